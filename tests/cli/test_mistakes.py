import subprocess
import sys
from dataclasses import replace

import pytest

from vestige.errors import CorruptFile, DataError
from vestige.registry import COMMANDS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["indx"], "There is no command 'indx'. Did you mean 'index'?\nType `vestige --help`"),
        (["zebra"], "There is no command 'zebra'. There are: attribute, audit, bank, "),
        (["--zebra"], "There is no command '--zebra'. There are: attribute"),
        (["index", "--modle", "x"], "Unknown option: --modle. Did you mean --model?\nType `vestige index --help`"),
        (["doctor", "m", "d"], "Not understood: m d. A value needs its flag before it."),
        (["index", "--model"], "parameter --model requires an argument"),
        (["index", "--seed", "many"], 'Invalid value for --seed: unable to convert "many" into int'),
        (["index", "--dtype", "f16"], 'Invalid value "f16" for --dtype. Choose from: "float16"'),
        (["index"], "`model` is missing"),
        (["index", "--model", "m", "--data", "d"], "`out` is missing: Folder of the index"),
        (["index", "--model", "m", "--data", "d", "--out", "o", "--shard", "0/3"], "expected i/n with i from 1 to n"),
        (["index", "--model", "m", "--data", "d", "--out", "o", "--disk", "lots"], "'lots' is not a size"),
        (["index", "--model", "m", "--data", "d", "--out", "o", "--max-length", "0"], "expected greater than 0"),
        (["attribute", "--queries", "q", "--out", "o"], "Neither `index` nor `data` was given"),
        (["attribute", "--queries", "q", "--out", "o", "--index", "i", "--data", "d"], "an index holds its data"),
        (["attribute", "--queries", "q", "--out", "o", "--index", "i", "--damping", "-1"], "a damping above zero"),
        (["report"], "`run` is missing"),
        (["data", "parafrase"], "There is no kind of data 'parafrase'. Did you mean 'paraphrase'?"),
        (["evaluate", "scetch"], "There is no evaluation 'scetch'. Did you mean 'sketch'?"),
        (["view", "run", "--port", "99999"], "less than or equal to 65535"),
        (["status", "nowhere"], "nowhere is neither an index nor a run"),
    ],
)
def test_a_mistake_is_answered_in_words_with_status_2(words, message, vestige, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = vestige(*words)
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.startswith("vestige: ")
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def raising(error):
    def run(settings):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DataError("Row 3 has no text."), 2, "vestige: Row 3 has no text.\n"),
        (CorruptFile("Shard 3 is torn."), 2, "vestige: Shard 3 is torn.\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.bin"),
            2,
            "vestige: x.bin: No such file or directory. Check the path, or choose another one.\n",
        ),
        (MemoryError(), 2, "vestige: There is not enough memory. "),
        (KeyboardInterrupt(), 130, "vestige: interrupted\n"),
    ],
)
def test_users_errors_and_interruption_have_a_status_and_a_line(error, status, message, vestige, monkeypatch):
    broken = raising_command(error)
    monkeypatch.setattr(COMMANDS, "find", lambda _: broken)
    outcome = vestige("status", "somewhere")
    assert outcome.status == status
    assert outcome.err.startswith(message)


def test_a_bug_is_called_one_and_its_traceback_lies_in_a_file(vestige, monkeypatch, tmp_path):
    broken = raising_command(ZeroDivisionError("by \x1b[31m"))
    monkeypatch.setattr(COMMANDS, "find", lambda _: broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = vestige("status", "somewhere")
    assert outcome.status == 1
    assert outcome.err.startswith("vestige: unexpected ZeroDivisionError: by \\x1b[31m\nThis is a bug in Vestige")
    (trace,) = tmp_path.iterdir()
    assert str(trace) in outcome.err
    assert "Traceback" not in outcome.err
    assert "raise error" in trace.read_text()


def raising_command(error):
    return replace(COMMANDS.find("status"), run=raising(error))


@pytest.mark.slow
def test_the_installed_command_ends_with_the_status():
    done = subprocess.run(
        [sys.executable, "-m", "vestige.cli", "index", "--modle", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("vestige: Unknown option: --modle. Did you mean --model?")
