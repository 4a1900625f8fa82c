"""Counts of the house: how much there is to read, and how much of it one command runs. `make check` prints them.

A bound here is today's figure; it may only fall. Where it has to end is in the design: 28,000 lines of the core, 45
files for `vestige index` and 65 for `vestige attribute`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vestige
from tests.workshop import furnish

CORE = Path(vestige.__file__).parent
RECIPES = CORE.parents[1] / "recipes" / "src" / "vestige_recipes"

LINES = {"core": 56_600, "recipes": 11_200}
IMPORTS_PER_1000_LINES = 45
FILES_RUN = {"index": 139, "attribute": 195}

TRACE = """
import json, os, sys, threading
from vestige.cli import main
root, found = sys.argv[1], set()

def seen(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(root) and code.co_name != "<module>":
        found.add((code.co_filename, code.co_qualname))

threading.setprofile(seen)
sys.setprofile(seen)
try:
    main(sys.argv[2:])
finally:
    sys.setprofile(None)
    print(json.dumps(sorted(found)))
"""


def lines_of(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def run(folder: Path, *words: str) -> tuple[int, int]:
    """Return the files and functions of the core that a command runs."""
    done = subprocess.run(
        [sys.executable, "-c", TRACE, str(CORE), *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return len({path for path, _ in found}), len(found)


@pytest.mark.parametrize(("name", "folder"), [("core", CORE), ("recipes", RECIPES)])
def test_lines(name, folder):
    count = lines_of(folder)
    print(f"{name}: {count:,} lines in {len(list(folder.rglob('*.py')))} files (at most {LINES[name]:,} lines)")
    assert count <= LINES[name]


def test_internal_imports():
    texts = [path.read_text() for path in CORE.rglob("*.py")]
    count = sum(len(re.findall(r"^\s*(?:from|import) vestige\b", text, re.MULTILINE)) for text in texts)
    share = 1000 * count / lines_of(CORE)
    print(f"internal imports: {share:.1f} per 1,000 lines (at most {IMPORTS_PER_1000_LINES})")
    assert share <= IMPORTS_PER_1000_LINES


@pytest.mark.slow
def test_files_that_a_command_runs(tmp_path):
    folder = furnish(tmp_path)
    words = ("--model", "tiny-model", "--data", "train.jsonl")
    index = run(folder, "index", *words, "--out", "idx")
    attribute = run(folder, "attribute", "--index", "idx", "--queries", "train.jsonl", "--out", "run")
    for name, (files, functions) in {"index": index, "attribute": attribute}.items():
        print(f"vestige {name}: {functions} functions of {files} files (at most {FILES_RUN[name]} files)")
        assert files <= FILES_RUN[name]
