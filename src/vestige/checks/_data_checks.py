"""Checks of the tokenised examples, without running the model."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from vestige.checks._types import Check
from vestige.data import TokenizedData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = 3


def data_checks(
    data: TokenizedData,
    tokenizer: "PreTrainedTokenizerBase | None",
    model: nn.Module,
    *,
    max_length: int | None,
    chat: bool,
) -> list[Check]:
    """Check everything that the tokens alone show."""
    return [
        _check_vocabulary(data, model),
        _check_beginnings(data, tokenizer),
        _check_template(data, tokenizer, chat),
        _check_targets(data),
        _check_lengths(data, max_length),
        _check_empty(data),
        _check_duplicates(data),
    ]


def _check_vocabulary(data: TokenizedData, model: nn.Module) -> Check:
    name = "vocabulary"
    largest = np.array([int(ids.max()) if len(ids) else 0 for ids in data.input_ids])
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(getattr(embeddings, "weight", None), "shape", (None,))[0]
    if size is None:
        return Check(name, "good", f"largest token is {largest.max()}", "The model's vocabulary size is not known.")
    beyond = largest >= size
    value = f"largest token is {largest.max()}, the model has {size:,}"
    if not beyond.any():
        return Check(name, "good", value, "Every token has an embedding.", 0)
    advice = f"{_ids(data, beyond)}: the tokenizer is not this model's. Give the right one with --tokenizer."
    return Check(name, "bad", value, advice, int(beyond.sum()))


def _check_beginnings(data: TokenizedData, tokenizer: "PreTrainedTokenizerBase | None") -> Check:
    name = "beginning token"
    beginning: Any = getattr(tokenizer, "bos_token_id", None)
    if tokenizer is None or beginning is None:
        return Check(name, "good", "the tokenizer has none", "Nothing can be doubled.")
    token = tokenizer.convert_ids_to_tokens(beginning)
    once = np.array([len(ids) > 0 and ids[0] == beginning for ids in data.input_ids])
    twice = np.array([len(ids) > 1 and ids[0] == ids[1] == beginning for ids in data.input_ids])
    if twice.any():
        return Check(
            name,
            "bad",
            f"{token} stands twice before {int(twice.sum()):,} of {len(data):,} examples",
            f"{_ids(data, twice)}. Take it out of the texts, the chat template or the tokenizer's settings; a model "
            "that was not trained on it twice answers differently.",
            int(twice.sum()),
        )
    if tokenizer_doubles(tokenizer, int(beginning)):
        advice = (
            "The tokenizer itself writes it twice, and Vestige removes one. If the model was trained with both, "
            "give rows with `input_ids`."
        )
        return Check(name, "warn", f"{token} twice from the tokenizer, once here", advice, 0)
    value = f"{token} before {int(once.sum()):,} of {len(data):,} examples"
    if 0 < int(once.sum()) < len(data):
        advice = "Some examples begin with it and some do not; train and trace with one way of writing them."
        return Check(name, "warn", value, advice, 0)
    return Check(name, "good", value, "It stands nowhere twice.", 0)


def tokenizer_doubles(tokenizer: "PreTrainedTokenizerBase", beginning: int) -> bool:
    """Return whether the tokenizer puts its beginning token twice before a plain text."""
    ids: Any = tokenizer("a", verbose=False)["input_ids"]
    return list(ids[:2]) == [beginning, beginning]


def _check_template(data: TokenizedData, tokenizer: "PreTrainedTokenizerBase | None", chat: bool) -> Check:
    name = "chat template"
    template = bool(getattr(tokenizer, "chat_template", None))
    pairs = any(example.prompt is not None and "input_ids" not in example.extra for example in data.examples)
    if not template:
        return Check(name, "good", "the tokenizer has none", "Texts are used as they are written.")
    if pairs and not chat:
        advice = "If the model was trained on prompts in its chat template, add --chat, or nothing here is what it saw."
        return Check(name, "warn", "there is one, and prompts are not put into it", advice)
    used = chat or any(example.messages for example in data.examples)
    return Check(name, "good", "used" if used else "not needed", "Examples are written as the settings say.")


def _check_targets(data: TokenizedData) -> Check:
    name = "targets"
    counts = data.target_counts
    without = counts == 0
    value = f"{int(counts.sum()):,} of {int(data.lengths.sum()):,} tokens are learned"
    if not without.any():
        return Check(name, "good", value, "Every example has something to learn.", 0)
    value += f"; {int(without.sum()):,} of {len(data):,} examples have none"
    advice = f"{_ids(data, without)}: they score zero. Give them a completion, or raise --max-length if it was cut off."
    return Check(name, "warn", value, advice, int(without.sum()))


def _check_lengths(data: TokenizedData, max_length: int | None) -> Check:
    lengths, cut = data.lengths, data.truncated
    value = f"{lengths.min()} to {lengths.max()} tokens, median {np.median(lengths):.0f}"
    if not cut.any():
        return Check("length", "good", value, "Nothing is cut off.", 0)
    return Check(
        "length",
        "warn",
        f"{value}; {int(cut.sum()):,} of {len(data):,} examples were cut at {max_length}",
        f"{_ids(data, cut)}: what lies behind is not attributed to. Split them, or raise --max-length if the model's "
        "context allows.",
        int(cut.sum()),
    )


def _check_empty(data: TokenizedData) -> Check:
    empty = data.lengths < 2
    if not empty.any():
        return Check("empty examples", "good", "none", "Every example has at least two tokens.", 0)
    advice = f"{_ids(data, empty)}: nothing can be predicted from fewer than two tokens. Leave them out."
    return Check("empty examples", "warn", f"{int(empty.sum()):,} of {len(data):,}", advice, int(empty.sum()))


def _check_duplicates(data: TokenizedData) -> Check:
    seen: set[tuple[bytes, bytes]] = set()
    repeats = np.zeros(len(data), dtype=bool)
    for row, (ids, mask) in enumerate(zip(data.input_ids, data.targets, strict=True)):
        key = (ids.tobytes(), mask.tobytes())
        repeats[row] = key in seen
        seen.add(key)
    count = int(repeats.sum())
    if not count:
        return Check("duplicates", "good", "none", "No two examples are the same to the model.", 0)
    advice = f"{_ids(data, repeats)}: copies get equal scores and fill the ranks together. Leave them out to see more."
    return Check("duplicates", "warn", f"{count:,} of {len(data):,} repeat an earlier one", advice, count)


def _ids(data: TokenizedData, chosen: np.ndarray) -> str:
    """Return the first few ids where `chosen` is true, and how many more there are."""
    rows = np.flatnonzero(chosen)
    shown = ", ".join(repr(data.examples[int(row)].id) for row in rows[:_NAMED])
    return f"{shown} and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else shown
