"""The verb from files to files: what is written, what is found again, and answers to mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

import vestige
from vestige.cli import main
from vestige.data import load_examples
from vestige.errors import CorruptFile, DataError, IndexMismatch, SpecError, UserError
from vestige.methods import attribute
from vestige.selection import SelectedData, select


def test_rows_keep_their_columns_and_their_order(run, workshop, tmp_path):
    chosen = select(scores=run, budget=4, out=tmp_path / "out")
    lines = [json.loads(line) for line in chosen.data.read_text().splitlines()]
    source = [json.loads(line) for line in (workshop / "train.jsonl").read_text().splitlines()]
    rows = sorted(choice.row for choice in chosen.choices)
    assert lines == [source[row] for row in rows]
    table = parquet.read_table(tmp_path / "out" / "selected.parquet").to_pylist()
    assert [row["rank"] for row in table] == [1, 2, 3, 4]
    assert [row["source"] for row in table] == [source[row["row"]]["source"] for row in table]
    assert vestige.select(scores=run, budget=4, out=tmp_path / "two").ids == chosen.ids


def test_rows_without_an_id_get_the_one_that_scores_know_them_by(tmp_path):
    texts = ["one", "two", "three"]
    chosen = select(data=texts, budget=2, out=tmp_path / "out", strategy="random")
    lines = [json.loads(line) for line in chosen.data.read_text().splitlines()]
    assert [line["text"] for line in lines] == [texts[int(line["id"])] for line in lines]


def test_an_index_gives_rows_that_read_as_the_same_examples(store, workshop, tmp_path):
    chosen = select(index=store, budget=5, out=tmp_path / "out", strategy="random")
    before = {example.id: example for example in load_examples(str(workshop / "train.jsonl"))}
    for example in load_examples(str(chosen.data)):
        old = before[example.id]
        assert (example.prompt, example.completion, example.source, example.extra) == (
            old.prompt,
            old.completion,
            old.source,
            old.extra,
        )


@pytest.mark.parametrize(("budget", "count"), [("5%", 1), ("30%", 4), ("100%", 12), (7, 7), ("7 examples", 7)])
def test_budgets_of_examples_and_shares(given, tmp_path, budget, count):
    assert len(select(data=given["data"], budget=budget, out=tmp_path / "out", strategy="random")) == count


def test_a_budget_of_tokens_ends_before_the_first_that_does_not_fit(store, given, tmp_path):
    everything = select(index=store, budget="100%", out=tmp_path / "all", strategy="random")
    tokens = [choice.tokens for choice in everything.choices]
    for budget in (sum(tokens[:3]), sum(tokens[:4]) - 1, sum(tokens)):
        chosen = select(index=store, budget=f"{budget} tokens", out=tmp_path / str(budget), strategy="random")
        assert len(chosen) == int((np.cumsum(tokens) <= budget).sum())
        assert chosen.record["tokens"] <= budget
    counted = select(
        data=given["data"],
        tokenizer=given["model"],
        budget=f"{sum(tokens[:3])} tokens",
        out=tmp_path / "t",
        strategy="random",
    )
    assert counted.ids == everything.ids[:3]
    with pytest.raises(DataError, match="longer than the budget"):
        select(index=store, budget="1 token", out=tmp_path / "one", strategy="random")


@pytest.mark.parametrize("budget", ["none", 0, "0%", "101%", -3, 0.05, "2.5", "5 bananas"])
def test_a_budget_that_is_none_is_refused(given, tmp_path, budget):
    with pytest.raises(SpecError, match="5%"):
        select(data=given["data"], budget=budget, out=tmp_path / "out", strategy="random")


def test_a_budget_above_the_data_is_refused(given, store, tmp_path):
    with pytest.raises(SpecError, match="which has 12 examples"):
        select(data=given["data"], budget=13, out=tmp_path / "out", strategy="random")
    with pytest.raises(SpecError, match="tokens"):
        select(index=store, budget="1000000 tokens", out=tmp_path / "out", strategy="random")
    with pytest.raises(SpecError, match="tokenizer=MODEL"):
        select(data=given["data"], budget="10 tokens", out=tmp_path / "out", strategy="random")


def test_a_second_call_writes_nothing_and_changed_settings_are_refused(run, planted, tmp_path):
    first = select(scores=run, budget=4, out=tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert select(scores=run, budget=4, out=tmp_path / "out").ids == first.ids
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(IndexMismatch, match=r"budget: 4 there, 5 now"):
        select(scores=run, budget=5, out=tmp_path / "out")
    with pytest.raises(IndexMismatch, match="scores"):
        select(scores=planted(np.ones((3, 12))), budget=4, out=tmp_path / "out")
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert len(select(scores=run, budget=5, out=tmp_path / "out", overwrite=True)) == 5


def test_killed_at_any_point_the_same_call_gives_the_same_files(run, tmp_path, monkeypatch):
    select(scores=run, budget=4, out=tmp_path / "whole")
    names = ["selected.jsonl", "selected.parquet"]
    real = Path.replace
    for stop in range(3):
        out, written = tmp_path / f"killed{stop}", []

        def die(self, target, written=written, stop=stop):
            if len(written) == stop:
                raise KeyboardInterrupt
            written.append(target)
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", die)
            with pytest.raises(KeyboardInterrupt):
                select(scores=run, budget=4, out=out)
        with pytest.raises(UserError, match="no selection"):
            SelectedData.open(out)
        select(scores=run, budget=4, out=out)
        assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_damaged_files_are_seen_and_made_again(run, tmp_path):
    chosen = select(scores=run, budget=4, out=tmp_path / "out")
    before = chosen.data.read_bytes()
    chosen.data.write_bytes(before[:-5])
    with pytest.raises(CorruptFile, match="damaged"):
        SelectedData.open(tmp_path / "out")
    select(scores=run, budget=4, out=tmp_path / "out")
    assert chosen.data.read_bytes() == before


def test_a_torn_record_is_named_and_replaced_with_overwrite(run, tmp_path):
    select(scores=run, budget=4, out=tmp_path / "out")
    (tmp_path / "out" / "selection.json").write_text("torn")
    with pytest.raises(UserError, match="overwrite"):
        select(scores=run, budget=4, out=tmp_path / "out")
    assert len(select(scores=run, budget=4, out=tmp_path / "out", overwrite=True)) == 4


def test_other_files_are_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("...")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"other files \(thesis.txt\)"):
            select(scores=run, budget=4, out=tmp_path / "mine", overwrite=overwrite)


def test_a_run_that_keeps_only_the_ends_serves_as_far_as_it_goes(run, tmp_path):
    listed = tmp_path / "listed"
    shutil.copytree(run, listed)
    (listed / "scores.safetensors").unlink()
    for strategy in ("round-robin", "per-target"):
        full = select(scores=run, budget=3, out=tmp_path / f"full {strategy}", strategy=strategy)
        assert select(scores=listed, budget=3, out=tmp_path / strategy, strategy=strategy).ids == full.ids
        with pytest.raises(UserError, match=r"the 3 best of each query.\n.*--dense"):
            select(scores=listed, budget=11, out=tmp_path / "no", strategy=strategy)
    for choice in ({}, {"strategy": "gumbel"}, {"strategy": "per-target", "targets": "source"}):
        with pytest.raises(UserError, match="--dense"):
            select(scores=listed, budget=2, out=tmp_path / "no", **choice)


@pytest.mark.slow
def test_one_query_needs_no_dense_scores_and_whole_lists_are_dense(given, workshop, tmp_path):
    arguments = {**given, "method": "grad-dot", "trust": False}
    attribute(**arguments, queries=["Why is the sky blue?"], out=tmp_path / "one", k=5)
    assert len(select(scores=tmp_path / "one", budget=5, out=tmp_path / "a")) == 5
    with pytest.raises(UserError, match="the 5 best"):
        select(scores=tmp_path / "one", budget=6, out=tmp_path / "b")
    queries = str(workshop / "q.jsonl")
    attribute(**arguments, queries=queries, out=tmp_path / "long", k=12)
    attribute(**arguments, queries=queries, out=tmp_path / "dense", k=12, dense=True)
    for strategy in ("top", "gumbel"):
        found = select(scores=tmp_path / "long", budget=7, out=tmp_path / f"l {strategy}", strategy=strategy)
        assert found.ids == select(scores=tmp_path / "dense", budget=7, out=tmp_path / strategy, strategy=strategy).ids


def test_data_that_were_not_scored_are_refused(run, store, workshop, tmp_path):
    lines = (workshop / "train.jsonl").read_text().splitlines(keepends=True)
    for name, changed, words in (
        ("short", lines[:-1], "holds 11"),
        ("turned", lines[::-1], "in row 0"),
        ("edited", [line.replace('"prompt": "', '"prompt": "Well, ') for line in lines], "have changed"),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(changed))
        with pytest.raises(IndexMismatch, match=words):
            select(scores=run, data=str(path), budget=2, out=tmp_path / "out")
    with pytest.raises(IndexMismatch, match="holds 12 examples"):
        select(index=store, data=str(tmp_path / "short.jsonl"), budget=2, out=tmp_path / "out", strategy="random")


def test_settings_that_do_not_fit_are_refused(run, given, tmp_path):
    for arguments, words in (
        ({"strategy": "top"}, "needs scores=RUN"),
        ({"strategy": "random"}, "Nothing to choose from"),
        ({"strategy": "random", "data": given["data"], "min_score": 0}, "about scores"),
        ({"scores": run, "targets": "source"}, "per-target"),
        ({"scores": run, "pool": 2}, "diverse"),
        ({"scores": tmp_path / "nowhere"}, "is not a run"),
    ):
        with pytest.raises(UserError, match=words):
            select(budget=2, out=tmp_path / "out", **arguments)


def test_targets_that_queries_do_not_have_are_refused(run, workshop, tmp_path):
    with pytest.raises(DataError, match="column `topic`"):
        select(scores=run, budget=2, out=tmp_path / "out", strategy="per-target", targets="topic")
    with pytest.raises(DataError, match="no query 'sky'"):
        select(
            scores=run, budget=2, out=tmp_path / "out", strategy="per-target", targets="source",
            queries=str(workshop / "questions.jsonl"),
        )  # fmt: skip


def test_the_command_prints_reasons_and_its_record_replays_it(run, tmp_path, capsys):
    main(["select", "--scores", str(run), "--budget", "25%", "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "3 of 12 examples (25.0%)" in shown
    assert "place 1 by mean score over 3 queries" in shown
    record = tmp_path / "out" / "selection.json"
    main(["select", "--config", str(record), "--out", str(tmp_path / "again")])
    for name in ("selected.jsonl", "selected.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert json.loads(record.read_text())["command"].startswith("vestige select --budget 25%")


def test_data_without_rows_or_with_an_id_twice_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    twice = [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}, {"id": "a", "text": "three"}]
    for data, words in (
        (str(tmp_path / "empty.jsonl"), "no rows|empty"),
        ([], "no rows"),
        (twice, "two rows with the id 'a'"),
        (str(tmp_path / "nowhere.jsonl"), "nowhere.jsonl"),
    ):
        with pytest.raises(DataError, match=words):
            select(data=data, budget=1, out=tmp_path / "out", strategy="random")
    assert not (tmp_path / "out").exists()


def test_listed_rows_are_never_chosen_and_lie_beside(run, workshop, tmp_path, capsys):
    best = select(scores=run, budget=3, out=tmp_path / "best")
    (tmp_path / "rows.txt").write_text("".join(f"{name}\n" for name in best.ids))
    for strategy in ("top", "round-robin", "random"):
        out = tmp_path / strategy
        chosen = select(scores=run, budget=9, strategy=strategy, drop=tmp_path / "rows.txt", out=out)
        assert len(chosen) == 9
        assert not set(chosen.ids) & set(best.ids)
        removed = [json.loads(line) for line in chosen.removed.read_text().splitlines()]
        assert {row["id"] for row in removed if "rows.txt" in row["problem"]} == set(best.ids)
    assert select(scores=run, budget=9, drop=tmp_path / "best", out=tmp_path / "folder").ids
    with pytest.raises(IndexMismatch):
        select(scores=run, budget=9, out=tmp_path / "top")


def test_scores_of_the_models_own_answers_say_what_they_keep(given, tmp_path, capsys):
    settings = {"method": "random", "dense": True, "trust": False}
    own = attribute(**given, **settings, queries=["Who wrote Emma?"], max_new_tokens=4, out=tmp_path / "own")
    chosen = select(scores=own.folder, budget=3, out=tmp_path / "out")
    assert "1 of 1 queries are answers that the model gave itself" in capsys.readouterr().err
    assert "right or wrong" in str(chosen)


@pytest.mark.slow
def test_random_rows_are_drawn_by_text_with_all_copies(given, tmp_path):
    """Rows 8 and 9 are copies of rows 0 and 2: no budget parts them, and a copied text is no likelier to be drawn."""
    chosen = []
    ids = [json.loads(line)["id"] for line in Path(given["data"]).read_text().splitlines()]
    pairs = [(ids[0], ids[8]), (ids[2], ids[9])]
    for seed in range(120):
        found = select(data=given["data"], budget=5, out=tmp_path / f"{seed}", strategy="random", seed=seed)
        assert len(found) == 5
        assert all((first in found.ids) == (copy in found.ids) for first, copy in pairs)
        chosen += found.ids
    assert "2 of 12 rows are copies of others: 10 distinct texts, each counted once." in found.notes
    copied = np.mean([chosen.count(first) for first, _ in pairs])
    others = np.mean([chosen.count(name) for name in ids if not any(name in pair for pair in pairs)])
    assert copied < 1.15 * others


def test_rows_chosen_by_scores_that_repeat_a_text_are_counted(planted, tmp_path):
    scores = np.zeros((3, 12))
    scores[:, [0, 8, 5]] = 3, 3, 2
    found = select(scores=planted(scores), budget=3, out=tmp_path / "out")
    assert {choice.row for choice in found.choices} == {0, 8, 5}
    assert any("1 of the chosen rows repeat the text" in note and "--duplicates 1" in note for note in found.notes)
