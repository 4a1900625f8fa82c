"""`make demo`: teach a small model some answers, ask it in other words, and see which pairs its answers came from.

Everything lies below demo-output/. The first run unpacks and trains the model (minutes); later runs reuse both.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from examples.demo.check import outcomes, print_outcomes
from examples.demo.prepare import Training, prepare

from vestige.progress import format_seconds

OUTPUT = Path("demo-output")
VERBS = (
    "index --model demo-output/model --data demo-output/train.jsonl --out demo-output/index",
    "attribute --index demo-output/index --queries demo-output/reworded.jsonl "
    "--max-new-tokens 32 --k 5 --tokens --out demo-output/run --overwrite",
    "report demo-output/run --out demo-output/report.html",
)


def main() -> None:
    start = time.monotonic()
    os.environ.setdefault("VESTIGE_CACHE", str(OUTPUT.absolute() / "cache"))
    prepare(OUTPUT, Training())
    for verb in VERBS:
        print(f"\n$ vestige {verb}", flush=True)
        finished = subprocess.run([sys.executable, "-m", "vestige.cli", *shlex.split(verb)], check=False)
        if finished.returncode:
            sys.exit(finished.returncode)
    print()
    print_outcomes(outcomes(OUTPUT / "run", OUTPUT / "reworded.jsonl"))
    print(f"Finished in {format_seconds(time.monotonic() - start)}. Open {OUTPUT / 'report.html'} in a browser.")


if __name__ == "__main__":
    main()
