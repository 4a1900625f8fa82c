"""A package of others adds one object of each kind: docs/extending.md, installed by pip, used at the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch

from tests.workshop import furnish, write_rows
from vestige import Index, Scores

PACKAGE = Path(__file__).with_name("plugin_package")
PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which pip has installed a copy of the package."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PACKAGE, folder / "vestige-count")
    words = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    pip = [sys.executable, "-m", "pip", "install", *words, str(folder / "vestige-count")]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture
def run(installed, tmp_path):
    """Run a command line where the package is installed, in a folder with `train.jsonl`."""
    rows = [{"text": f"text {number}", "source": "books" if number < 2 else "web"} for number in range(5)]
    write_rows(tmp_path / "train.jsonl", rows)
    environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "200"}

    def call(*words):
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return call


@pytest.mark.slow
def test_the_command_is_in_the_help_and_the_built_in_ones_stay(run):
    told = run("-m", "vestige.cli", "--help").stdout
    assert re.search(r"count +Count the examples of a data source\.", told)
    assert re.search(r"index +\w", told)


@pytest.mark.slow
def test_every_line_of_the_page_runs(run):
    lines = re.search(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)[1].splitlines()
    printed = []
    for line in lines:
        program, *words = line.split()
        if program == "vestige":
            done = run("-m", "vestige.cli", *words)
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout.strip())
    assert printed[1:] == ["5 examples", "2 examples"]


def test_the_page_shows_the_package_as_it_is():
    page = PAGE.read_text()
    for path in (PACKAGE / "pyproject.toml", *PACKAGE.glob("*.py")):
        language = "toml" if path.suffix == ".toml" else "python"
        assert f"```{language}\n{path.read_text()}```" in page, path.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("count", "nowhere.jsonl"), "nowhere.jsonl"),
        (("count",), "`data` is missing"),
        (("count", "train.jsonl", "--limit", "-1"), "`limit` was -1"),
        (("count", "train.jsonl", "--config", "c.yaml"), "Did you mean `source`"),
        (("cuont", "train.jsonl"), "Did you mean 'count'"),
    ],
)
def test_its_mistakes_end_with_status_2_and_words(run, tmp_path, words, message):
    (tmp_path / "c.yaml").write_text("sourec: books\n")
    done = run("-m", "vestige.cli", *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_its_function_takes_the_same_settings_in_python(run):
    done = run("-c", "import vestige_count; print(vestige_count.count_examples('train.jsonl', source='web'))")
    assert done.stdout == "3\n", done.stderr


@pytest.mark.slow
def test_its_measure_is_printed_with_the_built_in_ones(run):
    told = run("-m", "vestige.cli", "measures").stdout
    assert re.search(r"│ loss +│ mean loss of the target tokens", told)
    assert re.search(r"│ first_choice +│ share of the target tokens", told)
    assert "coarse on short texts" in run("-m", "vestige.cli", "measures", "first_choice").stdout


@pytest.mark.slow
def test_its_measure_is_in_the_evidence_whoever_computes_it(run, tmp_path):
    furnish(tmp_path)
    words = ("--model", "tiny-model", "--data", "train.jsonl", "--measures", "loss", "first_choice")
    columns = []
    for number in (1, 2):
        done = run("-m", "vestige.cli", "audit", *words, "--workers", str(number), "--out", f"audit-{number}")
        assert done.returncode == 0, done.stderr
        columns.append(parquet.read_table(tmp_path / f"audit-{number}/evidence.parquet")["first_choice"].to_pylist())
    assert columns[0] == columns[1]
    assert all(0 <= share <= 1 for share in columns[0])
    assert "share of the target tokens" in (tmp_path / "audit-1/run.json").read_text()


@pytest.mark.slow
def test_its_method_scores_and_its_evaluation_judges_the_run(run, tmp_path):
    furnish(tmp_path)
    told = run("-m", "vestige.cli", "methods").stdout
    assert re.search(r"│ longest-match +│ How much of the query and its answer", told)
    words = ("--model", "tiny-model", "--data", "train.jsonl", "--queries", "train.jsonl")
    done = run("-m", "vestige.cli", "attribute", *words, "--method", "longest-match", "--out", "run")
    assert done.returncode == 0, done.stderr
    scores = Scores.open(tmp_path / "run")
    assert all(scores.top(query, 1)[0].example_id == query for query in scores.queries)
    assert "Blind to paraphrase; long examples lead." in (tmp_path / "run/run.json").read_text()
    done = run("-m", "vestige.cli", "evaluate", "standout", "--run", "run", "--out", "standout")
    assert done.returncode == 0, done.stderr
    assert "longest-match" in done.stdout
    [row] = json.loads((tmp_path / "standout/standout.json").read_text())["rows"]
    first, second = scores.top(scores.queries[0], 2)
    assert row[scores.queries[0]] == first.score / second.score
    assert run("-m", "vestige.cli", "report", "run").returncode == 0
    assert "How much of the query and its answer stands in the example" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_its_compressor_is_a_word_of_the_language(run, tmp_path):
    furnish(tmp_path)
    words = ("--model", "tiny-model", "--data", "train.jsonl")
    for compress in ("none", "head:8"):
        done = run(
            "-m", "vestige.cli", "index", *words, "--compress", compress, "--dtype", "float32", "--out", compress
        )
        assert done.returncode == 0, done.stderr
    whole, head = (Index.open(tmp_path / name) for name in ("none", "head:8"))
    rows = range(head.rows)
    for number in range(len(head.manifest.components)):
        exact = whole.gradients_of(rows)[:, whole.columns(number)]
        assert torch.equal(head.gradients_of(rows)[:, head.columns(number)], exact[:, :8])


@pytest.mark.slow
def test_its_engine_leaves_the_bytes_of_one_process(run, tmp_path):
    furnish(tmp_path)
    words = ("--model", "tiny-model", "--data", "train.jsonl", "--compress", "head:8")
    for name, options in {"here": (), "there": ("--engine", "one-by-one", "--workers", "2")}.items():
        done = run("-m", "vestige.cli", "index", *words, "--token-budget", "1", "--out", name, *options)
        assert done.returncode == 0, done.stderr
    shards = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "shards").iterdir()} for name in ("here", "there")
    ]
    assert shards[0] == shards[1]
    assert len(list((tmp_path / "there/launch/indexing/journal").iterdir())) == 2
    done = run("-m", "vestige.cli", "index", *words, "--out", "other", "--engine", "one-by-two")
    assert (done.returncode, "`engine` was 'one-by-two'" in done.stderr) == (2, True), done.stderr


@pytest.mark.slow
def test_its_tracker_is_given_the_steps_of_a_training(run, tmp_path):
    furnish(tmp_path)
    words = ("--model", "tiny-model", "--data", "train.jsonl", "--steps", "3", "--batch-size", "4")
    done = run("-m", "vestige.cli", "train", *words, "--out", "trained", "--report-to", "step-lines")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "trained/tracking/steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
