"""An example without a finite loss, and no index: named and fatal, or left out as an index leaves it out."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vestige
from tests.workshop import PAIRS, furnish, write_rows
from vestige.errors import NonFinite, SpecError
from vestige.methods import ExactGradients

BAD = (3, 7)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that knows no number for one letter, and data in which two examples have that letter."""
    folder = furnish(tmp_path_factory.mktemp("skip-bad"))
    rows = [
        {"id": f"e{number}", "prompt": prompt, "completion": completion, "source": source}
        for number, (prompt, completion, source) in enumerate(PAIRS)
    ]
    write_rows(folder / "good.jsonl", [row for number, row in enumerate(rows) if number not in BAD])
    for number in BAD:
        rows[number]["prompt"] += " Ω"
    write_rows(folder / "all.jsonl", rows)
    write_rows(folder / "asked.jsonl", [{"prompt": "Who wrote Emma?", "completion": "Jane."}])
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny-model")
    letter = AutoTokenizer.from_pretrained(folder / "tiny-model")("Ω")["input_ids"]
    model.get_input_embeddings().weight.data[letter[-1]] = float("nan")
    model.save_pretrained(folder / "tiny-model")
    return folder


def ask(place, data, method, **given):
    out = place / f"{data}-{method}-{'-'.join(given)}"
    model = place / "tiny-model"
    source = {"checkpoints": [model], "checkpoint_weights": [0.5]} if method == "tracin" else {"model": model}
    return vestige.attribute(
        **source,
        data=place / f"{data}.jsonl",
        queries=str(place / "asked.jsonl"),
        out=out,
        method=method,
        token_budget=60,
        trust=False,
        **given,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grad-dot", "influence", "ekfac", "tracin", "rep-sim"])
def test_left_out_the_others_score_as_without_them(place, method):
    with_bad, without = ask(place, "all", method, skip_bad=True), ask(place, "good", method)
    # Influence reads an index in float16, where other batches may round the last bit of a number otherwise.
    closeness = 2**-10 if method == "influence" else 1e-4
    assert with_bad.run.left_out == ["e3", "e7"]
    for one, other in zip(with_bad.top(0, 100), without.top(0, 100), strict=True):
        assert one.example_id == other.example_id
        assert one.score == pytest.approx(other.score, rel=closeness, abs=1e-6)
    assert next(iter(with_bad.run.distribution.values())).count == len(PAIRS) - 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grad-dot", "influence", "ekfac", "tracin"])
def test_fatal_by_default_it_is_named_in_the_words_of_an_index(place, method):
    with pytest.raises(
        NonFinite, match=r'The loss of \d examples? is NaN or infinite: "e[37]" \(row [37]\).*skip_bad=True'
    ):
        ask(place, "all", method)


@pytest.mark.slow
def test_self_influence_and_dense_scores_leave_them_out(place):
    run = ask(place, "all", "grad-dot", skip_bad=True, self_influence=True, dense=True)
    assert {row.example_id for row in run.self_influence()}.isdisjoint({"e3", "e7"})
    assert np.flatnonzero(np.isnan(run.dense()[0])).tolist() == list(BAD)


@pytest.mark.slow
def test_in_pieces_too(place, monkeypatch):
    monkeypatch.setattr(ExactGradients, "piece_tokens", (100, 100))
    whole = ask(place, "all", "grad-dot", skip_bad=True, dense=True)
    assert whole.run.left_out == ["e3", "e7"]
    monkeypatch.undo()
    again = ask(place, "all", "grad-dot", skip_bad=True, dense=True, seed=0)
    assert torch.allclose(torch.tensor(whole.dense()), torch.tensor(again.dense()), equal_nan=True)


def test_an_index_has_decided_already(tmp_path):
    with pytest.raises(SpecError, match="vestige index --skip-bad"):
        vestige.attribute(index=tmp_path, queries=["Why?"], out=tmp_path / "run", skip_bad=True)
