"""Batches of examples of like length, within a budget of padded tokens."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int

from vestige.data._types import NO_TARGET, Batch, TokenizedData
from vestige.errors import DataError


class Sharing(NamedTuple):
    """The examples that may share a batch: all, unless the model's forward pass depends on the longest of them."""

    switches: tuple[int, ...] = ()
    """Numbers of tokens: an example no longer than one of them shares no batch with a longer one."""
    equal: bool = False
    """Only examples of the same length share a batch, so that there is no padding."""

    def most(self, lengths: np.ndarray) -> np.ndarray:
        """Return the most tokens that examples of these lengths may be padded to; -1 where nothing limits it."""
        if self.equal:
            return lengths
        borders = np.array([*sorted(self.switches), -1])
        return borders[np.searchsorted(borders[:-1], lengths)]


ANY_EXAMPLES = Sharing()
"""Of a model whose results depend on no other example."""


def plan_batches(
    lengths: np.ndarray, token_budget: int, max_examples: int | None = None, *, sharing: Sharing = ANY_EXAMPLES
) -> list[np.ndarray]:
    """Return the rows of each batch, every row in exactly one; longest first, so too large a budget fails early.

    Args:
        lengths: Tokens per example, [example].
        token_budget: Most tokens in a batch, padding included; an example longer than that is a batch by
            itself.
        max_examples: Most examples in a batch.
        sharing: What the model allows.

    Returns:
        int64 arrays of rows, sorted by length, ties by row.

    Raises:
        DataError: The budget or `max_examples` is below 1.
    """
    cut = CutBatches(lengths, token_budget, max_examples, sharing)
    return [cut.rows[one.start : one.stop].astype(np.int64) for one in cut.batches()]


class CutBatch(NamedTuple):
    """A batch, as a range of `CutBatches.rows`."""

    start: int
    stop: int
    longest: int
    """Tokens of its longest example, at least 1."""

    @property
    def tokens(self) -> int:
        """Its tokens, padding included."""
        return (self.stop - self.start) * self.longest


@final
class CutBatches:
    """The batches of `plan_batches` for data of any size: in memory is one row number for each example.

    Of the lengths, only how often each occurs is kept; where batches end follows from that.
    """

    def __init__(
        self,
        lengths: Int[np.ndarray, "example"],
        token_budget: int,
        max_examples: int | None = None,
        sharing: Sharing = ANY_EXAMPLES,
    ) -> None:
        """Plan as `plan_batches` does."""
        if token_budget < 1 or (max_examples is not None and max_examples < 1):
            raise DataError(
                f"token_budget={token_budget}, max_examples={max_examples}: both must be above 0, for example 4096."
            )
        self._budget, self._most = token_budget, max_examples or len(lengths)
        counts = np.bincount(lengths)
        present = np.flatnonzero(counts)[::-1]
        self._lengths: list[int] = present.tolist()
        """Those that occur, longest first."""
        self._ends: list[int] = np.cumsum(counts[present]).tolist()
        """Where the rows of each length end."""
        self._borders = _group_ends(sharing.most(present), self._ends)
        """Where the rows end that may share a batch with each length."""
        order = np.argsort(-lengths.astype(np.int32), kind="stable")
        self.rows = order.astype(np.int32 if len(lengths) <= np.iinfo(np.int32).max else np.int64)
        """Row numbers, longest example first, ties by row, int32 or int64 [example]."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[CutBatch]:
        """Yield the batches of the rows `start:stop`, which begin and end with a batch."""
        stop = len(self) if stop is None else stop
        kind = 0
        while start < stop:
            while self._ends[kind] <= start:
                kind += 1
            longest = max(self._lengths[kind], 1)
            end = min(start + min(max(self._budget // longest, 1), self._most), stop, self._borders[kind])
            yield CutBatch(start, end, longest)
            start = end

    def tokens(self, start: int, stop: int) -> int:
        """Return the number of tokens of the examples `start:stop` of `rows`, without padding."""
        total = first = 0
        for length, end in zip(self._lengths, self._ends, strict=True):
            total += length * max(min(end, stop) - max(first, start), 0)
            first = end
        return total


def _group_ends(groups: np.ndarray, ends: list[int]) -> list[int]:
    """Return, for each length, where the rows of the last length of its group end."""
    found: list[int] = []
    for number in reversed(range(len(ends))):
        same = bool(found) and groups[number] == groups[number + 1]
        found.append(found[-1] if same else ends[number])
    return found[::-1]


def make_batch(data: TokenizedData, rows: Sequence[int] | np.ndarray) -> Batch:
    """Return the rows as right-padded tensors on the CPU; padding is token 0 with `NO_TARGET` as its label.

    A batch is at least one token wide, so that a model can run on an example without tokens.
    """
    numbers = [int(row) for row in rows]
    width = max([1, *(len(data.input_ids[row]) for row in numbers)])
    ids = np.zeros((len(numbers), width), dtype=np.int64)
    labels = np.full((len(numbers), width), NO_TARGET, dtype=np.int64)
    for place, row in enumerate(numbers):
        tokens, mask = data.input_ids[row], data.targets[row]
        ids[place, : len(tokens)] = tokens
        labels[place, : len(tokens)][mask] = tokens[mask]
    return Batch(torch.tensor(numbers, dtype=torch.int64), torch.from_numpy(ids), torch.from_numpy(labels))
