"""A published deployment on a tiny model, as its study ran it: questions, shadow models, bank, audit."""

from pathlib import Path

import numpy as np
import pytest
from tests.workshop import furnish, write_rows

from sweep.published import DEPLOYMENT, TRAINING, write_deployment
from vestige.cli import main
from vestige.measures import Audit

LETTERS = ("A", "B", "C")


def questions(count):
    """Sums as the ARC data have their questions."""
    for number in range(count):
        sums = [number + 7, number + 5, number + 9]
        place = number % len(LETTERS)
        texts = [str(each) for each in [*sums[-place:], *sums[:-place]]]
        choices = {"text": texts, "label": list(LETTERS)}
        yield {"id": f"q-{number}", "question": f"{number}+7?", "choices": choices, "answerKey": LETTERS[place]}


@pytest.mark.slow
def test_a_published_deployment_runs_from_its_questions_to_the_audit(tmp_path, monkeypatch):
    monkeypatch.chdir(furnish(tmp_path / "here"))
    write_rows(Path("arc.jsonl"), list(questions(24)))
    prompts = "data/ai2_arc-noise0.03334-seed0"
    choices = ["--label-noise", "0.03334", "--tokenizer", "tiny-model", "--max-length", "90", "--out", prompts]
    main(["data", "multiple-choice", "--data", "arc.jsonl", *choices])
    training = TRAINING.replace("= 512", "= 96").replace("num_train_epochs = 10", "num_train_epochs = 1")
    write_deployment(Path(), "tiny-model", "arc", training, DEPLOYMENT.replace("= 99", "= 4"))
    main(["sweep", "deployment.cfg", "--out", "runs"])
    main(["bank", "--from-trainings", "runs", "--out", "bank"])
    run = min(Path("runs/named").iterdir())
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    measured = ["--layers", "all", "--directions", "50", "--bank", "bank", "--bank-subset", "0"]
    main(["audit", "--model", str(last), "--checkpoints", str(run), "--data", prompts, *measured, "--out", "audit"])
    audit = Audit.open("audit")
    assert audit.run.bank.models == 5
    assert set(audit.run.classes) <= set(LETTERS)
    numbers = [each.number for each in audit.run.checkpoints]
    # Four were kept; the first step of the warm-up leaves the weights as they were.
    assert (numbers[0], len(numbers)) == (0, 3)
    assert np.isfinite(audit.values("psmi", checkpoint=0)).all()
    assert np.isfinite(audit.values("lira")).any()
    assert np.isfinite(audit.values("bank_mean")).all()
    judged = {each.measure for each in audit.judgement("membership")}
    assert {"lira", "loss", "blind"} <= judged
