"""Train and compare: the arithmetic beside plain loops, and the command from chosen folders to a table."""

import json
import math

import numpy as np
import pytest

import vestige
from vestige.banks import Bank
from vestige.cli import main
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.evaluate import measure_gain
from vestige.selection import select


def test_a_gain_is_random_minus_chosen_seed_by_seed():
    random = np.random.default_rng(0)
    chosen, others = random.normal(size=(3, 5)), random.normal(size=(2, 3, 5))
    gain = measure_gain(chosen, others, 200, 0)
    by_seed = [
        sum(others[group][seed][query] - chosen[seed][query] for group in range(2) for query in range(5)) / 10
        for seed in range(3)
    ]
    assert gain.by_seed == pytest.approx(by_seed)
    mean = sum(by_seed) / 3
    assert gain.over_all.value == pytest.approx(mean)
    # Student's 97.5 % quantile with two degrees of freedom is 4.302653.
    half = 4.302653 * math.sqrt(sum((value - mean) ** 2 for value in by_seed) / 2) / math.sqrt(3)
    assert gain.over_seeds == pytest.approx((mean, mean - half, mean + half), rel=1e-5)
    assert gain.over_all.low < mean < gain.over_all.high


@pytest.mark.slow
def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Noise of seeds, sets and queries around a true gain of 1; few of each, so that 95 % is not reached."""
    random, hits, worlds = np.random.default_rng(3), 0, 100
    for world in range(worlds):
        seeds, sets, queries = (random.normal(size=shape) for shape in ((1, 6, 1), (6, 1, 1), (1, 1, 40)))
        others = 1 + seeds * 0.3 + sets * 0.3 + queries * 0.3 + random.normal(size=(6, 6, 40)) * 0.3
        found = measure_gain(np.zeros((6, 40)), others, 100, world).over_all
        hits += found.low <= 1 <= found.high
    assert hits / worlds > 0.8


def test_one_seed_has_no_interval_over_seeds():
    gain = measure_gain(np.zeros((1, 4)), np.ones((2, 1, 4)), 10, 0)
    assert gain.over_seeds.value == 1
    assert math.isnan(gain.over_seeds.low)


COPIES = {8: 0, 9: 2}
"""Rows of the workshop's data that repeat the text of an earlier one."""


@pytest.fixture(scope="module")
def compared(workshop, given, run):
    chosen = [select(scores=run, budget=4, out=workshop / "best", strategy="top")]
    chosen.append(select(data=given["data"], budget=3, out=workshop / "few", strategy="random"))
    arguments = {
        **given,
        "queries": str(workshop / "q.jsonl"),
        "selected": [str(one.folder) for one in chosen],
        "out": workshop / "compared",
        "random_sets": 2,
        "seeds": 2,
        "epochs": 2,
        "batch_size": 3,
        "learning_rate": 3e-3,
        "draws": 50,
    }
    return arguments, vestige.evaluate.selection(**arguments), chosen


def test_every_set_is_trained_on_and_nothing_else(compared, given):
    arguments, result, chosen = compared
    assert [row.method for row in result.rows] == ["best", "few", "random 3", "random 4", "everything"]
    sizes = [[len(result.details["sets"][f"random {size} #{number}"]) for number in (0, 1)] for size in (3, 4)]
    shown = [low if low == high else f"{low} to {high}" for low, high in map(sorted, sizes)]
    assert [row.values["examples"] for row in result.rows] == [4, 3, *shown, 12]
    bank = Bank.open(arguments["out"] / "bank")
    members = dict(zip(bank.subset_names, bank.subset_membership, strict=True))
    for one in chosen:
        assert {bank.example_ids[row] for row in np.flatnonzero(members[one.folder.name])} == set(one.ids)
    # A text is in a random set with all its copies or not at all; a set lacks a row where only copies were left.
    for size in (3, 4):
        for held in (members[f"random {size} #0"], members[f"random {size} #1"]):
            assert all(held[first] == held[copy] for copy, first in COPIES.items())
            assert size - 1 <= held.sum() <= size
    assert members["everything"].all()
    # Two passes over the largest set of four, three at a time.
    assert bank.identity["steps"] == 4
    assert len(bank) == 7 * 2


def test_the_numbers_follow_from_the_trained_models(compared):
    arguments, result, _ = compared
    bank = Bank.open(arguments["out"] / "bank")
    losses = {
        name: [
            float(np.mean([bank.query_losses[m][q] / bank.query_targets[q] for q in range(3)]))
            for m in range(len(bank))
            if bank.subset_names[bank.subsets[m]] == name
        ]
        for name in bank.subset_names
    }
    row = result["best"].values
    assert row["loss"].value == pytest.approx(sum(losses["best"]) / 2)
    expected = [
        (losses["random 4 #0"][seed] + losses["random 4 #1"][seed]) / 2 - losses["best"][seed] for seed in (0, 1)
    ]
    assert result.details["gain_by_seed"]["best"] == pytest.approx(expected)
    assert row["gain over random"].value == pytest.approx(sum(expected) / 2)
    assert row["seeds ahead"] == f"{sum(value > 0 for value in expected)} of 2"
    assert 0 <= row["accuracy"].value <= 1
    content = json.loads((arguments["out"] / "selection.json").read_text())
    assert content["rows"][0]["method"] == "best"
    assert (arguments["out"] / "selection.png").exists()


@pytest.mark.slow
def test_a_model_trained_on_the_queries_themselves_is_ahead(workshop, given, tmp_path):
    """Planted: three examples are the queries, the others are other words; choosing those must win."""
    rows = [{"id": f"n{number}", "text": f"zzz yyy xxx w{number} " * 3} for number in range(9)]
    asked = [{"id": f"q{number}", "text": text} for number, text in enumerate(["Bees make honey.", "Paris is a city."])]
    same = [row | {"id": f"same{number}"} for number, row in enumerate(asked)]
    scores = [{"id": row["id"], "text": row["text"]} for row in rows + same]
    run = tmp_path / "run"
    vestige.attribute(data=scores, queries=asked, method="bm25", dense=True, out=run, trust=False)
    chosen = select(scores=run, data=scores, budget=2, out=tmp_path / "bm25")
    assert set(chosen.ids) == {"same0", "same1"}
    result = vestige.evaluate.selection(
        model=given["model"], data=scores, queries=asked, selected=str(chosen.folder), out=tmp_path / "out",
        seeds=2, random_sets=2, steps=6, learning_rate=5e-3, draws=50,
    )  # fmt: skip
    assert result["bm25"].values["seeds ahead"] == "2 of 2"
    assert result["bm25"].values["gain over random"].low > 0


@pytest.mark.slow
def test_killed_it_goes_on_and_a_further_set_is_added(compared, run, workshop, monkeypatch):
    arguments, first, _ = compared
    out = arguments["out"]
    member = out / "bank" / "members" / "00000-0.parquet"
    before = member.stat().st_mtime_ns
    lost = sorted((out / "bank" / "members").glob("00003-1.*"))
    assert lost
    for path in lost:
        path.unlink()
    assert str(vestige.evaluate.selection(**arguments)) == str(first)
    more = select(scores=run, budget=4, out=workshop / "each", strategy="round-robin")
    both = vestige.evaluate.selection(**arguments | {"selected": [*arguments["selected"], str(more.folder)]})
    assert [row.method for row in both.rows][:3] == ["best", "few", "each"]
    assert both["best"].values == first["best"].values
    assert member.stat().st_mtime_ns == before
    with pytest.raises(IndexMismatch, match="learning-rate"):
        vestige.evaluate.selection(**arguments | {"learning_rate": 1e-3})


def test_mistakes_are_answered(compared, workshop, given, tmp_path):
    arguments, _, _ = compared
    everything = select(data=given["data"], budget="100%", out=tmp_path / "all", strategy="random")
    clash = select(data=given["data"], budget=3, out=tmp_path / "best", strategy="random")
    named = select(data=given["data"], budget=3, out=tmp_path / "everything", strategy="random")
    foreign = select(data=["one", "two", "three"], budget=2, out=tmp_path / "foreign", strategy="random")
    for change, error, words in (
        ({"selected": str(everything.folder)}, SpecError, "all of the data"),
        ({"selected": [*arguments["selected"], str(clash.folder)]}, SpecError, "'best' is taken"),
        ({"selected": str(named.folder)}, SpecError, "'everything' is taken"),
        ({"selected": str(foreign.folder)}, IndexMismatch, "which the data do not"),
        ({"selected": str(tmp_path / "nowhere")}, Exception, "no selection"),
        ({"selected": ()}, SpecError, "pass selected=CHOSEN"),
        ({"steps": 3}, SpecError, "`epochs` and `steps`"),
        ({"queries": str(workshop / "questions.jsonl")}, DataError, "completion"),
    ):
        with pytest.raises(error, match=words):
            vestige.evaluate.selection(**arguments | {"out": tmp_path / "out"} | change)


@pytest.mark.slow
def test_the_command_shares_its_trainings_between_workers(compared, tmp_path, capsys):
    arguments, first, _ = compared
    single = {name: value for name, value in arguments.items() if name not in ("selected", "out")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in single.items()]
    # The first part of three, in this process: it leaves the rest to others.
    main(["evaluate", "selection", *words, "--selected", *arguments["selected"], "--out", str(tmp_path / "out"),
          "--shard", "1/3"])  # fmt: skip
    done = list((tmp_path / "out" / "bank" / "members").glob("*.parquet"))
    assert 0 < len(done) < 14
    main(["evaluate", "selection", *words, "--selected", *arguments["selected"], "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "gain over random" in shown
    found = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert first["best"].values["loss"].value == pytest.approx(found["rows"][0]["loss"]["value"])


def test_random_sets_that_can_only_be_the_selection_itself_are_refused(given, tmp_path):
    """Nine copies of one text never fit into a set of two rows, and only two other rows are left."""
    rows = [{"id": f"n{number}", "text": "zzz yyy"} for number in range(9)]
    rows += [{"id": "a", "text": "Bees make honey."}, {"id": "b", "text": "Paris is a city."}]
    chosen = select(data=rows, budget=2, out=tmp_path / "two", strategy="random")
    assert set(chosen.ids) == {"a", "b"}
    arguments = {"model": given["model"], "data": rows, "queries": rows[-1:], "steps": 1}
    with pytest.raises(SpecError, match="There is no random set of 2 rows but 'two' itself"):
        vestige.evaluate.selection(**arguments, selected=str(chosen.folder), out=tmp_path / "out")
    with pytest.raises(DataError, match="every text has more copies than the budget has rows"):
        select(data=rows[:9], budget=2, out=tmp_path / "none", strategy="random")
