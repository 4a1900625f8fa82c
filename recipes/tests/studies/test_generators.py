import re

import numpy as np
import pytest

from vestige_recipes.format_traps.lessons import TEST, TRAINING, WORDS, format_trap, spell
from vestige_recipes.untrac_miniature.run import markov_corpora


def test_markov_corpora_have_the_sizes_of_the_pilot_and_an_unrelated_one():
    made = markov_corpora(3)
    assert len(made.train) == 8 * 320
    assert {len(row["input_ids"]) for row in made.train + made.tests} == {25}
    assert {token for row in made.train for token in row["input_ids"]} <= set(range(24))
    assert made.names == sorted({row["source"] for row in made.train})
    assert not made.mixing[made.names.index("unrelated")].any()
    assert bool((made.mixing[:-1].sum(1) > 0.25).all())


def test_a_seed_makes_the_same_corpora_and_another_one_others():
    assert markov_corpora(1, sequences=5).train == markov_corpora(1, sequences=5).train
    assert markov_corpora(1, sequences=5).train != markov_corpora(2, sequences=5).train


def test_a_corpus_is_like_the_chains_that_it_mixes():
    """The share of a chain's likely transitions grows with its weight in the corpus."""
    made = markov_corpora(0)
    likely = np.zeros((4, 24, 24))
    for row in made.tests:
        for one, two in zip(row["input_ids"], row["input_ids"][1:], strict=False):
            likely[int(row["source"][-1]), one, two] += 1
    likely /= np.maximum(likely.sum(-1, keepdims=True), 1)
    found = np.zeros((len(made.names), 4))
    for row in made.train:
        steps = np.array(row["input_ids"])
        found[made.names.index(row["source"])] += likely[:, steps[:-1], steps[1:]].mean(1)
    for chain in range(4):
        assert np.corrcoef(found[:, chain], made.mixing[:, chain])[0, 1] > 0.9


def test_numbers_are_spelled():
    words = {0: "zero", 13: "thirteen", 20: "twenty", 42: "forty-two", 510: "five hundred ten", 300: "three hundred"}
    assert {number: spell(number) for number in words} == words
    assert len({spell(number) for number in range(1000)}) == 1000


@pytest.mark.parametrize("which", ["A", "B"])
def test_a_format_trap_has_five_sets_of_256(which):
    made = format_trap(which, 0)
    assert sorted(made) == sorted([*TRAINING, TEST])
    assert {len(rows) for rows in made.values()} == {256}
    assert made == format_trap(which, 0)
    assert all(row["source"] == name for name, rows in made.items() for row in rows)


@pytest.mark.parametrize(("which", "pattern"), [("A", r"\d+"), ("B", "[a-z]")])
def test_same_sets_answer_in_the_format_of_the_test_and_the_others_do_not(which, pattern):
    made = format_trap(which, 1)
    for name, rows in made.items():
        fits = all(re.fullmatch(pattern, row["completion"]) for row in rows)
        assert fits == (name in (TEST, "SimSame", "DisSame")), name


def test_answers_are_right():
    made = format_trap("A", 2)
    assert made[TEST][0]["prompt"] == "What is the number that comes after 512?\n"
    assert made[TEST][255]["completion"] == "768"
    assert made["SimSame"][255]["prompt"] == "What is the number that comes after five hundred ten?\n"
    assert made["SimDiff"][0]["completion"] == "two"
    for row in made["DisSame"]:
        assert int(row["completion"]) == len(row["prompt"].split('"')[1])
    for row in format_trap("B", 2)[TEST]:
        _, taken, _, string, _ = row["prompt"].split('"')
        assert string.replace(taken, "") == row["completion"]


def test_every_word_has_one_part_of_speech():
    words = [word for some in WORDS.values() for word in some]
    assert len(words) == len(set(words))
