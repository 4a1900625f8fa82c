import json

import pytest

from vestige.errors import SpecError, UserError
from vestige_recipes import study
from vestige_recipes.studies import STUDIES, Gate, Outcome, Study, StudySettings, register_study


@pytest.fixture
def toy(monkeypatch):
    find = STUDIES.find

    @register_study(["pocket"])
    def run(settings: StudySettings) -> Outcome:
        gates = [Gate("high", 0.9, ">=", 0.5), Gate("low", float("nan"), "<=", 0.5)]
        return Outcome(("a", "b"), [("x", 0.25)], gates, {"seed": settings.seed})

    monkeypatch.setattr(STUDIES, "find", lambda name: run if name == "toy" else find(name))


def test_a_study_leaves_its_outcome_with_passed_and_failed_gates(toy, tmp_path):
    report = study("toy", out=tmp_path / "toy", seed=7)
    assert [gate.passed for gate in report.gates] == [True, False]
    assert not report.passed
    record = json.loads((tmp_path / "toy" / "study.json").read_text())
    assert record["details"] == {"seed": 7}
    assert record["rows"] == [["x", 0.25]]


def test_an_unknown_study_or_size_is_told(toy, tmp_path):
    with pytest.raises(SpecError, match="untrac-miniature"):
        study("untrac-miniatur", out=tmp_path / "out")
    with pytest.raises(SpecError, match="pocket"):
        study("toy", size="paper", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        study("toy", out=tmp_path / "file")


def test_the_settings_name_every_study():
    description = StudySettings.model_fields["name"].description or ""
    assert all(name in description for name in STUDIES.names())


def test_every_study_is_announced_under_the_sizes_that_it_has():
    assert {"digits", "untrac-miniature", "memorization-early"} <= set(STUDIES.names())
    for found in STUDIES:
        assert isinstance(found, Study)
        assert {"tiny", "pocket"} <= set(found.sizes) <= {"tiny", "pocket", "paper"}
