"""Which examples each model of a bank is trained on: a design is a list of subsets, each with a name."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vestige.data import read_row_list, rows_named
from vestige.errors import DataError
from vestige.parsing import parse_json

EVERYTHING = "everything"
"""Name of the subset that leaves nothing out, to which the others of its design are compared."""

_SUBSETS, _RUNS, _LEFT_OUT = 0, 1, 2
"""First words of the seeds, so that subsets, runs and left-out examples never share random numbers."""


class Subset(NamedTuple):
    """Examples to train on."""

    name: str
    rows: np.ndarray
    """Rows of the data, sorted, int64."""

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of the sha256 of the subset's name and rows, which identify it."""
        name = self.name.encode()
        return hashlib.sha256(b"%d " % len(name) + name + self.rows.astype("<i8").tobytes()).hexdigest()[:16]


def random_subsets(groups: Int[np.ndarray, "example"], fraction: float, count: int, seed: int) -> list[Subset]:
    """Draw `count` subsets independently, each a share of the groups without replacement and all of their examples.

    Groups are numbered from 0. The first N subsets do not depend on `count`.

    Raises:
        DataError: `fraction` of the groups is none of them, or all.
    """
    distinct = int(groups.max(initial=-1)) + 1
    size = round(fraction * distinct)
    if not 0 < size < distinct:
        raise DataError(
            f"A fraction of {fraction:g} of {distinct} distinct examples is {size}: models would be trained on "
            "nothing, or all on the same. Give more data, or another --fraction."
        )
    draws = (np.random.default_rng([seed, _SUBSETS, number]) for number in range(count))
    return [
        Subset(f"random {number}", np.flatnonzero(np.isin(groups, draw.choice(distinct, size, replace=False))))
        for number, draw in enumerate(draws)
    ]


def without_each_source(sources: Sequence[str | None]) -> list[Subset]:
    """Return everything, then everything but each source, sources by name.

    Raises:
        DataError: An example has no source, or all have the same.
    """
    if missing := [row for row, source in enumerate(sources) if source is None]:
        raise DataError(
            f"{len(missing)} of {len(sources)} examples have no source, the first in row {missing[0]}. Give every row "
            "of the data a `source`, or use --subsets."
        )
    names = sorted({source for source in sources if source is not None})
    if len(names) < 2:
        raise DataError(f"All examples have the source {names[0]!r}: without it, none is left to train on.")
    rows = np.array(sources, dtype=object)
    return without_each({name: np.flatnonzero(rows == name) for name in names}, len(sources))


def without_each(left_out: Mapping[str, np.ndarray], examples: int) -> list[Subset]:
    """Return everything, then everything but each of the named lists of rows.

    Raises:
        DataError: A list is empty, or holds every example.
    """
    everything = np.arange(examples, dtype=np.int64)
    subsets = [Subset(EVERYTHING, everything)]
    for name, rows in left_out.items():
        rest = np.setdiff1d(everything, rows)
        if len(rest) in (0, examples):
            raise DataError(f"The list {name!r} leaves out {examples - len(rest)} of {examples} examples.")
        subsets.append(Subset(name, rest))
    return subsets


def without_one(ids: Sequence[str], groups: Int[np.ndarray, "example"], count: int, seed: int) -> list[Subset]:
    """Return everything, then everything but each of `count` groups drawn at random, named by its first example.

    Raises:
        DataError: There are fewer groups, or there is only one.
    """
    firsts = np.unique(groups, return_index=True)[1]
    if not 1 <= count <= len(firsts) or len(firsts) < 2:
        raise DataError(f"There are {len(firsts)} distinct examples, of which {count} cannot be left out one by one.")
    drawn = np.random.default_rng([seed, _LEFT_OUT]).permutation(len(firsts))[:count]
    return without_each({str(ids[int(firsts[group])]): np.flatnonzero(groups == group) for group in drawn}, len(ids))


def make_design(
    ids: Sequence[str],
    sources: Sequence[str | None],
    groups: Int[np.ndarray, "example"],
    seed: int,
    *,
    fraction: float,
    leave_source_out: bool,
    leave_out: Mapping[str, np.ndarray] | None,
    leave_one_out: int | None,
) -> Callable[[int], list[Subset]]:
    """Return the map from a number N to the first N subsets; where they follow from the data, to all of them."""
    if leave_source_out or leave_out is not None:
        subsets = without_each_source(sources) if leave_out is None else without_each(leave_out, len(ids))
        return lambda _: subsets
    if leave_one_out is not None:
        return lambda count: without_one(ids, groups, count - 1, seed)
    return lambda count: random_subsets(groups, fraction, count, seed)


def read_lists(source: Any, ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Read named lists of rows from lists of example ids, `ids` being those of all examples in row order.

    `source` is a JSON file, or its content: a mapping of names to lists of ids, or a list of such lists, which are then
    named by their position; or any file that names rows, which is one list.

    Raises:
        DataError: The file does not read, or names an example that there is not.
    """
    shown = source if isinstance(source, str | Path) else "The lists"
    content = _read_lists(Path(source)) if isinstance(source, str | Path) else source
    named = dict(enumerate(content)) if isinstance(content, list | tuple) else content
    if not isinstance(named, Mapping) or not all(isinstance(one, list | tuple) for one in named.values()) or not named:
        raise DataError(
            f"{shown}: expected lists of example ids, such as [[3, 17], [4]] or a mapping of names to them."
        )
    lists = {}
    for name, members in named.items():
        rows = rows_named([str(one) for one in members], ids, place=f"{shown}, list {name!r},")
        lists[str(name)] = np.array([rows[str(one)] for one in members], dtype=np.int64)
    return lists


def run_seed(seed: int, subset: int | None, number: int) -> int:
    """Return the seed of a run's random weights and order of batches, from the seed of the bank and its numbers.

    Without a subset the `number`-th run of every subset has the same seed: what is left out makes the only difference.
    """
    words = [seed, _RUNS, number] if subset is None else [seed, _RUNS, number, 1 + subset]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _read_lists(path: Path) -> Any:
    if path.suffix == ".json" and path.is_file():
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a JSON file that can be read ({error}).") from error
        if not isinstance(content, list) or any(isinstance(one, list) for one in content):
            return content
    return {path.name: [entry.name for entry in read_row_list(path)]}
