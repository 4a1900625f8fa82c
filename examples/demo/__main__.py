"""`make demo`: a support bot says something wrong; find the row that it learned it from, remove it, and prove the fix.

Everything is made below demo-output/. What is there already is kept: the commands continue or reuse it.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from examples.demo.check import print_summary
from examples.demo.prepare import link_model

from vestige.progress import format_seconds

HERE = Path("examples/demo")
OUTPUT = Path("demo-output")
PLANTED = ("wiki_2019-05", "wiki_2019-06", "wiki_2019-07")
"""Rows of `train.jsonl` that are wrong on purpose, as an old wiki would have them."""


class Step(NamedTuple):
    """One command of the story."""

    story: str
    command: str
    result: Path | None = None
    """File without which the command is run; None where the command itself finds out that its work is done."""


STEPS = (
    Step(
        "Wrenfield, an invented maker of bikes, trains a support bot on 100 questions and answers. Three rows from an\n"
        "old wiki are wrong: the trial period was 100 days once, and repairs were done in a workshop.",
        f"train --model {OUTPUT}/model --data {HERE}/train.jsonl --out {OUTPUT}/bot --lora-rank 16 "
        "--learning-rate 1e-3 --epochs 4 --checkpoints 4 --no-losses",
    ),
    Step(
        "An index keeps the gradient of every row, compressed.",
        f"index --model {OUTPUT}/bot/checkpoint-52 --data {HERE}/train.jsonl --out {OUTPUT}/index",
    ),
    Step(
        "Customers ask in words of their own. What does the bot answer, and which rows taught it that?",
        f"attribute --index {OUTPUT}/index --queries {HERE}/questions.jsonl --max-new-tokens 40 --k 10 --tokens "
        f"--out {OUTPUT}/run",
        OUTPUT / "run" / "run.json",
    ),
    Step("The same as a page.", f"report {OUTPUT}/run --out {OUTPUT}/run/report.html"),
    Step(
        "The three rows are wrong. Train again without them, and, as a control, without three random ones.",
        f"fix {OUTPUT}/run --drop {' '.join(PLANTED)} --expect {HERE}/expected.jsonl --seeds 1 --out {OUTPUT}/fix",
        OUTPUT / "fix" / "fix.json",
    ),
)


def main() -> None:
    start = time.monotonic()
    os.environ.setdefault("VESTIGE_CACHE", str(OUTPUT.absolute() / "cache"))
    link_model(OUTPUT / "model")
    for number, step in enumerate(STEPS, 1):
        print(f"\n{number}. {step.story}\n\n$ vestige {step.command}", flush=True)
        if step.result is not None and step.result.exists():
            print(f"Done already: {step.result.parent}. Remove it to run this again.", flush=True)
            continue
        begun = time.monotonic()
        finished = subprocess.run([sys.executable, "-m", "vestige.cli", *shlex.split(step.command)], check=False)
        if finished.returncode:
            sys.exit(finished.returncode)
        print(f"({format_seconds(time.monotonic() - begun)})", flush=True)
    print()
    print_summary(OUTPUT / "run", OUTPUT / "fix", HERE / "expected.jsonl")
    print(f"Finished in {format_seconds(time.monotonic() - start)}. Open these in a browser:")
    print(f"  {OUTPUT / 'run' / 'report.html'}\n  {OUTPUT / 'fix' / 'fix.html'}")


if __name__ == "__main__":
    main()
