"""The Fisher matrices of an index, piece by piece, and what their inverse makes of every row."""

import json

import numpy as np
import pytest
import torch

from tests.indexes.synthetic import COMPONENTS, build, gradient_rows
from vestige.curvature import fisher_of, fisher_path, plan_fisher, precondition, read_preconditioned
from vestige.errors import IndexMismatch, UserError, WorkElsewhere
from vestige.indexes import Index

ROWS = 60


@pytest.fixture
def index(tmp_path):
    build(tmp_path / "index", ROWS)
    return Index.open(tmp_path / "index")


def stored_rows(index):
    return index.gradients_of(range(index.rows)).double()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    original = Index.shard_groups
    monkeypatch.setattr(Index, "shard_groups", lambda self, _: original(self, 1))


def test_the_sum_of_the_pieces_is_the_fisher_matrix(index):
    assert plan_fisher(index).pieces.count == len(index.manifest.shard_rows) > 4
    found, rows = fisher_of(index), stored_rows(index)
    for block, part in zip(found.blocks, COMPONENTS, strict=True):
        columns = rows[:, part.start : part.stop]
        reference = torch.from_numpy(np.einsum("ni,nj->ij", columns.numpy(), columns.numpy()) / ROWS)
        assert torch.allclose(block.matrix.double(), reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


def computed_in_order(index, order):
    pieces = plan_fisher(index).pieces
    with pieces.open() as compute:
        for piece in order:
            compute(piece)
    pieces.reduce()
    return fisher_path(index).read_bytes()


def test_the_bytes_do_not_depend_on_who_computed_which_piece_when(index):
    pieces = plan_fisher(index).pieces.count
    first = computed_in_order(index, range(pieces))
    fisher_path(index).unlink()
    assert computed_in_order(index, [*reversed(range(pieces)), 1]) == first
    assert [path.name for path in fisher_path(index).parent.iterdir()] == [fisher_path(index).name]


def test_shares_of_three_workers_make_the_whole_and_an_empty_share_is_no_error(index):
    fisher_of(index)
    whole = fisher_path(index).read_bytes()
    fisher_path(index).unlink()
    for share in ("1/3", "99/99", "2/3"):
        with pytest.raises(WorkElsewhere):
            precondition(index=index.folder, shard=share)
        assert not fisher_path(index).exists()
    precondition(index=index.folder, shard="3/3")
    assert fisher_path(index).read_bytes() == whole


def test_a_damaged_piece_of_a_killed_run_is_computed_again(index):
    fisher_of(index)
    whole = fisher_path(index).read_bytes()
    fisher_path(index).unlink()
    plan = plan_fisher(index)
    with plan.pieces.open() as compute:
        compute(0)
        compute(1)
    path = plan.files.path(1)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    fisher_of(index)
    assert fisher_path(index).read_bytes() == whole


def test_preconditioned_rows_are_those_of_a_dense_solve(index, tmp_path):
    precondition(index=index.folder, out=tmp_path / "out", damping=0.1)
    rows = stored_rows(index)
    seen = []
    for block in read_preconditioned(tmp_path / "out"):
        seen += block.example.tolist()
        for part in COMPONENTS:
            columns = slice(part.start, part.stop)
            fisher = rows[:, columns].T @ rows[:, columns] / ROWS
            damped = fisher + 0.1 * fisher.trace() / len(fisher) * torch.eye(len(fisher), dtype=torch.float64)
            reference = torch.linalg.solve(damped, rows[block.example][:, columns].T).T
            # The rows differ by factors of 10^6, so each is compared at its own size; F itself is a float32 sum.
            error = (block.gradients[:, columns].double() - reference).norm(dim=1) / reference.norm(dim=1)
            assert float(error.max()) < 1e-4
    assert sorted(seen) == list(range(ROWS))
    assert float((gradient_rows(np.arange(3)).double() - rows[:3]).abs().max()) < 1


def test_grass_9_one_finished_chunk_does_not_make_the_whole_finished(index, tmp_path):
    with pytest.raises(WorkElsewhere):
        precondition(index=index.folder, out=tmp_path / "out", shard="1/3")
    precondition(index=index.folder, shard="1/1")
    with pytest.raises(WorkElsewhere):
        precondition(index=index.folder, out=tmp_path / "out", shard="1/3")
    assert list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(UserError, match="no complete preconditioned gradients"):
        list(read_preconditioned(tmp_path / "out"))
    precondition(index=index.folder, out=tmp_path / "out")
    assert sum(len(block.example) for block in read_preconditioned(tmp_path / "out")) == ROWS


def test_grass_9_finished_chunks_are_skipped_and_keep_their_bytes(index, tmp_path):
    precondition(index=index.folder, out=tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*")}
    (tmp_path / "out" / "00002.json").unlink()
    body = (tmp_path / "out" / "00002.safetensors").read_bytes()
    precondition(index=index.folder, out=tmp_path / "out")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*")}
    assert {name for name in before if before[name] != after[name]} == {"00002.json", "00002.safetensors"}
    assert (tmp_path / "out" / "00002.safetensors").read_bytes() == body


def test_another_damping_is_refused_and_changes_nothing(index, tmp_path):
    precondition(index=index.folder, out=tmp_path / "out")
    with pytest.raises(IndexMismatch, match="another damping"):
        precondition(index=index.folder, out=tmp_path / "out", damping=0.5)
    record = json.loads((tmp_path / "out" / "preconditioned.json").read_text())
    assert record["damping"] == 1.0


def test_a_folder_with_other_files_is_left_alone(index, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"other files \(thesis.tex\)"):
        precondition(index=index.folder, out=tmp_path / "out")


def test_a_profile_says_where_the_time_went(index, tmp_path):
    precondition(index=index.folder, out=tmp_path / "out", profile=True)
    profile = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert profile["seconds"]["preconditioning"] > 0
    assert profile["bytes"]["read"] == 2 * ROWS * index.manifest.row_bytes, "twice, as it is stored"
