import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from vestige.data import (
    Example,
    Rendered,
    Span,
    data_fingerprint,
    load_examples,
    load_queries,
    mark_targets,
    tokenize,
)
from vestige.errors import DataError


def targeted(data, row, tokenizer) -> str:
    """The target tokens of a row, decoded: what the model is asked to learn."""
    return tokenizer.decode(data.input_ids[row][data.targets[row]])


def context(data, row, tokenizer) -> str:
    return tokenizer.decode(data.input_ids[row][~data.targets[row]])


def test_every_token_of_a_text_but_the_first_is_a_target(byte_level):
    data = tokenize(load_examples(["The sky is blue."]), byte_level, max_length=None, add_eos=False)
    assert data.input_ids[0].dtype == np.int32
    assert byte_level.decode(data.input_ids[0]) == "The sky is blue."
    assert not data.targets[0][0]
    assert data.targets[0][1:].all()


def test_after_a_beginning_token_the_whole_text_is_a_target(with_beginning):
    data = tokenize(load_examples(["The sky is blue."]), with_beginning, max_length=None)
    assert targeted(data, 0, with_beginning) == "The sky is blue.</s>"


def test_loss_is_on_the_completion_only(with_beginning):
    rows = [{"prompt": "Why is the sky blue?", "completion": " Because of scattering."}]
    data = tokenize(load_examples(rows), with_beginning, max_length=None)
    assert context(data, 0, with_beginning) == "<s>Why is the sky blue?"
    assert targeted(data, 0, with_beginning) == " Because of scattering.</s>"


def test_question_and_answer_are_parted_by_a_masked_newline(byte_level):
    data = tokenize(
        load_examples([{"question": "Why?", "answer": "Because."}]), byte_level, max_length=None, add_eos=False
    )
    assert context(data, 0, byte_level) == "Why?\n"
    assert targeted(data, 0, byte_level) == "Because."


def test_tokens_are_those_of_the_joined_text(byte_level):
    rows = [{"prompt": "The capital of Fran", "completion": "ce is Paris."}]
    data = tokenize(load_examples(rows), byte_level, max_length=None, add_eos=False)
    joined = byte_level("The capital of France is Paris.")["input_ids"]
    assert data.input_ids[0].tolist() == joined


def test_a_token_across_the_border_counts_as_completion(byte_level):
    assert byte_level.tokenize("of France")[-1] == "ĠFrance"
    data = tokenize(
        load_examples([{"prompt": "of Fran", "completion": "ce"}]), byte_level, max_length=None, add_eos=False
    )
    assert targeted(data, 0, byte_level) == " France"
    assert context(data, 0, byte_level) == "of"


@pytest.mark.parametrize(("prompt", "completion"), [("of ", "France"), ("of", " France")])
def test_the_space_before_a_word_belongs_to_its_token_on_either_side(byte_level, prompt, completion):
    rows = [{"prompt": prompt, "completion": completion}]
    data = tokenize(load_examples(rows), byte_level, max_length=None, add_eos=False)
    assert targeted(data, 0, byte_level) == " France"


def test_blanks_on_both_sides_of_the_border_stay_on_their_side(byte_level):
    rows = [{"prompt": "a  \n", "completion": "\n  \n"}]
    data = tokenize(load_examples(rows), byte_level, max_length=None, add_eos=False)
    assert context(data, 0, byte_level) == "a  \n"
    assert targeted(data, 0, byte_level) == "\n  \n"


def test_characters_of_several_bytes_are_split_at_the_border(byte_level):
    rows = [{"prompt": "猫", "completion": "犬😀"}]
    data = tokenize(load_examples(rows), byte_level, max_length=None, add_eos=False)
    assert context(data, 0, byte_level) == "猫"
    assert targeted(data, 0, byte_level) == "犬😀"


def test_an_empty_prompt_leaves_all_but_position_zero(byte_level, with_beginning):
    rows = [{"prompt": "", "completion": "Paris is the capital"}]
    assert not tokenize(load_examples(rows), byte_level, max_length=None).targets[0][0]
    data = tokenize(load_examples(rows), with_beginning, max_length=None)
    assert targeted(data, 0, with_beginning) == "Paris is the capital</s>"


def test_an_empty_completion_is_the_end_token_alone(with_beginning):
    data = tokenize(load_examples([{"prompt": "Why?", "completion": ""}]), with_beginning, max_length=None)
    assert targeted(data, 0, with_beginning) == "</s>"


@pytest.mark.parametrize("text", ["<s>Hello world", "Hello world"])
def test_a_beginning_token_is_never_doubled(with_beginning, text):
    data = tokenize(load_examples([text]), with_beginning, max_length=None)
    assert data.input_ids[0].tolist().count(with_beginning.bos_token_id) == 1
    pair = tokenize(load_examples([{"prompt": text, "completion": "!"}]), with_beginning, max_length=None)
    assert pair.input_ids[0].tolist().count(with_beginning.bos_token_id) == 1
    assert targeted(pair, 0, with_beginning) == "!</s>"


@pytest.mark.parametrize("completion", [" Paris.", " Paris.</s>"])
def test_the_end_token_is_appended_once(byte_level, completion):
    rows = [{"prompt": "capital?", "completion": completion}, {"text": "capital?" + completion}]
    data = tokenize(load_examples(rows), byte_level, max_length=None)
    for row in range(2):
        assert data.input_ids[row].tolist().count(byte_level.eos_token_id) == 1
        assert data.input_ids[row][-1] == byte_level.eos_token_id
        assert data.targets[row][-1]


@pytest.mark.parametrize(("completion", "learnt"), [(" Paris.", " Paris.</s>"), ("", "</s>")])
@pytest.mark.parametrize("add_eos", [True, False])
def test_an_end_token_of_the_tokenizers_own_belongs_to_the_completion(with_both_ends, completion, learnt, add_eos):
    rows = [{"prompt": "capital?", "completion": completion}]
    data = tokenize(load_examples(rows), with_both_ends, max_length=None, add_eos=add_eos)
    assert with_both_ends.decode(data.input_ids[0]) == f"<s>capital?{completion}</s>"
    assert targeted(data, 0, with_both_ends) == (learnt if add_eos or completion else "")


def test_without_an_end_token_nothing_is_appended_and_it_is_said(byte_level, capsys):
    byte_level.eos_token = None
    data = tokenize(load_examples(["Hello"]), byte_level, max_length=None)
    assert byte_level.decode(data.input_ids[0]) == "Hello"
    assert "no end token" in capsys.readouterr().err


def test_a_prompt_without_completion_has_no_target_and_no_end(with_beginning, capsys):
    data = tokenize(load_queries(["Why is the sky blue?"]), with_beginning, max_length=None, prompts=True)
    assert with_beginning.decode(data.input_ids[0]) == "<s>Why is the sky blue?"
    assert data.target_counts.tolist() == [0]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("frame", ["<s> $A </s>", "$A </s>", "<s> $A </s> </s>"])
def test_nothing_stands_behind_a_prompt(with_both_ends, frame):
    """Where the tokenizer ends every text, a prompt would be answered after the end."""
    named = [(token, with_both_ends.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    with_both_ends.backend_tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=named)
    begins = "<s>" if frame.startswith("<s>") else ""
    for text in ("Why is the sky blue?", "", "Why</s>"):
        data = tokenize(load_queries([{"prompt": text}]), with_both_ends, max_length=None, prompts=True)
        assert with_both_ends.decode(data.input_ids[0]) == begins + text


def test_cutting_is_from_the_right_announced_and_counted(with_beginning, capsys):
    rows = [
        {"text": "Why is the sky blue?"},
        {"text": "blue"},
        {"prompt": "Why is the sky blue? Why is the sky blue?", "completion": "!"},
    ]
    whole = tokenize(load_examples(rows), with_beginning, max_length=None)
    assert capsys.readouterr().err == ""
    data = tokenize(load_examples(rows), with_beginning, max_length=5, name="train")
    assert data.truncated.tolist() == [True, False, True]
    assert len(data) == 3
    assert data.input_ids[0].tolist() == whole.input_ids[0][:5].tolist()
    assert with_beginning.eos_token_id not in data.input_ids[0]
    assert data.target_counts[2] == 0
    message = capsys.readouterr().err
    assert "train: 2 of 3 examples are longer than 5 tokens" in message
    assert f"the longest has {len(whole.input_ids[2])}" in message
    assert "no target is left in 1 of them" in message


def test_an_example_of_exactly_the_length_is_not_cut(byte_level):
    length = len(byte_level("Why is the sky blue?")["input_ids"]) + 1
    data = tokenize(load_examples(["Why is the sky blue?"]), byte_level, max_length=length)
    assert not data.truncated[0]
    assert data.input_ids[0][-1] == byte_level.eos_token_id


def test_examples_without_targets_keep_their_row_and_are_announced(byte_level, capsys):
    data = tokenize(load_examples(["", "Why?", ""]), byte_level, max_length=None, add_eos=False)
    assert data.lengths.tolist()[0] == 0
    assert data.target_counts[0] == 0
    assert len(data) == 3
    assert "2 of 3 examples have no target token" in capsys.readouterr().err


def test_a_length_that_predicts_nothing_is_refused(byte_level):
    with pytest.raises(DataError, match="at least 2"):
        tokenize(load_examples(["a"]), byte_level, max_length=1)


def test_long_texts_raise_no_warning_of_the_tokenizer(byte_level, caplog):
    tokenize(load_examples(["Why is the sky blue? " * 50]), byte_level, max_length=None)
    assert caplog.text == ""


def test_padding_and_truncation_left_on_in_the_tokenizer_change_nothing(byte_level):
    plain = tokenize(load_examples(["Why is the sky blue?", "a"]), byte_level, max_length=None)
    byte_level.backend_tokenizer.enable_truncation(3)
    byte_level.backend_tokenizer.enable_padding(length=20)
    again = tokenize(load_examples(["Why is the sky blue?", "a"]), byte_level, max_length=None)
    assert again.fingerprint == plain.fingerprint


def test_order_and_neighbours_do_not_change_an_example(chatml):
    rows = [
        {"text": "The sky is blue."},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"prompt": "Why?", "completion": " Because."},
        {"input_ids": [5, 6, 7]},
    ] * 300
    forward = tokenize(load_examples(rows), chatml, max_length=None)
    backward = tokenize(load_examples(rows[::-1]), chatml, max_length=None)
    for row in (0, 1, 2, 3, 1199):
        np.testing.assert_array_equal(forward.input_ids[row], backward.input_ids[1199 - row])
        np.testing.assert_array_equal(forward.targets[row], backward.targets[1199 - row])
    assert chatml.decode(forward.input_ids[1196]) == "<s>The sky is blue.</s>"


def test_a_slow_tokenizer_sees_prompt_and_completion_apart(letters):
    rows = [{"prompt": "why", "completion": " so"}, {"text": "abc"}]
    data = tokenize(load_examples(rows), letters, max_length=None)
    assert [letters.convert_ids_to_tokens(int(token)) for token in data.input_ids[0]] == list("^why so$")
    assert data.targets[0].tolist() == [False] * 4 + [True] * 4
    assert [letters.convert_ids_to_tokens(int(token)) for token in data.input_ids[1]] == list("^abc$")
    assert data.targets[1].tolist() == [False] + [True] * 4


def test_rows_that_came_tokenised_need_no_tokenizer():
    rows = [
        {"input_ids": [5, 6, 7], "id": "a"},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
        {"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0], "labels": [-100, 5, 6, -100]},
    ]
    data = tokenize(load_examples(rows), None, max_length=None)
    assert [ids.tolist() for ids in data.input_ids] == [[5, 6, 7], [5, 6, 7], [5, 6]]
    assert [mask.tolist() for mask in data.targets] == [
        [False, True, True],
        [False, False, True],
        [False, True],
    ]
    assert data.examples[0].extra["input_ids"].dtype == np.int32


def test_rows_that_came_tokenised_are_cut_too():
    data = tokenize(load_examples([{"input_ids": list(range(9))}]), None, max_length=4)
    assert data.input_ids[0].tolist() == [0, 1, 2, 3]
    assert data.truncated.tolist() == [True]


def test_tokens_win_over_a_text_beside_them_and_this_is_said(byte_level, capsys):
    rows = [{"text": "Hello", "input_ids": [9, 8]}, {"text": "Hello"}]
    data = tokenize(load_examples(rows), byte_level, max_length=None)
    assert data.input_ids[0].tolist() == [9, 8]
    assert byte_level.decode(data.input_ids[1]) == "Hello</s>"
    assert "1 of 2 rows hold `input_ids`" in capsys.readouterr().err


def test_shifted_labels_are_refused():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [6, 7, -100]}]
    with pytest.raises(DataError, match=r"row 1 .*label at position 0 is 6, but the token there is 5.*not shifted"):
        tokenize(load_examples(rows), None, max_length=None)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(DataError, match=r"train, row 1 .*needs a tokenizer"):
        tokenize(load_examples([{"input_ids": [1, 2]}, "text"]), None, max_length=None, name="train")


def test_fingerprint_moves_with_ids_tokens_targets_and_order_only(byte_level):
    def fingerprint(rows, **settings):
        return tokenize(load_examples(rows), byte_level, max_length=None, **settings).fingerprint

    rows = [{"id": "a", "prompt": "x ", "completion": "yz"}, {"id": "b", "text": "word"}]
    base = fingerprint(rows)
    assert len(base) == 64
    assert fingerprint(rows, name="other") == base
    assert fingerprint([{**row, "note": 1} for row in rows]) == base
    assert fingerprint(rows[::-1]) != base
    assert fingerprint(rows, add_eos=False) != base
    assert fingerprint([{**rows[0], "id": "c"}, rows[1]]) != base
    assert fingerprint([{"id": "a", "prompt": "x y", "completion": "z"}, rows[1]]) != base


def test_fingerprint_keeps_neighbouring_rows_apart():
    def fingerprint(*lists):
        examples = [Example(id="", row=row) for row in range(len(lists))]
        arrays = [np.array(ids, dtype=np.int32) for ids in lists]
        return data_fingerprint(examples, arrays, [np.zeros(len(ids), dtype=bool) for ids in lists])

    assert fingerprint([1, 2], [3]) != fingerprint([1], [2, 3])
    nothing = np.array([], dtype=np.int32)
    joined = [Example(id="ab", row=0), Example(id="", row=1)]
    apart = [Example(id="a", row=0), Example(id="b", row=1)]
    assert data_fingerprint(joined, [nothing] * 2, [nothing] * 2) != data_fingerprint(
        apart, [nothing] * 2, [nothing] * 2
    )


def test_a_blank_token_without_characters_belongs_where_it_ends():
    """Offsets that leave out leading spaces give a token of spaces an empty range at its end."""
    item = Rendered("ab  cd  ef", (Span(2, 8),), has_special_tokens=True, ends=False)
    offsets = np.array([[0, 2], [4, 4], [4, 6], [8, 8], [8, 10]])
    assert mark_targets(item, offsets).tolist() == [False, True, True, True, False]


def test_tokens_across_either_border_of_a_span_are_targets():
    item = Rendered("abcdef", (Span(2, 4),), has_special_tokens=True, ends=False)
    offsets = np.array([[0, 1], [1, 3], [3, 5], [5, 6]])
    assert mark_targets(item, offsets).tolist() == [False, True, True, False]
