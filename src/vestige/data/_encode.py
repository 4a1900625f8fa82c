"""Tokenisation of rendered text: target spans in characters become target marks of tokens."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from vestige.data._records import quote
from vestige.data._types import NO_TARGET
from vestige.errors import DataError
from vestige.parsing import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IDS, LABELS, ATTENTION = "input_ids", "labels", "attention_mask"
_LEARNED = re.compile(
    r"(completion|assistant|response|answer|output|target|generation|loss|train|learn|label|action)s?"
    r"(_only)?(_tokens?)?(_loss)?_masks?|(token_)?loss_masks?|completion_only"
)
"""Columns whose 1 marks a token that the model learns."""
_NOT_LEARNED = re.compile(r"(prompt|instruction|query|ignore|ignored)s?(_tokens?)?_masks?")
"""Columns whose 1 marks a token that the model does not learn."""
_DOCUMENTS = re.compile(r"(seq|seqs|sequence|document|doc|segment|sample|pack|sub_seq)s?_?(ids?|idx|index|indices)")
"""Columns with a number for each token: that of its document."""
_LENGTHS = re.compile(r"((seq|sequence|document|doc|segment|sample|pack)s?_?)?(lens?|lengths?)")
"""Columns with the length of every document of a pack."""
_BORDERS = re.compile(r"cu_?seq_?lens?(_q|_k)?|seq_start_ids?|(document|doc|sequence)_starts?")
"""Columns with the positions where documents of a pack begin."""
_PROMPT_ENDS = re.compile(
    r"(prompt|source|instruction|context|query)s?_?(tokens?_?)?(len|length|end)s?"
    r"|(completion|response|answer|output|target)s?_?(tokens?_?)?starts?"
)
"""Numbers that mark where the prompt of a row ends."""
SUSPECT = re.compile(r"mask|weight|loss|label|target|advantage|reward|position|segment|document|seq|learn|train")
"""Words of names that may decide the loss: a column with an entry for every token and such a name is refused."""
_HARMLESS = ("special_tokens_mask", "token_type_ids", "mm_token_type_ids")


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
    alone: bool = False
    """The targets are a part of the text, to which what follows it does not belong."""


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
    found: dict[int, Tokens] = {}
    for special in (False, True):
        numbers = [number for number, item in enumerate(rendered) if item.has_special_tokens is special]
        for begin in range(0, len(numbers), TEXTS_PER_CALL):
            chunk = numbers[begin : begin + TEXTS_PER_CALL]
            items = [rendered[number] for number in chunk]
            if tokenizer.is_fast:
                encoded = _encode_fast(items, tokenizer, add_special=not special)
            else:
                encoded = [_encode_pieces(item, tokenizer, add_special=not special) for item in items]
            found.update(zip(chunk, encoded, strict=True))
    behind = _count_added_behind(tokenizer)
    return [_finish(item, found[number], tokenizer, behind, add_eos) for number, item in enumerate(rendered)]


def _count_added_behind(tokenizer: "PreTrainedTokenizerBase") -> int:
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
    ids = [np.array(numbers, dtype=np.int32) for numbers in encoded["input_ids"]]
    if all_whole:
        return [Tokens(numbers, np.ones(len(numbers), dtype=bool)) for numbers in ids]
    offsets = [np.array(places, dtype=np.int64).reshape(-1, 2) for places in encoded["offset_mapping"]]
    return list(map(Tokens, ids, map(mark_targets, items, offsets)))


def mark_targets(item: Rendered, offsets: np.ndarray) -> np.ndarray:
    """Return which tokens overlap a target span, given the characters `[token, 2]` that each token covers.

    Some tokenizers trim the leading space from a token's offsets, which can leave a token of blanks with an
    empty range at its end; its end then decides. Special tokens added around the text have the range (0, 0):
    before the first target they are context, after a span that runs to the end of the text they belong to it.
    """
    begin, end = offsets[:, 0], offsets[:, 1]
    targets = np.zeros(len(offsets), dtype=bool)
    for span in item.targets:
        targets |= (end > span.start) & ((end <= span.stop) | (begin < span.stop))
    if item.ends and not item.alone and targets.any():
        targets[int(targets.argmax()) :] = True
    return targets


def _encode_pieces(item: Rendered, tokenizer: "PreTrainedTokenizerBase", *, add_special: bool) -> Tokens:
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
    borders = [0, *(max(at, 0) for span in item.targets for at in span), len(item.text)]
    # Of the pieces between borders every second one is a span.
    pieces = [(item.text[start:stop], number % 2 == 1) for number, (start, stop) in enumerate(pairwise(borders))]
    return [(text, is_target) for text, is_target in pieces if text]


def _finish(item: Rendered, tokens: Tokens, tokenizer: "PreTrainedTokenizerBase", behind: int, add_eos: bool) -> Tokens:
    """Remove what stands `behind` a text that goes on, and a doubled beginning; add the end token where it is due."""
    ids, targets = tokens
    if behind and not (item.ends or item.has_special_tokens):
        ids, targets = ids[:-behind], targets[:-behind]
    bos: Any = tokenizer.bos_token_id
    eos: Any = tokenizer.eos_token_id
    if not item.has_special_tokens and bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids, targets = ids[1:], targets[1:]
    if item.ends and add_eos and eos is not None:
        if len(ids) == 0 or ids[-1] != eos:
            ids, targets = np.append(ids, np.int32(eos)), np.append(targets, not item.alone)
        if not item.alone:
            targets[-1] = True
    targets[:1] = False
    return Tokens(ids, targets)


def read_columns(columns: Mapping[str, Any], place: str) -> dict[str, np.ndarray]:
    """Return the columns of a tokenised row that Vestige uses, as int32 arrays of one length: ids, labels and marks."""
    found = {IDS: _whole(columns[IDS], IDS, place)}
    if found[IDS].min(initial=0) < 0:
        raise DataError(f"{place}: `{IDS}` holds {found[IDS].min()}; ids of tokens begin at 0.")
    for name in columns:
        if name in (LABELS, ATTENTION) or _is_mark(name):
            found[name] = _whole(columns[name], name, place)
            if len(found[name]) != len(found[IDS]):
                raise DataError(f"{place}: `{name}` has {len(found[name])} entries, `{IDS}` has {len(found[IDS])}.")
    for name in found:
        if _is_mark(name) and not np.isin(found[name], (0, 1)).all():
            raise DataError(
                f"{place}: `{name}` holds {quote(sorted(set(found[name].tolist()))[:5])}. A token is learned or not "
                "(0 and 1); weights of tokens are not supported. Correct it, or drop the column."
            )
    _require_one_document(columns, found, place)
    _refuse_unknown(columns, found, place)
    return found


def is_used(name: str, cell: Any) -> bool:
    """Return whether the column of a tokenised row decides its tokens or its loss, or was checked not to."""
    if name in (IDS, LABELS, ATTENTION, "position_ids") or _is_mark(name):
        return True
    return _entries(cell) is not None and any(kind.fullmatch(name) for kind in (_DOCUMENTS, _LENGTHS, _BORDERS))


def read_given_tokens(columns: Mapping[str, Any], place: str) -> Tokens:
    """Return the tokens of a row that came tokenised; what its attention mask leaves out is padding and is dropped.

    A token is a target where its label and every mask of the row agree that it is learned.
    """
    arrays = read_columns(columns, place)
    ids, labels = arrays[IDS], arrays.get(LABELS, arrays[IDS])
    targets = labels != NO_TARGET
    kept = arrays.get(ATTENTION, np.ones(len(ids))).astype(bool)
    wrong = np.flatnonzero(targets & (labels != ids) & kept)
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{place}: the label at position {at} is {labels[at]}, but the token there is {ids[at]}. A "
            f"label must be its own token or {NO_TARGET}; labels are not shifted (the model shifts them "
            "itself)."
        )
    for name, array in arrays.items():
        if _is_mark(name):
            targets &= array.astype(bool) != (_NOT_LEARNED.fullmatch(name) is not None)
    ids, targets = ids[kept], targets[kept]
    targets[:1] = False
    return Tokens(ids, targets)


def _is_mark(name: str) -> bool:
    return _LEARNED.fullmatch(name) is not None or _NOT_LEARNED.fullmatch(name) is not None


def _whole(cell: Any, name: str, place: str) -> np.ndarray:
    """Return the column as int32; numbers such as 1.0 count as whole in a mask."""
    array = _array(cell)
    if _is_mark(name) and array.dtype.kind == "f" and np.isfinite(array).all() and (array == array.round()).all():
        array = array.astype(np.int64)
    if _is_mark(name) and array.dtype.kind == "f":
        raise DataError(
            f"{place}: `{name}` holds {quote(cell)}. A token is learned or not (0 and 1); weights of tokens are not "
            "supported. Correct it, or drop the column."
        )
    if array.ndim != 1 or not (array.dtype.kind in "iub" or array.size == 0):
        raise DataError(f"{place}: `{name}` must be a flat list of whole numbers, got {quote(cell)}.")
    limits = np.iinfo(np.int32)
    if array.size and (int(array.max()) > limits.max or int(array.min()) < limits.min):
        beyond = int(array.max()) if int(array.max()) > limits.max else int(array.min())
        raise DataError(f"{place}: `{name}` holds {beyond}, which is no id of a token: they end at {limits.max}.")
    return array.astype(np.int32)


def _array(cell: Any) -> np.ndarray:
    try:
        return np.asarray(parse_json(cell) if isinstance(cell, str) else cell)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return np.empty((0, 0))


def _require_one_document(columns: Mapping[str, Any], found: Mapping[str, np.ndarray], place: str) -> None:
    """Raise unless every column that separates documents of a pack has only one."""
    attention = found.get(ATTENTION, np.ones(len(found[IDS]), dtype=np.int32))
    kept = attention != 0
    if (np.diff(np.flatnonzero(kept)) > 1).any():
        raise DataError(
            f"{place}: `{ATTENTION}` is 0 in the middle. It may leave out padding at both ends; what a model could not "
            "attend to between other tokens is not supported. Give `labels` to mark what is learned."
        )
    if ATTENTION in found and len(set(attention[kept].tolist()) - {1}) > 0:
        raise _pack_error(ATTENTION, "numbers its documents", place)
    if "position_ids" in columns:
        positions = _array(columns["position_ids"])
        if positions.shape != kept.shape or not np.array_equal(positions[kept], np.arange(int(kept.sum()))):
            raise _pack_error(
                "position_ids", "does not count from 0 to the end, as positions of one document do", place
            )
    for name, cell in columns.items():
        entries = _entries(cell)
        if entries is None:
            continue
        if _DOCUMENTS.fullmatch(name) and entries.shape == kept.shape and len(set(entries[kept].tolist())) > 1:
            raise _pack_error(name, "names several documents", place)
        if _LENGTHS.fullmatch(name) and entries.size > 1:
            raise _pack_error(name, "has the lengths of several documents", place)
        if _BORDERS.fullmatch(name) and set(entries.reshape(-1).tolist()) - {0, len(kept), int(kept.sum())}:
            raise _pack_error(name, "has the borders of several documents", place)


def _pack_error(name: str, why: str, place: str) -> DataError:
    return DataError(
        f"{place}: `{name}` {why}. The row is a pack of documents that training kept apart, and Vestige scores whole "
        "rows. Give each document as a row of its own, before packing (packing=False); drop the column only if the "
        "model read the row as one text."
    )


def _refuse_unknown(columns: Mapping[str, Any], found: Mapping[str, np.ndarray], place: str) -> None:
    """Raise where a column that is not used has an entry for each token and a name that suggests the loss."""
    for name, cell in columns.items():
        if name in found or name in _HARMLESS or is_used(name, cell) or not SUSPECT.search(name.lower()):
            continue
        entries = _entries(cell)
        if entries is not None and len(entries) == len(found[IDS]):
            raise DataError(
                f"{place}: `{name}` has an entry for each token and may decide which are learned, and Vestige does not "
                "know how to read it. Rename it `completion_mask` (1: learned) or `prompt_mask` (1: not learned), or "
                "drop it if it changes nothing."
            )
    for name, cell in columns.items():
        if _PROMPT_ENDS.fullmatch(name) and isinstance(cell, int | float):
            raise DataError(
                f"{place}: `{name}` may mark which tokens are a prompt's and not learned, and Vestige does not "
                "read it. Give `completion_mask` (1: learned) instead, or drop it if it changes nothing."
            )
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in columns and _array(columns[name]).any():
            raise DataError(
                f"{place}: `{name}` is not 0 everywhere. Vestige gives a model its tokens alone. Drop the column if "
                "the model was trained without it."
            )


def _entries(cell: Any) -> np.ndarray | None:
    """Return the column as an array if it is a list, also as JSON text; else None."""
    is_list = isinstance(cell, list | tuple | np.ndarray) or (isinstance(cell, str) and cell.lstrip().startswith("["))
    return _array(cell) if is_list else None
