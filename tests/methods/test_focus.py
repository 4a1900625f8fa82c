"""What queries choose to have explained, against float64 gradients of single texts by `torch.func`."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vestige
from tests.reference.gradients import example_gradients
from tests.workshop import PAIRS, furnish, write_rows
from vestige.cli import main
from vestige.errors import SpecError
from vestige.methods import METHODS

SKY, PARIS = "Why is the sky blue?", "What is the capital of France?"
AIR, ROME = " Air scatters blue light.", " The capital of France is Rome, I think."
QUERIES = [
    {"id": "plain", "prompt": SKY, "completion": AIR},
    {"id": "contrast", "prompt": PARIS, "completion": " The capital of France is Paris.", "instead": ROME},
    {"id": "span", "prompt": SKY, "completion": AIR, "span": "blue light"},
    {"id": "spans", "prompt": SKY, "completion": AIR, "span": [[1, 4], "light"], "weights": [2, -0.5]},
    {"id": "text", "text": "Bees make honey and wax.", "span": [5, 9]},
]
CHOICE = {"precision": "float64", "trust": False, "dense": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, its data, and queries of uneven lengths that choose in every way."""
    folder = furnish(tmp_path_factory.mktemp("focus"))
    write_rows(folder / "queries.jsonl", QUERIES)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "tiny-model").double()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "tiny-model")


def read(tokenizer, before, answer, ranges=None):
    """Ids of a text, and which of its tokens lie partly in a range of characters of its answer; not given: all."""
    found = tokenizer(before + answer, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    if ranges is None:
        return ids + [tokenizer.eos_token_id], [end > len(before) for _, end in offsets] + [True]
    ranges = [(len(before) + start, len(before) + stop) for start, stop in ranges]
    inside = [any(begin < stop and end > start for start, stop in ranges) for begin, end in offsets]
    return ids + [tokenizer.eos_token_id], inside + [False]


def gradient(model, ids, targets, mean=False):
    found = example_gradients(model, torch.tensor(ids), torch.tensor(targets), mean)
    return torch.cat([found[name].flatten() for name in sorted(found)])


def expected(folder, model, tokenizer, mean):
    """Gradients of the five queries and of all training rows."""

    def of(*text):
        return gradient(model, *read(tokenizer, *text), mean)

    one, other = read(tokenizer, SKY, AIR, [(1, 4)]), read(tokenizer, SKY, AIR, [(19, 24)])
    count = sum(one[1]) + sum(other[1]) if mean else 1
    queries = [
        of(SKY, AIR),
        of(PARIS, " The capital of France is Paris.") - of(PARIS, ROME),
        of(SKY, AIR, [(14, 24)]),
        (2 * gradient(model, *one) - 0.5 * gradient(model, *other)) / count,
        of("", "Bees make honey and wax.", [(5, 9)]),
    ]
    train = [of(question, answer) for question, answer, _ in PAIRS]
    return torch.stack(queries), torch.stack(train)


@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_scores_are_those_of_the_chosen_losses(folder, model, tokenizer, loss, tmp_path):
    queries, train = expected(folder, model, tokenizer, loss == "mean")
    run = vestige.attribute(
        model=folder / "tiny-model",
        data=folder / "train.jsonl",
        queries=str(folder / "queries.jsonl"),
        method="grad-dot",
        loss=loss,
        components="all",
        out=tmp_path / "run",
        **CHOICE,
    )
    wanted = (queries @ train.T).numpy()
    np.testing.assert_allclose(run.dense(), wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
