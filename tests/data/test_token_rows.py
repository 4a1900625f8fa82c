"""Rows that came tokenised: every column that decides the loss is honoured, or refused by its name."""

import json

import numpy as np
import pytest

from vestige.data import load_examples, tokenize
from vestige.errors import DataError

IDS = [5, 6, 7, 8]


def learned(row):
    """The target tokens of a row."""
    data = tokenize(load_examples([row]), None, max_length=None)
    return data.input_ids[0][data.targets[0]].tolist()


@pytest.mark.parametrize(
    "name",
    [
        "completion_mask",
        "assistant_masks",
        "assistant_mask",
        "assistant_tokens_mask",
        "loss_mask",
        "token_loss_mask",
        "response_mask",
        "answer_mask",
        "label_mask",
        "target_mask",
        "train_mask",
        "completion_only",
    ],
)
@pytest.mark.parametrize("mask", [[0, 0, 1, 1], [False, False, True, True], [0.0, 0.0, 1.0, 1.0], "[0, 0, 1, 1]"])
def test_a_mask_says_which_tokens_are_learned(name, mask):
    assert learned({"input_ids": IDS, name: mask}) == [7, 8]


@pytest.mark.parametrize("name", ["prompt_mask", "prompt_masks", "instruction_mask", "ignore_mask"])
def test_a_mask_of_prompts_says_which_tokens_are_not(name):
    assert learned({"input_ids": IDS, name: [1, 1, 0, 0]}) == [7, 8]


def test_labels_and_several_masks_all_have_to_agree():
    row = {
        "input_ids": IDS,
        "labels": [-100, 6, 7, 8],
        "completion_mask": [0, 0, 1, 1],
        "assistant_masks": [1, 1, 1, 0],
    }
    assert learned(row) == [7]


def test_a_mask_counts_tokens_with_their_padding():
    row = {"input_ids": [0, *IDS, 0], "attention_mask": [0, 1, 1, 1, 1, 0], "loss_mask": [0, 0, 0, 1, 1, 0]}
    assert learned(row) == [7, 8]


def test_position_zero_is_never_learned():
    assert learned({"input_ids": IDS, "completion_mask": [1, 0, 0, 1]}) == [8]


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("completion_mask", [0, 0, 2, 1]),
        ("loss_mask", [0.0, 0.5, 1.0, 1.0]),
        ("loss_mask", "[0, 0.25, 1, 1]"),
        ("assistant_masks", [1, 1]),
        ("mask", [0, 0, 1, 1]),
        ("weights", [0.0, 0.5, 1.0, 1.0]),
        ("loss_weights", [1, 1, 1, 1]),
        ("token_weights", [1, 2, 1, 1]),
        ("advantages", [0.1, 0.1, 0.1, 0.1]),
        ("my_label_mask_v2", "[0, 0, 1, 1]"),
        ("token_type_ids", [0, 0, 1, 1]),
        ("attention_mask", [1, 1, 2, 2]),
        ("attention_mask", [[1, 0], [1, 1]]),
        ("position_ids", [0, 1, 0, 1]),
        ("position_ids", [0, 1, 2]),
        ("position_ids", "[0, 1, 0, 1]"),
        ("position_ids", [3, 2, 1, 0]),
        ("seq_lengths", [2, 2]),
        ("sequence_lengths", [2, 2]),
        ("lengths", [1, 3]),
        ("cu_seqlens", [0, 2, 4]),
        ("cu_seq_lens_q", [[0, 2, 4]]),
        ("seq_start_id", [0, 2]),
        ("seq_idx", [0, 0, 1, 1]),
        ("document_ids", [4, 4, 4, 5]),
        ("segment_ids", "[1, 1, 2, 2]"),
        ("sequence_id", [0, 0, 1, 1]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(column, cell):
    with pytest.raises(DataError, match=rf"the list, row 1: `{column}`"):
        load_examples([{"input_ids": IDS}, {"input_ids": IDS, column: cell}])


def test_a_pack_is_refused_with_the_way_out():
    with pytest.raises(DataError, match="Give each document as a row of its own"):
        load_examples([{"input_ids": IDS, "position_ids": [0, 1, 0, 1]}])


@pytest.mark.parametrize(
    "columns",
    [
        {"position_ids": [0, 1, 2, 3]},
        {"position_ids": [1, 0, 1, 2], "attention_mask": [0, 1, 1, 1]},
        {"seq_lengths": [4], "length": 4, "num_tokens": 4},
        {"cu_seqlens": [0, 4]},
        {"document_ids": [9, 9, 9, 9]},
        {"token_type_ids": [0, 0, 0, 0]},
        {"special_tokens_mask": [1, 0, 0, 1]},
    ],
)
def test_columns_of_one_whole_document_change_nothing(columns):
    kept = IDS[1:] if "attention_mask" in columns else IDS
    assert learned({"input_ids": IDS, **columns}) == kept[1:]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, -1, 7], r"row 1: `input_ids` holds -1; ids of tokens begin at 0"),
        ([5, 2**31, 7], r"row 1: `input_ids` holds 2147483648, which is no id of a token"),
        ([5, 2**70, 7], r"row 1: `input_ids` "),
        ([5, -(2**40)], r"row 1: `input_ids` holds -1099511627776"),
    ],
)
def test_ids_that_are_none_are_refused_by_row(ids, message):
    with pytest.raises(DataError, match=message):
        load_examples([{"input_ids": IDS}, {"input_ids": ids}])


def test_a_token_beyond_the_vocabulary_is_refused_by_row(byte_level):
    rows = load_examples([{"input_ids": [1, 2]}, {"id": "x", "input_ids": [1, 9]}])
    assert len(tokenize(rows, None, max_length=None, vocabulary=10)) == 2
    with pytest.raises(DataError, match=r"row 1 \(id 'x'\): the token 9 is beyond the model's vocabulary of 9 tokens"):
        tokenize(rows, None, max_length=None, vocabulary=9)
    with pytest.raises(DataError, match=r"row 0 .*--tokenizer"):
        tokenize(load_examples(["The sky"]), byte_level, max_length=None, vocabulary=9)


def test_columns_that_change_nothing_are_listed_once(capsys):
    rows = [{"input_ids": IDS, "completion_mask": [0, 0, 1, 1], "url": "a", "length": 4}] * 3
    tokenize(load_examples([{**row, "id": number} for number, row in enumerate(rows)]), None, max_length=None)
    said = capsys.readouterr().err
    assert said.count("changing neither their text nor their loss: `length`, `url`.") == 1
    assert "completion_mask" not in said


def test_masks_are_read_from_tables_and_stay_with_an_index(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from vestige.data import EXAMPLES, StoredExamples, record_of

    table = pa.table({"input_ids": [IDS], "loss_mask": pa.array([[0, 0, 1, 1]], pa.list_(pa.uint8()))})
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text('input_ids,loss_mask\n"[5, 6, 7, 8]","[0, 0, 1, 1]"\n')
    (tmp_path / "rows.json").write_text(json.dumps([{"input_ids": IDS, "loss_mask": [0, 0, 1, 1]}]))
    for kind in ("parquet", "csv", "json"):
        examples = load_examples(tmp_path / f"rows.{kind}")
        stored = pa.Table.from_pylist([record_of(examples[0], 4)], schema=EXAMPLES)
        parquet.write_table(stored, tmp_path / f"stored-{kind}.parquet")
        for found in (examples, StoredExamples([tmp_path / f"stored-{kind}.parquet"])):
            data = tokenize(found, None, max_length=None)
            np.testing.assert_array_equal(data.targets[0], [False, False, True, True])
