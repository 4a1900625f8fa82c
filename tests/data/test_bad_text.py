"""Halves of surrogate pairs: the row is named, or they are replaced and counted, wherever they stand."""

import json

import pytest

from vestige.data import load_examples, load_queries, load_records, tokenize_source
from vestige.errors import DataError

BAD = "cut \ud83d here"
GOOD = "cut \ufffd here"


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"text": BAD}, "text"),
        ({"id": "\udcff", "text": "a"}, "id"),
        ({"text": "a", "source": BAD}, "source"),
        ({"text": "a", "label": BAD}, "label"),
        ({"text": "a", "meta": {"tags": ["a", BAD]}}, r"meta\.tags\[1\]"),
        ({"prompt": "a", "completion": BAD}, "completion"),
        ({"messages": [{"role": "user", "content": BAD}]}, r"messages\[0\]\.content"),
        ({"text": "a", "b\ud800": 1}, r"b\\ud800"),
    ],
)
def test_the_row_and_the_field_are_named(tmp_path, row, field):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n\n" + json.dumps(row) + "\n")
    for load in (load_examples, load_queries, lambda source: list(load_records(source))):
        with pytest.raises(DataError, match=rf"rows.jsonl, row 1 \(line 3\): `{field}` holds half of a surrogate pair"):
            load(path)


def test_halves_are_replaced_and_counted_once(tmp_path, byte_level, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "x\udc00", "text": BAD, "meta": {"b\ud800": [BAD]}}, {"text": "whole \U0001f600"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(path, on_bad_text="replace")
    assert [example.text for example in examples] == [GOOD, "whole \U0001f600"]
    assert (examples[0].id, examples[0].extra) == ("x\ufffd", {"meta": {"b\ufffd": [GOOD]}})
    said = "rows.jsonl: 4 halves of surrogate pairs, which are no characters, were replaced with U+FFFD."
    assert capsys.readouterr().err.count(said) == 1
    data = tokenize_source(path, byte_level, max_length=None, name="rows.jsonl", on_bad_text="replace")
    assert [example.text for example in data.examples] == [GOOD, "whole \U0001f600"]
    assert capsys.readouterr().err.count(said) == 1


def test_a_question_on_the_command_line_is_checked_too():
    with pytest.raises(DataError, match="the list, row 0: the text holds half"):
        load_queries("\ud800x")
    assert load_queries("\ud800x", on_bad_text="replace")[0].prompt == "\ufffdx"
