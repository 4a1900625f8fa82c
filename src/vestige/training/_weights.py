"""Weights of examples: how much each counts in the mean that a step learns from."""

import hashlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import Trainer

from vestige.data import NO_TARGET, Example, TokenizedData
from vestige.errors import DataError
from vestige.progress import announce
from vestige.training._rows import WEIGHT

_SMALLEST, _LARGEST = 1e-30, 1e30
"""Sums over a batch of weights in between, and what is divided by them, stay finite in float32."""


def weights_of(data: TokenizedData) -> Float[np.ndarray, "example"] | None:
    """Return the field `weight` of every example as float32, 1 where there is none; None if all are 1.

    Raises:
        DataError: One is negative, NaN, infinite or no number; the message names the row.
    """
    found = np.array([_weight(example, data.name) for example in data.examples], dtype=np.float32)
    return None if (found == 1).all() else found


def weighted(data: TokenizedData, weights: Float[np.ndarray, "example"]) -> TokenizedData:
    """Return the same data under a fingerprint that depends on the weights."""
    digest = hashlib.sha256(f"{data.fingerprint}:weights:".encode() + weights.astype("<f4").tobytes()).hexdigest()
    return TokenizedData(data.examples, data.input_ids, data.targets, data.truncated, digest, data.name)


def announce_weights(data: TokenizedData, weights: Float[np.ndarray, "example"]) -> None:
    """Print that there are weights, and which examples they leave out."""
    none = int((weights == 0).sum())
    announce(
        f"{data.name}: {int((weights != 1).sum()):,} of {len(data):,} examples have a `weight` other than 1 "
        f"({weights.min():g} to {weights.max():g}); the loss of a step is the weighted mean over its target tokens."
        + (f" {none:,} with weight 0 are left out." if none else "")
    )


class WeightedTrainer(Trainer):
    """A Trainer whose loss is the weighted mean over the target tokens of a step.

    Of an example i with weight w and n target tokens, over all batches that a step accumulates:
    `sum_i w_i sum_t loss_it / sum_i w_i n_i`, in nats. Each row of a batch has its weight in `weight`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # The loss is divided by the sum over the whole step, so the Trainer must not divide by the number of batches.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the batch's share in the loss of the step."""
        labels, weights = inputs["labels"][:, 1:], inputs[WEIGHT]
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", WEIGHT)})
        wanted = labels != NO_TARGET
        losses = F.cross_entropy(outputs.logits[:, :-1][wanted].float(), labels[wanted], reduction="none")
        total = self._weight_of(inputs) if num_items_in_batch is None else num_items_in_batch
        loss = (losses * weights[wanted.nonzero()[:, 0]]).sum() / total
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return the sum of the weights of all target tokens of a step."""
        return torch.stack([self._weight_of(batch) for batch in batch_samples]).sum().to(device)

    @staticmethod
    def _weight_of(batch: dict[str, Any]) -> Tensor:
        return (batch[WEIGHT] * (batch["labels"][:, 1:] != NO_TARGET).sum(1)).sum()


def _weight(example: Example, name: str) -> float:
    given = example.extra.get(WEIGHT)
    # Tables hold texts: an empty cell is no weight.
    if given is None or (isinstance(given, str) and not given.strip()):
        return 1.0
    try:
        number = float("nan") if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        number = float("nan")
    if number == 0 or _SMALLEST <= number <= _LARGEST:
        return number
    raise DataError(
        f"{name}, row {example.row} (id {example.id!r}): its `weight` is {given!r}, expected 0 or a positive number "
        f"({_SMALLEST:g} to {_LARGEST:g}). Correct it, or rename the column if it is no weight."
    )
