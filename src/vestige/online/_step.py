"""One step of training under observation: hooks on, the caller's forward and backward passes, hooks off, scores."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vestige.errors import DataError, ModelError, NonFinite, UserError
from vestige.gradients import Handle, Receive, observe
from vestige.models import Component
from vestige.online._rates import ScaleProbe, common_rate
from vestige.online._second_order import CurvatureTerm
from vestige.online._sinks import ScoreSink
from vestige.online._validation import Measured


@dataclass(frozen=True)
class StepScores:
    """What one step did to the validation loss, by example; positive: the example helped to lower it."""

    step: int
    """1 for the first step of the training."""
    ids: tuple[str, ...]
    score: Float[Tensor, "example"]
    """`<share of the example in the step's gradient, gradient of the validation loss>`, float64."""
    influence: Float[Tensor, "example"]
    """`learning rate * score` (by parameter group), less the second-order term where requested: nats by which the
    example lowers the validation loss in a step of plain gradient descent."""
    learning_rate: float | None
    """The rate of the step; None where parameter groups have different ones."""
    loss: tuple[float | None, ...]
    """For each example the loss of its batch as the model returned it, None if it returned none."""
    validation_loss: float
    """Before the step."""


@dataclass
class _Batch:
    """One micro-batch: its ids, and its measurements."""

    ids: tuple[str, ...]
    sink: ScoreSink
    loss: Tensor | None = None


class Step:
    """A context around the forward and backward passes of one optimizer step; `result` is there once it is left.

    Clip the gradient inside the block: the scores are shares in what `.grad` holds at its end.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Sequence[Component],
        rates: Sequence[float],
        number: int,
        measure: Callable[[Sequence[Component]], Measured],
        curvature: CurvatureTerm | None,
        done: Callable[[StepScores], None],
    ) -> None:
        self._model, self._components, self._rates, self._number = model, components, rates, number
        self._measure, self._curvature, self._done = measure, curvature, done
        self._batches: list[_Batch] = []
        self._handles: list[Handle] = []
        self._first_ids: Iterable[Any] | None = None
        self.result: StepScores | None = None

    def announce(self, ids: Iterable[Any]) -> "Step":
        """Set the ids of the step's first batch, and return the step."""
        self._first_ids = ids
        return self

    def __enter__(self) -> "Step":
        """Take the validation gradient and place the hooks."""
        _refuse_batch_statistics(self._model)
        self._validation = self._measure(self._components)
        if self._first_ids is not None:
            self.batch(self._first_ids)
        self._handles += observe(self._model, self._components, self._receive, self._validation.by_function)
        self._handles.append(self._model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(self._model.register_forward_hook(self._after))
        self._probe = ScaleProbe(self._model, self._components)
        self._handles.append(self._probe)
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Take the hooks away; unless an error is under way, work out the scores and hand them on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None:
            self.result = self._finish()
            self._done(self.result)
        self._batches.clear()

    def batch(self, ids: Iterable[Any]) -> None:
        """Announce the ids of the examples of the next forward pass, in their order in the batch."""
        names = as_ids(ids)
        sink = ScoreSink(self._validation.gradient, len(self._components), len(names), keep=self._curvature is not None)
        self._batches.append(_Batch(names, sink))

    def _receive(self) -> Receive:
        return Receive(self._batches[-1].sink, len(self._batches[-1].ids))

    def _before(self, module: nn.Module, inputs: Any, named: Any) -> None:  # noqa: ARG002
        if not torch.is_grad_enabled():
            return
        if not self._batches:
            raise UserError("Whose gradients are these? Give the batch's ids: engine.step(ids), or step.batch(ids).")
        first = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor) and value.ndim), None)
        expected = len(self._batches[-1].ids)
        if first is not None and len(first) != expected:
            raise DataError(f"The batch has {len(first)} examples and {expected} ids. Give one id for each example.")

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002
        loss = getattr(output, "loss", None)
        if torch.is_grad_enabled() and isinstance(loss, Tensor) and loss.numel() == 1:
            self._batches[-1].loss = loss.detach()

    def _finish(self) -> StepScores:
        if not any(batch.sink.deliveries for batch in self._batches):
            raise UserError(
                "No gradient arrived in this step. Call loss.backward() inside the block: "
                "`with engine.step(ids): loss = ...; loss.backward()`."
            )
        self._refuse_missed()
        factor = self._probe.factor()
        rates = torch.tensor(self._rates, dtype=torch.float64)
        parts = [factor * batch.sink.scores for batch in self._batches]
        influence = [rates @ part for part in parts]
        if self._curvature is not None:
            pieces = [batch.sink.pieces for batch in self._batches]
            bends = self._curvature(self._components, self._rates, factor, pieces, [len(b.ids) for b in self._batches])
            influence = [first - bend for first, bend in zip(influence, bends, strict=True)]
        ids = tuple(name for batch in self._batches for name in batch.ids)
        scores, total = torch.cat([part.sum(0) for part in parts]), torch.cat(influence)
        losses = [None if batch.loss is None else float(batch.loss) for batch in self._batches]
        _refuse_nonfinite(self._number, ids, scores + total, losses)
        each = tuple(loss for loss, batch in zip(losses, self._batches, strict=True) for _ in batch.ids)
        rate = common_rate(self._rates)
        return StepScores(self._number, ids, scores, total, rate, each, self._validation.loss)

    def _refuse_missed(self) -> None:
        """Raise if a parameter has a gradient of which no example got a share."""
        for number, component in enumerate(self._components):
            if any(batch.sink.delivered(number) for batch in self._batches):
                continue
            gradient = self._model.get_parameter(component.parameter).grad
            if gradient is not None and gradient.any():
                raise ModelError(
                    f"{component.name} has a gradient, but no example's share in it arrived: the model uses it in a "
                    f"way that no rule covers. Leave it out with components=['all', '!{component.name}']."
                )


def as_ids(ids: Iterable[Any]) -> tuple[str, ...]:
    """Return ids as text, from any sequence or tensor.

    Raises:
        DataError: there are none.
    """
    names = tuple(str(name) for name in (ids.tolist() if isinstance(ids, Tensor) else ids))
    if not names:
        raise DataError("A batch without examples has no step. Give at least one id.")
    return names


def _refuse_batch_statistics(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ModelError(
                f"{path} ({type(module).__name__}) normalises with the statistics of the batch, so no example has a "
                "gradient of its own. Put that module into evaluation mode."
            )


def _refuse_nonfinite(
    number: int, ids: Sequence[str], values: Float[Tensor, "example"], losses: Sequence[float | None]
) -> None:
    bad = [name for name, fine in zip(ids, values.isfinite().tolist(), strict=True) if not fine]
    if not bad:
        return
    shown = ", ".join(repr(name) for name in bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    told = [f"{loss:g}" for loss in losses if loss is not None]
    raise NonFinite(
        f"Step {number}: the gradient of {shown} is not finite" + (f" (loss {', '.join(told)})" if told else "") + ". "
        "The optimizer has not moved. Check these examples, or lower the learning rate."
    )
