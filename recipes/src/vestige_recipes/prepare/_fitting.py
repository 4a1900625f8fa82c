"""Prompts that fit into a model together with their answer: what is too long loses its beginning."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vestige.data import Encoder, Example
from vestige.errors import DataError

CUT = "cut_words"
"""Column that says how many words a prompt lost."""
_SHOWN = 3
_WORD = re.compile(r"\S+")


class Fitted(NamedTuple):
    """Rows of which none is too long."""

    rows: list[dict[str, Any]]
    cut: int
    """How many of them were."""


def fitted(rows: Sequence[Mapping[str, Any]], options: str, tokenizer: Any, max_length: int) -> Fitted:
    """The rows, the longest ones without the first words of their prompt.

    Whoever cuts a text at its end cuts off the answer, which is all that there is to learn. Here options and answer
    stay whole, and as few words go as have to.

    Args:
        rows: With `id`, `prompt` and `completion`.
        options: What the options begin with, which stay.
        tokenizer: The model's.
        max_length: Tokens of a prompt, its answer and the end token that a row may have.

    Raises:
        DataError: Options and answer alone are longer.
    """
    encoder = Encoder(tokenizer, max_length=None, name="prompts", chat=False, prompts=True)
    lengths = _lengths(rows, encoder)
    found, impossible = [dict(row) for row in rows], []
    too_long = [place for place, length in enumerate(lengths) if length > max_length]
    for place in too_long:
        row = found[place]
        kept = _kept(row, options, encoder, max_length)
        if kept is None:
            impossible.append(row["id"])
        else:
            prompt = row["prompt"]
            row |= {"prompt": prompt[kept:], CUT: len(_WORD.findall(prompt[:kept]))}
    if impossible:
        named = ", ".join(map(repr, impossible[:_SHOWN])) + (", ..." if len(impossible) > _SHOWN else "")
        raise DataError(
            f"{len(impossible):,} rows ({named}) have options and an answer that are longer than {max_length} tokens "
            "even without their question. Give a larger --max-length, or take them out."
        )
    return Fitted(found, len(too_long))


def _kept(row: Mapping[str, Any], options: str, encoder: Encoder, max_length: int) -> int | None:
    """Where the prompt begins that is as long as can be; None if nothing before the options may stay.

    Tokens at a cut may be others than before it, so every cut that is chosen was tried.
    """
    prompt = row["prompt"]
    end = prompt.rindex(options)
    starts = [*(match.start() for match in _WORD.finditer(prompt[:end])), end]
    low, high = 0, len(starts) - 1
    if not _fits(row, starts[high], encoder, max_length):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(row, starts[middle], encoder, max_length) else (middle, high)
    return starts[high]


def _fits(row: Mapping[str, Any], begin: int, encoder: Encoder, max_length: int) -> bool:
    return _lengths([{**row, "prompt": row["prompt"][begin:]}], encoder)[0] <= max_length


def _lengths(rows: Sequence[Mapping[str, Any]], encoder: Encoder) -> list[int]:
    examples = [
        Example(id=row["id"], row=place, prompt=row["prompt"], completion=row["completion"])
        for place, row in enumerate(rows)
    ]
    return [len(ids) for ids in encoder.encode(examples).input_ids]
