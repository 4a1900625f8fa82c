"""The names of the UnTrac reproduction, with its defaults, and its experiment with its file."""

import importlib.util
import json

import numpy as np
import pytest
from tests.cli.conftest import furnished, workshop  # noqa: F401
from tests.workshop import PAIRS, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from vestige.errors import DataError
from vestige_recipes.untrac_reproduction import (
    MemoryEfficientUnTracEstimator,
    ToxicityAttributionExperiment,
    TracInBaseline,
    UnTracConfig,
    UnTracInfluenceEstimator,
)

TEXTS = [f"{prompt} {answer}" for prompt, answer, _ in PAIRS]


@pytest.mark.slow
def test_their_names_and_defaults_give_ranked_texts(workshop, capsys):  # noqa: F811
    config = UnTracConfig(model_name="tiny-model", max_train_samples=10)
    assert (config.unlearning_rate, config.unlearning_steps, config.batch_size) == (5e-5, 1, 1)
    config.gradient_checkpointing = False
    estimator = UnTracInfluenceEstimator(config)
    scores = estimator.compute_influence_scores(TEXTS[4], TEXTS, show_progress=True)
    assert "The first 10 of 12 texts are used (max_train_samples=10)." in capsys.readouterr().err
    assert (len(scores), int(np.argmax(scores))) == (10, 4)
    top = estimator.get_top_k_influences(TEXTS[4], TEXTS[:10], k=3)
    assert top[0] == (4, scores[4], TEXTS[4])
    assert [score for _, score, _ in top] == sorted(scores.tolist(), reverse=True)[:3]
    capsys.readouterr()
    estimator.compute_influence_scores(TEXTS[4], TEXTS[:10], show_progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_one_small_step_ranks_as_inner_products_of_gradients_do_and_in_their_direction(workshop):  # noqa: F811
    """The published code descends on the test text, and its scores were the negative of these (r = -0.92 there)."""
    model = AutoModelForCausalLM.from_pretrained("tiny-model")
    baseline = TracInBaseline(model, AutoTokenizer.from_pretrained("tiny-model"), "cpu")
    products = baseline.compute_influence_scores(TEXTS[4], TEXTS)
    scores = UnTracInfluenceEstimator(UnTracConfig(model_name="tiny-model")).compute_influence_scores(TEXTS[4], TEXTS)
    assert np.corrcoef(products, scores)[0, 1] > 0.99


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs vestige[quantize]")
def test_a_packed_model_moves_matrices_of_its_own(workshop, capsys):  # noqa: F811
    config = UnTracConfig(model_name="tiny-model", unlearning_rate=1e-2)
    estimator = MemoryEfficientUnTracEstimator(config, use_quantization=True, quant_bits=4)
    scores = estimator.compute_influence_scores_batched(TEXTS[4], TEXTS, batch_size=8)
    assert "batch_size=8 is not used" in capsys.readouterr().err
    assert int(np.argmax(scores)) == 4


@pytest.mark.slow
def test_the_toxicity_experiment_writes_the_published_file(workshop):  # noqa: F811
    write_rows(workshop / "web.jsonl", [{"text": "too short"}, *({"text": f"{text} " * 3} for text in TEXTS)])
    write_rows(
        workshop / "prompts.jsonl", [{"prompt": {"text": "Why is the sky", "toxicity": 0.1}}, {"prompt": "Bees"}]
    )
    config = UnTracConfig(model_name="tiny-model", max_train_samples=12, max_test_samples=2)
    given = {"texts": str(workshop / "web.jsonl"), "prompts": str(workshop / "prompts.jsonl")}
    ToxicityAttributionExperiment(config, **given, out=workshop / "results").run_experiment()
    found = json.loads((workshop / "results" / "untrac_toxicity_results.json").read_text())
    assert [case["test_case_id"] for case in found["test_cases"]] == [0, 1]
    case = found["test_cases"][0]
    assert set(case) == {"test_case_id", "prompt", "completion", "top_influences"}
    assert case["prompt"] == "Why is the sky"
    assert len(case["top_influences"]) == 10
    assert set(case["top_influences"][0]) == {"rank", "index", "score", "text"}
    scores = [one["score"] for one in case["top_influences"]]
    assert scores == sorted(scores, reverse=True)
    write_rows(workshop / "web.jsonl", [{"text": "too short"}])
    with pytest.raises(DataError, match="more than 50 characters"):
        ToxicityAttributionExperiment(config, **given, out=workshop / "results").run_experiment()
