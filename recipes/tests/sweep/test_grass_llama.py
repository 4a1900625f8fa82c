"""The recipe for Llama-3.1-8B and OpenWebText: its commands are understood, and run on a tiny model."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from tests.workshop import furnish

from vestige.cli import build_app, main

SCRIPT = Path(__file__).parents[3] / "recipes" / "grids" / "grass-llama.sh"
RECORDER = """#!/usr/bin/env python3
import json, os, sys
open(os.environ["RECORD"], "a").write(json.dumps(sys.argv[1:]) + "\\n")
"""


def commands(folder, **variables):
    """The words of every command that the script types."""
    program = folder / "bin" / "vestige"
    program.parent.mkdir()
    program.write_text(RECORDER)
    program.chmod(0o755)
    environment = {**os.environ, **variables, "RECORD": str(folder / "record")}
    environment["PATH"] = f"{program.parent}:{environment['PATH']}"
    subprocess.run(["sh", str(SCRIPT), "out"], env=environment, check=True, cwd=folder)
    return [json.loads(line) for line in (folder / "record").read_text().splitlines()]


def test_the_commands_at_full_size_would_be_understood(tmp_path):
    found = commands(tmp_path)
    assert [words[0] for words in found] == ["data", "index", "precondition", "data", "attribute", "export"]
    for words in found:
        build_app().parse_args(words, exit_on_error=False, print_error=False)
    text = "\n".join(" ".join(words) for words in found)
    assert "--model meta-llama/Llama-3.1-8B-Instruct" in text
    assert text.count("--engine slurm --workers 20") == 3


@pytest.mark.slow
def test_the_commands_run_on_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.chdir(furnish(tmp_path / "workshop"))
    tiny = {"MODEL": "tiny-model", "DATA": "train.jsonl", "PROMPTS": "questions.jsonl", "ROWS": "12", "BLOCK": "24"}
    tiny |= {"COMPRESS": "Random-8*8 | SJLT-16", "TOKENS": "6", "RUNS": "--device cpu", "CLUSTER": "--workers 1"}
    for words in commands(tmp_path / "workshop", **tiny):
        main(words)
    (written,) = Path("out/influence-json").iterdir()
    rows = json.loads(written.read_text())["scores"]
    assert {row["rank"] for row in rows if row["end"] == "proponent"} == {1, 2, 3, 4, 5}
    assert len({row["query_id"] for row in rows}) == 2
