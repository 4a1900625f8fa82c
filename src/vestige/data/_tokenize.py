"""From examples to the tokens a model sees, with the positions whose prediction enters the loss."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vestige.data._chat import render_conversations
from vestige.data._encode import Rendered, Span, Tokens, encode, whole_text
from vestige.data._fingerprint import data_fingerprint
from vestige.data._types import NO_TARGET, Example, TokenizedData
from vestige.errors import DataError
from vestige.progress import announce

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    max_length: int | None,
    name: str = "data",
    chat: bool = False,
    add_eos: bool = True,
) -> TokenizedData:
    """The examples as tokens and targets; row `i` of the result is `examples[i]`.

    Targets are all tokens of a `text`, the tokens of a `completion` (one that straddles the border to the
    prompt counts as completion), and the assistant's turns of `messages`. Position 0 is never a target.
    Examples with `input_ids` in `extra` are taken as they are, their `labels` deciding the targets.

    Args:
        examples: What `load_examples` or `load_queries` returned.
        tokenizer: The model's tokenizer; None when every example has `input_ids`.
        max_length: Tokens beyond this many are cut off from the right, which is announced; None cuts nothing.
        name: What the data is called in messages and in the result.
        chat: Write a prompt and its completion as a user's and an assistant's turn of the chat template.
        add_eos: End texts and completions with the end token (a target), unless they do; chat templates end
            turns.

    Raises:
        DataError: A conversation does not render, a tokenised row is inconsistent, or a tokenizer is needed.
    """
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length={max_length}: at least 2 tokens are needed, one to predict the other from.")
    examples = list(examples)
    rows = _encode_all(examples, tokenizer, name, chat, add_eos)
    whole = np.array([len(tokens.ids) for tokens in rows], dtype=np.int64)
    truncated = np.zeros(len(rows), dtype=bool) if max_length is None else whole > max_length
    input_ids = [tokens.ids[:max_length] for tokens in rows]
    targets = [tokens.targets[:max_length] for tokens in rows]
    fingerprint = data_fingerprint(examples, input_ids, targets)
    data = TokenizedData(examples, input_ids, targets, truncated, fingerprint, name)
    _announce_losses(data, rows, max_length)
    return data


def _encode_all(
    examples: list[Example],
    tokenizer: "PreTrainedTokenizerBase | None",
    name: str,
    chat: bool,
    add_eos: bool,
) -> list[Tokens]:
    """Tokens of every example, each kind of example encoded in one go."""
    given = [number for number, example in enumerate(examples) if "input_ids" in example.extra]
    result = {number: _given_tokens(examples[number], name) for number in given}
    spoken = [
        number
        for number, example in enumerate(examples)
        if number not in result and (example.messages or (chat and example.prompt is not None))
    ]
    plain = sorted(set(range(len(examples))) - set(result) - set(spoken))
    if given and len(given) < len(examples):
        announce(f"{name}: {len(given):,} of {len(examples):,} rows hold `input_ids`, which are used as they are.")
    if len(given) == len(examples):
        return [result[number] for number in range(len(examples))]
    if tokenizer is None:
        example = examples[min(spoken + plain)]
        raise DataError(
            f"{name}, row {example.row} (id {example.id!r}): a text needs a tokenizer, and none was given. "
            "Name one, or give rows that hold `input_ids`."
        )
    rendered = render_conversations([examples[number] for number in spoken], tokenizer) if spoken else []
    rendered += [_render_plain(examples[number]) for number in plain]
    if add_eos and plain and tokenizer.eos_token_id is None:
        announce(f"{name}: the tokenizer has no end token, so none is added to texts and completions.")
    result.update(zip(spoken + plain, encode(rendered, tokenizer, add_eos=add_eos), strict=True))
    return [result[number] for number in range(len(examples))]


def _render_plain(example: Example) -> Rendered:
    if example.text is not None:
        return Rendered(example.text, (whole_text(example.text),), has_special_tokens=False, ends=True)
    prompt, completion = example.prompt or "", example.completion
    if completion is None:
        return Rendered(prompt, (), has_special_tokens=False, ends=False)
    text = prompt + completion
    return Rendered(text, (Span(len(prompt), len(text)),), has_special_tokens=False, ends=True)


def _given_tokens(example: Example, name: str) -> Tokens:
    """Tokens of a row that came tokenised; what its attention mask leaves out is padding and goes."""
    ids = np.asarray(example.extra["input_ids"], dtype=np.int32)
    labels = np.asarray(example.extra.get("labels", ids), dtype=np.int32)
    kept = np.asarray(example.extra.get("attention_mask", np.ones(len(ids))), dtype=bool)
    place = f"{name}, row {example.row} (id {example.id!r})"
    if not len(ids) == len(labels) == len(kept):
        raise DataError(
            f"{place}: `input_ids`, `labels` and `attention_mask` have {len(ids)}, {len(labels)} and "
            f"{len(kept)} entries; they must have the same number."
        )
    ids, labels = ids[kept], labels[kept]
    targets = labels != NO_TARGET
    wrong = np.flatnonzero(targets & (labels != ids))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{place}: the label at position {at} is {labels[at]}, but the token there is {ids[at]}. A "
            f"label must be its own token or {NO_TARGET}; labels are not shifted (the model shifts them "
            "itself)."
        )
    targets[:1] = False
    return Tokens(ids, targets)


def _announce_losses(data: TokenizedData, rows: list[Tokens], max_length: int | None) -> None:
    """Says how many examples were cut, by how much, and how many have nothing to learn, before and after."""
    cut = int(data.truncated.sum())
    without = data.target_counts == 0
    emptied = sum(1 for number in np.flatnonzero(without & data.truncated) if rows[int(number)].targets.any())
    if cut:
        longest = max(len(tokens.ids) for tokens in rows)
        tail = f"; no target is left in {emptied:,} of them" if emptied else ""
        announce(
            f"{data.name}: {cut:,} of {len(data):,} examples are longer than {max_length:,} tokens (the "
            f"longest has {longest:,}) and were cut at the end{tail}."
        )
    # Prompts alone are queries whose answer is still to come: they are not a loss.
    bare = sum(1 for number in np.flatnonzero(without) if not _awaits_answer(data.examples[int(number)])) - emptied
    if bare > 0:
        announce(f"{data.name}: {bare:,} of {len(data):,} examples have no target token and cannot score.")


def _awaits_answer(example: Example) -> bool:
    if example.messages:
        return example.messages[-1].role != "assistant"
    return example.prompt is not None and example.completion is None
