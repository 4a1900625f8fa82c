"""What every command takes and ends with: --quiet, --verbose, the next command; and completion in a shell."""

import shlex
import shutil
import subprocess

import pytest

from tests.cli.conftest import index_words
from vestige.registry import COMMANDS

BM25 = ("attribute", "--data", "train.jsonl", "--queries", "train.jsonl", "--method", "bm25", "--out", "run")


def test_a_command_ends_with_the_next_one_which_runs(workshop, vestige):
    first = vestige(*BM25)
    assert first.err.splitlines()[-1] == "Next: vestige report run"
    assert "Next:" not in first.out
    then = vestige("report", "run")
    assert then.status == 0
    assert then.err == "Next: vestige view run\n"


def test_paths_in_the_next_command_are_words_of_a_shell(workshop, vestige):
    done = vestige(*BM25[:-1], "my run")
    assert shlex.split(done.err.splitlines()[-1])[1:] == ["vestige", "report", "my run"]


def test_quiet_prints_the_result_alone(workshop, vestige):
    loud, quiet = vestige(*BM25), vestige(*BM25, "--overwrite", "--quiet")
    assert quiet == (0, loud.out, "")


def test_verbose_prints_the_command_and_the_seconds_of_phases(workshop, vestige):
    done = vestige(*index_words(), "--out", "idx", "--verbose")
    assert done.status == 0
    assert "vestige index --model tiny-model --data train.jsonl --out idx" in done.err
    assert "compression" in done.err
    assert "seconds" in done.err


def test_questions_and_inputs_may_stand_without_their_flags(settings_of):
    assert settings_of("index", "m", "d", "--out", "o").record() == {
        **settings_of("index", "--model", "m", "--data", "d", "--out", "o").record()
    }
    typed = settings_of("attribute", "Why?", "Who?", "--index", "idx", "--out", "o")
    assert typed.record()["queries"] == ["Why?", "Who?"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The completion of bash, generated once."""
    from vestige.cli import build_app

    path = tmp_path_factory.mktemp("completion") / "vestige.sh"
    path.write_text(build_app(completing=True).generate_completion(prog_name="vestige", shell="bash"))
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("vestige attr", "attribute"),
        ("vestige attribute --meth", "--method"),
        ("vestige attribute --method gra", "grad-cos grad-dot"),
        ("vestige audit --measures psm", "psmi"),
        ("vestige attribute --answer gi", "given"),
        ("vestige index --model tiny", "tiny-model"),
        ("vestige index --data train", "train.jsonl"),
        ("vestige evaluate ld", "lds"),
    ],
)
def test_bash_completes_commands_flags_names_and_files(typed, expected, script, workshop):
    code = (
        f"source {script}; COMP_WORDS=({typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _vestige; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == expected.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_a_shell(shell, vestige):
    printed = vestige("completion", shell)
    assert printed.status == 0
    for name in COMMANDS.names():
        assert name.split()[-1] in printed.out
