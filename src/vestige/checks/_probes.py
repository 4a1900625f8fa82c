"""A few short examples to try the model on, alone, together and padded."""

import dataclasses

import numpy as np
from jaxtyping import Int

from vestige.data import TokenizedData

PROBES = 4
PROBE_TOKENS = 64
EXTRA_PADDING = 7


def choose_probes(data: TokenizedData, context: int | None) -> TokenizedData:
    """Choose up to four examples with targets, of different lengths, cut to 64 tokens around their first target.

    A lone example gets its own tokens in reverse as company: something to be independent of.
    """
    tokens = PROBE_TOKENS if context is None else max(2, min(PROBE_TOKENS, context - EXTRA_PADDING))
    lengths = data.lengths
    rows = np.flatnonzero(data.target_counts > 0)
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    short = rows[lengths[rows] <= tokens]
    pool = short if len(short) >= PROBES else rows[:PROBES]
    picked = pool[np.linspace(0, len(pool) - 1, min(PROBES, len(pool))).astype(int)]
    probes = cut_examples(data.subset(picked), tokens)
    if len(probes) > 1:
        return probes
    twice = probes.subset([0, 0])
    return dataclasses.replace(twice, input_ids=[twice.input_ids[0], twice.input_ids[1][::-1].copy()])


def cut_examples(data: TokenizedData, tokens: int) -> TokenizedData:
    """Cut each example to at most `tokens` tokens, beginning at most half a window before its first target."""
    ids, targets = [], []
    for row_ids, row_targets in zip(data.input_ids, data.targets, strict=True):
        first = int(row_targets.argmax()) if row_targets.any() else 0
        start = max(0, min(first - tokens // 2, len(row_ids) - tokens))
        ids.append(row_ids[start : start + tokens])
        window = row_targets[start : start + tokens].copy()
        window[:1] = False
        targets.append(window)
    return dataclasses.replace(data, input_ids=ids, targets=targets)


def padded(data: TokenizedData, widths: Int[np.ndarray, "example"]) -> TokenizedData:
    """Fill each example up on the right to its width, with tokens that are no targets."""
    more = [max(0, int(width) - len(ids)) for width, ids in zip(widths, data.input_ids, strict=True)]
    return dataclasses.replace(
        data,
        input_ids=[np.pad(ids, (0, count)) for ids, count in zip(data.input_ids, more, strict=True)],
        targets=[np.pad(mask, (0, count)) for mask, count in zip(data.targets, more, strict=True)],
    )
