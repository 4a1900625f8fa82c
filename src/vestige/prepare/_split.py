"""`vestige data split`: the rows in parts."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vestige.data import Example, describe_copies, text_groups
from vestige.errors import DataError
from vestige.prepare._results import (
    Prepared,
    check_same_result,
    claim_result,
    fingerprint_of,
    line_of,
    read_rows,
    row_of,
    write_prepared,
)
from vestige.settings import SplitSettings, with_settings
from vestige.storage import write_durably


@with_settings(SplitSettings)
def split(settings: SplitSettings) -> Prepared:
    """Write a file of JSON lines for each part, and data.jsonl with every drawn row and the name of its `part`.

    Raises:
        DataError: The data is absent or broken, a part would be empty, or sources are requested and a row has none.
    """
    examples = read_rows(settings)
    fingerprint = fingerprint_of(examples)
    check_same_result(settings, "split", fingerprint, frozenset())
    groups = text_groups(examples)
    parts = _assign_parts(examples, groups, settings.shares, settings.by, settings.seed)
    rows = {
        name: [row_of(each) for each, part in zip(examples, parts, strict=True) if part == name]
        for name in settings.shares
    }
    empty = [name for name, held in rows.items() if not held]
    if empty:
        raise DataError(f"No row of {len(examples):,} falls to {', '.join(empty)}. Give larger shares or more rows.")
    claim_result(settings, "split", fingerprint)
    for name, held in rows.items():
        write_durably(settings.out / f"{name}.jsonl", map(line_of, held))
    every = [row | {"part": name} for name, held in rows.items() for row in held]
    notes = [f"{len(held):,} rows in {settings.out / name}.jsonl" for name, held in rows.items()]
    left = len(examples) - len(every)
    notes += [f"{left:,} rows are in no part."] if left else []
    if (copies := describe_copies(groups)) is not None:
        firsts = np.unique(groups, return_index=True)[1]
        apart = sum(part != parts[int(firsts[group])] for group, part in zip(groups, parts, strict=True))
        notes += [copies, *([f"{apart:,} copies are not in the part of the first such row."] if apart else [])]
    return write_prepared(settings, "split", every, fingerprint=fingerprint, notes=notes)


def _assign_parts(
    examples: Sequence[Example], groups: Int[np.ndarray, "example"], shares: dict[str, float], by: str, seed: int
) -> list[str | None]:
    """Return the part of every example, None where the shares leave some out; the same for the same arguments.

    Examples of one group are in one part, wherever sources are not to stay whole. Raise `DataError` where `by` asks for
    sources and an example has none.
    """
    draw = np.random.default_rng(seed)
    firsts = np.unique(groups, return_index=True)[1]
    if by == "example":
        parts = _draw_parts(len(firsts), shares, draw)
        return [parts[group] for group in groups]
    sources: dict[str, list[int]] = {}
    for row, example in enumerate(examples):
        if example.source is None:
            raise DataError(f"Row {row} (id {example.id!r}) has no `source`, and --by {by} asks for one.")
        sources.setdefault(example.source, []).append(row)
    found: list[str | None] = [None] * len(examples)
    if by == "source":
        for rows, part in zip(sources.values(), _draw_parts(len(sources), shares, draw), strict=True):
            for row in rows:
                found[row] = part
        return found
    for rows in sources.values():
        own = [row for row in rows if firsts[groups[row]] == row]
        for row, part in zip(own, _draw_parts(len(own), shares, draw), strict=True):
            found[row] = part
    return [found[firsts[group]] for group in groups]


def _draw_parts(count: int, shares: dict[str, float], draw: np.random.Generator) -> list[str | None]:
    """Return a part for each of `count` things, in shares that are as near as whole numbers allow."""
    found: list[str | None] = [None] * count
    order = draw.permutation(count)
    ends = np.floor(np.cumsum(list(shares.values())) * count + 0.5 + 1e-9).astype(int)
    for name, begin, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
        for thing in order[begin:end]:
            found[int(thing)] = name
    return found
