import contextlib

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tests.architectures import CAUSAL, build
from vestige import methods
from vestige.data import Example
from vestige.errors import NonFinite
from vestige.gradients import Knowledge
from vestige.methods import Bm25, Random, RepSim
from vestige.models import Component, CoverageRow, Selection, Use
from vestige.runs import RankedScore

from .conftest import all_scores, model_job, text_job


def tops(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(row) for row in rows]


def test_proponents_are_in_rank_order_whatever_the_order_given():
    ranked = [
        RankedScore(1, "proponent", 1, 7, 2.0, 99.0),
        RankedScore(0, "proponent", 2, 3, 1.0, 90.0),
        RankedScore(0, "proponent", 1, 5, 2.0, 99.0),
        RankedScore(0, "opponent", 1, 9, -2.0, 0.0),
        RankedScore(0, "proponent", 3, 1, 0.5, 80.0),
    ]
    assert [top.tolist() for top in methods.find_proponents(ranked, 2, k=2)] == [[5, 3], [7]]


def test_overlap_of_queries():
    check = methods.check_overlap(tops([0, 1], [1, 2], [3, 4]), examples=100)
    assert check.value == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert check.verdict == "good"
    assert methods.check_overlap(tops([0, 1], [1, 0]), examples=100).verdict == "warn"
    assert methods.check_overlap(tops([0, 1], [1, 0]), examples=3).verdict == "unknown"
    alone = methods.check_overlap(tops([0, 1]), examples=100)
    assert (alone.value, alone.verdict) == (None, "unknown")


def test_hub_rate():
    ids = [f"e{row}" for row in range(100)]
    check = methods.check_hubs(tops([0, 1], [2, 1], [1, 4], [5, 6]), 100, ids)
    assert (check.value, check.verdict) == (0.75, "warn")
    assert "e1" in check.reading
    assert methods.check_hubs(tops([0], [1], [2], [3]), 100, ids).verdict == "good"
    assert methods.check_hubs(tops([0], [0]), 100, ids).verdict == "unknown"
    assert methods.check_hubs(tops(*[[0, 1]] * 4), 4, ids).verdict == "unknown"


def test_bm25_overlap():
    check = methods.check_bm25_overlap(tops([0, 1], [2, 3]), tops([1, 9], []))
    assert (check.value, check.verdict) == (0.25, "good")
    assert methods.check_bm25_overlap(tops([0, 1]), tops([1, 0])).verdict == "warn"
    assert methods.check_bm25_overlap(tops([0, 1]), tops([])).verdict == "unknown"


def test_lexical_tops_leave_out_what_shares_no_word():
    job = text_job(["sky", "grass", "sky sky sky"], ["sky", "moon"])
    assert [sorted(top.tolist()) for top in methods.find_lexical_tops(job)] == [[0, 2], []]
    assert [top.tolist() for top in methods.find_lexical_tops(text_job(["", "?"], ["sky"]))] == [[]]


def selection(selected: int, skipped: int, name: str = "w") -> Selection:
    component = Component(name, (selected, 1), (Use("m", "linear", "weight"),))
    rows = (CoverageRow(name, selected, True, ""), CoverageRow("rest", skipped, False, "not asked for"))
    return Selection((component,), rows)


def test_coverage():
    assert methods.check_coverage(selection(60, 40)).verdict == "good"
    little = methods.check_coverage(selection(1, 999))
    assert (little.value, little.verdict) == (0.001, "unknown")
    assert "0.10%" in little.reading
    assert methods.check_coverage(selection(1, 999, "layer.lora_A.weight")).verdict == "good"
    assert methods.check_coverage(None).value is None


def test_finite_numbers():
    assert methods.check_finite(10, [1.0, 2.0]).verdict == "good"
    assert methods.check_finite(10, None).verdict == "good"
    broken = methods.check_finite(10, [1.0, float("nan")])
    assert (broken.value, broken.verdict) == (1.0, "warn")


def test_duplicates_count_copies_below_their_like():
    job = text_job(["same", "same", "other", "same"], ["q"])
    check = methods.check_duplicates(tops([0, 1, 2], [2, 3, 0]), job.train)
    assert check.value == pytest.approx(2 / 6)
    assert check.verdict == "warn"
    assert methods.check_duplicates(tops([0, 2]), job.train).verdict == "good"


def test_examples_without_text_are_copies_when_their_tokens_are():
    job = text_job(["", "", ""], ["q"])
    job.train.input_ids[:] = [np.array(ids, dtype=np.int32) for ids in ([5, 6], [5, 7], [5, 6])]
    assert methods.check_duplicates(tops([0, 1, 2]), job.train).value == pytest.approx(1 / 3)


def test_free_checks_are_complete_and_readable():
    job = model_job("llama")
    scores = all_scores(RepSim(), job)
    ranked = [
        RankedScore(query, "proponent", rank + 1, int(row), float(scores[query, row]), 0.0)
        for query in range(3)
        for rank, row in enumerate(scores[query].argsort(descending=True)[:4])
    ]
    checks = methods.run_free_checks(job, RepSim(), ranked, losses=[1.0, 2.0, 3.0], k=4)
    assert len({check.name for check in checks}) == len(checks) == 7
    assert all(check.reading.endswith(".") for check in checks)
    assert {check.name: check.value for check in checks}["coverage"] is None
    own = {check.name: check for check in methods.run_free_checks(job, Bm25(), ranked)}
    assert own["BM25 overlap"].verdict == "unknown"


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_randomised_weights_come_back_bit_for_bit(architecture, dtype):
    model = build(architecture, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        with methods.randomise(model, seed=0):
            assert not torch.equal(model(input_ids=tokens).logits, logits)
            for name, value in model.named_parameters():
                if value.numel() > 200:
                    assert not torch.equal(value, before[name])
                    assert value.float().std().item() == pytest.approx(before[name].float().std().item(), rel=0.2)
        assert torch.equal(model(input_ids=tokens).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_come_back_after_an_error_and_the_noise_follows_the_seed():
    model = build("gpt2", torch.float32)
    before = [value.clone() for value in model.parameters()]
    seen = []
    for seed in (0, 0, 1):
        with contextlib.suppress(RuntimeError), methods.randomise(model, seed):
            seen.append([value.detach().clone() for value in model.parameters()])
            raise RuntimeError
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(seen[0], seen[1], strict=True))
    assert not torch.equal(seen[0][0], seen[2][0])


def test_a_constant_weight_stays_constant():
    norm = torch.nn.LayerNorm(8)
    with methods.randomise(norm, 0):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


LEARNED, NOTHING = Knowledge(2.0, 6.0, 4.0), Knowledge(6.1, 6.0, 4.0)


def test_correlation_is_the_mean_spearman_and_a_model_without_knowledge_is_never_good():
    weights, seen = torch.nn.Linear(500, 1), []

    def score(*, randomised=False):
        seen.append(randomised)
        return weights.weight.detach()[0].repeat(3, 1).clone()

    check = methods.check_randomised(weights, score, 500, knowledge=LEARNED)
    assert seen == [False, True]
    with methods.randomise(weights, 0):
        noise = weights.weight.detach()[0].clone()
    expected = spearmanr(weights.weight.detach()[0], noise).statistic
    assert check.value == pytest.approx(expected, abs=1e-9)
    assert check.verdict == "good"
    blind = methods.check_randomised(weights, score, 500, knowledge=NOTHING)
    assert (blind.verdict, blind.value) == ("warn", check.value)
    assert "learned nothing" in blind.reading


def test_scores_that_ignore_the_weights_are_found_out():
    by_length = torch.arange(40.0).repeat(2, 1)
    check = methods.check_randomised(torch.nn.Linear(3, 3), lambda **_: by_length, 40, knowledge=LEARNED)
    assert check.value == pytest.approx(1.0)
    assert check.verdict == "warn"


def test_what_cannot_be_correlated_is_unknown():
    model = torch.nn.Linear(3, 3)
    constant = methods.check_randomised(model, lambda **_: torch.ones(2, 40), 40)
    assert (constant.value, constant.verdict) == (None, "unknown")

    def overflows(*, randomised=False):
        if randomised:
            raise NonFinite("the noise overflowed")
        return torch.rand(2, 40)

    assert methods.check_randomised(model, overflows, 40).value is None
    assert methods.check_randomised(model, overflows, 5).verdict == "unknown"


def test_queries_that_the_model_is_certain_of_are_named():
    job = text_job(["a b c"], ["x y", "y z", "z"])
    job.queries.targets[:] = [np.array([False, *[True] * 9])] * 3
    check = methods.check_memorized(job.queries, [0.2, 0.9, 30.0], "sum")
    assert (check.value, check.verdict) == (pytest.approx(1 / 3), "warn")
    assert job.queries.examples[0].id in check.reading
    assert methods.check_memorized(job.queries, [0.02, 0.1, 3.0], "mean").value == pytest.approx(1 / 3)
    assert methods.check_memorized(job.queries, [0.9, 0.9, 30.0], "sum").verdict == "good"
    assert methods.check_memorized(job.queries, None, "sum").verdict == "unknown"


def test_random_scores_need_no_example_text():
    job = text_job(["x"] * 3, ["y"])
    job.train.examples[0] = Example("t0", 0)
    assert all_scores(Random(), job).shape == (1, 3)
