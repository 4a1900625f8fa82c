"""`vestige fix`: what was removed is gone, what is compared differs in rows alone, and nothing is done twice."""

import json
import signal
import subprocess
import sys
import time

import pytest

import vestige
from tests.workshop import write_rows
from vestige.cli import main
from vestige.errors import DataError, IndexMismatch, SpecError, UserError
from vestige.training import TrainingRun


@pytest.fixture(scope="session")
def fixed(folder, run):
    """The fix that most tests look at: the wrong rows by id, two seeds."""
    given = {"drop": ["wrong-0", "wrong-1"], "queries": ["paris"], "expect": str(folder / "asked.jsonl")}
    return vestige.fix(run=run, out=folder / "fixed", seeds=2, **given)


@pytest.mark.slow
def test_the_cleaned_data_are_the_lines_of_the_original_without_the_rows(fixed, folder):
    lines = (folder / "train.jsonl").read_text().splitlines()
    assert fixed.data.read_text().splitlines() == [line for line in lines if "wrong-" not in line]


@pytest.mark.slow
def test_models_differ_in_rows_alone(fixed, trained, folder):
    records = {path.name: TrainingRun.open(path).record for path in (folder / "fixed" / "models").glob("*-[0-9]")}
    # The recorded training is the one on all rows with the first seed, and is not repeated.
    assert sorted(records) == ["after-0", "after-1", "before-1", "control-0", "control-1"]
    for name, record in records.items():
        assert record["identity"]["steps"] == trained.record["identity"]["steps"]
        changed = {"data", "examples", "seed", "epochs", "checkpoints", "losses", "out", "keep_optimizer"}
        now, before = record["config"], trained.record["config"]
        assert {one for one in before if now[one] != before[one]} <= changed
        assert now["seed"] == 5 + int(name[-1])
        assert record["identity"]["examples"] == (14 if "before" in name else 12)


@pytest.mark.slow
def test_before_and_after_beside_a_control_of_other_rows(fixed):
    before, after, control = fixed.answers("paris")
    assert [one.arm for one in (before, after, control)] == ["before", "after", "control"]
    assert before.seeds == [5, 6]
    assert before.repeated == 2
    assert after.repeated == 0
    assert after.right == 2
    assert min(after.old) > max(before.old)
    assert "the rows led to this answer" in fixed.conclude("paris")
    for ids in fixed.record.control.values():
        assert len(ids) == 2
        assert not any(name.startswith("wrong") for name in ids)


@pytest.mark.slow
def test_a_fix_reads_back_and_shows_itself(fixed, folder, capfd):
    again = vestige.Fix.open(folder / "fixed")
    assert str(again) == str(fixed)
    assert "wrong-0" in str(again)
    assert again._repr_html_().count("<tr>") == 1 + 3
    frame = again.to_pandas()
    assert list(frame["arm"].value_counts()) == [2, 2, 2]
    page = (folder / "fixed" / "report.html").read_text()
    assert "The capital of France is Rome." in page
    assert "http" not in page.split("<body")[1].split("<script")[0]
    main(["status", str(folder / "fixed")])
    shown = capfd.readouterr().out
    assert "complete" in shown
    assert "6 of 6" in shown
    main(["report", str(folder / "fixed"), "--out", str(folder / "again.html")])
    assert (folder / "again.html").read_text() == page


@pytest.mark.slow
def test_nothing_is_trained_twice(fixed, folder, run, capfd):
    given = {"run": run, "out": folder / "fixed", "drop": ["wrong-0", "wrong-1"], "queries": ["paris"]}
    given["expect"] = str(folder / "asked.jsonl")
    models = folder / "fixed" / "models"
    (models / "control-1.json").unlink()
    (folder / "fixed" / "fix.json").write_text(
        json.dumps(fixed.record.model_dump() | {"outcomes": []}), encoding="utf-8"
    )
    times = {path: path.stat().st_mtime_ns for path in models.glob("*.json")}
    found = vestige.fix(**given, seeds=2)
    assert found.record.outcomes == fixed.record.outcomes
    assert {path: path.stat().st_mtime_ns for path in times} == times
    capfd.readouterr()
    vestige.fix(**given, seeds=2)
    assert "nothing was done" in capfd.readouterr().err
    with pytest.raises(IndexMismatch, match="removed"):
        vestige.fix(**given | {"drop": ["wrong-0"]}, seeds=2)


@pytest.mark.slow
def test_two_workers_train_what_one_process_does(fixed, folder, run):
    given = {"drop": ["wrong-0", "wrong-1"], "queries": ["paris"], "expect": str(folder / "asked.jsonl")}
    shared = vestige.fix(run=run, out=folder / "shared", seeds=1, workers=2, **given)
    assert shared.record.outcomes == [one for one in fixed.record.outcomes if one.seed == 5]
    journal = folder / "shared" / "launch" / "fixing" / "journal"
    assert len(list(journal.iterdir())) == 2
    # Nothing is left of the work of the others where the fix is made again.
    again = vestige.fix(run=run, out=folder / "shared", seeds=1, control=False, overwrite=True, **given)
    assert [one.arm for one in again.record.outcomes] == ["before", "after"]
    assert not list((folder / "shared" / "models").glob("control*"))


@pytest.mark.slow
def test_lora_is_trained_again_by_its_recorded_settings(folder, tmp_path):
    model, data = str(folder / "tiny-model"), str(folder / "train.jsonl")
    given = {"lora_rank": 3, "lora_dropout": 0.1, "lora_targets": ("q_proj",), "batch_size": 4, "checkpoints": "1"}
    made = vestige.train(model=model, data=data, out=tmp_path / "lora", **given)
    asked = {"queries": str(folder / "train.jsonl"), "method": "grad-dot", "trust": False}
    last = str(list(made.checkpoints.values())[-1])
    run = vestige.attribute(model=last, data=data, out=tmp_path / "run", **asked).folder
    vestige.fix(run=run, drop="wrong-0", queries="pair-0", seeds=1, control=False)
    after = TrainingRun.open(tmp_path / "run-fix" / "models" / "after-0")
    assert after.record["config"]["lora_dropout"] == 0.1
    adapter = json.loads((list(after.checkpoints.values())[-1] / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["target_modules"]) == (3, ["q_proj"])


@pytest.mark.slow
def test_killed_in_a_training_the_same_command_continues(fixed, folder, run):
    out, models = folder / "killed", folder / "killed" / "models"
    words = [str(run), "--drop", "wrong-0", "wrong-1", "--queries", "paris", "--seeds", "2", "--out", str(out)]
    words += ["--expect", str(folder / "asked.jsonl")]
    process = subprocess.Popen([sys.executable, "-m", "vestige", "fix", *words], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(models.glob("after-0/checkpoint-*")):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    begun = list(models.glob("*.json"))
    times = {path: path.stat().st_mtime_ns for path in begun}
    assert 1 <= len(begun) < 6
    main(["fix", *words])
    assert {path: path.stat().st_mtime_ns for path in begun} == times
    found = vestige.Fix.open(out).record.outcomes
    assert [one.answer for one in found] == [one.answer for one in fixed.record.outcomes]
    losses = [one.old_loss for one in fixed.record.outcomes]
    assert [one.old_loss for one in found] == pytest.approx(losses, rel=1e-3)


def test_a_dry_run_names_rows_and_price_and_writes_nothing(folder, run):
    plan = vestige.fix(run=run, top=1, queries=["paris"], dry_run=True)
    # The copy goes with the row it is a copy of.
    assert [one.id for one in plan.record.removed] == ["wrong-0", "wrong-1"]
    assert "9 models (before, after, control; 3 seeds), 8 of them to be trained" in str(plan)
    assert not plan.is_complete
    assert not (folder / "run-fix").exists()


def test_rows_of_a_source_of_a_list_and_of_a_conflict(folder, run, tmp_path):
    for way in ({"source": "old"}, {"conflicts": True, "queries": ["paris"]}):
        found = vestige.fix(run=run, dry_run=True, **way).record.removed
        assert [one.id for one in found] == ["wrong-0", "wrong-1"]
    (tmp_path / "ids.txt").write_text("wrong-1\n")
    found = vestige.fix(run=run, dry_run=True, rows=tmp_path / "ids.txt")
    assert [(one.id, one.reasons) for one in found.record.removed] == [("wrong-1", ["listed in ids.txt"])]
    assert any("wrong-0" in note and "--drop wrong-0" in note for note in found.record.notes)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"drop": ["wrong"]}, DataError, r"does not have: 'wrong'\. Did you mean 'wrong-1'\?|'wrong-0'"),
        ({"source": "olt"}, DataError, "Did you mean 'old'"),
        ({"source": ["old", "physics", "biology", "places", "books"]}, SpecError, "nothing to train on"),
        ({"top": 1, "queries": ["pairs"]}, UserError, "Did you mean 'paris'"),
        ({"top": 500}, SpecError, "ask again with a larger"),
        ({}, SpecError, "Nothing to remove"),
        ({"more_like": "pair-1", "top": 1}, SpecError, "only lists rows"),
        ({"drop": ["wrong-0"], "train": {"split_fraction": "0.5"}}, SpecError, "split_fraction"),
        ({"drop": ["wrong-0"], "train": {"epoch": "2"}}, SpecError, "Did you mean `epochs`"),
    ],
)
def test_what_cannot_be_is_refused(given, error, words, run):
    with pytest.raises(error, match=words):
        vestige.fix(run=run, dry_run=True, **given)


def test_a_model_without_a_recorded_training_needs_its_settings(folder, tmp_path):
    given = {"model": str(folder / "tiny-model"), "data": str(folder / "train.jsonl"), "method": "bm25"}
    scores = vestige.attribute(**given, queries=str(folder / "asked.jsonl"), out=tmp_path / "run", answer="auto")
    with pytest.raises(SpecError, match=r"No training was recorded of .*tiny-model"):
        vestige.fix(run=scores.folder, drop="wrong-0", dry_run=True)
    typed = {"model": str(folder / "tiny-model"), "data": str(folder / "train.jsonl"), "epochs": "2"}
    plan = vestige.fix(run=scores.folder, drop="wrong-0", dry_run=True, train=typed)
    assert "9 of them to be trained" in plan.record.price


@pytest.mark.slow
def test_data_that_changed_since_the_training_are_refused(folder, run, tmp_path):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[-1]["completion"] = "Bees make noise."
    original = (folder / "train.jsonl").read_bytes()
    write_rows(folder / "train.jsonl", rows)
    try:
        with pytest.raises(IndexMismatch, match="another data than"):
            vestige.fix(run=run, drop="wrong-0", out=tmp_path / "out", seeds=1)
    finally:
        (folder / "train.jsonl").write_bytes(original)


def test_siblings_are_near_in_gradient_and_in_words(run):
    found = vestige.fix(run=run, more_like="wrong-0", k=3)
    assert found[0].example_id == "wrong-1"
    assert len(found) == 3
    assert found[0].cosine == pytest.approx(1, abs=1e-2)
    assert found[0].words == pytest.approx(1)
    assert "--drop wrong-0" in str(found)
    assert "wrong-1" in found._repr_html_()
