"""Which rows a fix removes and why, and as many random ones for the control."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from vestige.data import Example, rows_listed, rows_named, text_groups
from vestige.errors import DataError, SpecError
from vestige.runs import Scores, conclude
from vestige.settings import FixSettings


@dataclass(frozen=True)
class Choice:
    """The rows to remove."""

    examples: Sequence[Example]
    """All the data."""
    groups: Int[np.ndarray, "example"]
    """The same number for copies of one text."""
    reasons: dict[int, list[str]] = field(default_factory=dict)
    """By row, ascending."""

    @property
    def copies(self) -> list[int]:
        """Rows that stay, although their text is that of a removed one."""
        removed = list(self.reasons)
        alike = np.flatnonzero(np.isin(self.groups, self.groups[removed]))
        return [row for row in alike.tolist() if row not in self.reasons]


def choose_rows(settings: FixSettings, scores: Scores, queries: Sequence[str], examples: Sequence[Example]) -> Choice:
    """Return the rows that the settings name, each with its reasons."""
    choice = Choice(examples, text_groups(examples))
    found: dict[int, list[str]] = {}
    for row, reason in _find(settings, scores, queries, choice):
        found.setdefault(row, []).append(reason)
    if not found:
        raise SpecError(
            f"No row is to be removed: {settings.run} has no conflict for {', '.join(map(repr, queries))}, or no row "
            "with a positive score. Name rows with --drop ID; the report and --top 5 --dry-run list candidates."
        )
    if len(found) == len(examples):
        raise SpecError(
            f"All {len(examples):,} rows are to be removed, which leaves nothing to train on. Remove fewer."
        )
    choice.reasons.update((row, list(dict.fromkeys(found[row]))) for row in sorted(found))
    return choice


def _find(settings: FixSettings, scores: Scores, queries: Sequence[str], choice: Choice) -> Iterator[tuple[int, str]]:
    """Yield the number of each row with a reason."""
    ids = [example.id for example in choice.examples]
    for name, row in rows_named(settings.drop, ids, place="--drop").items():
        yield row, "named" if name == ids[row] else f"named by its number {name}"
    for path in settings.rows:
        for row in rows_listed(path, ids):
            yield row, f"listed in {path.name}"
    for name in settings.source:
        yield from ((row, f"of the source {name}") for row in _rows_of_source(name, choice.examples))
    for query in queries if settings.top is not None else ():
        yield from _find_top(settings, scores, query, ids, choice.groups)
    for query in queries if settings.conflicts else ():
        for proponent, opponent in conclude(scores, query).conflicts:
            rows = rows_named([proponent], ids, place=str(settings.run))
            yield from ((row, f"in conflict with {opponent} over {query}") for row in rows.values())


def _rows_of_source(name: str, examples: Sequence[Example]) -> list[int]:
    found = [row for row, example in enumerate(examples) if example.source == name]
    if not found:
        known = sorted({example.source for example in examples if example.source is not None})
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known[:20]) or 'none'}."
        raise DataError(f"--source {name!r}: no row has this `source`. {hint}")
    return found


def _find_top(
    settings: FixSettings, scores: Scores, query: str, ids: list[str], groups: Int[np.ndarray, "example"]
) -> Iterator[tuple[int, str]]:
    """Yield the strongest proponents of a query, with all copies of their texts."""
    assert settings.top is not None
    listed = [entry for entry in scores.listed(query, "proponent") if entry.score > 0]
    rows = rows_named([entry.example_id for entry in listed], ids, place=str(settings.run))
    texts = list(dict.fromkeys(int(groups[rows[entry.example_id]]) for entry in listed))
    if len(texts) < settings.top:
        raise SpecError(
            f"--top {settings.top}: the run lists {len(texts)} different texts with a positive score for {query!r}. "
            f"Remove fewer, or ask again with a larger --k: vestige attribute --k {2 * settings.top}."
        )
    for rank, group in enumerate(texts[: settings.top], 1):
        yield from ((row, f"proponent {rank} of {query}") for row in np.flatnonzero(groups == group).tolist())


def draw_control(choice: Choice, allowed: Int[np.ndarray, "row"], count: int, seed: int) -> list[int]:
    """Draw as many random rows as are removed: none of these and none of their copies, each text with all its copies.

    Args:
        choice: The removed rows.
        allowed: Rows that are trained on.
        count: How many of them are removed.
        seed: Of the draw.

    Returns:
        Rows, ascending; fewer than are removed where the others are too few, or too large groups of copies.
    """
    groups = choice.groups
    others = np.setdiff1d(allowed, np.flatnonzero(np.isin(groups, groups[list(choice.reasons)])))
    drawn: list[int] = []
    for group in dict.fromkeys(groups[np.random.default_rng(seed).permutation(others)].tolist()):
        rows = others[groups[others] == group].tolist()
        if len(drawn) + len(rows) <= count:
            drawn += rows
        if len(drawn) == count:
            break
    return sorted(drawn)
