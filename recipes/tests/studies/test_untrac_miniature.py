import json

import numpy as np
import pytest

from vestige.settings import LaunchSettings
from vestige_recipes import study
from vestige_recipes.common import sources as banks
from vestige_recipes.untrac_miniature import run as miniature


@pytest.fixture(scope="module")
def tiny_study(tmp_path_factory):
    """The study's outcome, its folder, and where each of its banks and unlearnings was told to run."""
    out, seen = tmp_path_factory.mktemp("study") / "mini", {"bank": [], "untrac": []}
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((banks, "bank"), (banks, "untrac")):
            right, told = getattr(module, name), seen[name]

            def told_and_done(right=right, told=told, **given):
                told.append({key: given[key] for key in LaunchSettings.model_fields})
                return right(**given)

            patch.setattr(module, name, told_and_done)
        report = study("untrac-miniature", size="tiny", out=out, retries=5, threads=3)
    return report, out, seen


@pytest.mark.slow
def test_every_method_and_opponent_is_in_the_table_of_every_draw(tiny_study):
    report, _, _ = tiny_study
    names = {row[0] for row in report.rows}
    assert names >= {"UnTrac, automatic", "UnTrac-Inv, automatic", "UnTrac, 0.0001", "UnTrac-Inv, 0.0001"}
    assert names >= {"GradDot", "GradCos", "TracIn", "HIF, LiSSA", "HIF, Arnoldi", "BM25", *miniature.RETAINING}
    draw = report.details["draws"][0]
    assert np.array(draw["truth"]).shape == (2, 2, 4)
    assert len(draw["scores"]) == 2
    # The grid is on the first model alone.
    assert "UnTrac, 0.0001" in draw["scores"][0]
    assert "UnTrac, 0.0001" not in draw["scores"][1]
    assert all(np.array(table).shape == (2, 4) for each in draw["scores"] for table in each.values())


@pytest.mark.slow
def test_where_the_work_runs_is_handed_on_to_banks_and_unlearning(tiny_study):
    seen = tiny_study[2]
    assert seen["bank"]
    assert seen["untrac"]
    assert all(each["retries"] == 5 and each["threads"] == 3 for told in seen.values() for each in told)


@pytest.mark.slow
def test_a_finished_study_is_read_again(tiny_study):
    report, out, _ = tiny_study
    model = next(out.rglob("model-0/checkpoint-3/model.safetensors"))
    before = model.stat().st_mtime_ns
    again = study("untrac-miniature", size="tiny", out=out)
    assert model.stat().st_mtime_ns == before
    assert again.rows == report.rows
    assert json.loads((out / "study.json").read_text())["gates"] == []
