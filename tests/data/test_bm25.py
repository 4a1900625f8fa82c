"""Both forms of BM25 against their formulas, word by word, and in parts."""

import math
import tracemalloc
from collections import Counter

import bm25s
import numpy as np
import pytest

from vestige.data import Example, LexicalIndex, Message, prompt_of, words_of

WORDS = ["the", "the", "the", "of", "sun", "moon", "sea", "Sea"]


def drawn(seed, count, longest):
    generator = np.random.default_rng(seed)
    return [list(generator.choice(WORDS, size=generator.integers(0, longest))) for _ in range(count)]


def slow(query, documents, variant):
    n, mean = len(documents), sum(map(len, documents)) / len(documents)
    holding = Counter(word for document in documents for word in set(document))
    okapi = {word: math.log(n - df + 0.5) - math.log(df + 0.5) for word, df in holding.items()}
    floor = 0.25 * sum(okapi.values()) / len(okapi)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            f, df = document.count(word), holding[word]
            if not f:
                continue
            share = f / (f + 1.5 * (0.25 + 0.75 * len(document) / mean))
            if variant == "okapi":
                score += 2.5 * share * (okapi[word] if okapi[word] >= 0 else floor)
            else:
                score += share * math.log(1 + (n - df + 0.5) / (df + 0.5))
        scores.append(score)
    return scores


@pytest.mark.parametrize(("variant", "error"), [("lucene", 2e-6), ("okapi", 1e-12)])
def test_scores_are_those_of_the_formula(variant, error):
    documents, queries = [*drawn(0, 40, 12), []], [*drawn(1, 9, 7), ["unknown", "sun"]]
    found = LexicalIndex(queries, iter(documents), variant).scores()
    expected = np.array([slow(query, documents, variant) for query in queries]).T
    np.testing.assert_allclose(found, expected, rtol=error, atol=error)


@pytest.mark.parametrize("block_numbers", [7, 2**16])
def test_scores_are_those_of_bm25s(block_numbers):
    documents = [[str(word) for word in each] for each in drawn(3, 300, 30)]
    queries = [["sun"], ["the", "moon"], ["sea", "Sea", "of", "unknown"]]
    oracle = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    oracle.index(documents, show_progress=False)
    known = {word for document in documents for word in document}
    expected = [oracle.get_scores([word for word in query if word in known]) for query in queries]
    found = LexicalIndex(queries, documents, block_numbers=block_numbers).scores()
    np.testing.assert_allclose(found, np.array(expected).T, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["lucene", "okapi"])
def test_a_part_is_what_the_whole_has_there(variant):
    index = LexicalIndex(drawn(1, 9, 7), drawn(0, 40, 12), variant)
    part = index.scores(documents=slice(7, 20), queries=slice(2, 5))
    np.testing.assert_array_equal(part, index.scores()[7:20, 2:5])


@pytest.mark.parametrize("variant", ["lucene", "okapi"])
def test_blocks_of_any_size_score_alike(variant):
    documents, queries = drawn(0, 40, 12), drawn(1, 9, 7)
    whole = LexicalIndex(queries, documents, variant).scores()
    index = LexicalIndex(queries, documents, variant, block_numbers=20)
    np.testing.assert_array_equal(index.scores(), whole)
    for part in (slice(0, 7), slice(5, 23), slice(35, 99), slice(7, 7), slice(12, 13)):
        np.testing.assert_array_equal(index.scores(documents=part), whole[part])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_documents():
    def most(count):
        tracemalloc.start()
        index = LexicalIndex([["sun", "sea"]], (["sun", "sea", "of"] for _ in range(count)), block_numbers=2**12)
        for first in range(0, count, 2**10):
            index.scores(documents=slice(first, first + 2**10))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # In memory, 60,000 documents more would be 1.4 MB.
    assert most(80_000) - most(20_000) < 1e5


@pytest.mark.parametrize("variant", ["lucene", "okapi"])
def test_documents_are_read_once(variant):
    def documents():
        for number in range(200):
            yield ["sun", *(f"strange-{number}-{place}" for place in range(50))]

    index = LexicalIndex([["sun"], ["moon"]], documents(), variant)
    assert len(index) == 200
    assert (index.scores() > 0).sum(0).tolist() == [200, 0]


def test_without_words_there_is_nothing_to_compare():
    assert not LexicalIndex([["sun"]], [[], []], "okapi").has_words
    assert LexicalIndex([[]], [["sun"]]).scores().tolist() == [[0.0]]


def test_what_was_asked_is_the_first_turn_the_prompt_or_the_text():
    turns = (Message("system", "x"), Message("user", "sea"), Message("user", "moon"))
    assert prompt_of(Example("a", 0, messages=turns)) == "sea"
    assert prompt_of(Example("a", 0, prompt="why", completion="so")) == "why"
    assert prompt_of(Example("a", 0, text="all of it")) == "all of it"
    assert words_of("Why, Öl?") == ["why", "öl"]
