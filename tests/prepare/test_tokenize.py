import numpy as np
import pyarrow.parquet as parquet
import pytest

import vestige
from vestige.data import load_examples, tokenize
from vestige.errors import IndexMismatch, ModelError, SpecError
from vestige.models import load_model


def test_the_file_reads_back_as_the_tokens_of_the_rows(workshop, tmp_path):
    rows = str(workshop / "train.jsonl")
    made = vestige.prepare.tokenize(
        data=rows, tokenizer=str(workshop / "tiny-model"), out=tmp_path / "out", max_length=20
    )
    tokenizer = load_model(str(workshop / "tiny-model")).tokenizer
    expected = tokenize(load_examples(rows), tokenizer, max_length=20)
    found = tokenize(load_examples(str(made.data)), None, max_length=None)
    for name in ("input_ids", "targets"):
        assert all(map(np.array_equal, getattr(found, name), getattr(expected, name)))
    assert [(row.id, row.source, row.display) for row in found.examples] == [
        (row.id, row.source, row.display) for row in expected.examples
    ]
    assert not (tmp_path / "out" / "tokens").exists()


@pytest.mark.slow
def test_a_model_trains_on_the_tokens_as_on_the_rows(workshop, tmp_path):
    rows, model = str(workshop / "train.jsonl"), str(workshop / "tiny-model")
    made = vestige.prepare.tokenize(data=rows, tokenizer=model, out=tmp_path / "out")
    runs = [
        vestige.train(model=model, data=data, out=tmp_path / name, batch_size=6, checkpoints="1")
        for name, data in (("rows", rows), ("tokens", str(made.data)))
    ]
    assert runs[0].losses.equals(runs[1].losses)


def test_what_cannot_be_tokenised_is_refused(workshop, tmp_path):
    rows, model = str(workshop / "train.jsonl"), str(workshop / "tiny-model")
    with pytest.raises(ModelError, match="no tokenizer"):
        vestige.prepare.tokenize(data=rows, tokenizer=tmp_path, out=tmp_path / "out")
    with pytest.raises(SpecError, match="`push_to_hub`"):
        vestige.prepare.tokenize(data=rows, tokenizer=model, out=tmp_path / "out", push_to_hub="me/mine")
    vestige.prepare.tokenize(data=rows, tokenizer=model, out=tmp_path / "out")
    with pytest.raises(IndexMismatch, match="max_length"):
        vestige.prepare.tokenize(data=rows, tokenizer=model, out=tmp_path / "out", max_length=9)


def test_masks_and_padding_of_rows_of_tokens_are_in_the_labels(workshop, tmp_path):
    columns = {"loss_mask": [0, 0, 0, 1, 0], "attention_mask": [0, 1, 1, 1, 1], "position_ids": [0, 0, 1, 2, 3]}
    rows = [{"id": "a", "input_ids": [0, 5, 6, 7, 8], "url": "x", **columns}]
    result = vestige.prepare.tokenize(
        data=rows, out=tmp_path / "out", tokenizer=str(workshop / "tiny-model"), max_length=3
    )
    (row,) = parquet.read_table(result.data).to_pylist()
    assert row == {"id": "a", "url": "x", "input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
