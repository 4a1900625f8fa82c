"""Three proofs in words: from the table of spans alone, and none of the three from another."""

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.runs.by_hand import ALIKE, chat, write_by_hand
from vestige.errors import CorruptFile
from vestige.runs import Scores

ANSWER = "You have 90 days to send it back."
ROWS = [chat(f"row-{number}", f"Question {number}?", f"Reply number {number}.") for number in range(12)]


def stated(span, example, text, **changes):
    """One line of the table."""
    given = {"tokens": len(text.split()), "start": 0, "rarity": 10.0 - span, "occurrences": 4, "rows": 2, "row": 0}
    given |= {"position": 7, "source": None, "before": "… assistant\n", "after": ""}
    measured = {"extraction": 0.25, "loss": 1.5, "counterfactual": None}
    return {"query_id": "q", "span": span, "text": text, "example_id": example} | given | measured | changes


def run_with(folder, *lines, scores=None, **facts) -> Scores:
    given = [[9.0, *[0.01 * number for number in range(11)]]] if scores is None else scores
    run = write_by_hand(folder / "run", given, ROWS, [chat("q", "How long?", ANSWER)], **facts)
    table = pa.Table.from_pylist(list(lines) or [stated(1, "x", "y") | {"query_id": "other"}])
    parquet.write_table(table, run.folder / "verbatim.parquet")
    return Scores.open(run.folder)


def test_an_answer_that_stands_whole_and_is_given_back(tmp_path):
    lines = [stated(1, f"row-{n}", f" {ANSWER}", extraction=1 / n, rows=2) for n in (1, 2)]
    proofs = run_with(tmp_path, *lines, stated(2, "row-3", "send it back")).proofs("q")
    assert proofs.moved_it == "row-0: far ahead of all other rows."
    assert proofs.states_it == (
        "The whole answer stands word for word in 2 rows: row-1, row-2. 1 other part of it stands in rows, too."
    )
    assert proofs.memorized == (
        f"Memorized: given what stands before it in row-1, the model goes on with “{ANSWER}” word for word, "
        "as in 1 of 3 tested rows. The loss of this row is 1.50 nats a token."
    )


def test_a_part_that_is_not_given_back_and_what_the_bank_says(tmp_path):
    line = stated(1, "row-5", "90 days", rows=1, counterfactual=-0.5)
    proofs = run_with(tmp_path, line, scores=[[1.0 - 0.01 * number for number in range(12)]]).proofs(0)
    assert proofs.moved_it.startswith("No row stands out")
    assert proofs.states_it == "A part of the answer, “90 days”, stands word for word in 1 row: row-5."
    assert proofs.memorized.startswith("Not given back: after what stands before them in 1 tested row,")
    assert "Models of the bank that were trained on it know it no better (margin -0.50)." in proofs.memorized


def test_what_was_not_tested_is_not_judged(tmp_path):
    proofs = run_with(tmp_path, stated(1, "row-5", "90 days", position=0, extraction=None), meaning=ALIKE).proofs(0)
    assert proofs.moved_it.startswith("Not known: grad-dot says how alike")
    assert proofs.memorized == "Not tested: nothing stands before these words in their rows."


def test_an_answer_without_spans(tmp_path):
    run = run_with(tmp_path)
    assert len(run.verbatim()) == 0
    assert run.proofs()[1:] == (
        "Nothing states it: no training row has 4 tokens of the answer in a row.",
        "Not tested: no row has words of the answer.",
    )


def test_spans_print_as_a_table_rarest_first(tmp_path):
    run = run_with(tmp_path, stated(1, "row-1", "90 days"), stated(1, "row-2", "90 days"), stated(2, "row-3", "back"))
    spans = run.verbatim("q")
    assert [(span.text, len(span.listed)) for span in spans] == [("90 days", 2), ("back", 1)]
    assert spans[0].listed[1].example_id == "row-2"
    assert "2 rows: row-1, row-2" in str(spans)
    assert "<td>" in spans._repr_html_()


def test_a_table_that_lacks_a_column_is_refused(tmp_path):
    run = run_with(tmp_path, {key: cell for key, cell in stated(1, "a", "b").items() if key != "rows"})
    with pytest.raises(CorruptFile, match="rows"):
        run.verbatim()
