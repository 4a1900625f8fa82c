import numpy as np
import pytest

from tests.reference.similarity import bm25
from vestige.data import Example, Message
from vestige.errors import DataError
from vestige.methods import Bm25, example_words

from .conftest import all_scores, text_job

DOCUMENTS = [
    "The sky is blue because of scattering.",
    "Grass is green, grass is grass.",
    "",
    "Why is the SKY dark at night?",
    "the sky is blue because of scattering",
    "Straße und Öl",
]
QUERIES = ["Why is the sky blue? why!", "grass öl STRASSE", "nothing whatsoever matches"]


def test_scores_are_those_of_the_formula():
    scores = all_scores(Bm25(), text_job(DOCUMENTS, QUERIES[:1])).numpy()
    assert scores[0] == pytest.approx(bm25(QUERIES[0], DOCUMENTS), rel=1e-5, abs=1e-7)
    # Equal words, equal score; no word in common, zero.
    assert scores[0, 0] == scores[0, 4] > 0
    assert scores[0, 2] == scores[0, 5] == 0


def test_case_is_folded_beyond_ascii_and_unknown_words_score_zero():
    scores = all_scores(Bm25(), text_job(DOCUMENTS, QUERIES))
    assert scores[1].argmax() in (1, 5)
    assert scores[1, 5] > 0
    assert (scores[2] == 0).all()


def test_block_size_and_order_change_nothing(monkeypatch):
    plain = all_scores(Bm25(), text_job(DOCUMENTS, QUERIES))
    order = np.random.default_rng(0).permutation(len(DOCUMENTS))
    turned = all_scores(Bm25(), text_job([DOCUMENTS[row] for row in order], QUERIES))
    assert (turned - plain[:, order]).abs().max() < 1e-6
    monkeypatch.setattr(Bm25, "block_scores", 6)
    assert len(list(Bm25().blocks(text_job(DOCUMENTS, QUERIES)))) == 3
    assert (all_scores(Bm25(), text_job(DOCUMENTS, QUERIES)) == plain).all()


def test_words_come_from_prompt_and_answer_and_turns_but_not_from_roles():
    assert example_words(Example("a", 0, prompt="Why?", completion="It is.")) == ["why", "it", "is"]
    turns = (Message("user", "Why?"), Message("assistant", "It is."))
    assert example_words(Example("a", 0, messages=turns)) == ["why", "it", "is"]


def test_data_without_words_is_refused():
    with pytest.raises(DataError, match="no training example has any"):
        list(Bm25().blocks(text_job(["", "?!"], ["why"])))
