"""Questions are put as the data are, and an answer that says nothing is refused."""

import pytest
from transformers import AutoTokenizer

from tests.workshop import furnish
from vestige.data import Example, Message, ask, frame_of, require_answers, tokenize
from vestige.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(furnish(tmp_path_factory.mktemp("workshop")) / "tiny-model")


def talk(row, system, *turns):
    roles = ("user", "assistant") * len(turns)
    said = tuple(Message(role, text) for role, text in zip(roles, turns, strict=False))
    return Example(str(row), row, messages=((Message("system", system),) if system else ()) + said)


def prompt(text, answer=None):
    return Example("q", 0, prompt=text, completion=answer)


TALKS = [talk(0, "Be kind.", "Hi?", "Hello."), talk(1, "Be kind.", "Who?", "Me."), talk(2, "Be brief.", "Why?", "So.")]


def test_a_prompt_becomes_the_user_turn_under_the_commonest_system_prompt(tokenizer, capsys):
    queries, how = ask([prompt("Where?\n"), prompt("When?", "Now.")], TALKS, chat=None, tokenizer=tokenizer)
    lead = Message("system", "Be kind.")
    assert queries[0].messages == (lead, Message("user", "Where?"))
    assert queries[0].prompt is None
    assert queries[0].lacks_answer
    assert queries[1].messages == (lead, Message("user", "When?"), Message("assistant", "Now."))
    assert "2 of 3 rows" in how
    assert capsys.readouterr().err.count("--no-chat keeps the bare text") == 1


@pytest.mark.parametrize(
    "data",
    [
        [talk(0, None, "a", "b"), talk(1, None, "c", "d"), TALKS[0]],  # most have none
        [talk(row, f"Page {row}", "a", "b") for row in range(4)],  # each has its own
    ],
)
def test_a_system_prompt_that_is_not_shared_is_not_made_up(data, tokenizer):
    (query,), _ = ask([prompt("Where?")], data, chat=None, tokenizer=tokenizer)
    assert query.messages == (Message("user", "Where?"),)


@pytest.mark.parametrize(
    ("data", "chat"),
    [
        (TALKS, False),
        ([Example("0", 0, prompt="a", completion="b"), Example("1", 1, text="c")], None),
        ([TALKS[0], Example("1", 1, text="c")], None),  # half of the rows are not most of them
    ],
)
def test_prompts_stay_as_they_are_where_the_data_or_the_user_say_so(data, chat, tokenizer, capsys):
    queries = [prompt("Where?")]
    assert ask(queries, data, chat=chat, tokenizer=tokenizer) == (queries, "")
    assert "conversation" not in capsys.readouterr().err


def test_conversations_texts_and_rendered_prompts_are_left_alone(tokenizer, capsys):
    given = [TALKS[0], Example("t", 1, text="A text."), prompt("<|user|>Where?</s><|assistant|>")]
    queries, how = ask(given, TALKS, chat=None, tokenizer=tokenizer)
    assert (queries, how) == (given, "")
    printed = capsys.readouterr().err
    assert "1 of them hold special tokens" in printed
    assert "1 of them are a `text`" in printed


def test_a_developer_turn_is_a_system_prompt():
    data = [Example(str(row), row, messages=(Message("developer", "Do."), Message("user", "a"))) for row in range(2)]
    frame = frame_of(data, chat=None)
    assert frame is not None
    assert frame.lead == (Message("system", "Do."),)


@pytest.mark.parametrize(
    ("query", "generated"),
    [
        (prompt("Why?", ""), True),
        (prompt("Why?", " \n"), False),
        (prompt("Why?", "</s>"), False),
        (talk(0, None, "Why?", ""), True),
        (talk(0, None, "Why?", "Because.", "Really?", "\t"), False),
        (talk(0, None, "Why?", "</s>"), True),
        (Example("t", 0, text="   "), False),
    ],
)
def test_white_space_and_end_tokens_are_no_answer(query, generated, tokenizer):
    data = tokenize([prompt("Who?", "Me."), query], tokenizer, max_length=None)
    with pytest.raises(DataError, match=r"1 of 2 queries.*(--max-new-tokens|Give the answer)"):
        require_answers(data, [False, generated], tokenizer)


def test_every_query_without_an_answer_is_named_and_chat_is_offered(tokenizer):
    rows = [Example(f"q{row}", row, prompt="Why?", completion="" if row else "So.") for row in range(8)]
    data = tokenize(rows, tokenizer, max_length=None)
    with pytest.raises(DataError, match=r"7 of 8 queries \('q1', .*'q5' and 2 more\).*--chat"):
        require_answers(data, [True] * 8, tokenizer)


@pytest.mark.parametrize("answer", ["So.", "0", "\u00e9", "..."])
def test_an_answer_of_one_character_is_one(answer, tokenizer):
    require_answers(tokenize([prompt("Why?", answer)], tokenizer, max_length=None), [False], tokenizer)
