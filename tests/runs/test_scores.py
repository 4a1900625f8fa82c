import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.runs.by_hand import chat, write_by_hand
from tests.runs.conftest import tokenized
from vestige.data import Example
from vestige.errors import CorruptFile, MissingExtra, UserError
from vestige.runs import RunTables, Scores, write_run


@pytest.fixture
def folder(tmp_path, record, content):
    return write_run(tmp_path / "run", record, content)


@pytest.fixture
def scores(folder) -> Scores:
    return Scores.open(folder)


def test_top_and_bottom_by_position_and_by_id(scores):
    assert scores.queries == ["q0", "q1"]
    assert [row.example_id for row in scores.top(0, 2)] == ["a", "d"]
    assert [row.example_id for row in scores.top("q1", 1)] == ["b"]
    assert [row.example_id for row in scores.bottom(np.int64(1), 2)] == ["d", "e"]
    assert [row.example_id for row in scores.bottom(-1, 1)] == ["d"]
    first = scores.top()[0]
    assert (first.rank, first.score, first.percentile, first.row, first.source) == (1, 3.0, 60.0, 0, "books")
    assert first.text == "the sky is blue"
    assert scores.meaning.sign == "positive: good"
    assert scores.run.method == "grad-dot"


def test_an_unknown_query_is_answered_with_the_known_ones(scores):
    with pytest.raises(UserError, match=r"Did you mean 'q0'\?"):
        scores.top("q00")
    with pytest.raises(UserError, match="no query number 2"):
        scores.top(2)
    with pytest.raises(TypeError):
        scores.top(0.5)


def test_a_table_prints_aligned(scores, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = str(scores.top(0, k=10)).splitlines()
    assert lines[0] == "proponents of query q0: sky | blue"
    assert lines[1].split() == ["rank", "example", "strength", "score", "percentile", "text"]
    assert lines[2].split()[:5] == ["1", "a", "100", "+3", "60.0"]
    assert "(the run" not in str(scores.top(0, k=3))
    assert repr(scores.top(0)) == str(scores.top(0))


def test_long_texts_are_shortened_only_in_print(tmp_path, record, content, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    words = "<b>" + "word " * 100
    example = content.train.examples[0]
    content.train.examples[0] = type(example)("a", 0, text=words)
    table = Scores.open(write_run(tmp_path / "run", record, content)).top(0, 1)
    assert table[0].text == words
    assert all(len(line) <= 60 for line in str(table).splitlines())
    assert "…" in str(table)
    assert "&lt;b&gt;word" in table._repr_html_()


def test_components_and_tokens_add_up_to_the_score(scores):
    for row in [*scores.top("q1", 3), *scores.bottom("q1", 3)]:
        assert sum(part.score for part in scores.components("q1", row.example_id)) == pytest.approx(row.score)
        assert sum(part.score for part in scores.tokens("q1", row.example_id)) == pytest.approx(row.score)
    assert [part.component for part in scores.components(0, "a")] == ["one", "two"]
    assert "".join(part.token for part in scores.tokens(0, "a")) == "he sky is blue"


def test_parts_of_examples_that_share_an_id_are_refused_not_mixed(tmp_path, record, content):
    first, other = content.train.examples[0], content.train.examples[3]
    content.train.examples[3] = type(other)(first.id, 3, text=other.text)
    scores = Scores.open(write_run(tmp_path / "run", record, content))
    for split in (scores.tokens, scores.components):
        with pytest.raises(UserError, match="2 listed examples have the id 'a'"):
            split(0, "a")


def test_scores_of_a_query_that_is_not_there_are_refused(folder):
    rows = parquet.read_table(folder / "scores.parquet").to_pylist()
    parquet.write_table(pa.Table.from_pylist([*rows, rows[0] | {"query_id": "gone"}]), folder / "scores.parquet")
    record = json.loads((folder / "run.json").read_text()) | {"files": {}}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(CorruptFile, match=r"scores\.parquet names 'gone', and queries\.parquet lacks it"):
        Scores.open(folder).top()


def test_dense_scores(scores, all_scores):
    assert np.array_equal(scores.dense(), all_scores)


def test_self_influence_is_highest_first_with_ties_in_row_order(tmp_path, record, content):
    found = content._replace(self_scores=np.array([1.0, 4.0, 0.5, 4.0, 2.0]))
    scores = Scores.open(write_run(tmp_path / "run", record, found))
    assert [(entry.example_id, entry.row, entry.score) for entry in scores.self_influence()] == [
        *(("b", 1, 4.0), ("d", 3, 4.0), ("e", 4, 2.0), ("a", 0, 1.0), ("c", 2, 0.5))
    ]


@pytest.mark.parametrize("kinds", [1, 4, 10_000])
@pytest.mark.parametrize("count", [1, 16, 200])
def test_self_influence_of_examples_that_were_left_out(kinds, count, tmp_path, record, content):
    random = np.random.default_rng(count)
    values = random.integers(kinds, size=count) / 7
    values[random.random(count) < 0.1] = np.nan
    names = [f"example {row}" for row in range(count)]
    train = tokenized([Example(name, row, text=name) for row, name in enumerate(names)])
    tables = RunTables(train, content.queries, [], generated=[False, False], self_scores=values)
    record = record.model_copy(update={"data": record.data.model_copy(update={"examples": count})})
    scores = Scores.open(write_run(tmp_path / "run", record, tables))
    order = sorted(np.flatnonzero(~np.isnan(values)).tolist(), key=lambda row: (-values[row], row))
    found = [(entry.example_id, entry.row, entry.score) for entry in scores.self_influence()]
    assert found == [(names[row], row, values[row]) for row in order]
    assert np.array_equal(scores.self_scores(), values, equal_nan=True)


def test_what_was_not_stored_is_named_with_the_flag_that_stores_it(tmp_path, record, content):
    bare = RunTables(content.train, content.queries, content.ranked, generated=[False, False])
    scores = Scores.open(write_run(tmp_path / "run", record, bare))
    with pytest.raises(UserError, match="--dense"):
        scores.dense()
    with pytest.raises(UserError, match="--tokens"):
        scores.tokens(0, "a")
    with pytest.raises(UserError, match="--self-influence"):
        scores.self_influence()
    with pytest.raises(UserError, match="does not split scores by component"):
        scores.components(0, "a")


def test_an_example_that_is_not_listed(scores):
    with pytest.raises(UserError, match="not among the listed"):
        scores.tokens(0, "zzz")


def test_to_pandas_holds_both_ends(scores):
    pytest.importorskip("pandas")
    frame = scores.to_pandas()
    assert len(frame) == 12
    assert frame[(frame.query_id == "q0") & (frame.end == "proponent")].text.tolist()[0] == "the sky is blue"


def test_to_pandas_without_pandas_says_how_to_get_it(scores, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match="pip install pandas"):
        scores.to_pandas()


def test_a_damaged_table_is_named(folder):
    (folder / "scores.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CorruptFile, match=r"scores\.parquet"):
        Scores.open(folder).top()


@pytest.mark.slow
def test_opens_without_torch(folder):
    code = (
        "import sys; from vestige.runs import Scores; print(Scores.open(sys.argv[1]).top(0, 1));"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)


def test_beyond_what_is_listed_the_scores_of_all_examples_go_on(scores, all_scores):
    table = scores.top(0, k=10)
    assert [row.example_id for row in table] == ["a", "d", "c", "e", "b"]
    assert [row.score for row in table] == sorted(all_scores[0].tolist(), reverse=True)
    assert [row.percentile for row in table] == [60.0, 60.0, 40.0, 20.0, 0.0]
    assert [row.row for row in scores.bottom(0, k=5)] == [1, 4, 2, 0, 3]
    assert not table.note


def test_without_all_scores_the_note_says_how_to_get_more(tmp_path, record, content):
    scores = Scores.open(write_run(tmp_path / "run", record, content._replace(dense=None)))
    assert len(scores.top(0, k=10)) == 3
    assert str(scores.top(0, k=10)).splitlines()[-1] == "(the run lists 3 of 5; for more: k=5 or dense=True)"


def test_texts_that_the_run_lacks_are_missed_in_words(tmp_path):
    rows = [chat(f"row-{number}", f"What is {number}?", "That.") for number in range(6)]
    scores = write_by_hand(tmp_path / "run", [[6.0, 5, 4, 3, 2, 1]], rows, [chat("q", "What?")], k=2, dense=True)
    table = scores.top(0, k=4)
    assert [(row.example_id, bool(row.text), row.strength) for row in table] == [
        *(("row-0", True, 100.0), ("row-1", True, pytest.approx(500 / 6))),
        *(("row-2", False, pytest.approx(400 / 6)), ("row-3", False, 50.0)),
    ]
    assert table.note == "(the run has no text of 2 of them)"


def test_all_scores_as_a_data_frame(scores, all_scores):
    frame = scores.to_pandas(dense=True)
    assert list(frame.index) == list("abcde")
    assert list(frame.columns) == ["q0", "q1"]
    assert np.array_equal(frame.to_numpy(), all_scores.T)
    assert frame["q1"].idxmax() == "b"


def test_a_run_shows_its_queries_and_conclusions_in_a_notebook(tmp_path):
    rows = [chat(f"row-{number}", f"What is {number}?", "That.") for number in range(12)]
    query = chat("<q>", "What is <b>bold</b>?", "Text\x1b[31m.")
    page = write_by_hand(tmp_path / "run", [[9.0, *[0.0] * 11]] * 1, rows, [query])._repr_html_()
    assert "1 queries against 12 examples by grad-dot" in page
    assert "One row stands out" in page
    assert "&lt;b&gt;bold" in page
    assert "<b>" not in page
    assert "\x1b" not in page


def test_a_figure_of_a_query_is_no_window_and_reads_no_formula(tmp_path):
    rows = [chat(f"$row_{number}$", f"What is {number}?", "That.") for number in range(12)]
    scores = write_by_hand(tmp_path / "run", [[9.0, *[0.0] * 10, -3.0]], rows, [chat("q", "$\\frac{1}$?")])
    figure = scores.plot("q")
    figure.savefig(tmp_path / "figure.png")
    bars, histogram = figure.axes
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert labels[0] == "$row_0$"
    assert labels[-1] == "$row_11$"
    assert histogram.get_ylabel() == "training examples"


def test_two_runs_of_the_same_data_are_compared(tmp_path):
    rows = [chat(f"row-{number}", f"What is {number}?", "That.") for number in range(6)]
    query = [chat("q", "What?", "This.")]
    first = write_by_hand(tmp_path / "one", [[6.0, 5, 4, 3, 2, 1]], rows, query, dense=True)
    other = write_by_hand(tmp_path / "two", [[1.0, 2, 3, 4, 5, 6]], rows, query, dense=True, method="grad-cos")
    found = first.compare(other, "q", 2)
    assert [(row.example_id, row.rank, row.other_rank, row.change) for row in found] == [
        *(("row-0", 1, 6, -5), ("row-1", 2, 5, -3), ("row-5", 6, 1, 5), ("row-4", 5, 2, 3)),
    ]
    assert (found.shared, found.k, found.correlation) == (0, 2, pytest.approx(-1.0))
    assert "0 of the first 2 are shared by grad-dot" in str(found)
    assert "<table>" in found._repr_html_()
    assert first.compare(first, 0, 3).shared == 3


def test_without_all_scores_only_listed_ranks_are_compared(tmp_path):
    rows = [chat(f"row-{number}", f"What is {number}?", "That.") for number in range(6)]
    query = [chat("q", "What?", "This.")]
    first = write_by_hand(tmp_path / "one", [[6.0, 5, 4, 3, 2, 1]], rows, query, k=2)
    other = write_by_hand(tmp_path / "two", [[1.0, 2, 3, 4, 5, 6]], rows, query, k=2)
    found = first.compare(other, 0, 2)
    assert found.correlation is None
    assert (found[0].rank, found[0].other_rank, found[0].change) == (1, None, None)


def test_runs_of_other_data_or_questions_are_not_compared(tmp_path):
    rows = [chat(f"row-{number}", f"What is {number}?", "That.") for number in range(6)]
    query = [chat("q", "What?", "This.")]
    one = write_by_hand(tmp_path / "one", [[6.0, 5, 4, 3, 2, 1]], rows, query)
    fewer = write_by_hand(tmp_path / "fewer", [[6.0, 5, 4, 3, 2]], rows[:5], query)
    changed = [*rows[:5], chat("row-5", "What is 5?", "No.")]
    altered = write_by_hand(tmp_path / "altered", [[6.0, 5, 4, 3, 2, 1]], changed, query)
    asked = write_by_hand(tmp_path / "asked", [[6.0, 5, 4, 3, 2, 1]], rows, [chat("q", "Who?", "This.")])
    named = write_by_hand(tmp_path / "named", [[6.0, 5, 4, 3, 2, 1]], rows, [chat("p", "What?", "This.")])
    for run in (fewer, altered):
        with pytest.raises(UserError, match="of different data"):
            one.compare(run)
    with pytest.raises(UserError, match="is another question"):
        one.compare(asked)
    with pytest.raises(UserError, match=r"has no query 'q'\. It has: 'p'"):
        one.compare(named)


def test_runs_with_other_tokens_of_the_same_texts_are_compared(tmp_path):
    rows = [chat(f"row-{number}", f"What is {number}?", "That.") for number in range(6)]
    query = [chat("q", "What?", "This.")]
    one = write_by_hand(tmp_path / "one", [[6.0, 5, 4, 3, 2, 1]], rows, query)
    other = write_by_hand(tmp_path / "other", [[6.0, 5, 4, 3, 2, 1]], rows, query)
    other.run = other.run.model_copy(update={"data": other.run.data.model_copy(update={"fingerprint": "word search"})})
    assert one.compare(other, 0, 6).shared == 6
