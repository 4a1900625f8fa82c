"""What queries choose to have explained: this answer and not that one, a part of it, or its tokens by weights."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vestige.data._records import quote
from vestige.data._turns import read_json, read_turns
from vestige.data._types import ASSISTANT, Example, Focus
from vestige.errors import DataError

FocusUse = Literal["read", "refuse", "keep"]
"""Whether a source of queries may choose what is explained; `keep`: it holds no queries, and such columns are data."""
INSTEAD, SPAN, WEIGHTS = FIELDS = ("instead", "span", "weights")
_CHOSEN, _REJECTED = "chosen", "rejected"
_ALIKE = 0.8
"""Likeness of a column's name to one of the fields at which it is taken for a slip."""
_NO_SLIPS = ("weight",)
"""Columns of training data, which may be queries as they are."""


def take_focus(columns: Mapping[str, Any], place: str, use: FocusUse) -> tuple[Mapping[str, Any], Focus | None]:
    """Take what chooses the explained part out of the columns of a query; a preference is a contrast of its answers."""
    given = [name for name in (*FIELDS, _CHOSEN, _REJECTED) if not _is_empty(columns.get(name))]
    if use == "refuse":
        if given:
            raise DataError(
                f"{place}: `{given[0]}` chooses what of a query is explained, which `vestige attribute` alone does: "
                "this command reads the whole answer. Drop the column."
            )
        return columns, None
    for name in columns:
        close = difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=_ALIKE)
        if close and name not in (*FIELDS, *_NO_SLIPS):
            raise DataError(f"{place}: `{name}` is no field of a query. Rename it to `{close[0]}`, or drop it.")
    if not given:
        return columns, None
    columns = _as_contrast(columns, given, place)
    focus = Focus(
        _read_instead(columns.get(INSTEAD), place),
        _read_spans(columns.get(SPAN), place),
        _read_weights(columns.get(WEIGHTS), place),
    )
    if focus.instead is not None and (focus.spans or focus.weights):
        other = SPAN if focus.spans else WEIGHTS
        raise DataError(
            f"{place}: `{INSTEAD}` compares whole answers, and `{other}` chooses a part of one. Drop one of them; what "
            "both answers begin with alike counts nothing in a contrast anyway."
        )
    return {name: cell for name, cell in columns.items() if name not in FIELDS}, focus


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str | list | tuple | np.ndarray) and len(cell) == 0)


def _as_contrast(columns: Mapping[str, Any], given: Sequence[str], place: str) -> Mapping[str, Any]:
    """Return the columns of a preference as those of a contrast: why `chosen` and not `rejected`."""
    pair = [name for name in (_CHOSEN, _REJECTED) if name in given]
    if not pair:
        return columns
    answers = [
        name for name in ("completion", "messages", "conversations", INSTEAD) if not _is_empty(columns.get(name))
    ]
    if len(pair) == 1 or answers:
        beside = f" beside `{answers[0]}`" if answers else ""
        raise DataError(
            f"{place}: `{pair[0]}`{beside}: a query that is a preference has `{_CHOSEN}` and `{_REJECTED}`, and is "
            f"explained as a contrast. Give both and no other answer, or write `completion` and `{INSTEAD}`."
        )
    chosen, rejected, prompt = columns[_CHOSEN], columns[_REJECTED], columns.get("prompt")
    rest = {name: cell for name, cell in columns.items() if name not in (_CHOSEN, _REJECTED)}
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        return rest | {"completion": chosen, INSTEAD: rejected}
    before = [] if prompt is None else prompt
    if not all(isinstance(turns, list | tuple | np.ndarray) for turns in (chosen, rejected, before)):
        raise DataError(
            f"{place}: `{_CHOSEN}` and `{_REJECTED}` must be two answers to a `prompt`, or two conversations; they are "
            f"{quote(chosen)} and {quote(rejected)}."
        )
    one, other = (
        read_turns([*before, *turns], name, place) for name, turns in zip(pair, (chosen, rejected), strict=True)
    )
    if one[:-1] != other[:-1] or (one[-1].role, other[-1].role) != (ASSISTANT, ASSISTANT):
        raise DataError(
            f"{place}: `{_CHOSEN}` and `{_REJECTED}` must be the same conversation but for its last turn, the "
            "assistant's. Give conversations that differ there alone."
        )
    return {name: cell for name, cell in rest.items() if name != "prompt"} | {
        "messages": [turn.columns for turn in one],
        INSTEAD: other[-1].content,
    }


def _read_instead(cell: Any, place: str) -> str | None:
    if _is_empty(cell):
        return None
    if not isinstance(cell, str) or not cell.strip():
        raise DataError(f"{place}: `{INSTEAD}` is {quote(cell)}; expected a text: the other answer.")
    return cell


def _read_spans(cell: Any, place: str) -> tuple[tuple[int, int] | str, ...]:
    if _is_empty(cell):
        return ()
    several = cell.tolist() if isinstance(cell, np.ndarray) else cell
    several = several if isinstance(several, list | tuple) and not _is_range(several) else [several]
    plain = [one.tolist() if isinstance(one, np.ndarray) else one for one in several]
    wrong = [one for one in plain if not (one.strip() if isinstance(one, str) else _is_range(one))]
    if wrong:
        raise DataError(
            f"{place}: `{SPAN}` holds {quote(wrong[0])}; expected characters [start, end] of the answer, counted from "
            "0, the words themselves, or a list of these."
        )
    return tuple(one if isinstance(one, str) else (one[0], one[1]) for one in plain)


def _is_range(cell: Any) -> bool:
    is_pair = isinstance(cell, list | tuple) and len(cell) == 2
    return is_pair and all(isinstance(each, int | np.integer) and not isinstance(each, bool) for each in cell)


def _read_weights(cell: Any, place: str) -> tuple[float, ...]:
    if _is_empty(cell):
        return ()
    found = read_json(cell, WEIGHTS, place) if isinstance(cell, str) else cell
    try:
        numbers = np.asarray(found)
    except ValueError:  # rows of different lengths
        numbers = np.empty((0, 0))
    is_flat = numbers.ndim == 1 and numbers.dtype.kind in "if" and not any(isinstance(each, bool) for each in found)
    if not is_flat or not np.isfinite(numbers).all() or not numbers.any():
        raise DataError(
            f"{place}: `{WEIGHTS}` is {quote(cell)}; expected a list of finite numbers, not all 0: one for each part "
            f"of `{SPAN}`, or one for each token of the answer."
        )
    return tuple(map(float, numbers))


def describe_focus(examples: Sequence[Example]) -> str:
    """Return in words what of how many queries is explained; empty where it is the whole of every one."""
    chosen = [one.focus for one in examples if one.focus is not None]
    counts = {
        "as contrasts, by the loss of the answer less that of `instead`": sum(
            one.instead is not None for one in chosen
        ),
        "by a part of the answer": sum(bool(one.spans) for one in chosen),
        "with weights of tokens": sum(bool(one.weights) for one in chosen),
    }
    return "; ".join(f"{count:,} of {len(examples):,} {what}" for what, count in counts.items() if count)


def find_focus(examples: Sequence[Example]) -> dict[str, str]:
    """Return the fields that queries choose with, each with the id of the first that does."""
    found: dict[str, str] = {}
    for example in examples:
        columns = {} if example.focus is None else example.focus.columns
        for name in (name for name, cell in columns.items() if cell is not None):
            found.setdefault(name, example.id)
    return found
