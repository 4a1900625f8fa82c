"""The studies on real texts in their tiny size: everything that the larger ones do, with a handful of steps."""

import json

import numpy as np
import pytest

from studies.test_domain_texts import lay_out
from vestige.errors import DataError
from vestige_recipes import study
from vestige_recipes.text_lds.run import GRADIENTS, sketches

OPPONENTS = {"random", "bm25", "rep-sim"}


@pytest.fixture(scope="module")
def lds_study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "text-lds"
    return study("text-lds", size="tiny", out=out), out


@pytest.mark.slow
def test_every_gradient_method_and_opponent_is_in_one_table(lds_study):
    report, out = lds_study
    methods = [row[0] for row in report.rows]
    sketched = {f"influence {name}" for name in sketches((16,))}
    assert methods[0] == "noise ceiling"
    assert set(methods[1:]) == {"influence", *GRADIENTS, "tracin", "trak-1", *sketched, *OPPONENTS}
    assert len(methods) == len(set(methods))
    assert [row[1] for row in report.rows[1:]] == sorted((row[1] for row in report.rows[1:]), reverse=True)
    record = json.loads((out / "study.json").read_text())
    assert record["details"]["lds"]["subsets"] == 4
    assert record["gates"] == []
    assert (out / "lds" / "lds.png").exists()


@pytest.mark.slow
def test_the_model_that_is_asked_is_none_of_the_bank(lds_study):
    notes = lds_study[0].details["lds"]["notes"]
    assert not any("biased" in note or "has not been trained" in note for note in notes)


@pytest.mark.slow
def test_an_interrupted_study_goes_on_to_the_same_table_and_keeps_what_is_finished(lds_study):
    report, out = lds_study
    member = next((out / "bank" / "members").glob("*.parquet"))
    before = member.stat().st_mtime_ns
    (out / "runs" / "grad-dot").rename(out / "lost")
    again = study("text-lds", size="tiny", out=out)
    assert member.stat().st_mtime_ns == before
    # What a method cost is measured anew.
    assert [row[:4] for row in again.rows] == [row[:4] for row in report.rows]


@pytest.mark.slow
def test_domains_measure_every_method_for_both_sizes(tmp_path, monkeypatch):
    lay_out(tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    report = study("domains", size="tiny", seeds=1, out=tmp_path / "domains")
    found = {part: {row[1] for row in report.rows if row[0] == part} for part in ("equal", "unequal")}
    common = {"truth of another seed", "UnTrac", "UnTrac-Inv", "GradDot", "GradCos", "TracIn", "BM25", "random"}
    assert found["equal"] == common
    assert found["unequal"] == common | {"UnTrac x size", "UnTrac-Inv x size"}
    for part in ("equal", "unequal"):
        assert (tmp_path / "domains" / f"{part}.png").stat().st_size > 1000
        details = report.details[part]
        assert details["tests"] == ["toxic", "biased", "truthful"]
        assert np.array(details["truth"]).shape == (1, 3, 8)
        assert all(np.isfinite(table).all() for each in details["scores"] for table in each.values())


def test_full_size_says_which_corpora_to_bring(tmp_path):
    with pytest.raises(DataError, match=r"train.jsonl and .*queries.jsonl is not there.*vestige_recipes/domains"):
        study("domains", size="paper", out=tmp_path / "domains")
