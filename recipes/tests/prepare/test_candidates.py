import math
from collections import Counter

import numpy as np
import pytest

from vestige.data import Example, Message
from vestige.errors import DataError
from vestige_recipes.prepare import find_candidates, okapi_scores

WEATHER = ["hello there good man!", "it is quite windy in london", "how is the weather today?"]


def rows(prompts, prefix="t", **extra):
    return [Example(id=f"{prefix}{row}", row=row, prompt=prompt, **extra) for row, prompt in enumerate(prompts)]


def slow_okapi(query, documents):
    """The formula, word by word."""
    n, mean = len(documents), sum(map(len, documents)) / len(documents)
    holding = Counter(word for document in documents for word in set(document))
    rarity = {word: math.log(n - df + 0.5) - math.log(df + 0.5) for word, df in holding.items()}
    floor = 0.25 * sum(rarity.values()) / len(rarity)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            f = document.count(word)
            if f:
                weight = rarity[word] if rarity[word] >= 0 else floor
                score += weight * f * 2.5 / (f + 1.5 * (0.25 + 0.75 * len(document) / mean))
        scores.append(score)
    return scores


def test_bm25_gives_the_published_scores_of_windy_london():
    (scores,) = okapi_scores([["windy", "london"]], [text.split() for text in WEATHER])
    assert scores == pytest.approx([0, 0.93729472, 0], abs=5e-9)


def test_bm25_is_the_formula_also_where_rarity_falls_below_zero():
    generator = np.random.default_rng(0)
    words = ["the", "the", "the", "of", "sun", "moon", "sea", "Sea"]
    documents = [list(generator.choice(words, size=generator.integers(1, 12))) for _ in range(40)]
    documents.append([])
    queries = [list(generator.choice([*words, "unknown"], size=6)) for _ in range(9)]
    found = list(okapi_scores(queries, documents))
    for scores, query in zip(found, queries, strict=True):
        assert scores == pytest.approx(slow_okapi(query, documents), abs=1e-12)


def test_scores_in_blocks_are_the_scores_at_once(monkeypatch):
    documents, queries = [text.split() for text in WEATHER], [["is"], ["london"], ["good", "man!"], []]
    expected = list(okapi_scores(queries, documents))
    monkeypatch.setattr("vestige_recipes.prepare.candidate_lists.BLOCK_SCORES", 4)
    np.testing.assert_array_equal(list(okapi_scores(queries, documents)), expected)


def test_the_original_keeps_its_rank_and_gets_no_place_that_it_has_not_earned():
    training = rows(["a b c", "a b d", "a x y", "q r s"])
    query = Example(id="p", row=0, prompt="a b c", extra={"original_id": "t3"})
    (found,) = find_candidates([query], training, k=2)
    assert [one.id for one in found.listed] == ["t0", "t1"]
    assert (found.original.id, found.original_rank, found.original.score, found.forced) == ("t3", 4, 0.0, False)
    (forced,) = find_candidates([query], training, k=2, force_original=True)
    assert [one.id for one in forced.listed] == ["t0", "t3"]
    assert (forced.forced, forced.original_rank) == (True, 4)


def test_an_original_that_is_listed_is_not_forced():
    (found,) = find_candidates(
        [Example(id="p", row=0, prompt="a b", extra={"original_id": "t0"})],
        rows(["a b", "c"]),
        k=1,
        force_original=True,
    )
    assert (found.original_rank, found.forced) == (1, False)


def test_ties_are_in_the_order_of_the_data_and_are_counted():
    training = rows(["same words", "other", "same words", "same words", "thing"])
    (found,) = find_candidates([Example(id="t2", row=0, prompt="same words")], training, k=2)
    assert [one.id for one in found.listed] == ["t0", "t2"]
    assert found.left_out_ties == 1
    assert (found.original.id, found.original_rank, found.original_ties) == ("t2", 2, 2)


def test_all_of_the_training_data_may_be_candidates():
    training = rows(WEATHER)
    (found,) = find_candidates([Example(id="q", row=0, prompt="windy london")], training, k=None)
    assert [one.row for one in found.listed] == [1, 0, 2]
    assert (found.left_out_ties, found.original, found.original_rank) == (0, None, None)
    (more,) = find_candidates([Example(id="q", row=0, prompt="windy london")], training, k=99)
    assert more == found


def test_prompts_are_compared_and_answers_are_not():
    spoken = Example(
        id="t0", row=0, messages=(Message("system", "x"), Message("user", "sea"), Message("assistant", "moon"))
    )
    written = Example(id="t1", row=1, prompt="moon", completion="sea")
    other = Example(id="t2", row=2, prompt="nothing of both")
    (found,) = find_candidates([Example(id="q", row=0, prompt="sea")], [spoken, written, other], k=1)
    assert found.listed[0].id == "t0"


def test_originals_may_be_named_and_must_be_there():
    training = rows(["a", "b"])
    query = Example(id="q", row=0, prompt="a", extra={"made_of": "t1", "wrong": "gone"})
    assert find_candidates([query], training, truth="made_of")[0].original_rank == 2
    with pytest.raises(DataError, match="'gone', which is not in the training data"):
        find_candidates([query], training, truth="wrong")


def test_what_cannot_be_compared_is_said():
    with pytest.raises(DataError, match="k=0"):
        find_candidates([], rows(["a"]), k=0)
    with pytest.raises(DataError, match="No training prompt has a word"):
        find_candidates(rows(["a"], "q"), rows(["", " "]))
