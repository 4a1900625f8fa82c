import json

import numpy as np
import pytest
from tests.cli.conftest import furnished, workshop  # noqa: F401
from tests.workshop import write_rows

from vestige.cli import main
from vestige.errors import PieceFailed, SpecError
from vestige.runs import Scores
from vestige_recipes.untrac_reproduction.scaling import scaling_experiment

GIVEN = {"data": "train.jsonl", "queries": "tests.jsonl", "learning_rate": 1e-3}


@pytest.fixture
def sizes(workshop):  # noqa: F811
    rows = [{"prompt": "Why is the sea blue?", "completion": "Water scatters light.", "source": "sky"}]
    write_rows(workshop / "tests.jsonl", rows)
    return workshop


@pytest.mark.slow
def test_a_model_that_fails_is_reported_and_the_others_go_on(sizes, capsys):
    models = ["--model", "tiny-model", "--model", "nowhere/", "--model", str(sizes / "tiny-model")]
    words = ["--data", "train.jsonl", "--queries", "tests.jsonl", "--learning-rate", "1e-3", "--out", "sizes"]
    main(["evaluate", "scaling", *models, *words])
    assert "nowhere/ failed: " in capsys.readouterr().out
    found = json.loads((sizes / "sizes" / "scaling.json").read_text())
    assert found["summary"]["total_models_tested"] == 3
    assert found["summary"]["successful_models"] == 2
    assert set(found["summary"]["comparison"][0]) == {
        *("model", "parameters", "runtime_seconds", "memory_gb", "avg_influence_score")
    }
    assert not found["models"]["nowhere/"]["success"]
    assert "nowhere" in found["models"]["nowhere/"]["error"]
    own = found["models"]["tiny-model"]
    assert own["success"]
    assert own["runtime_seconds"] > 0
    assert 0 < own["memory_gb"] < 16
    assert own["agreement"] == pytest.approx(1.0)
    assert own["avg_influence_score"] == pytest.approx(float(np.mean(Scores.open(sizes / "sizes" / "run-0").dense())))
    assert (sizes / "sizes" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert (sizes / "sizes" / "scaling.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_nothing_to_compare_is_refused(sizes):
    with pytest.raises(PieceFailed, match=r"Every model failed. nowhere/: .*nowhere"):
        scaling_experiment(model=["nowhere/", "nowhere-either/"], out="sizes", **GIVEN)
    assert not (sizes / "sizes" / "scaling.json").exists()
    with pytest.raises(SpecError, match="two or more models"):
        scaling_experiment(model=["tiny-model"], out="other", **GIVEN)
