import json
import resource
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.indexes.synthetic import content, gradient_rows
from vestige.errors import CorruptFile, DiskSpaceError, NonFinite
from vestige.indexes import (
    Expectation,
    Marker,
    ShardContent,
    ShardFile,
    map_shard,
    marker_path,
    parts_of,
    read_marker,
    shard_fault,
    shard_path,
)

EXPECTED = Expectation(rows=20, input="0" * 64)
ROWS = torch.arange(100, 120)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shards").mkdir()
    return tmp_path


def write_shard(folder, number, parts, *options, **named) -> Marker:
    with ShardFile(folder, number, *options, **named) as shard:
        for part in parts:
            shard.put(part)
    return read_marker(folder, number)


def stored(folder, gradients, dtype):
    rows = torch.arange(len(gradients))
    norm = gradients.double().norm(dim=1).float()
    made = ShardContent(gradients, torch.zeros(len(rows)), norm, rows)
    write_shard(folder, 0, [made], dtype, Expectation(len(rows), "0" * 64))
    return map_shard(folder, 0).decode(slice(0, len(rows)))


# What rounding may cost, relative to the entry (floating point) or to the row's largest entry (int8).
@pytest.mark.parametrize(
    ("dtype", "of_entry", "of_row"),
    [("float32", 0, 0), ("float16", 2**-11, 2**-39), ("bfloat16", 2**-8, 0), ("int8", 0, 0.5 / 127)],
)
@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
def test_rounding_stays_within_the_type_at_any_size_of_gradient(folder, dtype, of_entry, of_row, size):
    gradients = gradient_rows(ROWS.numpy()) * size
    error = (stored(folder, gradients, dtype) - gradients).abs().double()
    largest = gradients.abs().amax(1, keepdim=True).double()
    # 1e-6 is float32's own rounding, of the scale and of the product.
    assert (error <= of_entry * gradients.abs() + (of_row + 1e-6 * bool(of_row)) * largest).all()
    assert bool(error.any()) == (dtype != "float32")


def test_float16_keeps_small_entries_beside_a_huge_one(folder):
    # Unscaled, 1e6 is infinite in float16 and 1e-3 of 1e9 vanishes beside it at a common scale of the shard.
    gradients = torch.tensor([[1e6, 1.0, 1e-2], [1e-9, 1e-12, 1e-15], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(stored(folder, gradients, "float16"), gradients, rtol=2**-11, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_rows_of_zeros_stay_zeros(folder, dtype):
    assert torch.equal(stored(folder, torch.zeros(3, 4), dtype), torch.zeros(3, 4))


@pytest.mark.parametrize("size", [torch.finfo(torch.float32).max / 2, torch.finfo(torch.float32).tiny, 1e-42])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_ends_of_float32_survive_their_scale(folder, dtype, size):
    back = stored(folder, torch.tensor([[size, -size, 0.0]]), dtype)
    # Below float32's normal numbers the scale itself is at its smallest, and int8 has no room left.
    if size == 1e-42 and dtype == "int8":
        assert back.abs().max() < torch.finfo(torch.float32).tiny
    else:
        torch.testing.assert_close(back, torch.tensor([[size, -size, 0.0]]), rtol=2**-10, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_the_safetensors_library_reads_what_we_write(folder, dtype):
    made = content(ROWS.numpy())
    write_shard(folder, 0, [made], dtype, EXPECTED)
    theirs, ours = load_file(shard_path(folder, 0)), map_shard(folder, 0)
    assert set(theirs) == {"gradients", "loss", "norm", "example"} | ({"scale"} if ours.scale is not None else set())
    for name, tensor in theirs.items():
        assert torch.equal(tensor, getattr(ours, name)), name
    assert theirs["gradients"].dtype == getattr(torch, dtype)
    assert torch.equal(ours.example, ROWS)
    assert torch.equal(ours.norm, made.norm)
    assert torch.equal(ours.loss, made.loss)


def parts(most, made):
    for first in range(0, len(made.loss), most):
        yield ShardContent(*(tensor[first : first + most] for tensor in made))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_shard_has_the_same_bytes_in_one_part_and_in_many(folder, dtype):
    made = content(ROWS.numpy())
    made.gradients[4, 0] = float("inf")
    whole = write_shard(folder, 0, [made], dtype, EXPECTED, skip_bad=True)
    written = shard_path(folder, 0).read_bytes()
    marker = marker_path(folder, 0).read_bytes()
    assert write_shard(folder, 0, parts(3, made), dtype, EXPECTED, skip_bad=True) == whole
    assert shard_path(folder, 0).read_bytes() == written
    assert marker_path(folder, 0).read_bytes() == marker
    assert whole.skipped == (104,)
    assert len(list((folder / "shards").iterdir())) == 2


def test_a_bad_part_leaves_nothing_behind(folder):
    made = content(ROWS.numpy())
    made.loss[17] = float("nan")
    with pytest.raises(NonFinite, match='loss of 1 example is NaN or infinite: "e117"'):
        write_shard(folder, 0, parts(3, made), "float16", EXPECTED, lambda row: f'"e{row}"')
    assert list((folder / "shards").iterdir()) == []


def test_a_disk_that_takes_a_part_only_is_called_full(folder):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DiskSpaceError, match=r"stopped after [0-9]+ B(.|\n)*Finished shards are intact"):
            write_shard(folder, 0, parts(3, content(ROWS.numpy())), "float16", EXPECTED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((folder / "shards").iterdir()) == []


def test_memory_does_not_grow_with_the_shard(folder):
    width, peaks = 1024, []
    for rows in (256, 2048):
        batches = [np.arange(first, first + 16) for first in range(0, rows, 16)]

        def made(batches=batches):
            for count, part in parts_of(batches, width, most_bytes=2**18):
                numbers = torch.from_numpy(np.concatenate(list(part)))
                assert len(numbers) == count
                gradients = torch.from_numpy(np.ones((count, width), np.float32))
                yield ShardContent(gradients, torch.zeros(count), torch.ones(count), numbers)

        sizes = [len(part.loss) for part in made()]
        # 64 rows of 1,024 numbers of 4 bytes are a part.
        assert sizes == [64] * (rows // 64)
        tracemalloc.start()
        write_shard(folder, 0, made(), "float32", Expectation(rows, "0" * 64))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The larger shard is 8 MiB: not even a byte for each of its numbers is held.
    assert peaks[1] - peaks[0] < 2**19


@pytest.mark.parametrize("sizes", [[], [1], [5], [3, 3, 3], [1, 1, 9, 1, 2, 2], [4, 4, 1]])
def test_parts_take_every_batch_once_and_count_each_as_done(sizes):
    ends = np.cumsum([0, *sizes])
    batches, done = [np.arange(one, other) for one, other in pairwise(ends)], []

    class Counted(list):
        def __iter__(self):
            for number in range(len(self)):
                yield self[number]
                done.append(number)

    taken = []
    for count, part in parts_of(Counted(batches), 10, most_bytes=4 * 10 * 4):
        rows = [batch.tolist() for batch in part]
        assert count == sum(map(len, rows))
        assert count <= 4 or len(rows) == 1
        taken += rows
    assert taken == [batch.tolist() for batch in batches]
    assert done == list(range(len(sizes)))


def test_rows_come_back_in_pieces_and_picked_as_they_do_whole(folder):
    write_shard(folder, 0, [content(ROWS.numpy())], "float16", EXPECTED)
    stored_rows = map_shard(folder, 0)
    whole = stored_rows.decode(slice(0, 20))
    assert torch.equal(stored_rows.decode(slice(5, 12)), whole[5:12])
    picked = torch.tensor([19, 0, 3, 3])
    assert torch.equal(stored_rows.pick(picked), whole[picked])


def test_a_large_row_is_decoded_whole(folder):
    # Longer than the pieces in which rows are converted and written.
    gradients = torch.randn(2, 2**21 + 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stored(folder, gradients, "float16"), gradients, rtol=2**-11, atol=1e-9)


def test_what_a_reader_changes_does_not_reach_the_file(folder):
    write_shard(folder, 0, [content(ROWS.numpy())], "float32", EXPECTED)
    before = shard_path(folder, 0).read_bytes()
    map_shard(folder, 0).gradients.zero_()
    assert shard_path(folder, 0).read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["loss", "norm", "gradients"])
def test_what_is_not_finite_is_refused_by_the_examples_name(folder, field, value):
    made = content(ROWS.numpy())
    getattr(made, field)[4] = value
    with pytest.raises(NonFinite, match='1 example is NaN or infinite: "e104"'):
        write_shard(folder, 0, [made], "float16", EXPECTED, lambda row: f'"e{row}"')
    assert list((folder / "shards").iterdir()) == []


def test_many_bad_examples_are_counted_and_the_first_named(folder):
    made = content(ROWS.numpy())
    made.loss[:] = float("nan")
    with pytest.raises(NonFinite, match=r"20 examples is NaN or infinite: row 100, .*row 109, \.\.\."):
        write_shard(folder, 0, [made], "float16", EXPECTED)


def damage_nothing(tensors, marker):
    pass


def truncate(tensors, marker):
    tensors.write_bytes(tensors.read_bytes()[:-1])


def lengthen(tensors, marker):
    tensors.write_bytes(tensors.read_bytes() + b"\x00")


def flip_a_bit(tensors, marker):
    body = bytearray(tensors.read_bytes())
    body[-10] ^= 1
    tensors.write_bytes(body)


def remove_tensors(tensors, marker):
    tensors.unlink()


def remove_marker(tensors, marker):
    marker.unlink()


def tear_marker(tensors, marker):
    marker.write_bytes(marker.read_bytes()[:40])


def swap_marker(tensors, marker):
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"input": "1" * 64}))


@pytest.mark.parametrize(
    ("damage", "cheaply", "thoroughly"),
    [
        (damage_nothing, None, None),
        (truncate, "truncated", "truncated"),
        (lengthen, "too long", "too long"),
        (flip_a_bit, None, "sha256"),
        (remove_tensors, "tensors are gone", "tensors are gone"),
        (remove_marker, "missing", "missing"),
        (tear_marker, "torn marker", "torn marker"),
        (swap_marker, "other data or settings", "other data or settings"),
    ],
)
def test_damage_is_found_and_named(folder, damage, cheaply, thoroughly):
    write_shard(folder, 0, [content(ROWS.numpy())], "float16", EXPECTED)
    damage(shard_path(folder, 0), marker_path(folder, 0))
    for contents, wanted in ((False, cheaply), (True, thoroughly)):
        found = shard_fault(folder, 0, EXPECTED, contents=contents)
        assert found is None if wanted is None else wanted in found


def test_a_shard_written_again_is_never_vouched_for_by_its_old_marker(folder, monkeypatch):
    write_shard(folder, 0, [content(ROWS.numpy())], "float16", EXPECTED)
    shard_path(folder, 0).write_bytes(b"damaged")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(folder, 0, [content(ROWS.numpy())], "float16", EXPECTED)
    assert read_marker(folder, 0) is None


def test_a_whole_shard_that_another_process_wrote_by_now_is_left_as_it_is(folder):
    write_shard(folder, 0, [content(ROWS.numpy())], "float16", EXPECTED)
    paths = sorted(folder.rglob("*.*"))
    before = [path.stat().st_ino for path in paths]
    write_shard(folder, 0, [content(ROWS.numpy())], "float16", EXPECTED)
    assert sorted(folder.rglob("*.*")) == paths
    assert [path.stat().st_ino for path in paths] == before


@pytest.mark.parametrize("text", [b"", b"short", b"\xff" * 64, (16).to_bytes(8, "little") + b"{" * 16])
def test_a_file_that_is_no_shard_is_called_corrupt(folder, text):
    shard_path(folder, 0).write_bytes(text)
    for checked in (True, False):
        with pytest.raises(CorruptFile, match="is not the shard that was written"):
            map_shard(folder, 0, checked=checked)


def test_a_header_that_promises_more_than_the_file_holds_is_called_corrupt(folder):
    write_shard(folder, 0, [content(ROWS.numpy())], "float16", EXPECTED)
    truncate(shard_path(folder, 0), None)
    with pytest.raises(CorruptFile, match="sha256"):
        map_shard(folder, 0)
    with pytest.raises(CorruptFile, match="is not the shard that was written"):
        map_shard(folder, 0, checked=False)
