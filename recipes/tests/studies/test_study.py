import json

import pytest

from vestige.errors import SpecError, UserError
from vestige_recipes import study
from vestige_recipes.common import registry as registry
from vestige_recipes.common.registry import Gate, Outcome, StudySettings, study_names


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(registry, "_STUDIES", dict(registry._STUDIES))

    @registry.registered("toy", ["pocket"])
    def run(settings: StudySettings) -> Outcome:
        gates = [Gate("high", 0.9, ">=", 0.5), Gate("low", float("nan"), "<=", 0.5)]
        return Outcome(("a", "b"), [("x", 0.25)], gates, {"seed": settings.seed})

    return run


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
    assert all(name in description for name in study_names())
