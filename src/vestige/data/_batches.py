"""Batches of examples of like length, within a budget of padded tokens."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from vestige.data._types import NO_TARGET, Batch, TokenizedData
from vestige.errors import DataError


def plan_batches(lengths: np.ndarray, token_budget: int, max_examples: int | None = None) -> list[np.ndarray]:
    """Rows of each batch, every row in exactly one; longest first, so a budget that is too large fails early.

    Args:
        lengths: Tokens per example, [example].
        token_budget: Most tokens in a batch, padding included; an example longer than that is a batch by
            itself.
        max_examples: Most examples in a batch.

    Returns:
        int64 arrays of rows, sorted by length, ties by row.

    Raises:
        DataError: The budget or `max_examples` is below 1.
    """
    order, ends = cut_batches(lengths, token_budget, max_examples)
    return np.split(order, ends[:-1]) if len(order) else []


class CutBatches(NamedTuple):
    """All batches as two arrays, for plans of very many."""

    rows: np.ndarray
    """Row numbers, batch after batch, int64 [example]."""
    ends: np.ndarray
    """Where each batch ends among them, int64 [batch]."""


def cut_batches(lengths: np.ndarray, token_budget: int, max_examples: int | None = None) -> CutBatches:
    """`plan_batches`, without an array for every batch."""
    if token_budget < 1 or (max_examples is not None and max_examples < 1):
        raise DataError(
            f"token_budget={token_budget}, max_examples={max_examples}: both must be above 0, for example 4096."
        )
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    ends = array("q")
    begin = 0
    while begin < len(order):
        longest = max(int(lengths[order[begin]]), 1)
        count = max(token_budget // longest, 1)
        if max_examples is not None:
            count = min(count, max_examples)
        begin = min(begin + count, len(order))
        ends.append(begin)
    return CutBatches(order, np.array(ends, dtype=np.int64))


def make_batch(data: TokenizedData, rows: Sequence[int] | np.ndarray) -> Batch:
    """The rows as right-padded tensors on the CPU; padding is token 0 with `NO_TARGET` as its label.

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
