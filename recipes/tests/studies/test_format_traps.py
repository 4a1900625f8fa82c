import re

import numpy as np
import pytest

from vestige.data import NO_TARGET
from vestige_recipes import study
from vestige_recipes.format_traps.lessons import (
    END,
    LENGTH,
    NUMERALS,
    VOCABULARY,
    format_trap,
    lessons,
    question,
    tokenize_answer,
    tokens,
)
from vestige_recipes.format_traps.run import SOURCES, task_above_format


def test_words_are_tokens_and_figures_and_strings_are_spelled():
    assert len(tokens("What is the number")) == 4
    assert len(tokens("768")) == 3
    assert len(tokens('"aaab"')) == 6
    assert tokens("two hundred forty-one") == tokens("two  hundred forty - one")
    assert max(tokens(" ".join(row["prompt"] for rows in format_trap("B", 0).values() for row in rows))) < VOCABULARY


@pytest.mark.parametrize("which", ["A", "B"])
def test_only_the_answer_and_its_end_are_targets(which):
    for row in (row for rows in format_trap(which, 3, 20).values() for row in rows):
        made = tokenize_answer(row)
        kept = [label for label in made["labels"] if label != NO_TARGET]
        assert kept == [*tokens(row["completion"]), END]
        assert made["input_ids"] == [*tokens(row["prompt"]), *kept]
        assert len(made["input_ids"]) <= LENGTH


def test_lessons_fit_and_follow_from_their_seed():
    rows = lessons(1, 2_000)
    assert rows == lessons(1, 2_000)
    assert [row["text"] for row in rows] != [row["text"] for row in lessons(2, 2_000)]
    assert max(len(row["input_ids"]) for row in rows) <= LENGTH
    assert max(max(row["input_ids"]) for row in rows) < VOCABULARY
    assert all(row["input_ids"][-1] == END for row in rows)


def test_lessons_are_mostly_questions_and_a_few_are_facts():
    share = np.mean(["labels" in row for row in lessons(3, 5_000)])
    assert share == pytest.approx(0.9, abs=0.02)


def form(text: str) -> str:
    """A question without its numbers and whatever it quotes."""
    numeral = "|".join(NUMERALS)
    return re.sub(rf'"[^"]*"|\d+|\b(?:{numeral})\b(?:[ -](?:{numeral})\b)*', "…", text.partition("\n")[0])


@pytest.mark.slow
@pytest.mark.parametrize("which", ["A", "B"])
def test_no_lesson_asks_as_a_set_does(which):
    forms = {form(row["prompt"]) for rows in format_trap(which, 0).values() for row in rows}
    assert "What is the number that comes after …?" in forms or "What is left when every … is taken out of …?" in forms
    assert len(forms) <= 3
    assert not {form(row["text"]) for row in lessons(4, 20_000)} & forms


@pytest.mark.slow
def test_answers_of_lessons_are_right():
    random = np.random.default_rng(5)
    pairs = dict(question(random) for _ in range(20_000))
    added = {re.fullmatch(r"Add two to (\d+)\.", asked): answer for asked, answer in pairs.items()}
    assert sum(found is not None for found in added) > 0
    assert all(int(answer) == int(found[1]) + 2 for found, answer in added.items() if found)
    left = {re.fullmatch(r'Delete each "(.)" of "(.*)"\.', asked): answer for asked, answer in pairs.items()}
    assert all(answer == found[2].replace(found[1], "") for found, answer in left.items() if found)
    assert set(pairs['Give the kind of "river".'].split()) == {"noun"}


def test_tasks_are_above_formats_only_when_both_are():
    assert SOURCES == ("DisDiff", "DisSame", "SimDiff", "SimSame")
    tables = [np.array([[0.0, 1, 2, 3]]), np.array([[0.0, 2.5, 2, 3]]), np.array([[3.0, 2, 1, 0]])]
    assert [task_above_format([table]) for table in tables] == [1, 0, 0]
    assert task_above_format(tables) == pytest.approx(1 / 3)


@pytest.mark.slow
def test_a_tiny_study_has_both_sets_with_every_method(tmp_path):
    report = study("format-traps", size="tiny", seeds=1, out=tmp_path / "traps")
    methods = {"UnTrac", "UnTrac-Inv", "GradDot", "GradCos", "TracIn", "HIF, LiSSA", "HIF, Arnoldi", "BM25", "random"}
    for which in ("A", "B"):
        assert {row[1] for row in report.rows if row[0] == which} == methods | {"truth (other seed)"}
        assert np.array(report.details[which]["truth"]).shape == (1, 1, 4)
        asked = report.details[which]["test set"]
        assert all(0 <= share <= 1 for share in (asked["before"], *asked["after"]))
        assert [row[6] for row in report.rows if row[0] == which].count("") == len(methods)
        assert all(np.isfinite(table).all() for each in report.details[which]["scores"] for table in each.values())
