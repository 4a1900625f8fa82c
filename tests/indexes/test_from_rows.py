"""Gradients that were computed elsewhere, written as an index by a third party."""

import numpy as np
import pytest
import torch

from tests.indexes.synthetic import COMPONENTS, draft, examples_of, gradient_rows
from vestige.data import TokenizedData, data_fingerprint
from vestige.errors import IndexMismatch, NonFinite
from vestige.indexes import IMPORTED_SPEC, CompressionIdentity, ImportRecord, Manifest, write_rows

ROWS = 60


def data_of(count: int = ROWS) -> TokenizedData:
    examples = examples_of(count)
    ids, targets = [np.zeros(0, dtype=np.int32)] * count, [np.zeros(0, dtype=bool)] * count
    fingerprint = data_fingerprint(examples, ids, targets)
    return TokenizedData(examples, ids, targets, np.zeros(count, dtype=bool), fingerprint, "mine")


def manifest(digest: str = "d" * 64) -> Manifest:
    record = ImportRecord(layout="mine", digest=digest, notes=("Losses are not known.",), recomputable=False)
    spec = CompressionIdentity(spec=IMPORTED_SPEC)
    return draft(ROWS, dtype="float32", token_budget=8, compression=spec, components=COMPONENTS, imported=record)


def test_rows_become_an_index_in_the_order_of_the_data(tmp_path):
    made = write_rows(tmp_path / "idx", manifest(), data_of(), gradient_rows)
    assert torch.equal(made.gradients_of(range(ROWS)), gradient_rows(np.arange(ROWS)))
    assert [example.id for example in made.examples()] == [example.id for example in data_of().examples]
    assert made.verify() == []


def test_an_interrupted_call_computes_what_is_missing_and_another_source_is_refused(tmp_path):
    first = write_rows(tmp_path / "idx", manifest(), data_of(), gradient_rows)
    kept = sorted(path.name for path in (tmp_path / "idx" / "shards").glob("*.safetensors"))
    (tmp_path / "idx" / "shards" / "00000.json").unlink()
    read = []

    def noted(rows):
        read.extend(rows.tolist())
        return gradient_rows(rows)

    assert write_rows(tmp_path / "idx", manifest(), data_of(), noted).fingerprint == first.fingerprint
    assert 0 < len(read) < ROWS
    assert sorted(path.name for path in (tmp_path / "idx" / "shards").glob("*.safetensors")) == kept
    with pytest.raises(IndexMismatch):
        write_rows(tmp_path / "idx", manifest("e" * 64), data_of(), gradient_rows)
    write_rows(tmp_path / "idx", manifest("e" * 64), data_of(), gradient_rows, overwrite=True)


def test_a_row_that_is_not_finite_names_its_example(tmp_path):
    def broken(rows):
        gradients = gradient_rows(rows)
        gradients[rows == 7, 0] = torch.nan
        return gradients

    with pytest.raises(NonFinite, match='"e7"'):
        write_rows(tmp_path / "idx", manifest(), data_of(), broken)
