"""Rows that are copies of each other share a group."""

import numpy as np
import pytest

from tests.architectures import sequences
from vestige.data import Example, TokenizedData, describe_copies, load_examples, text_groups, token_groups
from vestige.errors import DataError


def data(ids: list[list[int]], targets: list[list[bool]], **columns: list[object]) -> TokenizedData:
    examples = [
        Example(f"e{row}", row, text="", extra={name: values[row] for name, values in columns.items()})
        for row in range(len(ids))
    ]
    tokens, masks = [np.array(each, dtype=np.int32) for each in ids], [np.array(each, dtype=bool) for each in targets]
    return TokenizedData(examples, tokens, masks, np.zeros(len(ids), dtype=bool), "f")


def test_equal_tokens_and_targets_share_a_group_numbered_by_first_rows():
    yes, no = [False, True], [False, False]
    given = data([[5, 6], [5, 7], [5, 6], [5, 6], [5], [5, 7]], [yes, yes, yes, no, [False], yes])
    assert token_groups(given).tolist() == [0, 1, 0, 2, 3, 1]
    assert describe_copies(token_groups(given)) == (
        "2 of 6 rows are copies of others: 4 distinct texts, each counted once."
    )
    many = sequences(40)
    distinct = data([each.tolist() for each in many.ids], [each.tolist() for each in many.targets])
    assert token_groups(distinct).tolist() == list(range(40))
    assert describe_copies(token_groups(distinct)) is None
    assert token_groups(data([], [])).tolist() == []


def test_a_column_groups_by_its_values_and_a_row_without_it_is_refused():
    given = data([[1], [2], [3]], [[False]] * 3, doc=[7, "x", 7])
    assert token_groups(given, "doc").tolist() == [0, 1, 0]
    with pytest.raises(DataError, match=r"--group doc: row 1 \(id 'e1'\)"):
        token_groups(data([[1], [2]], [[False]] * 2, doc=[7, None]), "doc")


def test_texts_without_a_tokenizer_are_compared_by_content_not_by_bookkeeping():
    rows = [
        {"text": "a", "id": "one", "source": "x", "number": 1},
        {"text": "a", "id": "two", "source": "y", "number": 2},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "c"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"input_ids": [1, 2], "labels": [1, 2]},
    ]
    assert text_groups(load_examples(rows)).tolist() == [0, 0, 1, 2, 3, 3, 4, 5]
