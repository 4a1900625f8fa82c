import numpy as np
import pytest

from vestige.data import Message, load_examples, load_queries
from vestige.errors import DataError


def only(row):
    (example,) = load_examples([row])
    return example


def test_text():
    example = only({"text": "a text"})
    assert (example.text, example.prompt, example.completion, example.messages) == ("a text", None, None, ())


def test_prompt_and_completion_stay_as_they_are():
    example = only({"prompt": "The sky is bl", "completion": "ue"})
    assert (example.prompt, example.completion, example.text) == ("The sky is bl", "ue", None)


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"instruction": "Add.", "output": "3"}, "Add.\n", "3"),
        ({"instruction": "Add.", "input": "1 + 2", "output": "3"}, "Add.\n\n1 + 2\n", "3"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add.\n", "3"),
        ({"instruction": "Add.", "input": None, "output": "3"}, "Add.\n", "3"),
        ({"question": "Why?", "answer": "So."}, "Why?\n", "So."),
        ({"question": "Why?\n", "answer": "So."}, "Why?\n", "So."),
    ],
)
def test_questions_and_instructions_end_in_a_newline(row, prompt, completion):
    example = only(row)
    assert (example.prompt, example.completion, example.extra) == (prompt, completion, {})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'},
        {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "Hello", "tool_calls": None},
            ]
        },
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ],
)
def test_messages(row):
    assert only(row).messages == (Message("user", "Hi"), Message("assistant", "Hello"))


def test_columns_are_carried_along():
    example = only({"text": "t", "id": 7, "source": "web", "label": 1, "url": "u", "score": 0.5, "none": None})
    assert (example.id, example.source, example.label) == ("7", "web", "1")
    assert example.extra == {"url": "u", "score": 0.5}


def test_a_structured_label_is_carried_as_json():
    assert only({"text": "t", "label": ["a", "b"]}).label == '["a", "b"]'


def test_rows_without_id_are_called_by_their_number():
    examples = load_examples([{"text": "a"}, {"text": "b", "id": ""}, {"text": "c", "id": "x"}])
    assert [example.id for example in examples] == ["0", "1", "x"]
    assert [example.row for example in examples] == [0, 1, 2]


def test_formats_may_change_from_row_to_row():
    rows = [
        {"text": "a", "prompt": None, "completion": None},
        {"text": "", "prompt": "p", "completion": "c"},
        {"messages": [{"role": "user", "content": "Hi"}], "text": None},
        {"text": "b", "prompt": "", "completion": ""},
    ]
    first, second, third, fourth = load_examples(rows)
    assert (fourth.text, fourth.prompt) == ("b", None)
    assert first.text == "a"
    assert (second.text, second.prompt, second.completion) == (None, "p", "c")
    assert third.messages


def test_the_most_structured_format_wins_and_this_is_said(capsys):
    example = only({"instruction": "Add.", "output": "3", "text": "Add. 3"})
    assert example.prompt == "Add.\n"
    assert example.extra == {"text": "Add. 3"}
    assert "instruction/output and text; instruction/output is used" in capsys.readouterr().err


def test_tokens_become_arrays():
    example = only({"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]})
    assert example.text is None
    assert example.extra["input_ids"].dtype == np.int32
    np.testing.assert_array_equal(example.extra["labels"], [-100, 2])


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_text_is_a_row(text):
    assert only({"text": text}).text == text


def test_a_query_may_be_a_prompt_alone():
    rows = [{"prompt": "a"}, {"question": "b"}, {"instruction": "c", "input": "d"}, {"prompt": "e", "completion": ""}]
    queries = load_queries(rows)
    assert [query.prompt for query in queries] == ["a", "b\n", "c\n\nd\n", "e"]
    assert all(query.completion is None and query.text is None for query in queries)


def test_bare_strings_are_texts_in_data_and_prompts_in_queries():
    assert load_examples(["a"])[0].text == "a"
    assert load_queries(["a"])[0].prompt == "a"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (5, r"row 1: expected an object with named columns .* got 5"),
        (None, r"row 1: expected an object"),
        (["a"], r"row 1: expected an object"),
        ({}, r"row 1: its columns are none; expected `text`; `prompt` and `completion`"),
        ({"body": "x", "id": "q"}, r"its columns are `body`, `id`.*Rename the column that holds the text to `text`"),
        ({"Text": "x"}, r"Rename `Text` to `text`\?"),
        ({"text": None, "id": 3}, r"its columns are `id` \(`text` without a value\)"),
        ({"prompt": "x"}, r"It has `prompt` but no `completion`"),
        ({"answer": "x"}, r"It has `answer` but no `question`"),
        ({"text": 5}, r"`text` must be a text, but it is of type int: 5"),
        ({"prompt": "x", "completion": ["y"]}, r"`completion` must be a text, but it is of type list"),
        ({"prompt": [{"role": "user", "content": "x"}], "completion": "y"}, r"into a column `messages`"),
        ({"question": "x", "answer": {"text": "y"}}, r"`answer` must be a text, but it is of type dict"),
        ({"messages": []}, r"`messages` must be a list of turns"),
        ({"messages": 3}, r"`messages` must be a list of turns"),
        ({"messages": "hi"}, r"`messages` is a string, but not JSON"),
        ({"messages": ["hi"]}, r"`messages`\[0\]: a turn must be like .* got 'hi'"),
        ({"messages": [{"role": "user"}]}, r"`messages`\[0\]: the turn has no `content`"),
        ({"messages": [{"content": "x"}]}, r"the turn has no `role`"),
        ({"messages": [{"role": "user", "content": [{"image": "x"}]}]}, r"`content`\[0\]: a part .* holds `image`"),
        ({"input_ids": "abc"}, r"`input_ids` must be a flat list of whole numbers"),
        ({"input_ids": [1.5]}, r"`input_ids` must be a flat list of whole numbers"),
        ({"input_ids": [[1], [2, 3]]}, r"`input_ids` must be a flat list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, r"`labels` has 1 entries, `input_ids` has 2"),
        ({"text": "x", "id": [1]}, r"`id` must be a text or a number"),
    ],
)
def test_a_row_that_does_not_parse_is_explained(row, message):
    with pytest.raises(DataError, match=message) as caught:
        load_examples([{"text": "fine"}, row])
    assert "the list, row 1" in str(caught.value)


def test_two_rows_of_one_id_are_both_named():
    with pytest.raises(DataError, match=r"row 2: the id 'x' is already that of row 0"):
        load_examples([{"text": "a", "id": "x"}, {"text": "b"}, {"text": "c", "id": "x"}])


def test_an_id_that_is_another_rows_number_is_refused():
    with pytest.raises(DataError, match=r"row 1: the id '1' is already that of row 0.*row number"):
        load_examples([{"text": "a", "id": 1}, {"text": "b"}])


def test_equal_texts_stay_separate():
    assert len(load_examples(["same", "same"])) == 2
