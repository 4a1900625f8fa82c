"""The validation side of a step: its loss and gradient, taken without leaving a trace in the training."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vestige.data import NO_TARGET, Batch, Example, TokenizedData, data_fingerprint, make_batch, plan_batches
from vestige.errors import DataError, NonFinite, SpecError
from vestige.gradients import CausalLoss, GradientPass, Objective, example_count
from vestige.models import Component, batch_sharing
from vestige.online._sinks import ValidationGradient


class Measured(NamedTuple):
    """The validation loss at the weights before the step, and its gradient."""

    loss: float
    gradient: ValidationGradient
    by_function: bool
    """As `GradientPass.by_function`."""


class Validation:
    """A fixed set of validation examples; its loss is the mean of theirs."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        objective: Objective,
        token_budget: int,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._model, self._objective, self._context = model, objective, context
        self._device = next(model.parameters()).device
        data = as_inputs(data, objective)
        self._data = data
        if isinstance(data, TokenizedData):
            self.ids = [example.id for example in data.examples]
            planned = plan_batches(data.lengths, token_budget, sharing=batch_sharing(model))
            kept = [rows for rows in planned if data.target_counts[rows].any()]
            self._batches: list[Any] = [make_batch(data, np.sort(rows)).to(self._device) for rows in kept]
        else:
            rows = data.rows.tolist() if isinstance(data, Batch) else range(example_count(data))
            self.ids = [str(row) for row in rows]
            self._batches = [data.to(self._device) if isinstance(data, Batch) else data]
        if not self.ids or not self._batches or not any(_has_target(batch) for batch in self._batches):
            raise DataError("The validation data have no target token, so no gradient. Give at least one example.")
        self._pass: tuple[tuple[Component, ...], GradientPass] | None = None
        with quietly(model):  # the objective checks the model once, before the training begins
            objective.head_module(model)

    def measure(self, components: Sequence[Component]) -> Measured:
        """Measure loss and gradient at the present weights; weights, flags, buffers and random state stay as they are.

        Raises:
            NonFinite: a validation loss is NaN or infinite.
        """
        gradient = ValidationGradient(components, 1.0 / len(self.ids))
        losses = []
        if self._pass is None or self._pass[0] != tuple(components):  # kept: it has proven that it misses nothing
            self._pass = tuple(components), GradientPass(self._model, components, self._objective)
        with quietly(self._model), self._context(), self._pass[1] as taken:
            for batch in self._batches:
                losses.append((batch, taken.run(batch, gradient)))
        total = sum(float(values.double().sum()) for _, values in losses)
        if not math.isfinite(total):
            raise NonFinite(
                f"The loss of validation example {self._first_bad(losses)!r} is not finite: the weights have diverged, "
                "or the example is damaged. Lower the learning rate, or leave it out."
            )
        return Measured(total / len(self.ids), gradient, taken.by_function)

    def tokenized(self) -> TokenizedData:
        """Return the validation examples as data.

        Raises:
            SpecError: they are not token sequences with a causal loss.
        """
        if not isinstance(self._objective, CausalLoss):
            raise SpecError("Second order needs the Hessian of a causal language model's loss: objective=CausalLoss().")
        if isinstance(self._data, TokenizedData):
            return self._data
        return batch_as_data(self._data, self.ids)

    @property
    def objective(self) -> Objective:
        """The loss of one validation example."""
        return self._objective

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the examples; empty where they are no token sequences."""
        if isinstance(self._data, TokenizedData):
            return self._data.fingerprint
        return batch_as_data(self._data, self.ids).fingerprint if isinstance(self._data, Batch) else ""

    def _first_bad(self, losses: Sequence[tuple[Any, Tensor]]) -> str:
        for batch, values in losses:
            for place in (~values.isfinite()).nonzero().flatten().tolist():
                row = int(batch.rows[place]) if isinstance(self._data, TokenizedData) else place
                return self.ids[row]
        return self.ids[0]


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Run a detour that does not affect the training: evaluation mode inside, every flag and random state restored."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def as_inputs(data: Any, objective: Objective) -> Any:
    """Return what the objective reads: keyword inputs become a `Batch` for `CausalLoss`, and stay for any other."""
    return as_batch(data) if isinstance(data, Mapping) and isinstance(objective, CausalLoss) else data


def as_batch(inputs: Mapping[str, Any]) -> Batch:
    """Return the model's keyword inputs as a batch for `CausalLoss`, which reads `input_ids` and `labels` alone.

    Raises:
        DataError: one of them is missing, or padding is on the left.
    """
    missing = [name for name in ("input_ids", "labels") if not isinstance(inputs.get(name), Tensor)]
    if missing:
        raise DataError(f"The batch has no {' and no '.join(missing)}; it has {', '.join(inputs) or 'nothing'}.")
    mask = inputs.get("attention_mask")
    if mask is not None and bool((mask[:, 0] == 0).any()):
        raise DataError("The batch is padded on the left. Set tokenizer.padding_side = 'right'.")
    ids = inputs["input_ids"]
    return Batch(torch.arange(len(ids)), ids, inputs["labels"])


def batch_as_data(batch: Batch, ids: Sequence[str]) -> TokenizedData:
    """Return the examples of a batch without their padding on the right."""
    tokens, targets = [], []
    for row, labels in zip(batch.input_ids.cpu(), batch.labels.cpu(), strict=True):
        mask = (labels != NO_TARGET).numpy()
        length = int(mask.nonzero()[0].max()) + 1 if mask.any() else 1
        tokens.append(row[:length].numpy().astype(np.int32))
        targets.append(mask[:length] & (np.arange(length) > 0))
    examples = [Example(id=name, row=row, text="") for row, name in enumerate(ids)]
    fingerprint = data_fingerprint(examples, tokens, targets)
    return TokenizedData(examples, tokens, targets, np.zeros(len(tokens), dtype=bool), fingerprint, "validation")


def _has_target(batch: Any) -> bool:
    return not isinstance(batch, Batch) or bool((batch.labels[:, 1:] != NO_TARGET).any())
