import numpy as np
import pytest
import torch

from vestige.data import NO_TARGET
from vestige.studies import study
from vestige.studies._format_tokens import END, LENGTH, VOCABULARY, answered, plain_facts, tokens
from vestige.studies._format_trap import format_trap
from vestige.studies._format_traps import SOURCES, task_above_format


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_words_are_tokens_and_figures_and_strings_are_spelled():
    assert len(tokens("What is the number")) == 4
    assert len(tokens("768")) == 3
    assert len(tokens('"aaab"')) == 6
    assert tokens("two hundred forty-one") == tokens("two  hundred forty - one")
    assert max(tokens(" ".join(row["prompt"] for rows in format_trap("B", 0).values() for row in rows))) < VOCABULARY


@pytest.mark.parametrize("which", ["A", "B"])
def test_only_the_answer_and_its_end_are_targets(which):
    for row in (row for rows in format_trap(which, 3, 20).values() for row in rows):
        made = answered(row)
        kept = [label for label in made["labels"] if label != NO_TARGET]
        assert kept == [*tokens(row["completion"]), END]
        assert made["input_ids"] == [*tokens(row["prompt"]), *kept]
        assert len(made["input_ids"]) <= LENGTH


def test_facts_are_not_questions_and_fit():
    facts = plain_facts(1, 700)
    assert facts == plain_facts(1, 700)
    assert facts != plain_facts(2, 700)
    assert max(len(row["input_ids"]) for row in facts) <= LENGTH
    assert not any("?" in row["text"] for row in facts)


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
        assert all(np.isfinite(table).all() for each in report.details[which]["scores"] for table in each.values())
