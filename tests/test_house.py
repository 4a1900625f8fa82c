"""Counts of the house: how much there is to read, and how much of it one command runs. `make check` prints them.

A bound here is today's figure; it may only fall. Where it has to end is in the design: 28,000 lines of the core, 45
files for `vestige index` and 65 for `vestige attribute`.
"""

import ast
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vestige
from tests.workshop import furnish

CORE = Path(vestige.__file__).parent
REPOSITORY = CORE.parents[1]
RECIPES = REPOSITORY / "recipes" / "src" / "vestige_recipes"

LINES = {"core": 62_640, "recipes": 12_490}
IMPORTS_PER_1000_LINES = 26.8
PATCHED = 0
FILES_RUN = {"index": 76, "attribute": 109}

WORDS = (
    r"room(?!\.)",
    "rooms",
    "knows? by heart",
    "lockstep",
    "crew",
    "mend",
    "mended",
    "loud",
    "told",
    "said",
    "so many",
    "the first ones",
    "anew",
    "meanwhile",
    "whoever",
    "somebody",
    "nobody",
    "decided",
    "dealt",
    "let go",
    "nothing happens",
    "surely",
    "perhaps",
    "of course",
)
"""Words of our own that have a word of the field: broadcast, requested, the first N, again."""

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


def test_no_two_files_import_each_other():
    files = {".".join(path.relative_to(CORE.parent).with_suffix("").parts): path for path in CORE.rglob("*.py")}
    imports = {}
    for name, path in files.items():
        statements = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        named = {f"{one.module}.{each.name}" for one in statements for each in one.names}
        imports[name] = (named | {one.module for one in statements}) & files.keys() - {name}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_words_are_those_of_the_field():
    ours = re.compile(rf"(?<![a-z])(?:{'|'.join(WORDS)})(?![a-z])", re.IGNORECASE)
    pages = [*CORE.rglob("*.py"), *(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "README.md"]
    found = []
    for path in pages:
        text = path.read_text()
        # Names of tests and of keys in files stand as code.
        text = re.sub(r"`[^`]*`", "", text) if path.suffix == ".md" else text
        for number, line in enumerate(text.splitlines(), 1):
            found += [f"{path}:{number}: {word}" for word in ours.findall(line.replace("_", " "))]
    assert not found, "\n".join(found)


def test_tests_use_public_names():
    private = re.compile(r"\bvestige(?:_recipes)?(?:\.\w+)*\._[a-z]\w+")
    tests = [*(REPOSITORY / "tests").rglob("*.py"), *(REPOSITORY / "recipes/tests").rglob("*.py")]
    found = [f"{path}: {name}" for path in tests for name in private.findall(path.read_text())]
    print(f"private modules named by tests, to shrink a block or to fail at a point: {len(found)} (at most {PATCHED})")
    assert len(found) <= PATCHED, "\n".join(found)


@pytest.mark.slow
def test_files_that_a_command_runs(tmp_path):
    folder = furnish(tmp_path)
    words = ("--model", "tiny-model", "--data", "train.jsonl")
    index = run(folder, "index", *words, "--out", "idx")
    attribute = run(folder, "attribute", "--index", "idx", "--queries", "train.jsonl", "--out", "run")
    for name, (files, functions) in {"index": index, "attribute": attribute}.items():
        print(f"vestige {name}: {functions} functions of {files} files (at most {FILES_RUN[name]} files)")
        assert files <= FILES_RUN[name]
