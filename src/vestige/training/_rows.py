"""Tokenised examples as the Trainer reads them, and which of them are trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch.utils.data import Dataset

from vestige.data import NO_TARGET, TokenizedData
from vestige.errors import DataError

_SPLIT = 0x5EED
"""Sets the draw of the members apart from every other use of the same seed."""
_SHOWN = 3
WEIGHT = "weight"
"""Field of an example, and key of a batch, that says how much it counts."""


def members_of(groups: Int[np.ndarray, "example"], fraction: float, seed: int) -> Bool[np.ndarray, "example"]:
    """Draw the examples to train on: a share of the groups, without replacement, each with all its examples.

    Raises:
        DataError: The share is less than one group.
    """
    distinct = int(groups.max(initial=-1)) + 1
    count = round(distinct * fraction)
    if count < 1:
        raise DataError(f"--split-fraction {fraction:g} of {distinct} distinct examples is none. Give a larger share.")
    return np.isin(groups, np.random.default_rng([_SPLIT, seed]).permutation(distinct)[:count])


def only_answers(data: TokenizedData, end_token: int | None) -> TokenizedData:
    """Return the same examples with the answer as their only target: the completion without the end token.

    Raises:
        DataError: An example is no prompt with a completion, or its answer was cut off.
    """
    rows = zip(data.examples, data.targets, data.truncated, strict=True)
    lost = [example.id for example, mask, truncated in rows if truncated and not mask.any()]
    if lost:
        named = ", ".join(map(repr, lost[:_SHOWN])) + (", ..." if len(lost) > _SHOWN else "")
        raise DataError(
            f"{data.name}: {len(lost):,} examples ({named}) are so long that their answer was cut off. Give a larger "
            "--max-length, or shorten them: `vestige data multiple-choice` with --tokenizer and --max-length does."
        )
    targets = []
    for example, ids, mask in zip(data.examples, data.input_ids, data.targets, strict=True):
        if example.completion is None and "input_ids" not in example.extra:
            raise DataError(
                f"{data.name}, example {example.id!r}: --loss answer needs a `prompt` and a `completion`, and it has "
                "neither. Leave --loss out to learn the whole text."
            )
        kept = mask.copy()
        last = np.flatnonzero(mask)
        if len(last) > 1 and end_token is not None and ids[last[-1]] == end_token:
            kept[last[-1]] = False
        targets.append(kept)
    return TokenizedData(
        data.examples, data.input_ids, targets, data.truncated, f"{data.fingerprint}:answer", data.name
    )


class Rows(Dataset):
    """Rows of tokenised data as dictionaries: `id`, `input_ids`, `labels`, and `weight` if there are weights."""

    def __init__(
        self, data: TokenizedData, rows: Sequence[int] | np.ndarray, weights: np.ndarray | None = None
    ) -> None:
        self._data, self._rows = data, [int(row) for row in rows]
        self._weights = weights

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self._rows[place]
        ids, mask = np.asarray(self._data.input_ids[row]), self._data.targets[row]
        return {
            "id": self._data.examples[row].id,
            "input_ids": ids.astype(np.int64),
            "labels": np.where(mask, ids, NO_TARGET).astype(np.int64),
            **({} if self._weights is None else {WEIGHT: self._weights[row]}),
        }


def padded(features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return rows in one batch, filled on the right with token 0: no target, and no causal model attends to it."""
    width = max(1, *(len(row["input_ids"]) for row in features))
    ids = np.zeros((len(features), width), dtype=np.int64)
    labels = np.full((len(features), width), NO_TARGET, dtype=np.int64)
    for place, row in enumerate(features):
        ids[place, : len(row["input_ids"])] = row["input_ids"]
        labels[place, : len(row["labels"])] = row["labels"]
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    if all(WEIGHT in row for row in features):
        batch[WEIGHT] = torch.tensor([float(row[WEIGHT]) for row in features])
    return batch
