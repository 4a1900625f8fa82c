"""`vestige demo`: the example that comes with Vestige, copied into a folder."""

import subprocess
import sys
import webbrowser

import pytest

import vestige
from vestige.cli import main
from vestige.errors import UserError
from vestige.fixes import EXAMPLE


def test_it_prints_the_answer_the_rows_and_the_fix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["demo"])
    printed = capsys.readouterr().out
    scores = vestige.Scores.open("demo-run/run")
    assert scores.top(0, 1)[0].example_id in printed
    fix = vestige.Fix.open("demo-run/fix")
    assert str(fix.record.asked[0].answer) in printed
    assert fix.conclude(scores.queries[0]) in printed
    assert "demo-run/run/report.html" in printed
    assert (tmp_path / "demo-run" / "fix" / "report.html").is_file()


def test_a_copy_is_used_again(tmp_path):
    first = vestige.demo(tmp_path / "copy")
    record = tmp_path / "copy" / "run" / "run.json"
    made = record.stat().st_mtime_ns
    assert vestige.demo(tmp_path / "copy").queries == first.queries
    assert record.stat().st_mtime_ns == made


def test_it_opens_the_page_in_a_browser(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    vestige.demo(tmp_path / "copy")
    assert not opened
    vestige.demo(tmp_path / "copy", open=True)
    assert opened == [(tmp_path / "copy" / "run" / "report.html").as_uri()]


def test_other_files_stay_as_they_are(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(mine.txt\)"):
        vestige.demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_changed_copy_is_refused(tmp_path):
    vestige.demo(tmp_path / "copy")
    (tmp_path / "copy" / "fix" / "fix.json").write_text("{}")
    with pytest.raises(UserError, match=r"fix\.json is not the one that comes with this Vestige"):
        vestige.demo(tmp_path / "copy")
    assert (tmp_path / "copy" / "fix" / "fix.json").read_text() == "{}"


def test_it_is_small_and_names_no_folder_of_the_machine_that_made_it():
    files = [path for path in EXAMPLE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    for path in files:
        if path.suffix == ".json":
            assert not any(f'"{folder}/' in path.read_text() for folder in ("/tmp", "/home", "/root", "/work", "/mnt"))


@pytest.mark.slow
def test_it_needs_no_torch(tmp_path):
    code = "import sys; from vestige.cli import main; main(['demo', '--out', sys.argv[1]])\n"
    code += "assert not {'torch', 'transformers'} & sys.modules.keys()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "copy")], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
