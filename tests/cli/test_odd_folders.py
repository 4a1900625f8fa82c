"""Folders that other hands made or took away: what lies in them is answered in words, with status 2."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset
from transformers import modeling_utils

from tests.cli.conftest import index_words

TRAIN = ("train", "--model", "tiny-model", "--data", "train.jsonl", "--epochs", "1", "--out", "trained")


def refused(outcome, *expected: str) -> None:
    assert outcome.status == 2, outcome.err
    for words in expected:
        assert words in outcome.err
    assert "bug in Vestige" not in outcome.err


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"sha256": True}, {"sha256": None}, {"rows": "x"}, {"skipped": 5}, {"bytes": []}, {"more": 1}]
)
def test_a_marker_of_a_shard_that_is_none(changes, vestige, idx):
    edit(idx / "shards" / "00000.json", **changes)
    refused(vestige("precondition", "idx"), "idx")
    refused(vestige("attribute", "--index", "idx", "--queries", "Why?", "--out", "run"), "idx")
    assert vestige(*index_words(), "--out", "idx").status == 0  # computes the shard again


@pytest.mark.parametrize(
    "changes",
    [{"format": "x"}, {"identity": 5}, {"identity": {"checkpoints": 5}}, {"names": None}, {"names": {"model": 5}}],
)
def test_a_record_of_a_training_that_is_none(changes, vestige, workshop):
    trained = workshop / "trained"
    trained.mkdir()
    record = {"format": 1, "kind": "training", "id": "0" * 16, "identity": {}, "names": {"model": "m", "data": "d"}}
    (trained / "run.json").write_text(json.dumps(record))
    assert vestige("status", "trained").status == 0
    edit(trained / "run.json", **changes)
    for words in (("status", "trained"), TRAIN):
        refused(vestige(*words), "run.json is not the record of a training")


def test_a_saved_data_set_of_unknown_columns(vestige, workshop):
    Dataset.from_list([{"text": "a b c"}]).save_to_disk("saved")
    edit(workshop / "saved" / "dataset_info.json", features={"text": {"dtype": 5, "_type": "Value"}})
    refused(vestige("index", "--model", "tiny-model", "--data", "saved", "--out", "new"), "saved", "does not load")


def test_a_tokenizer_that_its_own_library_cannot_run(vestige, idx):
    normalizer = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
    edit(Path("tiny-model/tokenizer.json"), normalizer=normalizer)
    refused(vestige(*index_words(), "--out", "new"), "tokenizer")


def test_links_in_a_circle_and_pipes(vestige, idx):
    Path("circle").symlink_to("circle")
    os.mkfifo("pipe")
    refused(vestige(*index_words(), "--out", "circle"), "symbolic links")
    refused(vestige("status", "circle"), "symbolic links")
    assert vestige("attribute", "--index", "idx", "--queries", "Why?", "--method", "bm25", "--out", "run").status == 0
    refused(vestige("report", "run", "--out", "pipe"), "pipe exists and is not a Vestige report")


def test_a_folder_whose_name_is_no_text(vestige, workshop, monkeypatch):
    here = workshop.parent / os.fsdecode(b"caf\xe9")
    shutil.copytree(workshop, here)
    monkeypatch.chdir(here)
    asked = ("--data", "train.jsonl", "--queries", "questions.jsonl", "--method", "rep-sim", "--out", "run")
    outcome = vestige("attribute", "--model", "tiny-model", *asked)
    assert outcome.status == 0 or "a name that is no text in UTF-8" in outcome.err
    refused(vestige("index", "--model", "tiny-model", "--data", str(here / "train.jsonl"), "--out", "new"), "UTF-8")


@pytest.mark.slow
def test_a_folder_that_is_taken_away_while_a_training_writes_to_it(vestige, workshop, monkeypatch):
    save = modeling_utils.safe_save_file

    def taken(*words, **options):
        shutil.rmtree("trained")
        save(*words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "safe_save_file", taken)
        refused(vestige(*TRAIN), "trained was removed or renamed while it was being written to")
    assert vestige(*TRAIN).status == 0


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused_also_without_digests(score, vestige, workshop):
    words = ("--data", "train.jsonl", "--queries", "train.jsonl", "--method", "bm25")
    assert vestige("attribute", *words, "--out", "run").status == 0
    table = parquet.read_table("run/scores.parquet")
    values = pa.array([score, *table["score"].to_pylist()[1:]])
    parquet.write_table(table.set_column(table.column_names.index("score"), "score", values), "run/scores.parquet")
    edit(workshop / "run" / "run.json", files={})
    for command in (("report", "run"), ("export", "run", "--to", "csv", "--out", "as-csv")):
        refused(vestige(*command), "scores.parquet, row 0: the score is", "no finite number")
