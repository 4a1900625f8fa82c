"""Columns and keys of turns beside the text: given to the chat template, honoured in the loss, listed, or refused."""

import json

import pytest

from vestige.data import Message, as_conversation, load_examples, load_queries, tokenize
from vestige.errors import DataError

ASKED = {"role": "user", "content": "Why?"}
SAID = {"role": "assistant", "content": "Because."}
WRITES_ALL = (
    "{%- if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{%- if documents %}{% for one in documents %}[{{ one.text }}]{% endfor %}{% endif %}"
    "{%- if enable_thinking is defined and not enable_thinking %}/no_think {% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}\n"
    "{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thoughts only in the last turn, so that a shorter conversation is no prefix of a longer one.
FORGETS = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{%- if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def writes_all(chatml):
    chatml.chat_template = WRITES_ALL
    return chatml


def read(row, tokenizer, **settings):
    """The text of a row, and of it what is learned."""
    data = tokenize(load_examples([row]), tokenizer, max_length=None, **settings)
    ids, mask = data.input_ids[0], data.targets[0]
    return tokenizer.decode(ids), tokenizer.decode(ids[mask])


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"weight": False},
        {"weight": "0"},
        {"train": False},
        {"training": False},
        {"trainable": False},
        {"loss": False},
        {"loss_mask": 0},
        {"loss_scale": 0.0},
        {"learn": 0},
        {"masked": True},
        {"mask": 1},
        {"ignore": True},
    ],
)
@pytest.mark.parametrize("template", ["chatml", "chatml_marked", "forgets"])
def test_a_turn_that_is_not_to_be_learned_is_no_target(flag, template, request, chatml):
    if template == "forgets":
        chatml.chat_template = FORGETS
    tokenizer = chatml if template == "forgets" else request.getfixturevalue(template)
    turns = [ASKED, {"role": "assistant", "content": "five", **flag}, ASKED, {"role": "assistant", "content": "four"}]
    text, learned = read({"messages": turns}, tokenizer)
    assert "five" in text
    assert learned == "four<|im_end|>"


@pytest.mark.parametrize("flag", [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"weight": None}, {"masked": False}])
def test_a_turn_that_is_to_be_learned_stays_one(flag, chatml):
    assert read({"messages": [ASKED, SAID | flag]}, chatml)[1] == "Because.<|im_end|>"


@pytest.mark.parametrize(
    ("turn", "name"),
    [
        (SAID | {"weight": 0.5}, "weight"),
        (SAID | {"weight": 2}, "weight"),
        (SAID | {"train": "maybe"}, "train"),
        (SAID | {"loss": 1.7}, "loss"),
        (SAID | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}, "train_detail"),
        (ASKED | {"train": True}, "train"),
        (ASKED | {"loss": True}, "loss"),
        (SAID | {"images": ["a.png"]}, "images"),
    ],
)
def test_a_flag_that_cannot_be_honoured_is_refused_by_name(turn, name):
    with pytest.raises(DataError, match=rf"row 0, `messages`\[1\]: `{name}`"):
        load_examples([{"messages": [ASKED, turn]}])


def test_a_weight_of_a_user_turn_changes_nothing(chatml):
    assert read({"messages": [ASKED | {"weight": 1}, SAID]}, chatml)[1] == "Because.<|im_end|>"


TOOLS = [{"type": "function", "function": {"name": "depth"}}]


@pytest.mark.parametrize("name", ["tools", "functions", "available_tools"])
@pytest.mark.parametrize("cell", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_given_to_the_template(name, cell, writes_all):
    row = {"messages": [ASKED, SAID], name: cell}
    text, learned = read(row, writes_all)
    assert text.startswith('<|im_start|>tools\n{"type": "function", "function": {"name": "depth"}}')
    assert learned == "Because.<|im_end|>"
    chat = read({"question": "Why?", "answer": "Because.", name: cell}, writes_all, chat=True)
    assert chat == (text, learned)


def test_documents_and_settings_of_the_template_are_given_to_it(writes_all):
    row = {
        "messages": [ASKED, SAID],
        "documents": [{"text": "ra"}, {"text": "in"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert read(row, writes_all)[0].startswith("[ra][in]/no_think <|im_start|>user")


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_column_is_a_system_turn(name, chatml):
    turns = [{"role": "system", "content": "Be kind."}, ASKED, SAID]
    expected = read({"messages": turns}, chatml)
    assert read({"messages": [ASKED, SAID], name: "Be kind."}, chatml) == expected
    assert read({"messages": turns, name: "Be kind."}, chatml) == expected
    assert read({"question": "Why?", "answer": "Because.", name: "Be kind."}, chatml, chat=True) == expected


def test_a_history_comes_before_the_question_and_is_learned(chatml):
    row = {"instruction": "Why?", "output": "Because.", "history": [["Hi", "Hello"]], "system": "Be kind."}
    (example,) = load_examples([row])
    assert [turn.role for turn in as_conversation(example)] == ["system", "user", "assistant", "user", "assistant"]
    assert read(row, chatml, chat=True)[1] == "Hello<|im_end|>Because.<|im_end|>"
    assert read(row | {"history": '[["Hi", "Hello"]]'}, chatml, chat=True)[1] == "Hello<|im_end|>Because.<|im_end|>"


@pytest.mark.parametrize(
    ("column", "cell"), [("system", "Be kind."), ("history", [["a", "b"]]), ("tools", TOOLS), ("functions", TOOLS)]
)
def test_columns_of_a_conversation_are_refused_in_plain_text(column, cell, chatml):
    with pytest.raises(DataError, match=rf"row 0 \(id '0'\): `{column}` .*--chat"):
        read({"prompt": "Why?", "completion": "Because.", column: cell}, chatml)
    empty = {"prompt": "Why?", "completion": "Because.", column: type(cell)()}
    assert read(empty, chatml)[1] == "Because.</s>"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"system": 5}, "`system` is 5"),
        ({"system": "a", "system_prompt": "b"}, "`system_prompt`"),
        ({"tools": "no JSON"}, "`tools` is a string, but not JSON"),
        ({"tools": {"name": "f"}}, "`tools` is .*expected a list"),
        ({"tools": TOOLS, "functions": TOOLS}, "`functions` beside other tools"),
        ({"chat_template_kwargs": ["a"]}, "`chat_template_kwargs` is .*expected an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "`chat_template_kwargs` holds `tokenize`"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "holds `add_generation_prompt`"),
    ],
)
def test_columns_of_a_conversation_that_are_broken_are_explained(columns, message, writes_all):
    with pytest.raises(DataError, match=message):
        read({"messages": [ASKED, SAID], **columns}, writes_all)


def test_two_system_texts_are_refused(chatml):
    with pytest.raises(DataError, match="`system` and the system's turn of the conversation differ"):
        read({"messages": [{"role": "system", "content": "a"}, ASKED, SAID], "system": "b"}, chatml)


def test_keys_of_turns_are_given_to_the_template(writes_all, capsys):
    call = {"function": {"name": "depth", "arguments": {"river": "Inn"}}}
    turns = [
        ASKED | {"name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2 m", "tool_call_id": "c1"},
        SAID | {"reasoning_content": "two"},
    ]
    text, learned = read({"messages": turns}, writes_all)
    written = '<call>{"name": "depth", "arguments": {"river": "Inn"}}</call>'
    assert text.startswith("<|im_start|>user AnnWhy?<|im_end|>")
    assert learned == f"{written}<|im_end|><think>two</think>Because.<|im_end|>"
    assert "None" not in text
    assert "writes some conversations the same without `tool_call_id`." in capsys.readouterr().err


def test_a_key_that_the_template_names_elsewhere_but_does_not_write_is_listed(chatml, capsys):
    chatml.chat_template = "{% if tools %}{{ tools[0].name }}{% endif %}" + chatml.chat_template
    read({"messages": [ASKED | {"name": "Ann", "mood": "glad"}, SAID | {"weight": 1}]}, chatml)
    assert "writes some conversations the same without `mood`, `name`." in capsys.readouterr().err


def test_thoughts_and_calls_are_learned_where_turns_are_found_by_their_contents(chatml):
    chatml.chat_template = FORGETS
    call = {"function": {"name": "depth"}}
    turns = [
        ASKED,
        SAID | {"tool_calls": [call], "reasoning_content": "old"},
        ASKED,
        SAID | {"reasoning_content": "two"},
    ]
    text, learned = read({"messages": turns}, chatml)
    assert "old" not in text
    assert learned == 'Because.<call>{"name": "depth"}</call><|im_end|><think>two</think>Because.<|im_end|>'


def test_a_template_that_cannot_join_a_null_content_is_given_an_empty_one(chatml):
    chatml.chat_template = WRITES_ALL.replace("{{ m.content }}", "{{ m.content + '' }}")
    turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "depth"}}]}]
    _, learned = read({"messages": turns}, chatml)
    assert learned == '<call>{"name": "depth"}</call><|im_end|>'


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"])
def test_text_of_a_turn_that_the_template_leaves_out_is_refused(key, chatml):
    cell = [{"function": {"name": "f"}}] if key == "tool_calls" else "a thought"
    with pytest.raises(DataError, match=rf"Row 0 \(id '0'\): .*does not write `{key}`"):
        read({"messages": [ASKED, SAID | {key: cell}]}, chatml)
    assert read({"messages": [ASKED, SAID | {key: None}]}, chatml)[1] == "Because.<|im_end|>"
    assert read({"messages": [ASKED, SAID | {key: type(cell)()}]}, chatml)[1] == "Because.<|im_end|>"


@pytest.mark.parametrize("column", ["tools", "documents"])
def test_a_column_that_the_template_leaves_out_is_refused(column, chatml):
    with pytest.raises(DataError, match=rf"does not write `{column}`"):
        read({"messages": [ASKED, SAID], column: [{"name": "f"}]}, chatml)


def test_a_template_that_goes_through_all_keys_writes_what_it_does_not_name(chatml):
    chatml.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for k, v in m.items() if k[:9] == 'reasoning' %}{{ v }}{% endfor %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    learned = read({"messages": [ASKED, SAID | {"reasoning_details": "So. "}]}, chatml)[1]
    assert learned == "So. Because.<|im_end|>"


@pytest.mark.parametrize(
    "role", ["Assistant", "ASSISTANT", "ai", "AI", "chatgpt", "bot", "gpt", "model", " assistant "]
)
def test_every_name_of_the_assistant_is_one(role):
    (example,) = load_examples([{"conversations": [{"from": "Human", "value": "a"}, {"from": role, "value": "b"}]}])
    assert example.messages == (Message("user", "a"), Message("assistant", "b"))


def test_conversations_without_an_assistant_are_counted_with_their_roles(chatml, capsys):
    rows = [
        {"messages": [ASKED, {"role": "clerk", "content": "x"}]},
        {"messages": [ASKED]},
        {"messages": [ASKED, SAID]},
    ]
    tokenize(load_examples(rows), chatml, max_length=None, name="train")
    said = capsys.readouterr().err
    assert "train: 2 of 3 examples have no target token and cannot score." in said
    assert "without an assistant's turn have the roles clerk, user." in said


def test_a_call_in_a_role_of_its_own_is_refused():
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]
    with pytest.raises(DataError, match=r"`conversations`\[1\]: a turn of the role `function_call`.*`tool_calls`"):
        load_examples([{"conversations": turns}])


def test_nulls_of_a_union_of_parts_are_no_words(chatml):
    parts = [{"type": "text", "text": "Why?", "image": None}, {"type": "text", "text": None, "image": None}]
    expected = read({"messages": [ASKED, SAID]}, chatml)
    assert read({"messages": [ASKED | {"content": parts}, SAID]}, chatml) == expected


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"type": "image", "text": None, "image": "x.png"}, "image"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
        ({"type": "image"}, "image"),
        ({"type": "input_audio", "input_audio": {"data": "x"}}, "input_audio"),
        ({"type": "video", "video": "x.mp4", "text": None}, "video"),
        ({"type": "text", "text": "hi", "image": "x.png"}, "image"),
        ({"type": "thinking", "thinking": "hm", "text": None}, "thinking"),
        ({"type": "tool_use", "input": {}, "name": "f"}, "tool_use"),
        ({"text": None}, "None"),
        ({"type": "text", "text": 5}, "text"),
    ],
)
def test_a_part_that_is_no_text_is_refused_by_name(part, name):
    turn = {"role": "user", "content": [{"type": "text", "text": "hi"}, part]}
    with pytest.raises(DataError, match=rf"row 0, `messages`\[0\], `content`\[1\]: .*{name}"):
        load_examples([{"messages": [turn, SAID]}])


@pytest.mark.parametrize("turn", [{"role": "user", "content": None}, {"role": "assistant", "content": None}])
def test_a_null_content_without_a_call_is_refused(turn):
    with pytest.raises(DataError, match=r"`messages`\[0\]: the turn has no `content` that is a text"):
        load_examples([{"messages": [turn, SAID]}])


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"rejected": "No."}, "rejected"),
        ({"chosen": [SAID], "rejected": [SAID]}, "chosen"),
        ({"rejected_response": "No."}, "rejected_response"),
        ({"label": False}, "label"),
        ({"kto_tag": False}, "kto_tag"),
        ({"images": ["x.png"]}, "images"),
        ({"train_on_prompt": True}, "train_on_prompt"),
        ({"mask_history": True}, "mask_history"),
        ({"image": "x.png"}, "image"),
    ],
)
@pytest.mark.parametrize("row", [{"prompt": "Why?", "completion": "Because."}, {"messages": [ASKED, SAID]}])
def test_rows_that_are_not_to_be_learned_as_they_stand_are_refused(columns, name, row):
    with pytest.raises(DataError, match=rf"row 0: `{name}`"):
        load_examples([row | columns])


@pytest.mark.parametrize("name", ["loss_mask", "weights", "turn_masks", "train_flags"])
def test_a_column_with_an_entry_for_each_turn_is_refused(name):
    with pytest.raises(DataError, match=rf"row 0: `{name}` may decide"):
        load_examples([{"messages": [ASKED, SAID], name: [0, 1]}])
    assert load_examples([{"messages": [ASKED, SAID], "tags": ["a", "b"], name: [1, 2, 3]}])


def test_other_labels_are_labels():
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, "False", 0, "spam")]
    rows += [{"text": "a", "label": False}, {"text": "a", "chosen": "a", "images": ["a"]}]
    assert [example.label for example in load_examples(rows)] == ["True", "False", "0", "spam", "False", None]
    assert load_queries([{"prompt": "a", "completion": "b", "label": False}])[0].label == "False"


def test_unknown_columns_are_listed_once(chatml, capsys):
    rows = [{"messages": [ASKED, SAID], "url": "x", "system": "Be kind."}, {"text": "a", "score": 1, "weight": 2}]
    tokenize(load_examples(rows), chatml, max_length=None, name="train")
    listed = "train: kept with the examples, changing neither their text nor their loss: `score`, `url`, `weight`"
    assert capsys.readouterr().err.count(listed) == 1


def test_columns_of_turns_that_do_not_fit_are_explained():
    with pytest.raises(
        DataError, match="columns of `messages` are of different lengths: `role` has 2, `content` has 1"
    ):
        load_examples([{"messages": {"role": ["user", "assistant"], "content": ["a"]}}])
    with pytest.raises(DataError, match="`messages` is a string, but not JSON: nested more than"):
        load_examples([{"messages": "[" * 100_000}])
    with pytest.raises(DataError, match=r"row 0: `messages` is JSON that holds half .* at \[0\]\.content"):
        load_examples([{"messages": json.dumps([ASKED | {"content": "cut \ud83d"}])}])


def test_turns_and_columns_come_back_from_an_index(tmp_path, writes_all):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from vestige.data import EXAMPLES, StoredExamples, record_of

    turns = [ASKED | {"name": "Ann"}, SAID | {"weight": 0}, ASKED, SAID | {"reasoning_content": "two"}]
    examples = load_examples([{"messages": turns, "tools": TOOLS}, {"messages": [ASKED, SAID]}])
    records = [record_of(example, 1) for example in examples]
    assert records[1]["messages"] == '[["user", "Why?"], ["assistant", "Because."]]'
    parquet.write_table(pa.Table.from_pylist(records, schema=EXAMPLES), tmp_path / "stored.parquet")
    stored = StoredExamples([tmp_path / "stored.parquet"])
    assert list(stored) == examples
    whole = [tokenize(found, writes_all, max_length=None).fingerprint for found in (examples, stored)]
    assert whole[0] == whole[1]
