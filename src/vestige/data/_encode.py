"""Tokenisation of rendered text: target spans in characters become target marks of tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_PER_CALL = 512
"""A fast tokenizer works through a list in parallel; longer lists would only keep more offsets in memory."""


class Span(NamedTuple):
    """Characters `start` up to `stop` (not included) of a rendered text."""

    start: int
    stop: int


class Rendered(NamedTuple):
    """The text of an example, and which of its characters the model is to learn."""

    text: str
    targets: tuple[Span, ...]
    has_special_tokens: bool
    """The text already holds its special tokens (a chat template wrote them): none may be added."""
    ends: bool
    """The end token follows: the text or the completion is over, and nothing has written the token yet."""


class Tokens(NamedTuple):
    """One example as the model receives it, before truncation."""

    ids: np.ndarray
    """int32 [token]"""
    targets: np.ndarray
    """bool [token]"""


def whole_text(text: str) -> Span:
    """Return the span that makes every token a target: it starts before the first character, whatever the offsets."""
    return Span(-1, len(text))


def encode(rendered: Sequence[Rendered], tokenizer: "PreTrainedTokenizerBase", *, add_eos: bool) -> list[Tokens]:
    """Tokenise each rendered text; a token that lies partly in a target span is a target.

    A fast tokenizer receives each text whole, so the tokens are those of the joined text; a slow one, which does not
    report where its tokens came from, receives the pieces between span borders separately. A beginning token that the
    text spells out itself is not added a second time. With `add_eos` the end token is appended as a target where a text
    `ends` without it. Where a text goes on, what the tokenizer puts behind every text is left out.
    """
    result: list[Tokens | None] = [None] * len(rendered)
    behind = _added_behind(tokenizer)
    encode_chunk = _encode_fast if tokenizer.is_fast else _encode_slow
    for special in (False, True):
        numbers = [number for number, item in enumerate(rendered) if item.has_special_tokens is special]
        for begin in range(0, len(numbers), TEXTS_PER_CALL):
            chunk = numbers[begin : begin + TEXTS_PER_CALL]
            items = [rendered[number] for number in chunk]
            for number, item, tokens in zip(
                chunk, items, encode_chunk(items, tokenizer, add_special=not special), strict=True
            ):
                if behind and not (item.ends or item.has_special_tokens):
                    tokens = Tokens(tokens.ids[:-behind], tokens.targets[:-behind])
                result[number] = _finished(item, tokens, tokenizer, add_eos)
    return [tokens for tokens in result if tokens is not None]


def _added_behind(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return how many tokens the tokenizer puts behind every text of its own accord."""
    bare: Any = tokenizer("a", add_special_tokens=False, padding=False, truncation=False, verbose=False)["input_ids"]
    whole: Any = tokenizer("a", padding=False, truncation=False, verbose=False)["input_ids"]
    starts = [at for at in range(len(whole) + 1) if list(whole[at : at + len(bare)]) == list(bare)]
    return len(whole) - starts[0] - len(bare) if bare and starts else 0


def _encode_fast(items: list[Rendered], tokenizer: "PreTrainedTokenizerBase", *, add_special: bool) -> list[Tokens]:
    # Where every token is a target anyway, the characters that it covers are not needed.
    all_whole = all(item.targets == (whole_text(item.text),) for item in items)
    encoded = tokenizer(
        [item.text for item in items],
        add_special_tokens=add_special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=not all_whole,
        verbose=False,
    )
    if all_whole:
        return [Tokens(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)) for ids in encoded["input_ids"]]
    return [
        Tokens(
            np.array(ids, dtype=np.int32),
            marked_targets(item, np.array(offsets, dtype=np.int64).reshape(-1, 2)),
        )
        for item, ids, offsets in zip(items, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def marked_targets(item: Rendered, offsets: np.ndarray) -> np.ndarray:
    """Return which tokens overlap a target span, given the characters `[token, 2]` that each token covers.

    Some tokenizers trim the leading space from a token's offsets, which can leave a token of blanks with an
    empty range at its end; its end then decides. Special tokens added around the text have the range (0, 0):
    before the first target they are context, after a span that runs to the end of the text they belong to it.
    """
    begin, end = offsets[:, 0], offsets[:, 1]
    targets = np.zeros(len(offsets), dtype=bool)
    for span in item.targets:
        targets |= (end > span.start) & ((end <= span.stop) | (begin < span.stop))
    if item.ends and targets.any():
        targets[int(targets.argmax()) :] = True
    return targets


def _encode_slow(items: list[Rendered], tokenizer: "PreTrainedTokenizerBase", *, add_special: bool) -> list[Tokens]:
    return [_encode_pieces(item, tokenizer, add_special) for item in items]


def _encode_pieces(item: Rendered, tokenizer: "PreTrainedTokenizerBase", add_special: bool) -> Tokens:
    ids: list[int] = []
    targets: list[bool] = []
    for text, is_target in _pieces(item):
        piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += piece
        targets += [is_target] * len(piece)
    if add_special:
        whole = list(cast(Any, tokenizer).build_inputs_with_special_tokens(ids))
        before = next(at for at in range(len(whole) + 1) if whole[at : at + len(ids)] == ids)
        after = len(whole) - before - len(ids)
        ids, targets = whole, [False] * before + targets + [bool(targets) and targets[-1]] * after
    return Tokens(np.array(ids, dtype=np.int32), np.array(targets, dtype=bool))


def _pieces(item: Rendered) -> list[tuple[str, bool]]:
    """Cut the text at the borders of its target spans, empty pieces left out."""
    pieces: list[tuple[str, bool]] = []
    done = 0
    for span in item.targets:
        start = max(span.start, 0)
        pieces += [(item.text[done:start], False), (item.text[start : span.stop], True)]
        done = span.stop
    pieces.append((item.text[done:], False))
    return [(text, is_target) for text, is_target in pieces if text]


def _finished(item: Rendered, tokens: Tokens, tokenizer: "PreTrainedTokenizerBase", add_eos: bool) -> Tokens:
    """Remove a doubled beginning, and add the end token where it is due; no target at position 0."""
    ids, targets = tokens
    bos: Any = tokenizer.bos_token_id
    eos: Any = tokenizer.eos_token_id
    if not item.has_special_tokens and bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids, targets = ids[1:], targets[1:]
    if item.ends and add_eos and eos is not None:
        if len(ids) == 0 or ids[-1] != eos:
            ids, targets = np.append(ids, np.int32(eos)), np.append(targets, True)
        targets[-1] = True
    targets[:1] = False
    return Tokens(ids, targets)
