"""The study of selection in its tiny size: everything that the larger one does, with a handful of steps."""

import json

import numpy as np
import pytest

from studies.finished import installed, written
from studies.test_domain_texts import lay_out
from vestige.banks import Bank
from vestige_recipes import study
from vestige_recipes.selection_domains.run import METHODS, PARTS, PLANS, TARGET, _write_texts


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("packages"), lay_out) as folder:
        yield folder


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "selection"
    return study("selection-domains", size="tiny", out=out, seeds=1), out


@pytest.mark.slow
def test_every_method_stands_beside_random_and_everything_in_both_parts(replayed):
    report, out = replayed
    for part in PARTS:
        names = [row[1] for row in report.rows if row[0] == part]
        assert set(names) == {*METHODS, "random", "everything"}
        assert names[-2:] == ["random", "everything"]
        assert (out / f"{part.replace(' ', '-')}.png").exists()
    assert not report.gates
    assert json.loads((out / "study.json").read_text())["details"]["target"] == TARGET


@pytest.mark.slow
def test_gains_follow_from_the_banks(replayed):
    report, out = replayed
    part = "target absent"
    bank = Bank.open(out / "0" / "target-absent" / "compared" / "bank")
    losses = dict(zip(bank.subset_names, bank.query_token_losses.mean(1), strict=True))
    random = [value for name, value in losses.items() if name.startswith("random ")]
    assert len(random) == 2
    gain = np.mean(random) - losses["bm25"]
    assert report.details[part]["gain by repetition"]["bm25"] == pytest.approx([gain])
    row = next(row for row in report.rows if row[:2] == (part, "bm25"))
    assert row[3] == pytest.approx(gain)
    assert row[6] == f"{int(gain > 0)} of 1"


@pytest.mark.slow
def test_finished_parts_are_kept(replayed):
    report, out = replayed
    before = written(out, "*.parquet", "*.safetensors", "optimizer.pt")
    again = study("selection-domains", size="tiny", out=out, seeds=1)
    assert again.rows == report.rows
    assert before == written(out, "*.parquet", "*.safetensors", "optimizer.pt")


def test_trap_nothing_is_chosen_for_the_pieces_that_it_is_judged_by(tmp_path):
    """Scores, start, mixture and tests share no piece; the mixture holds the target only where it should."""
    for part, inside in PARTS.items():
        texts, _ = _write_texts(PLANS["tiny"], tmp_path / part, inside, 0)
        read = {
            name: [json.loads(line) for line in texts[name].read_text().splitlines()]
            for name in ("before", "mixture", "warm", "asked", "tests")
        }
        ids = {name: {row["id"] for row in rows} for name, rows in read.items()}
        for one in ("before", "mixture", "asked", "tests"):
            for other in ("before", "mixture", "asked", "tests"):
                assert one == other or not ids[one] & ids[other]
        assert ids["warm"] < ids["mixture"]
        assert {row["source"] for row in read["asked"] + read["tests"]} == {TARGET}
        assert TARGET not in {row["source"] for row in read["before"]}
        assert (TARGET in {row["source"] for row in read["mixture"]}) == inside
