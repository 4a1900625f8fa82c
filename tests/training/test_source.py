"""SOURCE against unrolled trainings on quadratic losses, and against plain sums where no rate reaches far."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import vestige
from tests.reference.reweighted import example_loss
from tests.workshop import furnish, write_rows
from vestige.curvature import Block, Eigenbasis, KroneckerCurvature
from vestige.data import load_examples, tokenize
from vestige.errors import SpecError
from vestige.models import load_model
from vestige.training import Segment, TrainingRun, unroll

EXAMPLES, ROWS, COLUMNS = 5, 3, 4


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def test_on_a_quadratic_loss_it_is_the_exact_unrolled_difference():
    """`l_i = 1/2 (x - c_i)^T C (x - c_i)`, another C in each segment; from the common optimum all gradients stay."""
    torch.manual_seed(0)
    size, scale = ROWS * COLUMNS, 0.3
    centres = torch.randn(EXAMPLES, size, dtype=torch.float64)
    query = torch.randn(2, size, dtype=torch.float64)
    rates, steps, segments, matrices = [1e-5, 3e-5, 2e-5], [200_000, 100_000, 300_000], [], []
    for rate, count in zip(rates, steps, strict=True):
        left, right = rotation(ROWS), rotation(COLUMNS)
        values = torch.rand(ROWS, COLUMNS, dtype=torch.float64) * 4
        values[0, 0] = 0.0  # a direction that nothing bends
        block = Block("matrix", 0, None, (ROWS, COLUMNS))
        segments.append(Segment(KroneckerCurvature((block,), (Eigenbasis(left, right, values),)), scale, rate * count))
        both = torch.kron(left, right)
        matrices.append(both @ torch.diag(values.flatten()) @ both.T)
    vectors = unroll([query], segments)
    for row in range(EXAMPLES):
        gradients = [matrix @ (centres.mean(0) - centres[row]) for matrix in matrices]
        found = sum(some[0] @ gradient for some, gradient in zip(vectors, gradients, strict=True)) / EXAMPLES
        exact = query @ derivative(centres, row, rates, steps, matrices, scale)
        torch.testing.assert_close(found, -exact, rtol=1e-4, atol=1e-9)


def derivative(centres, row, rates, steps, matrices, scale) -> torch.Tensor:
    """Return how the last weights depend on the weight of an example: the recursion, step by step but for powers."""
    size, start = centres.shape[1], centres.mean(0)
    change = torch.zeros_like(start)
    for rate, count, matrix in zip(rates, steps, matrices, strict=True):
        # change <- (1 - h) change - rate * scale / n * C (start - c): an affine map, in one matrix more.
        affine = torch.eye(size + 1, dtype=torch.float64)
        affine[:size, :size] -= rate * scale * matrix
        affine[:size, size] = -rate * scale / len(centres) * (matrix @ (start - centres[row]))
        power = torch.linalg.matrix_power(affine, count)
        change = power[:size, :size] @ change + power[:size, size]
    return change


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in float64, and a training of it at a rate that bends nothing, of half of the examples."""
    folder = furnish(tmp_path_factory.mktemp("source"))
    loaded = load_model(str(folder / "tiny-model"), precision="float32")
    loaded.model.double().save_pretrained(folder / "double")
    loaded.tokenizer.save_pretrained(folder / "double")
    write_rows(folder / "queries.jsonl", [{"id": "sky", "prompt": "Why?", "completion": "Air scatters blue light."}])
    given = {"epochs": 6, "batch_size": 3, "learning_rate": 1e-9, "optimizer": "sgd", "momentum": 0.5, "clip": 0}
    given |= {"precision": "auto", "losses": False, "split_fraction": 0.5, "checkpoints": "1,2,..."}
    vestige.train(model=str(folder / "double"), data=str(folder / "train.jsonl"), out=folder / "trained", **given)
    return folder


def ask(folder, out, **more):
    given = {"training": folder / "trained", "queries": str(folder / "queries.jsonl"), "dense": True}
    return vestige.attribute(method="source", out=out, **{**given, **more})


@pytest.mark.slow
def test_where_no_rate_reaches_far_it_is_a_sum_of_products_over_the_segments(folder, tmp_path):
    scores = ask(folder, tmp_path / "run")
    run = TrainingRun.open(folder / "trained")
    table = run.steps.to_pandas()
    rates = table.groupby("step")["learning_rate"].first()
    member = dict(zip(*(run.membership[name].to_pylist() for name in ("example_id", "member")), strict=True))
    texts = tokenized(folder, "train.jsonl")
    targets = sum(sum(mask[1:]) for name, (_, mask) in texts.items() if member[name])
    models = {
        step: load_model(path, precision="auto").model.double().requires_grad_(True)
        for step, path in run.checkpoints.items()
    }
    (query,) = tokenized(folder, "queries.jsonl").values()
    slope = flat(example_loss(models[max(models)], *query), models[max(models)])
    last = max(models)
    for name in list(texts):
        expected = 0.0
        for begin in range(0, last, last // 3):
            inside = [step for step in models if begin < step <= begin + last // 3]
            reach = rates[(rates.index > begin) & (rates.index <= begin + last // 3)].sum() / (1 - 0.5)
            products = [flat(example_loss(models[step], *texts[name]), models[step]) @ slope for step in inside]
            expected += reach / targets * float(sum(products)) / len(inside) * member[name]
        found = scores.dense()[0, list(texts).index(name)]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-16)
    parts = scores.components("sky", scores.top("sky", 1)[0].example_id)
    assert sum(each.score for each in parts) == pytest.approx(scores.top("sky", 1)[0].score, rel=1e-4)


def flat(loss, model):
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, [*model.parameters()])])


def tokenized(folder, name):
    tokenizer = AutoTokenizer.from_pretrained(folder / "double")
    data = tokenize(load_examples(str(folder / name)), tokenizer, max_length=96, name=name)
    return {
        example.id: (np.asarray(ids).tolist(), np.asarray(mask).tolist())
        for example, ids, mask in zip(data.examples, data.input_ids, data.targets, strict=True)
    }


@pytest.mark.slow
def test_what_cannot_be_unrolled_is_refused(folder, tmp_path):
    with pytest.raises(SpecError, match=r"no checkpoint lies in \d+ of 9 segments"):
        ask(folder, tmp_path / "run", options={"segments": 9})
    with pytest.raises(SpecError, match="unrolls one training, and 2 were given"):
        ask(folder, tmp_path / "run", training=[folder / "trained"] * 2)
