"""Questions in the form of the training data: as a user turn where those are conversations, else as they stand."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from vestige.data._chat import as_conversation
from vestige.data._types import SYSTEM, Example, Message, TokenizedData
from vestige.errors import DataError
from vestige.progress import announce

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = 5
"""Ids that an error lists."""


class Frame(NamedTuple):
    """The frame that makes a question a conversation like those of the training data."""

    lead: tuple[Message, ...]
    """The system turn that goes before it, or nothing."""
    how: str
    """The same in words."""

    def put(self, query: Example) -> Example:
        """Return the query as a conversation, if it is a prompt; its answer is the assistant's turn."""
        if not is_bare(query):
            return query
        turns = (*self.lead, *as_conversation(query))
        return replace(query, prompt=None, completion=None, messages=turns)


class Questions(NamedTuple):
    """Queries, put as the training data are."""

    queries: list[Example]
    how: str
    """What was done to prompts among them, in words; empty for nothing."""


def prompt_of(example: Example) -> str:
    """Return the question: the first turn of the user, or the prompt; the whole text where there is neither."""
    question = next((message.content for message in example.messages if message.role == "user"), None)
    return question or example.prompt or example.display


def is_bare(query: Example) -> bool:
    """Return whether the query is a prompt, with or without an answer, and no conversation yet."""
    return query.prompt is not None and not query.messages and "input_ids" not in query.extra


def frame_of(examples: Iterable[Example], *, chat: bool | None) -> Frame | None:
    """Return the frame that most of the training data has; None if most are no conversations, or `chat` is False.

    The system turn is the most common one, if more conversations begin with it than with none; one that a single
    conversation of several has is not common.
    """
    if chat is False:
        return None
    leads: Counter[str | None] = Counter()
    total = spoken = 0
    for example in examples:
        total += 1
        if example.messages:
            spoken += 1
            first = example.messages[0]
            leads[first.content if first.role in SYSTEM else None] += 1
    if 2 * spoken <= total:
        return None
    lead, count = leads.most_common(1)[0]
    if lead is None or (count == 1 and spoken > 1):
        return Frame((), f"with no system prompt, since no one is shared by most of the {spoken:,} conversations")
    return Frame((Message("system", lead),), f"with the system prompt that {count:,} of {total:,} rows have")


def ask(
    queries: Sequence[Example],
    data: Iterable[Example],
    *,
    chat: bool | None,
    tokenizer: "PreTrainedTokenizerBase | None",
    name: str = "Questions",
) -> Questions:
    """Return the queries, prompts among them put as the data are, and announce how.

    A prompt that already holds a special token of the tokenizer, such as one that a template wrote, stays as it is.

    Args:
        queries: As `load_queries` returns them.
        data: The training data; read only if a query is a prompt.
        chat: What was typed: None follows the data, False keeps the bare text.
        tokenizer: Of the model that answers.
        name: What the queries are called.
    """
    bare = [is_bare(query) and not _is_rendered(query, tokenizer) for query in queries]
    texts = sum(query.text is not None for query in queries)
    frame = frame_of(data, chat=chat) if any(bare) or texts else None
    if frame is None:
        return Questions(list(queries), "")
    how = f"as the user turn of a conversation, {frame.how}" if any(bare) else ""
    if any(bare):
        announce(f"{name} are put {how}; --no-chat keeps the bare text.")
    if rendered := sum(map(is_bare, queries)) - sum(bare):
        announce(f"{rendered:,} of them hold special tokens of a template already, and are put as they stand.")
    if texts:
        announce(f"{texts:,} of them are a `text`, which is explained as it stands; a `prompt` would be answered.")
    return Questions([frame.put(query) if put else query for query, put in zip(queries, bare, strict=True)], how)


def _is_rendered(query: Example, tokenizer: "PreTrainedTokenizerBase | None") -> bool:
    if tokenizer is None:
        return False
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return any(token in (query.prompt or "") for token in special if len(token) > 2)


def require_answers(
    queries: TokenizedData, generated: Sequence[bool], tokenizer: "PreTrainedTokenizerBase | None"
) -> None:
    """Raise unless every query has something to explain: white space and end tokens are no answer.

    Args:
        queries: With their answers.
        generated: Which of these the model gave.
        tokenizer: What their tokens are of; None for queries that have none.

    Raises:
        DataError: One has not; the message names them and what to do.
    """
    skipped = _ends(tokenizer)
    empty = [row for row in range(len(queries)) if not _says_something(queries, row, skipped, tokenizer)]
    if not empty:
        return
    shown = ", ".join(repr(queries.examples[row].id) for row in empty[:_NAMED])
    shown += f" and {len(empty) - _NAMED:,} more" if len(empty) > _NAMED else ""
    who = f"{len(empty):,} of {len(queries):,} queries ({shown})"
    if any(generated[row] for row in empty):
        chat = any(generated[row] and not queries.examples[row].messages for row in empty)
        chat = chat and getattr(tokenizer, "chat_template", None) is not None
        way = "use the model's chat template (--chat, or rows of `messages`), " if chat else ""
        raise DataError(
            f"{who}: the model's answer is empty, or nothing but white space and end tokens, so nothing can be ranked "
            f"for it. To go on, {way}raise --max-new-tokens, or give the answer that is to be explained as "
            "`completion` (in `messages`: as the assistant's turn)."
        )
    is_cut = queries.truncated[empty[0]]
    cut = " It is longer than the model reads, so nothing of the answer was left." if is_cut else ""
    raise DataError(
        f"{who} have no token to explain: expected a `text`, a `prompt` with a `completion`, or messages that end with "
        f"the assistant's, of which something is left without white space and end tokens.{cut} Give the answer, or "
        "leave it out to have the model give its own."
    )


def _ends(tokenizer: "PreTrainedTokenizerBase | None") -> set[int]:
    """Return the special tokens, but for the one that stands for what the tokenizer does not know."""
    if tokenizer is None:
        return set()
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown: Any = tokenizer.unk_token_id
    return (special | set(tokenizer.all_special_ids)) - {unknown}


def _says_something(
    queries: TokenizedData, row: int, skipped: set[int], tokenizer: "PreTrainedTokenizerBase | None"
) -> bool:
    example = queries.examples[row]
    answer = example.text if example.answer is None else example.answer
    if answer is not None and not answer.strip():
        return False
    if tokenizer is None:
        return True
    kept = [int(number) for number in queries.input_ids[row][queries.targets[row]] if int(number) not in skipped]
    return bool(kept) and bool(str(tokenizer.decode(kept)).strip())
