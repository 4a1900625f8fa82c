"""Texts that repeat in the training data: drawn together, judged once, and never a member's copy among the others."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import vestige
from tests.workshop import write_rows
from vestige.banks import Bank, random_subsets
from vestige.errors import IndexMismatch
from vestige.training import bank

COPIES = (1, 4, 16)
PASSAGE = "sky grass France Italy Hamlet Emma spider ant moon water penguins bees honey wax blue green Paris Rome"
WORDS = PASSAGE.split()


def repeated_rows(texts_of_each: int) -> list[dict[str, object]]:
    """Random texts, so many of them once, four times and sixteen times, in random order."""
    draw, rows = random.Random(0), []
    for copies in COPIES:
        for number in range(texts_of_each):
            text = " ".join(draw.choices(WORDS, k=7)) + f" {draw.randrange(1000)}."
            rows += [{"text": text, "copies": copies, "group": f"{copies}-{number}"} for _ in range(copies)]
    draw.shuffle(rows)
    return [{"id": f"r{row}", **each} for row, each in enumerate(rows)]


@pytest.fixture(scope="module")
def made(workshop, tmp_path_factory) -> tuple[Path, Bank]:
    """A folder with the rows, and a bank of halves of them."""
    folder = tmp_path_factory.mktemp("copies")
    write_rows(folder / "rows.jsonl", repeated_rows(6))
    return folder, bank(
        **common(workshop, folder), out=folder / "bank", subsets=8, seeds=1, epochs=6, keep_weights=True
    )


def common(workshop: Path, folder: Path) -> dict[str, object]:
    return {
        "model": str(workshop / "tiny-model"),
        "data": str(folder / "rows.jsonl"),
        "batch_size": 8,
        "learning_rate": 5e-3,
        "device": "cpu",
    }


def test_a_text_is_in_a_half_with_all_its_copies_or_not_at_all(made):
    folder, found = made
    texts = [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    for member in found.membership:
        inside = {text for text, taken in zip(texts, member, strict=True) if taken}
        assert inside.isdisjoint(text for text, taken in zip(texts, member, strict=True) if not taken)
        assert len(inside) == 9
    assert found.identity["group"] == "copies"


@pytest.mark.slow
def test_trap_memorization_of_repeated_texts_does_not_vanish(made, workshop, tmp_path):
    """Drawn row by row, every half knows every repeated text: the most repeated looked the least memorized."""
    folder, found = made
    audit = vestige.audit(
        model=str(next((folder / "bank" / "members").glob("00000-0-model"))),
        data=str(folder / "rows.jsonl"),
        bank=str(folder / "bank"),
        bank_subset=0,
        measures=("loss", "lira", "counterfactual"),
        out=tmp_path / "audit",
        device="cpu",
    )
    copies = np.array([each["copies"] for each in repeated_rows(6)])
    means = [float(np.nanmean(audit.values("counterfactual")[copies == number])) for number in COPIES]
    assert means[0] < means[1] < means[2]
    member = found.membership[0]
    gaps = [
        float(np.nanmean(audit.values("lira")[(copies == number) & member]))
        - float(np.nanmean(audit.values("lira")[(copies == number) & ~member]))
        for number in COPIES
    ]
    assert gaps[2] > gaps[0]
    (row,) = [each for each in audit.judgement("membership") if each.measure == "loss"]
    assert (row.found, row.others) == (9, 9), "each text counts once"
    assert audit.run.notes[0].startswith("108 of 126 rows are copies of others: 18 distinct texts")


@pytest.mark.slow
def test_copies_of_members_are_members_and_a_bank_drawn_by_row_says_and_continues_so(
    workshop, tmp_path, monkeypatch, capfd
):
    """Copies of what the model was trained on counted as others, and its attack looked worse than it is."""
    write_rows(tmp_path / "rows.jsonl", repeated_rows(2))
    settings = common(workshop, tmp_path) | {"out": tmp_path / "bank", "seeds": 1, "steps": 2}
    # As an earlier version would have begun it: no word of groups, and subsets of rows.
    bank(**settings, subsets=2)
    record = json.loads((tmp_path / "bank" / "bank.json").read_text())
    del record["identity"]["group"]
    by_row = random_subsets(np.arange(record["identity"]["examples"]), 0.5, 2, 0)
    record["subsets"] = [[subset.name, subset.digest] for subset in by_row]
    shutil.rmtree(tmp_path / "bank")
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(record))
    old = bank(**settings, subsets=2)
    assert "group" not in old.identity
    monkeypatch.setenv("VESTIGE_QUIET", "")
    grown = bank(**settings, subsets=3)
    assert "are copies of rows that it is trained on" in capfd.readouterr().err
    np.testing.assert_array_equal(grown.membership[:2], old.membership)
    with pytest.raises(IndexMismatch, match="group"):
        bank(**settings, subsets=3, group="group")
    texts = [each["text"] for each in repeated_rows(2)]
    known = {text for text, inside in zip(texts, old.membership[0], strict=True) if inside}
    audit = vestige.audit(
        model=settings["model"],
        data=settings["data"],
        bank=str(tmp_path / "bank"),
        bank_subset=0,
        measures=("loss", "lira"),
        out=tmp_path / "audit",
        device="cpu",
    )
    (row,) = [each for each in audit.judgement("membership") if each.measure == "loss"]
    assert (row.found, row.others) == (len(known), len(set(texts)) - len(known))


def test_rows_of_one_group_stay_together(workshop, tmp_path):
    rows = [{"text": f"{word} is here.", "doc": number // 2} for number, word in enumerate(WORDS[:8])]
    write_rows(tmp_path / "rows.jsonl", rows)
    found = bank(**common(workshop, tmp_path), out=tmp_path / "bank", subsets=3, seeds=1, steps=1, group="doc")
    assert found.identity["group"] == "doc"
    pairs = found.membership.reshape(3, 4, 2)
    assert (pairs[:, :, 0] == pairs[:, :, 1]).all()
    without = bank(**common(workshop, tmp_path), out=tmp_path / "one", leave_one_out=2, seeds=1, steps=1, group="doc")
    assert (without.membership.sum(1) == [8, 6, 6]).all()


def test_data_without_copies_have_the_bank_they_had(workshop, tmp_path, recipe):
    found = bank(**recipe)
    assert "group" not in found.identity
    rows = [np.sort(np.random.default_rng([0, 0, number]).choice(12, 6, replace=False)) for number in range(2)]
    for member, number in zip(found.membership, found.subsets, strict=True):
        assert np.flatnonzero(member).tolist() == rows[number].tolist()
