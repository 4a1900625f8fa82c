"""Items of a benchmark that stand in training data, and what that does to the model's answers."""

import numpy as np
import pytest
from scipy.stats import ttest_ind

import vestige
from tests.measures.audited import QUESTIONS, questions, simple
from tests.workshop import write_rows
from vestige.errors import DataError, SpecError
from vestige.measures import find_matches, find_spans
from vestige.reports import report

ITEM = "The quick brown fox jumps over the lazy dog while seven wizards quietly mix a potion."


def longest_span(item, row):
    """Every pair of positions in turn."""
    best = 0
    for i in range(len(item)):
        for j in range(len(row)):
            count = 0
            while i + count < len(item) and j + count < len(row) and item[i + count] == row[j + count]:
                count += 1
            best = max(best, count)
    return best


def test_spans_are_the_longest_common_runs_of_words():
    draw = np.random.default_rng(0)
    items = [draw.choice(list("abcd"), size=draw.integers(4, 12)).tolist() for _ in range(40)]
    rows = [draw.choice(list("abcd"), size=draw.integers(0, 30)).tolist() for _ in range(20)]
    found = find_spans(items * 1, rows, span=5)
    # Here words repeat, so that runs which several items share do not count: compare with those that do.
    for item, span in zip(items, found, strict=True):
        best = max(longest_span(item, row) for row in rows)
        if span is not None:
            assert span.words <= best
            assert longest_span(item, rows[span.row]) >= span.words >= min(5, len(item))
        elif best >= min(5, len(item)):
            shared = [" ".join(item[b : b + min(5, len(item))]) for b in range(len(item))]
            assert any(sum(run in " ".join(other) for other in items) > 2 for run in shared)


def test_an_item_is_found_verbatim_inside_a_longer_row_and_as_a_near_copy():
    rows = ["Nothing of it stands here at all.", f"Before. {ITEM.upper()} After!", "Bees make honey of flowers."]
    reworded = "While seven wizards are quietly mixing a potion, the quick brown foxes jump over lazy dogs."
    inside, near, clean, short = find_matches([ITEM, reworded, "An item about trains and rails.", "Bees make"], rows)
    assert (inside.kind, inside.row, inside.words, inside.share) == ("verbatim", 1, 16, 1.0)
    assert inside.text.startswith("the quick brown fox")
    assert (near.kind, near.row) == ("near copy", 1)
    assert near.similarity > 0.5
    assert (clean.kind, clean.row) == ("clean", None)
    assert (short.kind, short.row) == ("too short", None)  # two words stand anywhere
    assert [match.kind for match in find_matches([ITEM], [])] == ["clean"]
    assert find_matches([], rows) == []
    with pytest.raises(SpecError, match="near"):
        find_matches([ITEM], rows, near=0.0)


def test_the_frame_of_a_task_is_no_contamination():
    frame = "Choose the right answer to the following question and give only its letter without any explanation"
    items = [f"{frame}: {word} {word[::-1]}" for word in ("alpha", "beta", "gamma", "delta", "kappa")]
    rows = [f"{frame}. Who wrote the letters of the dead queen of the mountains?"]
    assert {match.words for match in find_matches(items, rows)} == {0}


@pytest.mark.slow
def test_the_audit_says_which_items_stand_in_the_data_and_by_how_much_answers_are_better(place, tmp_path):
    data = questions(QUESTIONS, "q", 0)
    items = [{**row, "id": f"item-{number}"} for number, row in enumerate(data[:8])]
    items += [{**row, "id": f"new-{number}"} for number, row in enumerate(questions(8, "n", 77))]
    write_rows(tmp_path / "benchmark.jsonl", items)
    write_rows(tmp_path / "data.jsonl", data)
    model = str(place / "run/checkpoint-30")
    vestige.attribute(
        model=model,
        data=tmp_path / "data.jsonl",
        queries=str(tmp_path / "benchmark.jsonl"),
        method="bm25",
        out=tmp_path / "scores",
    )
    found = simple(
        place,
        tmp_path / "run",
        data=str(tmp_path / "data.jsonl"),
        against=str(tmp_path / "benchmark.jsonl"),
        against_span=11,
        against_near=1.0,
        against_scores=tmp_path / "scores",
        reference_model=str(place / "tiny-model"),
        measures=("loss",),
        flag=None,
    )
    table = found.contamination.to_pandas().set_index("item_id")
    record = found.run.contamination
    assert (record.items, record.verbatim) == (16, int((table.kind == "verbatim").sum()))
    for number in range(8):
        assert table.kind[f"item-{number}"] == "verbatim"
        assert table.example_id[f"item-{number}"] == f"q-{number}"
        assert table.loss[f"item-{number}"] == pytest.approx(found.values("loss")[number], rel=1e-5)
        assert table.score_rank[f"item-{number}"] <= 10
    assert record.leading[0] > 0.5
    (loss,) = [each for each in record.inflation if each.measure == "loss"]
    dirty = table.kind != "clean"
    assert loss.difference[0] == pytest.approx(table.loss[dirty].mean() - table.loss[~dirty].mean())
    interval = ttest_ind(table.loss[dirty], table.loss[~dirty], equal_var=False).confidence_interval()
    np.testing.assert_allclose(loss.difference[1:], interval, rtol=1e-9)
    assert {"accuracy", "perplexity_ratio"} <= {each.measure for each in record.inflation}
    assert any(note.startswith("Contamination of ") for note in found.run.notes)
    page = report(found.folder, out=tmp_path / "page.html").read_text()
    assert "item-0" in page
    with pytest.raises(DataError, match="no query is called"):
        simple(
            place,
            tmp_path / "other",
            data=str(tmp_path / "data.jsonl"),
            against=[{**row, "id": f"x{row['id']}"} for row in items],
            against_span=11,
            against_scores=tmp_path / "scores",
            measures=("loss",),
            flag=None,
        )


@pytest.mark.slow
def test_items_are_measured_without_what_the_data_alone_has(place, tmp_path):
    """Their classes and the layer chosen by them were asked of the items too, after everything else was measured."""
    data = [{**row, "kind": row["completion"]} for row in questions(QUESTIONS, "q", 0)]
    given = {
        "measures": ("psmi", "smi"),
        "choose_layer": "smi",
        "label_field": "kind",
        "layers": ("all",),
        "flag": None,
    }
    found = simple(place, tmp_path / "run", data=data, against=questions(6, "n", 77), **given)
    assert found.run.contamination.items == 6
    assert found.run.main_layer in (1, 2)
