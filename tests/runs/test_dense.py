import json
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vestige.errors import CorruptFile, UserError
from vestige.runs import DENSE_FILE, id_array, open_dense, write_dense

AWKWARD = ["a", "", '"', "\\", '", "', ", ", '\\",', "]", '["x"]', "é", "日本\n", "🙂", "axes", '"scores":', "b]\\"]


def written(folder, scores, queries, examples):
    write_dense(folder / DENSE_FILE, scores, queries, examples)
    return open_dense(folder)


def test_the_file_is_what_the_library_reads(tmp_path):
    scores = np.random.default_rng(0).normal(size=(2, len(AWKWARD)))
    written(tmp_path, scores, ["p", '"q"'], AWKWARD)
    path = tmp_path / DENSE_FILE
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
    assert {name: json.loads(about[f"{name}_ids"]) for name in ("query", "example")} == {
        "query": ["p", '"q"'],
        "example": AWKWARD,
    }
    assert about["axes"] == "query example"
    assert np.array_equal(load_file(path)["scores"], scores.astype(np.float32))
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_files_that_the_library_wrote_are_read(tmp_path):
    scores = np.random.default_rng(0).normal(size=(2, len(AWKWARD))).astype(np.float32)
    about = {
        "axes": "query example",
        "query_ids": json.dumps(["p", "q"]),
        "example_ids": json.dumps(AWKWARD, ensure_ascii=False),
    }
    save_file({"scores": scores}, tmp_path / DENSE_FILE, about)
    file = open_dense(tmp_path)
    assert file.query_ids() == ["p", "q"]
    assert list(file.example_ids()) == AWKWARD
    assert np.array_equal(file.read(), scores)


def test_parts_are_those_of_the_whole(tmp_path):
    scores = np.arange(15, dtype=np.float32).reshape(3, 5)
    file = written(tmp_path, scores, "pqr", "abcde")
    assert file.shape == (3, 5)
    for rows, columns in ((slice(None), slice(1, 3)), (slice(1, 2), slice(None)), (slice(2, 9), slice(4, 9))):
        assert np.array_equal(file.read(rows, columns), scores[rows, columns])


def test_damage_is_found(tmp_path):
    with pytest.raises(UserError, match="--dense"):
        open_dense(tmp_path)
    written(tmp_path, np.zeros((1, 3)), ["q"], "abc")
    path = tmp_path / DENSE_FILE
    whole = path.read_bytes()
    for broken in (b"", whole[:5], whole[:40], whole[:-1], whole + b"0", whole.replace(b"F32", b"F16"), b"\xff" * 99):
        path.write_bytes(broken)
        with pytest.raises(CorruptFile, match="cannot be read"):
            open_dense(tmp_path)
    path.write_bytes(whole.replace(b', \\"c\\"', b"       "))
    with pytest.raises(CorruptFile, match="2 ids for 3 examples"):
        list(open_dense(tmp_path).example_ids())
    path.write_bytes(whole.replace(b"query example", b"example query"))
    with pytest.raises(CorruptFile, match="has the axes 'example query'"):
        open_dense(tmp_path)


@pytest.mark.slow
def test_writing_ids_takes_no_memory_for_each(tmp_path):
    def peak(count):
        scores = np.zeros((1, count), dtype=np.float32)
        tracemalloc.start()
        write_dense(tmp_path / str(count), scores, ["q"], (f"example-{row}" for row in range(count)))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(20_000)
    assert (peak(100_000) - peak(20_000)) / 80_000 < 2


def test_an_array_of_ids_has_its_chunks_and_may_be_empty():
    names = [str(number) for number in range(20_000)]
    assert id_array(iter(names)).to_pylist() == names
    assert id_array([]).to_pylist() == []
