import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.indexes.synthetic import WIDTH, build, examples_of, gradient_rows, lengths_of
from vestige.data import TokenizedData
from vestige.errors import CorruptFile, UserError
from vestige.indexes import Index, _plan, fingerprint_rows, index_status, marker_path, remove_index, shard_path


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """An index of 60 examples that rounds nothing."""
    folder = tmp_path_factory.mktemp("exact") / "index"
    build(folder, dtype="float32")
    return Index.open(folder)


@pytest.fixture
def small(tmp_path):
    build(tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("max_bytes", [1, 4 * WIDTH * 3, 2**24])
def test_a_scan_yields_each_row_once_and_equals_the_dense_matrix(exact, max_bytes):
    dense, seen = gradient_rows(np.arange(60)), []
    for block in exact.blocks(max_bytes):
        assert block.gradients.dtype == torch.float32
        assert len(block.gradients) == 1 or block.gradients.nbytes <= max_bytes
        assert torch.equal(block.gradients, dense[block.example])
        assert torch.equal(block.norm, dense[block.example].norm(dim=1))
        assert torch.equal(block.loss, block.example.float() / 8)
        seen += block.example.tolist()
    assert sorted(seen) == list(range(60))
    # Plan order: the longest examples first.
    assert seen[0] == int(np.argmax(lengths_of(60)))


def test_scores_from_a_scan_equal_those_from_the_matrix(exact):
    query = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    scores = torch.empty(3, 60)
    for block in exact.blocks(4 * WIDTH * 7):
        scores[:, block.example] = query @ block.gradients.T
    torch.testing.assert_close(scores, query @ gradient_rows(np.arange(60)).T, rtol=1e-5, atol=1e-3)


def test_blocks_that_are_kept_are_not_overwritten(exact):
    dense, kept = gradient_rows(np.arange(60)), []
    for number, block in enumerate(exact.blocks(4 * WIDTH * 2)):
        # A block, a view of its rows, or nothing: whatever a caller may hold on to.
        kept.append((block.example, (block.gradients, block.gradients[:1], None)[number % 3]))
    for example, gradients in kept:
        if gradients is not None:
            assert torch.equal(gradients, dense[example[: len(gradients)]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_scan_multiplies_rows_as_they_are_stored_whichever_shards_it_is_asked_for(tmp_path, dtype):
    build(tmp_path / "index", dtype=dtype)
    index = Index.open(tmp_path / "index")
    queries = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    found = list(index.scan(queries))
    rows, scores, norms = torch.cat([one[0] for one in found]), torch.cat([one[1] for one in found], 1), found[0][2]
    assert sorted(rows.tolist()) == list(range(60))
    exact = queries.double() @ index.gradients_of(rows).double().T
    largest = index.gradients_of(rows).norm(dim=1) * queries.norm(dim=1, keepdim=True)
    assert ((scores - exact).abs() <= 1e-6 * largest).all()
    assert torch.equal(norms, index.losses_and_norms()[1][found[0][0]])
    # However the shards are shared among processes, every bit is the same.
    total = len(index.manifest.shard_rows)
    for size in (1, 3):
        groups = [range(first, min(first + size, total)) for first in range(0, total, size)]
        shared = [block for group in groups for block in index.scan(queries, shards=group)]
        assert torch.equal(torch.cat([one[1] for one in shared], 1), scores)


def test_a_scan_that_is_left_early_leaves_no_thread(exact):
    before = threading.active_count()
    blocks = exact.blocks(4 * WIDTH)
    next(blocks)
    blocks.close()
    assert threading.active_count() == before


def test_a_fault_while_reading_ahead_reaches_the_caller(small):
    index = Index.open(small)
    shard_path(small, 3).write_bytes(b"gone")
    with pytest.raises(CorruptFile, match=r"00003\.safetensors"):
        list(index.blocks())


def test_rows_are_looked_up_in_the_order_asked(exact):
    rows = [59, 0, 7, 7, 31]
    assert torch.equal(exact.gradients_of(rows), gradient_rows(np.array(rows)))
    assert torch.equal(exact.gradients_of(torch.tensor(rows)), gradient_rows(np.array(rows)))
    assert exact.gradients_of([]).shape == (0, WIDTH)


@pytest.mark.parametrize("rows", [[60], [-1]])
def test_a_row_that_is_not_there_is_an_error(exact, rows):
    with pytest.raises(IndexError, match="60 examples"):
        exact.gradients_of(rows)


def test_the_columns_of_a_component(exact):
    assert exact.columns(1) == slice(16, 24)
    assert (exact.rows, exact.width) == (60, WIDTH)


def test_no_index_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"does not exist. Make one with: vestige index"):
        Index.open(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        Index.open(tmp_path)


@pytest.mark.parametrize("damage", ["marker", "size"])
def test_an_unfinished_index_says_how_much_is_missing_and_how_to_go_on(small, damage):
    if damage == "marker":
        marker_path(small, 2).unlink()
    else:
        shard_path(small, 2).write_bytes(shard_path(small, 2).read_bytes()[:-1])
    total = len(Index.open(small, allow_missing=True).manifest.shard_rows)
    with pytest.raises(UserError, match=f"1 of {total} shards are missing(.|\n)*vestige index --model tiny"):
        Index.open(small)
    assert Index.open(small, allow_missing=True).missing_shards() == [2]
    status = index_status(small)
    assert (status.done, status.total) == (total - 1, total)
    assert status.rows == 60 - Index.open(small, allow_missing=True).manifest.shard_rows[2]


def test_verify_reads_every_byte(small):
    index = Index.open(small)
    assert index.verify() == []
    body = bytearray(shard_path(small, 4).read_bytes())
    body[-1] ^= 1
    shard_path(small, 4).write_bytes(body)
    assert Index.open(small).missing_shards() == []
    assert [(fault.number, "sha256" in fault.reason) for fault in index.verify()] == [(4, True)]


def test_verify_notices_rows_that_are_there_twice(small):
    index = Index.open(small)
    sizes = index.manifest.shard_rows
    one, other = next((i, j) for i in range(len(sizes)) for j in range(i) if sizes[i] == sizes[j])
    # A shard that is whole, under another's number, with a marker to match.
    shard_path(small, one).write_bytes(shard_path(small, other).read_bytes())
    copied = json.loads(marker_path(small, other).read_text())
    mine = json.loads(marker_path(small, one).read_text())
    marker_path(small, one).write_text(json.dumps(mine | {name: copied[name] for name in ("bytes", "sha256")}))
    with pytest.raises(CorruptFile, match="do not hold each of 60 examples once"):
        Index.open(small).verify()


def test_the_fingerprint_follows_the_content(small, tmp_path):
    build(tmp_path / "again")
    build(tmp_path / "other", dtype="int8")
    first, again, other = (Index.open(tmp_path / name).fingerprint for name in ("index", "again", "other"))
    assert first == again != other


def test_examples_and_lengths_come_back_as_they_were(small):
    index = Index.open(small)
    assert index.examples() == examples_of(60)
    assert np.array_equal(index.lengths(), lengths_of(60))
    build(small, 90, append=True)
    assert Index.open(small).examples() == examples_of(90)


def test_damaged_examples_are_named_and_written_again(small):
    path = small / "examples" / "00000-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(CorruptFile, match=r"00000\*\.parquet is missing or damaged"):
        Index.open(small).examples()
    build(small)
    assert path.read_bytes() == whole


def test_many_examples_lie_in_several_files_and_only_a_damaged_one_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(_plan, "_FILE_ROWS", 25)
    folder = tmp_path / "index"
    build(folder)
    paths = sorted((folder / "examples").iterdir())
    assert [path.name for path in paths] == [f"00000-0000{place}.parquet" for place in range(3)]
    assert Index.open(folder).examples() == examples_of(60)
    assert np.array_equal(Index.open(folder).lengths(), lengths_of(60))
    whole, times = [path.read_bytes() for path in paths], [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    with pytest.raises(CorruptFile, match="missing or damaged"):
        Index.open(folder).examples()
    build(folder)
    assert [path.read_bytes() for path in paths] == whole
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)] == [True, False, True]


def test_an_older_index_with_all_examples_in_one_file_is_read_and_continued(small):
    (small / "examples" / "00000-00000.parquet").rename(small / "examples" / "00000.parquet")
    assert Index.open(small).examples() == examples_of(60)
    build(small, 90, append=True)
    assert Index.open(small).examples() == examples_of(90)
    assert {path.name for path in (small / "examples").iterdir()} == {"00000.parquet", "00001-00000.parquet"}
    (small / "examples" / "00000.parquet").write_bytes(b"torn")
    build(small, 90)
    assert Index.open(small).examples() == examples_of(90)


@pytest.mark.parametrize("changed", ["tokens", "targets", "label", "text"])
def test_the_fingerprint_of_rows_sees_everything_that_is_stored(changed):
    def data(change=None):
        examples, ids = examples_of(4), [np.array([1, 2, 3], dtype=np.int32) for _ in range(4)]
        targets = [np.array([False, True, True]) for _ in range(4)]
        if change == "tokens":
            ids[2][0] = 7
        elif change == "targets":
            targets[2][1] = False
        elif change is not None:
            old = vars(examples[2])
            examples[2] = type(examples[2])(**(old | {"label": "x"} if change == "label" else old | {"prompt": "?"}))
        return TokenizedData(examples, ids, targets, np.zeros(4, dtype=bool), "unused")

    assert fingerprint_rows(data(), 0, 4) == fingerprint_rows(data(), 0, 4)
    assert fingerprint_rows(data(changed), 0, 4) != fingerprint_rows(data(), 0, 4)
    assert fingerprint_rows(data(changed), 0, 2) == fingerprint_rows(data(), 0, 2)


def test_removing_an_index_removes_nothing_else(small, tmp_path):
    (small / "my notes.txt").touch()
    with pytest.raises(UserError, match=r"holds other files \(my notes\.txt\)"):
        remove_index(small)
    assert Index.open(small).verify() == []
    (small / "my notes.txt").unlink()
    remove_index(small)
    assert list(small.iterdir()) == []
    remove_index(tmp_path / "none")


def rewrite(folder, number, change) -> None:
    """Put other bytes in place of a shard, with a marker that vouches for them."""
    path, marker = shard_path(folder, number), marker_path(folder, number)
    body = path.read_bytes()
    size = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + size])
    text = json.dumps(change(header), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body[8 + size :])
    known = json.loads(marker.read_text())
    known |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    marker.write_text(json.dumps(known))


def swapped(header):
    return header | {"loss": header["norm"], "norm": header["loss"]}


def renamed(header):
    other = {"loss": "norm", "norm": "loss"}
    return {other.get(name, name): entry for name, entry in header.items()}


def negative(header):
    start, end = header["loss"]["data_offsets"]
    return header | {"loss": header["loss"] | {"data_offsets": [start - 8, end - 8]}}


def before_the_file(header):
    entry = header["example"]
    first, last = entry["data_offsets"]
    return header | {"example": entry | {"data_offsets": [first - 8, last - 8]}}


def huge(header):
    return header | {"gradients": header["gradients"] | {"shape": [2**40, 2**20]}}


def narrower(header):
    rows, columns = header["gradients"]["shape"]
    return header | {"gradients": header["gradients"] | {"shape": [rows, columns // 2], "dtype": "F32"}}


@pytest.mark.parametrize("change", [swapped, renamed, negative, before_the_file, huge, narrower])
def test_headers_that_say_something_else_are_refused_even_with_a_marker_to_match(small, change):
    rewrite(small, 1, change)
    with pytest.raises(CorruptFile, match="00001"):
        list(Index.open(small).blocks())


def test_a_damaged_shard_is_found_when_it_is_read_and_not_before(small):
    body = bytearray(shard_path(small, 4).read_bytes())
    body[-1] ^= 1
    shard_path(small, 4).write_bytes(body)
    index = Index.open(small)
    assert len(list(index.blocks(shards=range(4)))) == 4
    with pytest.raises(CorruptFile, match=r"00004\.safetensors .*sha256(.|\n)*vestige index(.|\n)*--verify"):
        list(index.blocks())
    with pytest.raises(CorruptFile, match="00004"):
        index.gradients_of(np.arange(60))


def test_a_shard_is_hashed_once_in_a_process(small, monkeypatch):
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(
        "hashlib.file_digest", lambda file, kind: read.append(Path(file.name).name) or digest(file, kind)
    )
    index = Index.open(small)
    for _ in range(3):
        list(index.blocks(1))
    index.gradients_of([0, 5])
    assert len(read) == len(set(read)) == len(index.manifest.shard_rows)


@pytest.mark.parametrize("examples", [-1, 59, 61, 10**15])
def test_a_manifest_that_counts_other_examples_is_refused(small, examples):
    known = json.loads((small / "manifest.json").read_text())
    known["data"]["examples"] = examples
    (small / "manifest.json").write_text(json.dumps(known))
    with pytest.raises(CorruptFile, match="does not read as an index manifest"):
        Index.open(small)
