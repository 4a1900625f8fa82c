"""Some rows of a source in its own format, the others gone, and nothing else changed."""

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from vestige.data import load_examples, write_rows

ROWS = [
    {"text": "one, with a comma", "source": "a", "note": "x\ny"},
    {"text": "zwei ü", "source": "b", "note": ""},
    {"text": "=three", "source": "a", "note": '"quoted"'},
]


def save(folder, form):
    path = folder / f"data{form}"
    if form == ".parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif form == ".json":
        path.write_text(json.dumps(ROWS))
    elif form == ".jsonl":
        path.write_text("".join(json.dumps(row, sort_keys=True) + "\n\n" for row in ROWS))
    else:
        mark = "\t" if form == ".tsv" else ","
        cells = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row.values()] for row in ROWS]
        path.write_text("\n".join(mark.join(row) for row in [list(ROWS[0]), *cells]) + "\n")
    return path


@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_file_keeps_its_format_and_the_original_its_bytes(form, tmp_path):
    path = save(tmp_path, form)
    before = path.read_bytes()
    found = write_rows(path, {0, 2}, tmp_path, "cleaned")
    assert found == tmp_path / f"cleaned{form}"
    assert path.read_bytes() == before
    texts = [(one.text, one.source, one.extra.get("note")) for one in load_examples(found)]
    assert texts == [(row["text"], row["source"], row["note"]) for row in (ROWS[0], ROWS[2])]
    if form == ".jsonl":
        assert found.read_text().splitlines() == [line for line in path.read_text().splitlines() if line][::2]
    if form == ".parquet":
        assert parquet.read_schema(found) == parquet.read_schema(path)


def test_several_files_and_live_data_become_json_lines(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    for source in ([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], [{"text": "a"}, {"text": "b"}]):
        found = write_rows(source, {1}, tmp_path, "kept")
        assert found.suffix == ".jsonl"
        # A row without an id is known by its number, which would be another one in the new file.
        assert json.loads(found.read_text()) == {"id": "1", "text": "b"}
