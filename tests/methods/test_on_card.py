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
def test_products_are_taken_on_the_card(place, tmp_path, name, more, files):
    index, found = Index.open(place / "idx"), []
    for where in ("card", "cpu"):
        for kept in (index.folder / "curvature").glob("fisher-*"):
            kept.unlink()
        model, tokenizer = read(place)
        settings = {"index": index.folder, "tokenizer": tokenizer, "method": name, "dense": True, **ASKED, **more}
        if where == "cpu":
            found.append(scores_of(vestige.attribute(model=model, out=tmp_path / where, **settings)))
            continue
        with PretendedCard() as card:
            there = vestige.attribute(model=card.place(model), out=tmp_path / where, **settings)
        for file in files:
            assert card.total("launch", file) > 0, card.table("launch")
        found.append(scores_of(there))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6 * np.abs(found[1]).max())


@pytest.mark.slow
def test_an_index_on_a_card_keeps_the_budget_that_it_was_begun_with(place, tmp_path, monkeypatch):
    """What is free when it is resumed changes no batch."""
    model, tokenizer = read(place)
    free = {"now": 2**36}
    with PretendedCard() as card:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free["now"], 2**36))
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
        monkeypatch.undo()


@pytest.mark.slow
def test_the_doctor_prints_budget_and_peak(place):
    model, tokenizer = read(place)
    with PretendedCard() as card:
        report = vestige.doctor(model=card.place(model), tokenizer=tokenizer, data=place / "train.jsonl")
    check = report["batches"]
    assert check.verdict == "good"
    assert "65,536 tokens at once, about" in check.value
    assert "free of 69 GB on the GPU" in check.value
