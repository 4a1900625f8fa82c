"""Names and paths are checked before anything heavy is imported, and what needs no torch does without it."""

import subprocess
import sys

import pytest

TORCH = ("torch", "transformers", "datasets", "sklearn", "matplotlib")

RUN = """
import sys
from vestige.cli import main
try:
    main(sys.argv[1:])
except SystemExit as exit_:
    status = exit_.code or 0
else:
    status = 0
print("heavy:", *set(%r) & set(sys.modules))
sys.exit(status)
"""

MODEL, DATA, OUT = ["--model", "tiny-model"], ["--data", "train.jsonl"], ["--out", "result"]

MISTAKES = {
    "attribute --index nowhere --queries questions.jsonl": "There is no index in nowhere: it does not exist.",
    "attribute --index nowhere --queries questions.jsonl --method influense": "There is no index in nowhere",
    "attribute --data train.jsonl --queries questions.jsonl --method influense": "Did you mean 'influence'?",
    "attribute --data train.jsonl --queries nowhere.jsonl": "nowhere.jsonl: no such file.",
    "attribute --model ./nowhere --data train.jsonl --queries questions.jsonl": "No model folder nowhere",
    "index --model ./nowhere --data train.jsonl": "No model folder nowhere",
    "index --model tiny-model --data nowhere.jsonl": "nowhere.jsonl: no such file.",
    "index --model tiny-model --data train.jsonl --compress tensorsketh:64": "Did you mean 'tensorsketch'?",
    "train --model tiny-model --data nowhere.jsonl": "nowhere.jsonl: no such file.",
    "bank --model ./nowhere --data train.jsonl": "No model folder nowhere",
    "untrac --model tiny-model --data nowhere.jsonl --queries questions.jsonl": "nowhere.jsonl: no such file.",
    "audit --model tiny-model --data train.jsonl --measures psmy": "There is no measure 'psmy'. Did you mean 'psmi'?",
    "audit --model tiny-model --data train.jsonl --bank nowhere": "nowhere is no bank: it does not exist.",
    "select --scores nowhere --budget 5": "nowhere is not a run",
    "evaluate lds --run nowhere --bank nowhere": "nowhere is not a run",
    "fix nowhere --top 1": "nowhere is not a run",
    "attribute --method replay --training nowhere --queries questions.jsonl": "nowhere holds no training.",
    "evaluate removal --model tiny-model --data train.jsonl --queries questions.jsonl --rows nowhere": "is not there.",
    "audit --model tiny-model --data train.jsonl --canaries nowhere.jsonl": "nowhere.jsonl: no such file.",
    "evaluate overlap --methods influense --model tiny-model --data train.jsonl": "Did you mean 'influence'?",
    "evaluate selection --model tiny-model --data train.jsonl --queries questions.jsonl --selected nowhere": "is no ",
    "bank --from-trainings nowhere": "There is no training of `vestige train` in nowhere.",
    "bank --model tiny-model --data train.jsonl --leave-out-lists nowhere.json": "nowhere.json is not there.",
    "data clean --data train.jsonl --flagged nowhere": "nowhere is not there.",
    "attribute --method tracin --checkpoints ./nowhere --data train.jsonl --queries questions.jsonl": "No model folder",
    "attribute --method tracin --checkpoints ./no ./way --checkpoint-weights 1 1e-3 --data train.jsonl --queries "
    "questions.jsonl": "No model folder no",
    "index --model tiny-model --data train.jsonl --tokenizer ./nowhere": "No model folder nowhere",
    "data generate --data train.jsonl --model ./nowhere": "No model folder nowhere",
    "data candidates --data nowhere.jsonl --queries questions.jsonl": "nowhere.jsonl: no such file.",
    "data split --data nowhere.jsonl": "nowhere.jsonl: no such file.",
}


def start(*words: str) -> tuple[int, str, str]:
    """Return the exit status, the errors, and what was imported of heavy libraries."""
    done = subprocess.run([sys.executable, "-c", RUN % (TORCH,), *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, done.stdout.splitlines()[-1]


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_answered_before_anything_heavy_is_imported(typed, workshop):
    status, errors, heavy = start(*typed.split(), *OUT)
    assert status == 2
    assert MISTAKES[typed] in errors
    assert heavy == "heavy:"
    assert not (workshop / "result").exists()


@pytest.mark.parametrize(
    "typed", ["precondition nowhere", "report nowhere", "view nowhere", "doctor --model tiny-model"]
)
def test_so_is_one_of_a_command_without_a_folder_of_its_own(typed, workshop):
    status, errors, heavy = start(*typed.split())
    assert (status, heavy) == (2, "heavy:")
    assert "nowhere" in errors or "`data` is missing" in errors


@pytest.mark.slow
def test_commands_that_read_text_and_tables_import_no_torch(idx):
    given = [*DATA, "--queries", "train.jsonl"]
    for words in (
        ["status", "idx"],
        ["attribute", "--method", "bm25", *given, "--dense", "--out", "run"],
        ["status", "run"],
        ["status", "run", "--verify"],
        ["select", "--scores", "run", "--budget", "50%", "--out", "chosen"],
        ["select", "--strategy", "random", *DATA, "--budget", "5", "--out", "others"],
        ["report", "run"],
        ["cancel", "idx"],
    ):
        assert (words, *start(*words)[::2]) == (words, 0, "heavy:")
