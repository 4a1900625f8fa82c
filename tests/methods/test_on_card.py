"""With a card, stored gradients are multiplied there, block by block, and give the scores of the CPU."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vestige
from tests.pretend_gpu import PretendedCard
from tests.workshop import furnish
from vestige.indexes import Index

ASKED = {"queries": [{"prompt": "Who wrote Emma?", "completion": "Jane."}, {"text": "Bees."}], "trust": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = furnish(tmp_path_factory.mktemp("card"))
    model, tokenizer = read(folder)
    vestige.index(model=model, tokenizer=tokenizer, data=folder / "train.jsonl", out=folder / "idx")
    return folder


def read(folder):
    path = folder / "tiny-model"
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@pytest.fixture
def card():
    with PretendedCard() as card:
        yield card


def scores_of(run) -> np.ndarray:
    return np.stack([run.dense_of(query) for query in range(2)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more", "files"),
    [
        ("grad-dot", {}, ("indexes/_store.py",)),
        ("influence", {}, ("indexes/_store.py", "curvature/_fisher.py")),
        ("influence", {"options": {"relative": "loss"}, "self_influence": True}, ("curvature/_fisher.py",)),
    ],
)
def test_products_are_taken_on_the_card(place, card, tmp_path, name, more, files):
    model, tokenizer = read(place)
    index = Index.open(place / "idx")
    for kept in (index.folder / "curvature").glob("fisher-*"):
        kept.unlink()
    settings = {"index": index.folder, "tokenizer": tokenizer, "method": name, "dense": True, **ASKED, **more}
    card.reset()
    there = vestige.attribute(model=card.place(model), out=tmp_path / "card", **settings)
    for file in files:
        assert card.total("launch", file) > 0, card.table("launch")
    on_card = scores_of(there)
    model, _ = read(place)
    for kept in (index.folder / "curvature").glob("fisher-*"):
        kept.unlink()
    here = vestige.attribute(model=model, out=tmp_path / "cpu", device="cpu", **settings)
    np.testing.assert_allclose(on_card, scores_of(here), rtol=1e-4, atol=1e-6 * np.abs(on_card).max())


@pytest.mark.slow
def test_an_index_on_a_card_keeps_the_budget_that_it_was_begun_with(place, card, tmp_path, monkeypatch):
    """What is free when it is resumed changes no batch."""
    free = {"now": 2**36}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free["now"], 2**36))
    model, tokenizer = read(place)
    settings = {"model": card.place(model), "tokenizer": tokenizer, "data": place / "train.jsonl"}
    settings |= {"out": tmp_path / "i"}
    begun = vestige.index(**settings)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert begun.manifest.token_budget > 1024
    free["now"] = 2 * weights + 2**32
    smaller = vestige.index(**(settings | {"out": tmp_path / "other"}))
    assert smaller.manifest.token_budget < begun.manifest.token_budget
    (tmp_path / "i" / "shards" / "00000.json").unlink()
    resumed = vestige.index(**settings)
    assert resumed.manifest == begun.manifest
    typed = vestige.index(**(settings | {"out": tmp_path / "typed", "token_budget": 300}))
    assert typed.manifest.token_budget == 300


@pytest.mark.slow
def test_the_doctor_prints_budget_and_peak(place, card):
    model, tokenizer = read(place)
    report = vestige.doctor(model=card.place(model), tokenizer=tokenizer, data=place / "train.jsonl")
    check = report["batches"]
    assert check.verdict == "good"
    assert "65,536 tokens at once, about" in check.value
    assert "free of 69 GB on the GPU" in check.value
