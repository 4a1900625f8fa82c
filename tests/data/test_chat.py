import numpy as np
import pytest

from vestige.data import Message, as_conversation, load_examples, load_queries, tokenize
from vestige.errors import DataError

CONVERSATION = [
    {"role": "system", "content": "You know the sky."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Because of scattering."},
    {"role": "user", "content": "And the world?"},
    {"role": "assistant", "content": " good morning!"},
]
ROWS = [{"messages": CONVERSATION}]


def targeted(data, row, tokenizer) -> str:
    return tokenizer.decode(data.input_ids[row][data.targets[row]])


def test_loss_is_on_assistant_turns_and_their_end_only(chatml, capsys):
    data = tokenize(load_examples(ROWS), chatml, max_length=None)
    assert targeted(data, 0, chatml) == "Because of scattering.<|im_end|> good morning!<|im_end|>"
    assert chatml.decode(data.input_ids[0]).startswith("<|im_start|>system\nYou know the sky.<|im_end|>\n")
    assert capsys.readouterr().err == ""


def test_generation_markers_give_the_same_targets_as_prefixes(chatml, chatml_marked):
    marked = tokenize(load_examples(ROWS), chatml_marked, max_length=None)
    chatml_marked.chat_template = chatml_marked.chat_template.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    plain = tokenize(load_examples(ROWS), chatml_marked, max_length=None)
    assert targeted(marked, 0, chatml) == "Because of scattering.<|im_end|> good morning!<|im_end|>"
    assert marked.fingerprint == plain.fingerprint


def test_a_marked_turn_that_starts_with_a_space_is_not_lost(chatml_marked):
    """Transformers looks up the token of the span's first character, which trimmed offsets leave out."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " good"}]
    data = tokenize(load_examples([{"messages": turns}]), chatml_marked, max_length=None)
    assert targeted(data, 0, chatml_marked) == " good<|im_end|>"


def test_a_chat_template_gets_no_second_beginning_token(instruct):
    data = tokenize(load_examples([{"messages": CONVERSATION[1:]}]), instruct, max_length=None)
    assert data.input_ids[0].tolist().count(instruct.bos_token_id) == 1
    assert data.input_ids[0][0] == instruct.bos_token_id


def test_the_end_token_of_a_chat_is_the_templates_own(chatml):
    data = tokenize(load_examples(ROWS), chatml, max_length=None)
    assert chatml.eos_token_id not in data.input_ids[0]


def test_a_template_that_rewrites_earlier_turns_is_announced_and_still_masked(rewriting, capsys):
    data = tokenize(load_examples(ROWS), rewriting, max_length=None)
    assert targeted(data, 0, rewriting) == "Because of scattering.<|im_end|> good morning!<|im_end|>"
    assert "1 of 1 conversations turn by turn" in capsys.readouterr().err


def test_a_template_that_rewrites_earlier_turns_holds_for_one_turn(rewriting, capsys):
    data = tokenize(load_examples([{"messages": CONVERSATION[:3]}]), rewriting, max_length=None)
    assert targeted(data, 0, rewriting) == "<think>\n\n</think>\n\nBecause of scattering.<|im_end|>"
    assert capsys.readouterr().err == ""


def test_a_template_without_generation_prompt_is_masked_by_contents(instruct, capsys):
    data = tokenize(load_examples([{"messages": CONVERSATION[1:]}]), instruct, max_length=None)
    assert targeted(data, 0, instruct) == "Because of scattering.</s> good morning!</s>"
    assert "found by their contents" in capsys.readouterr().err


def test_repeated_contents_are_told_apart_by_contents(instruct):
    turns = [{"role": role, "content": "Hello"} for role in ("user", "assistant", "user", "assistant")]
    data = tokenize(load_examples([{"messages": turns}]), instruct, max_length=None)
    assert targeted(data, 0, instruct) == "Hello</s>Hello</s>"


def test_an_assistant_may_speak_first(chatml):
    turns = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}]
    data = tokenize(load_examples([{"messages": turns}]), chatml, max_length=None)
    assert targeted(data, 0, chatml) == "Hello<|im_end|>"


def test_a_conversation_that_waits_ends_in_the_generation_prompt(chatml, capsys):
    data = tokenize(load_queries([{"messages": CONVERSATION[:2]}]), chatml, max_length=None, prompts=True)
    assert chatml.decode(data.input_ids[0]).endswith("blue?<|im_end|>\n<|im_start|>assistant\n")
    assert data.target_counts.tolist() == [0]
    assert capsys.readouterr().err == ""


def test_prompt_and_completion_become_turns_on_demand(chatml):
    rows = [{"question": "Why is the sky blue?", "answer": "Because of scattering."}]
    data = tokenize(load_examples(rows), chatml, max_length=None, chat=True)
    turns = [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Because of scattering."},
    ]
    same = tokenize(load_examples([{"messages": turns}]), chatml, max_length=None)
    assert data.fingerprint == same.fingerprint
    assert chatml.decode(data.input_ids[0]).startswith("<|im_start|>user\nWhy is the sky blue?<|im_end|>")


def test_a_bare_prompt_in_chat_ends_in_the_generation_prompt(chatml):
    data = tokenize(load_queries("Why is the sky blue?"), chatml, max_length=None, chat=True)
    expected = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.decode(data.input_ids[0]) == expected


def test_chat_leaves_plain_texts_alone(chatml):
    data = tokenize(load_examples(["The sky is blue."]), chatml, max_length=None, chat=True)
    assert chatml.decode(data.input_ids[0]) == "<s>The sky is blue.</s>"


def test_turns_of_an_example():
    pair = load_examples([{"prompt": "a\n", "completion": "b"}])[0]
    assert as_conversation(pair) == (Message("user", "a"), Message("assistant", "b"))
    assert as_conversation(load_queries(["a"])[0]) == (Message("user", "a"),)


def test_a_slow_tokenizer_masks_by_pieces(letters, chatml):
    letters.chat_template = chatml.chat_template
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    data = tokenize(load_examples([{"messages": turns}]), letters, max_length=None)
    said = [letters.convert_ids_to_tokens(int(token)) for token in data.input_ids[0][data.targets[0]]]
    assert "".join(said).startswith("so<|im_end|>")
    assert letters.bos_token_id not in data.input_ids[0]


def test_a_tokenizer_without_template_is_refused(byte_level):
    with pytest.raises(DataError, match=r"no chat template.*Give the tokenizer of a chat model"):
        tokenize(load_examples(ROWS), byte_level, max_length=None)


def test_a_conversation_that_the_template_refuses_is_named(instruct):
    rows = [{"messages": CONVERSATION[1:]}, {"id": "odd", "messages": CONVERSATION}]
    with pytest.raises(DataError, match=r"row 1 \(id 'odd'\), whose roles are system, user.*roles must alternate"):
        tokenize(load_examples(rows), instruct, max_length=None)


def test_a_template_with_a_date_renders_the_same_every_day(chatml, capsys):
    header = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%S %f') %}{% endif %}{{ date_string }}"
    )
    chatml.chat_template = header + chatml.chat_template
    data = tokenize(load_examples(ROWS), chatml, max_length=None)
    assert chatml.decode(data.input_ids[0]).startswith("26 Jul 2024")
    assert capsys.readouterr().err == ""


def test_a_date_that_cannot_be_fixed_is_announced(chatml, capsys):
    chatml.chat_template = "{{ strftime_now('%Y') }}" + chatml.chat_template
    tokenize(load_examples(ROWS), chatml, max_length=None)
    assert "today's date" in capsys.readouterr().err


def test_a_cut_conversation_keeps_the_targets_before_the_cut(chatml):
    whole = tokenize(load_examples(ROWS), chatml, max_length=None)
    cut = tokenize(load_examples(ROWS), chatml, max_length=30)
    np.testing.assert_array_equal(cut.targets[0], whole.targets[0][:30])
    assert cut.truncated.tolist() == [True]
