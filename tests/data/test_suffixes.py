"""The suffix array finds exactly what a search through every place of every row finds."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from tests.workshop import furnish
from vestige.data import SuffixArray, TokenSearch, space_twins

OFFSETS = [0, 254, 65_533]
"""The least token: on either side of one byte, of two, and of the largest that two bytes hold."""


def places_of(rows, forms):
    """Every place of every row in turn."""
    return sorted(
        (number, at)
        for number, row in enumerate(rows)
        for at in range(len(row))
        if any(form and row[at : at + len(form)] == form for form in forms)
    )


def forms_of(text, start, stop, twins):
    forms = [text[start:stop]]
    if text[start] in twins:
        forms.append([twins[text[start]], *text[start + 1 : stop]])
    return forms


def search_naively(rows, text, least, twins):
    """Every run of the text in every place of every row; the longest ones alone."""
    runs = [(start, stop) for start in range(len(text)) for stop in range(start + 1, len(text) + 1)]
    standing = {run for run in runs if places_of(rows, forms_of(text, *run, twins))}
    longest = [
        run
        for run in standing
        if run[1] - run[0] >= least
        and not any(other != run and other[0] <= run[0] and other[1] >= run[1] for other in standing)
    ]
    found = {}
    for start, stop in longest:
        places = places_of(rows, forms_of(text, start, stop, twins))
        first = dict(reversed(places))
        rarity = sum(
            math.log(sum(map(len, rows)) / len(places_of(rows, forms_of(text, at, at + 1, twins))))
            for at in range(start, stop)
        )
        listed = tuple((row, first[row]) for row in sorted(first)[:5])
        found[start, stop] = (len(places), len(first), listed, pytest.approx(rarity))
    return found


def search(rows, text, least, twins, borders, largest):
    cuts = [0, *sorted(borders), len(rows)]
    parts = [rows[begin:end] for begin, end in pairwise(cuts)]
    arrays = [SuffixArray.build([np.array(row, np.int32) for row in part], largest) for part in parts]
    return TokenSearch(arrays).find(text, least, twins)


@settings(max_examples=150, deadline=None)
@given(strategies.data())
def test_every_maximal_span_every_occurrence_and_every_row_is_found(data):
    offset = data.draw(strategies.sampled_from(OFFSETS))
    token = strategies.integers(offset, offset + 3)
    rows = data.draw(strategies.lists(strategies.lists(token, max_size=9), max_size=8))
    rows += data.draw(strategies.lists(strategies.sampled_from(rows), max_size=3)) if rows else []
    text = data.draw(strategies.lists(token, min_size=1, max_size=9))
    twins = data.draw(
        strategies.dictionaries(token, token, max_size=2).filter(lambda one: all(a != b for a, b in one.items()))
    )
    least = data.draw(strategies.integers(1, 4))
    borders = data.draw(strategies.lists(strategies.integers(0, len(rows)), max_size=2))
    largest = data.draw(strategies.sampled_from([offset + 3, 200_000]))
    found = search(rows, text, least, twins, borders, largest)
    got = {(span.start, span.stop): (span.occurrences, span.rows, span.places, span.rarity) for span in found}
    assert got == search_naively(rows, text, least, twins)
    assert [span.rarity for span in found] == sorted((span.rarity for span in found), reverse=True)


def test_no_span_crosses_the_end_of_a_row():
    found = search([[1, 2], [3, 4], [], [4, 1]], [1, 2, 3, 4, 1], 1, {}, [], 9)
    assert {(span.start, span.stop) for span in found} == {(0, 2), (2, 4), (3, 5)}
    assert search([[1, 2], [3]], [1, 2, 3], 3, {}, [], 9) == []
    assert search([[], []], [1], 1, {}, [], 9) == search([], [1], 1, {}, [], 9) == []


def test_a_match_begins_with_a_token_and_not_within_one():
    # As bytes the second row holds the first token's: 0x0101 stands within 0x0201, 0x0102.
    rows = [[0x0200, 0x0101]]
    assert search(rows, [0x0001], 1, {}, [], 60_000) == []
    assert [span.places for span in search(rows, [0x0101], 1, {}, [], 60_000)] == [((0, 1),)]


def test_a_word_at_the_beginning_of_a_text_has_the_twin_with_a_space(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(furnish(tmp_path) / "tiny-model")
    inside, alone = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" a", "a"))
    assert len(inside) == len(alone) == 1
    assert space_twins(tokenizer, [*inside, *alone]) == {inside[0]: alone[0], alone[0]: inside[0]}
    assert space_twins(tokenizer, [tokenizer.eos_token_id]) == {}
    assert space_twins(None, [1, 2]) == {}
