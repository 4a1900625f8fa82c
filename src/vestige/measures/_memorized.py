"""Whether a model has memorized words that stand in training rows: extraction, loss, and what a bank says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vestige.banks import Bank
from vestige.data import TokenizedData, token_groups
from vestige.measures import counterfactual, extraction, greedy
from vestige.measures._evidence import find_in_bank, share_with_copies
from vestige.methods import compute_losses
from vestige.progress import progress

if TYPE_CHECKING:
    from torch import nn

TOKENS = 50
"""Given before the words, at most, and demanded of them, as in `extraction`."""


def measure_memorized(
    model: nn.Module,
    data: TokenizedData,
    places: Sequence[tuple[int, int, int]],
    *,
    token_budget: int,
    bank: Path | None = None,
) -> list[dict[str, float | None]]:
    """Measure, for words that stand in training rows, whether the model goes on with them, and how it knows the row.

    Args:
        model: The model.
        data: The training data.
        places: Row, position of the first token, and number of tokens of each.
        token_budget: Of a batch.
        bank: Folder of a bank of the same data.

    Returns:
        For each place `extraction`, the share of its first 50 tokens that greedy decoding gives back after the 50
        tokens before it or as many as there are, None where there is none; `loss` of the row, nats per target token;
        and with a bank `counterfactual`, the mean margin of the models trained on the row minus that of the others.

    Raises:
        DataError: The bank is of other data.
    """
    if not places:
        return []
    rows = np.array(sorted({row for row, _, _ in places}), dtype=np.int64)
    losses = dict(zip(rows.tolist(), compute_losses(model, data, "mean", token_budget, rows), strict=True))
    margins = np.full(len(data), np.nan) if bank is None else _compare(Bank.open(bank), data)
    found, generate = list[dict[str, float | None]](), greedy(model)
    with progress(len(places), "Memorized", unit="rows") as bar:
        for row, position, tokens in places:
            given, wanted = min(position, TOKENS), min(tokens, TOKENS)
            text = data.input_ids[row][position - given : position + wanted]
            value = np.nan
            if given:
                value = extraction([text], generate, prefixes=(given,), continuation=wanted).similarity[0, 0]
            values = {"extraction": value, "loss": losses[row], "counterfactual": margins[row]}
            found.append({name: None if np.isnan(one) else float(one) for name, one in values.items()})
            bar.advance()
    return found


def _compare(bank: Bank, data: TokenizedData) -> np.ndarray:
    """Return counterfactual memorization of every row, NaN for one that the bank lacks."""
    positions = find_in_bank(bank, [example.id for example in data.examples], data.fingerprint)
    membership = share_with_copies(bank.membership, token_groups(data), positions)
    return np.append(counterfactual(bank.example_margins, membership), np.nan)[positions]
