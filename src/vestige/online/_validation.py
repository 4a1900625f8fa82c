"""The validation side of a step: its loss, gradient and curvature, taken without leaving a trace in the training."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from random import getstate, setstate
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.curvature import CurvatureProduct
from vestige.data import NO_TARGET, Batch, Example, TokenizedData, data_fingerprint, make_batch, plan_batches
from vestige.errors import DataError, NonFinite, SpecError
from vestige.gradients import CausalLoss, GradientPass, Objective, evaluating, example_count
from vestige.models import Component, batch_sharing, parameter_view
from vestige.online._optimizers import Preconditioner
from vestige.online._sinks import (
    FactorStore,
    Piece,
    ValidationGradient,
    mean_gradient,
    products_among,
    products_with,
)


class Measured(NamedTuple):
    """The validation loss at the weights before the step, and its gradient."""

    loss: float
    gradient: ValidationGradient
    by_function: bool
    """As `GradientPass.by_function`."""


class Selected(NamedTuple):
    """The chosen examples, in the order in which they were picked."""

    rows: list[int]
    """Positions in the batch."""
    gains: list[float]
    """Nats by which each pick lowers the validation loss, after those before it."""


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
        self._model, self._objective, self._token_budget, self._context = model, objective, token_budget, context
        self._device = next(model.parameters()).device
        self._data = data = _as_inputs(data, objective)
        if isinstance(data, TokenizedData):
            self.ids = [example.id for example in data.examples]
            planned = plan_batches(data.lengths, token_budget, sharing=batch_sharing(model))
            kept = [rows for rows in planned if data.target_counts[rows].any()]
            self._batches: list[Any] = [make_batch(data, np.sort(rows)).to(self._device) for rows in kept]
        else:
            rows = data.rows.tolist() if isinstance(data, Batch) else range(example_count(data))
            self.ids = [str(row) for row in rows]
            self._batches = [data.to(self._device) if isinstance(data, Batch) else data]
        if not self.ids or not any(_has_target(batch) for batch in self._batches):
            raise DataError("The validation data have no target token, so no gradient. Give at least one example.")
        self._pass: tuple[tuple[Component, ...], GradientPass] | None = None
        with quietly(model):  # the objective checks the model once, before the training begins
            objective.head_module(model)

    def measure(self, components: Sequence[Component], *, as_matrices: bool = False) -> Measured:
        """Measure loss and gradient at the present weights; weights, flags, buffers and random state stay as they are.

        Raises:
            NonFinite: a validation loss is NaN or infinite.
        """
        gradient = ValidationGradient(components, 1.0 / len(self.ids), as_matrices=as_matrices)
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

    def select(
        self,
        candidates: Any,
        k: int,
        components: Sequence[Component],
        rates: Sequence[float],
        preconditioner: Preconditioner,
    ) -> Selected:
        """Select the `k` best for a step on the mean of the chosen examples' losses, in a pass with frozen weights.

        The share of an example in such a step is its own gradient over `k`, so that is what is weighed. The gradient of
        the step, which Adam divides by, is not known before the choice: it is taken to be the candidates' mean.
        """
        validation = self.measure(components, as_matrices=preconditioner.changes).gradient
        batch = _as_inputs(candidates, self._objective)
        batch = batch.to(self._device) if isinstance(batch, Batch) else batch
        count, store = example_count(batch), FactorStore(len(components))
        with quietly(self._model), self._context(), GradientPass(self._model, components, self._objective) as taken:
            taken.run(batch, store)
        gains = torch.zeros(count, dtype=torch.float64)
        overlaps = torch.zeros(count, count, dtype=torch.float64)
        for number, (rate, pieces) in enumerate(zip(rates, store.pieces, strict=True)):
            scale = None
            if preconditioner.changes and pieces:
                scale = preconditioner.scale(number, mean_gradient(pieces, count, components[number].shape))
            if scale is not None:
                validation.precondition(number, scale)
            for piece in pieces:
                gains[piece.examples] += rate / k * validation.products(number, piece.left, piece.right).double().cpu()
            overlaps += (rate / k) ** 2 * products_among(pieces, count, scale)
            pieces.clear()
        return greedy_selection(gains, overlaps, k)

    def curvature_terms(
        self,
        components: Sequence[Component],
        rates: Sequence[float],
        scales: Sequence[Tensor | None],
        factor: float,
        batches: Sequence[tuple[int, Sequence[Sequence[Piece]]]],
    ) -> list[Float[Tensor, "example"]]:
        """Return `1/2 (D g_i)^T H (D G)` of every example i of a step, one tensor for each micro-batch.

        D are the learning rates times what the optimizer multiplies a gradient by, H is the Hessian of the validation
        loss. The step moves the weights by `-D G`, with `G = sum_j g_j`, so by Taylor's expansion

            L(w) - L(w - D G) = sum_i <D g_i, grad L> - 1/2 sum_i (D g_i)^T H (D G) + O(D^3),

        and this is what example i's influence loses to second order. (In-Run Data Shapley, Wang et al. 2024,
        arXiv:2406.11011, writes the same for the change of the loss, with opposite signs.) Costs a Hessian-vector
        product on the validation data, and the factors of the whole step stay in memory until its end.

        Args:
            components: What is scored; `.grad` holds the step's gradient.
            rates: Learning rate of each.
            scales: What the optimizer multiplies a gradient by, as of `Preconditioner.scale`.
            factor: What the kept factors have to be multiplied by to add up to `.grad`.
            batches: Of each micro-batch the number of examples, and by component the kept factors.
        """
        moved = []
        for component, rate, scale in zip(components, rates, scales, strict=True):
            parameter = self._model.get_parameter(component.parameter)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            moved.append(rate * _multiply(scale, parameter_view(self._model, component, stored=gradient)).reshape(-1))
        assert isinstance(self._objective, CausalLoss)
        with quietly(self._model):
            product = CurvatureProduct(
                self._model, components, self.as_data(), self._token_budget, self._objective.reduction, "hessian"
            )(torch.cat(moved)[None])[0]
        parts = product.split([component.size for component in components])
        bent = [
            _multiply(scale, part.view(component.shape))
            for part, component, scale in zip(parts, components, scales, strict=True)
        ]
        terms = []
        for count, pieces in batches:
            total = torch.zeros(count, dtype=torch.float64)
            for component, rate, matrix in zip(pieces, rates, bent, strict=True):
                total += 0.5 * factor * rate * products_with(component, matrix, count)
            terms.append(total)
        return terms

    def as_data(self) -> TokenizedData:
        """Return the validation examples as data."""
        if not isinstance(self._objective, CausalLoss):
            raise SpecError("Second order needs the Hessian of a causal language model's loss: objective=CausalLoss().")
        return self._data if isinstance(self._data, TokenizedData) else _batch_as_data(self._data, self.ids)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the examples; empty where they are no token sequences."""
        data = _batch_as_data(self._data, self.ids) if isinstance(self._data, Batch) else self._data
        return data.fingerprint if isinstance(data, TokenizedData) else ""

    def _first_bad(self, losses: Sequence[tuple[Any, Tensor]]) -> str:
        for batch, values in losses:
            for place in (~values.isfinite()).nonzero().flatten().tolist():
                return self.ids[int(batch.rows[place]) if isinstance(self._data, TokenizedData) else place]
        return self.ids[0]


def greedy_selection(
    gains: Float[torch.Tensor, "example"], overlaps: Float[torch.Tensor, "example example2"], k: int
) -> Selected:
    """Return the `k` examples that a greedy search picks: the best, then the best given the first, and so on.

    `gains[i] = eta <g_i, g_val>` and `overlaps[i, j] = eta^2 <g_i, g_j>`. After each pick p, `overlaps[i, p]` is taken
    from the gain of every other: two copies of one good example are worth less than twice one. This is GREATS (Wang et
    al. 2024, NeurIPS), the second-order expansion of the step's effect with the identity in place of the Hessian. Ties
    go to the earlier example.

    Raises:
        SpecError: `k` is not between 1 and the number of examples.
        NonFinite: a product is NaN or infinite.
    """
    if not 1 <= k <= len(gains):
        raise SpecError(f"k={k} of {len(gains)} examples: choose 1 to {len(gains)}.")
    bad = (~(gains.isfinite() & overlaps.isfinite().all(1))).nonzero().flatten().tolist()
    if bad:
        raise NonFinite(f"The gradients of the batch's examples {bad[:8]} (counted from 0) are not finite.")
    left, rows, values = gains.double().clone(), [], []
    for _ in range(k):
        best = int(left.argmax())
        rows.append(best)
        values.append(float(left[best]))
        left -= overlaps[:, best]
        left[rows] = -torch.inf
    return Selected(rows, values)


@contextmanager
def restore_randomness() -> Iterator[None]:
    """Restore the random numbers of Python and NumPy afterwards."""
    python, numpy = getstate(), np.random.get_state()
    try:
        yield
    finally:
        setstate(python)
        np.random.set_state(numpy)


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Run a detour that does not affect the training: evaluation mode inside, every flag and random state restored."""
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices), restore_randomness(), evaluating(model):
        yield


def _multiply(scale: Tensor | None, matrix: Tensor) -> Tensor:
    return matrix if scale is None else scale * matrix


def _as_inputs(data: Any, objective: Objective) -> Any:
    """Return what the objective reads: keyword inputs become a `Batch` for `CausalLoss`, and stay for any other."""
    if not isinstance(data, Mapping) or not isinstance(objective, CausalLoss):
        return data
    missing = [name for name in ("input_ids", "labels") if not isinstance(data.get(name), Tensor)]
    if missing:
        raise DataError(f"The batch has no {' and no '.join(missing)}; it has {', '.join(data) or 'nothing'}.")
    mask = data.get("attention_mask")
    if mask is not None and bool((mask[:, 0] == 0).any()):
        raise DataError("The batch is padded on the left. Set tokenizer.padding_side = 'right'.")
    return Batch(torch.arange(len(data["input_ids"])), data["input_ids"], data["labels"])


def _batch_as_data(batch: Batch, ids: Sequence[str]) -> TokenizedData:
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
