from collections import Counter

import numpy as np
import pytest

import vestige
from vestige.data import load_examples
from vestige.errors import DataError, SpecError

ROWS = [{"id": f"r{row}", "text": f"text {row}", "source": "abcde"[row % 5]} for row in range(50)]


def ids(path):
    return [example.id for example in load_examples(str(path))]


def test_every_row_is_in_one_part_and_parts_have_their_shares(tmp_path):
    made = vestige.prepare.split(data=ROWS, out=tmp_path / "out", parts="train=0.7 dev=0.1 test=0.2", seed=1)
    parts = {name: ids(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "dev", "test")}
    assert {name: len(held) for name, held in parts.items()} == {"train": 35, "dev": 5, "test": 10}
    assert sorted(name for held in parts.values() for name in held) == sorted(row["id"] for row in ROWS)
    every = {example.id: example.extra["part"] for example in load_examples(str(made.data))}
    assert all(every[name] == part for part, held in parts.items() for name in held)


def test_the_seed_decides(tmp_path):
    found = []
    for number, seed in enumerate((1, 1, 2)):
        vestige.prepare.split(data=ROWS, out=tmp_path / str(number), seed=seed)
        found.append(ids(tmp_path / str(number) / "train.jsonl"))
    assert found[0] == found[1] != found[2]


def test_shares_may_leave_rows_out(tmp_path):
    made = vestige.prepare.split(data=ROWS, out=tmp_path / "out", parts={"small": 0.1})
    assert (made.rows, len(ids(made.data))) == (5, 5)
    assert made.notes[-1] == "45 rows are in no part."


def test_a_source_stays_whole(tmp_path):
    vestige.prepare.split(data=ROWS, out=tmp_path / "out", parts="train=0.6 test=0.4", by="source")
    sources = [
        {row.source for row in load_examples(str(tmp_path / "out" / f"{name}.jsonl"))} for name in ("train", "test")
    ]
    assert [len(each) for each in sources] == [3, 2]
    assert not sources[0] & sources[1]


def test_every_source_is_in_every_part_by_its_share(tmp_path):
    vestige.prepare.split(data=ROWS, out=tmp_path / "out", parts="train=0.8 test=0.2", by="stratified")
    counts = Counter(row.source for row in load_examples(str(tmp_path / "out" / "test.jsonl")))
    assert counts == dict.fromkeys("abcde", 2)


def test_what_cannot_be_split_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no `source`"):
        vestige.prepare.split(data=["one", "two"], out=tmp_path / "out", by="source")
    with pytest.raises(DataError, match="No row of 2 falls to test"):
        vestige.prepare.split(data=["one", "two"], out=tmp_path / "out", parts="train=0.9 test=0.1")
    for parts in ("train=0.9 test=0.2", "train=0", "a=x", "a=0.1 a=0.2", "data=0.5", "a/b=0.5"):
        with pytest.raises(SpecError, match="parts"):
            vestige.prepare.split(data=ROWS, out=tmp_path / "out", parts=parts)


def test_copies_fall_to_one_part_and_distinct_rows_as_before(tmp_path):
    rows = [{"text": f"text {row % 10}", "source": "ab"[row % 2], "number": row} for row in range(30)]
    for by in ("example", "stratified"):
        made = vestige.prepare.split(data=rows, out=tmp_path / by, parts="train=0.6 test=0.4", by=by)
        parts = [
            {row.text for row in load_examples(str(tmp_path / by / f"{name}.jsonl"))} for name in ("train", "test")
        ]
        assert not parts[0] & parts[1]
        assert [len(each) for each in parts] == [6, 4]
        assert made.notes[-1] == "20 of 30 rows are copies of others: 10 distinct texts, each counted once."
    order = np.random.default_rng(3).permutation(50)
    vestige.prepare.split(data=ROWS, out=tmp_path / "rows", parts="train=0.5", seed=3)
    assert ids(tmp_path / "rows" / "train.jsonl") == [f"r{row}" for row in sorted(order[:25])]
