"""Data that does not fit into memory gives the index and the run of data that does, from one tokenisation."""

import pytest

import vestige
from tests.indexes.synthetic import hashes
from tests.workshop import PAIRS, furnish, write_rows
from vestige.data import Encoder, StoredExamples, tokenize_source
from vestige.indexes import TOKENS, Index

TABLES = ("scores", "examples", "queries", "self_influence")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = furnish(tmp_path_factory.mktemp("large"))
    rows = [
        {"id": f"{turn}-{number}", "prompt": prompt, "completion": completion, "source": source}
        for turn in range(3)
        for number, (prompt, completion, source) in enumerate(PAIRS)
    ]
    rows += [{"input_ids": [5, 6, 7, 8 + row], "source": "tokens"} for row in range(4)]
    write_rows(folder / "train.jsonl", rows)
    return folder


@pytest.fixture
def as_large(monkeypatch):
    monkeypatch.setitem(tokenize_source.__kwdefaults__, "held_bytes", 0)
    monkeypatch.setitem(tokenize_source.__kwdefaults__, "part_rows", 8)


def index(place, out, **settings):
    made_of = {"model": str(place / "tiny-model"), "data": str(place / "train.jsonl"), "compress": "gauss:16"}
    return vestige.index(out=place / out, **made_of, **settings)


def ask(place, out, **settings):
    question = {"queries": ["Who wrote Emma?"], "max_new_tokens": 4, "self_influence": True, "k": 5}
    return vestige.attribute(out=place / out, **question, **settings)


def without_tokens(folder):
    beside = (TOKENS, "curvature", "checks")
    return {name: digest for name, digest in hashes(folder).items() if not name.startswith(beside)}


def tables(folder):
    return {name: (folder / f"{name}.parquet").read_bytes() for name in TABLES}


@pytest.fixture(scope="module")
def small(place):
    index(place, "small")
    ask(place, "small-run", index=place / "small")
    return place


@pytest.mark.slow
def test_index_and_run_have_the_same_bytes(small, as_large, monkeypatch):
    made = index(small, "large")
    assert without_tokens(small / "large") == without_tokens(small / "small")
    assert len(list((small / "large" / TOKENS).iterdir())) == 1
    assert isinstance(made.examples(), StoredExamples)

    def never(*_):
        raise AssertionError("tokenised a second time")

    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, examples: encode(self, examples) if len(examples) < 3 else never()
    )
    ask(small, "large-run", index=small / "large")
    assert tables(small / "large-run") == tables(small / "small-run")
    # The same command again, over what is there.
    index(small, "large")


@pytest.mark.slow
def test_without_an_index_tokens_go_with_the_run(small, as_large):
    settings = {"model": str(small / "tiny-model"), "data": str(small / "train.jsonl"), "method": "grad-dot"}
    ask(small, "exact", **settings)
    assert not list(small.glob(".exact.partial*"))


@pytest.mark.slow
def test_overwriting_and_appending(small, as_large, monkeypatch):
    index(small, "changed", limit=20)
    index(small, "changed", limit=20, max_length=9, overwrite=True)
    assert Index.open(small / "changed").lengths().max() == 9
    index(small, "grown", limit=20)
    assert Index.open(index(small, "grown", append=True).folder).rows == 40
    assert len(list((small / "grown" / TOKENS).iterdir())) == 1
    monkeypatch.undo()
    index(small, "grown-small", limit=20)
    index(small, "grown-small", append=True)
    assert without_tokens(small / "grown") == without_tokens(small / "grown-small")
