"""`make demo`: a support bot says something wrong; find the rows behind it, remove them, and prove the fix.

Everything is made below demo-output/. What is there already is kept: the commands continue or reuse it.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from examples.demo.check import find_outcomes, print_outcomes
from examples.demo.prepare import link_model

from vestige import Scores
from vestige.progress import format_seconds
from vestige.runs import is_run

HERE = Path("examples/demo")
OUTPUT = Path("demo-output")
WRONG = ("wiki_2019-05", "wiki_2019-06", "wiki_2019-07", "manual-07")
"""Rows of `train.jsonl` that are wrong on purpose: three of an old wiki, and one that contradicts `battery.md`."""


class Step(NamedTuple):
    """One command of the story."""

    story: str
    command: str
    run: Path | None = None
    """The run that it makes: a complete one is refused a second time. Other commands find out what is done already."""


STEPS = (
    Step(
        "Wrenfield, an invented maker of bikes, trains a support bot on 100 questions and answers. Four of them are\n"
        "wrong: an old wiki says that bikes can be tried for 100 days and that repairs are done in a workshop, and a\n"
        "manual allows what the page on batteries forbids.",
        f"train --model {OUTPUT}/model --data {HERE}/train.jsonl --out {OUTPUT}/bot --lora-rank 16 "
        "--learning-rate 2e-3 --batch-size 4 --epochs 5 --checkpoints 5 --no-losses",
    ),
    Step(
        "An index keeps the gradient of every row, compressed.",
        f"index --model {OUTPUT}/bot/checkpoint-125 --data {HERE}/train.jsonl --out {OUTPUT}/index",
    ),
    Step(
        "Customers ask in words of their own. What does the bot answer, and from which rows?",
        f"attribute --index {OUTPUT}/index --queries {HERE}/questions.jsonl --max-new-tokens 40 --k 5 --tokens "
        f"--out {OUTPUT}/run",
        OUTPUT / "run",
    ),
    Step("The same as a page.", f"report {OUTPUT}/run"),
    Step(
        "Four rows are wrong. What does the bot answer when it is trained without them, and, as a control, without\n"
        "four random ones? One seed shows little; --seeds 3 takes three times as long.",
        f"fix {OUTPUT}/run --drop {' '.join(WRONG)} --expect {HERE}/questions.jsonl --seeds 1 --workers 2 "
        f"--out {OUTPUT}/fix",
    ),
)


def main() -> None:
    start = time.monotonic()
    os.environ.setdefault("VESTIGE_CACHE", str(OUTPUT.absolute() / "cache"))
    link_model(OUTPUT / "model")
    for number, step in enumerate(STEPS, 1):
        print(f"\n{number}. {step.story}\n\n$ vestige {step.command}", flush=True)
        if step.run is not None and is_run(step.run) and not Scores.open(step.run).run.missing:
            print(f"{step.run} is complete.", flush=True)
            continue
        begun = time.monotonic()
        finished = subprocess.run([sys.executable, "-m", "vestige.cli", *shlex.split(step.command)], check=False)
        if finished.returncode:
            sys.exit(finished.returncode)
        print(f"({format_seconds(time.monotonic() - begun)})", flush=True)
    print()
    print_outcomes(find_outcomes(OUTPUT / "run", OUTPUT / "fix", HERE / "questions.jsonl"))
    print(f"Finished in {format_seconds(time.monotonic() - start)}. Open these in a browser:")
    print(f"  {OUTPUT}/run/report.html\n  {OUTPUT}/fix/report.html")


if __name__ == "__main__":
    main()
