import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import contents, furnished, vestige, workshop  # noqa: F401
from tests.workshop import write_rows
from vestige.errors import IndexMismatch
from vestige.methods import AscentRecipe, untrac
from vestige.reports import report
from vestige.runs import Scores
from vestige.settings import LaunchSettings

GIVEN = {"model": "tiny-model", "data": "train.jsonl", "queries": "tests.jsonl"}


@pytest.fixture
def here(workshop):  # noqa: F811
    rows = [
        {"prompt": "Why is the sea blue?", "completion": "Water scatters blue light.", "source": "sky"},
        {"prompt": "Why is a leaf green?", "completion": "It holds chlorophyll.", "source": "leaf"},
        {"prompt": "Is a fern green?", "completion": "Ferns are green.", "source": "leaf"},
    ]
    write_rows(workshop / "tests.jsonl", rows)
    return workshop


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["untrac", "inverse"])
@pytest.mark.parametrize("level", ["source", "example"])
def test_a_run_ends_in_a_directory_that_opens_and_is_reported(here, direction, level):
    scores = untrac(**GIVEN, out="run", direction=direction, level=level, dense=True)
    assert scores.queries == ["sky", "leaf"]
    columns = 4 if level == "source" else 12
    assert scores.dense().shape == (2, columns)
    assert "the run lists" not in str(scores.top("sky", 40)), "all columns are listed"
    assert scores.run.method == {"untrac": "untrac", "inverse": "untrac-inv"}[direction]
    assert {each.source for each in scores.run.groups["sky"]} == {"biology", "books", "physics", "places"}
    assert [check.verdict for check in scores.run.trust.checks if check.name == "first-order self-test"] == ["good"]
    curves = pq.read_table("run/curves.parquet").to_pylist()
    assert {row["kind"] for row in curves} == {"measured", "batch"}
    assert all(np.isfinite(row["loss"]) for row in curves)
    assert report("run", out="page.html").is_file()


@pytest.mark.slow
def test_the_command_prints_sources_checks_and_the_sign(here, vestige):  # noqa: F811
    words = [word for name, value in GIVEN.items() for word in (f"--{name}", value)]
    done = vestige("untrac", *words, "--learning-rate", "1e-3", "--out", "run")
    assert done.status == 0, done.err
    assert "biology" in done.out
    assert "[good] first-order self-test" in done.out
    assert "positive: training on it lowers" in done.out


@pytest.mark.slow
def test_scores_add_up_to_curves(here):
    scores = untrac(**GIVEN, out="run", learning_rate=1e-3, stop="last", points=3)
    rows = pq.read_table("run/curves.parquet").to_pylist()
    of = {(row["ascent"], row["set"], row["step"]): row["loss"] for row in rows if row["kind"] == "measured"}
    for place, test in enumerate(scores.queries):
        for column, source in enumerate(["biology", "books", "physics", "places"]):
            rise = of[test, source, 5] - of[test, source, 0]
            assert scores.dense()[place, column] == pytest.approx(rise, rel=1e-4)


@pytest.fixture
def kill_second_ascent(monkeypatch):
    """The learning rate of every ascent that is begun; the second one ends with Ctrl-C."""
    right, begun = AscentRecipe.make_optimizer, []

    def make(recipe, parameters):
        if recipe.optimizer != "sgd":  # The self-test's own step.
            begun.append(recipe.learning_rate)
            if len(begun) == 2:
                raise KeyboardInterrupt
        return right(recipe, parameters)

    monkeypatch.setattr(AscentRecipe, "make_optimizer", make)
    return begun


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_with_the_same_numbers(here, kill_second_ascent):
    with pytest.raises(KeyboardInterrupt):
        untrac(**GIVEN, out="cut", learning_rate=1e-3)
    assert not (here / "cut").exists()
    resumed = untrac(**GIVEN, out="cut", learning_rate=1e-3)
    # The first set was done before the kill, the second is tried twice.
    assert len(kill_second_ascent) == 3
    assert np.array_equal(resumed.dense(), untrac(**GIVEN, out="whole", learning_rate=1e-3).dense())
    assert not list(here.glob(".cut*"))


@pytest.mark.slow
def test_changed_settings_do_not_reuse_old_ascents(here, kill_second_ascent):
    with pytest.raises(KeyboardInterrupt):
        untrac(**GIVEN, out="run", learning_rate=1e-3)
    untrac(**GIVEN, out="run", learning_rate=2e-3)
    assert kill_second_ascent == [1e-3, 1e-3, 2e-3, 2e-3]


@pytest.mark.slow
def test_a_run_that_is_there_is_kept(here):
    untrac(**GIVEN, out="run", learning_rate=1e-3)
    before = contents(here / "run")
    with pytest.raises(IndexMismatch, match="overwrite=True"):
        untrac(**GIVEN, out="run", learning_rate=1e-3)
    assert contents(here / "run") == before
    untrac(**GIVEN, out="run", learning_rate=2e-3, overwrite=True)
    assert Scores.open("run").run.config["learning_rate"] == 2e-3


@pytest.mark.slow
def test_a_query_without_an_answer_gets_the_models_own(here):
    scores = untrac(**GIVEN | {"queries": "questions.jsonl"}, out="run", learning_rate=1e-3, max_new_tokens=4)
    rows = pq.read_table("run/queries.parquet").to_pylist()
    assert [row["generated"] for row in rows] == [True, True]
    assert len(scores.queries) == 2


@pytest.mark.slow
def test_a_run_can_be_replayed_from_its_record(here, vestige):  # noqa: F811
    untrac(**GIVEN, out="run", learning_rate=1e-3)
    config = json.loads((here / "run" / "run.json").read_text())["config"]
    assert set(LaunchSettings.model_fields) <= set(config)
    assert vestige("untrac", "--config", "run/run.json", "--out", "again").status == 0
    assert np.array_equal(Scores.open("again").dense(), Scores.open("run").dense())
