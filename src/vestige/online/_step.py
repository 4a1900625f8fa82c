"""One step of a training: the scores of its examples, from its own backward pass."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vestige.errors import DataError, ModelError, NonFinite, UserError
from vestige.gradients import Handle, Receive, observe
from vestige.models import Component, parameter_view
from vestige.online._optimizers import Preconditioner
from vestige.online._sinks import ScaleProbe, ScoreSink
from vestige.online._validation import Validation


@dataclass(frozen=True)
class StepScores:
    """What one step did to the validation loss, by example; positive: the example helped to lower it."""

    step: int
    """1 for the first step of the training."""
    ids: tuple[str, ...]
    score: Float[Tensor, "example"]
    """`<share of the example in the step's gradient, P * gradient of the validation loss>`, float64; P is what the
    optimizer multiplies a gradient by (`Preconditioner`), 1 for plain gradient descent."""
    influence: Float[Tensor, "example"]
    """`learning rate * score` (by parameter group), less the second-order term where requested: nats by which the
    example lowers the validation loss."""
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


@dataclass(eq=False, repr=False)
class Step:
    """A context around the forward and backward passes of one optimizer step; `result` is there once it is left.

    Clip the gradient inside the block: the scores are shares in what `.grad` holds at its end.
    """

    model: nn.Module
    components: Sequence[Component]
    rates: Sequence[float]
    """Learning rate of each component."""
    preconditioner: Preconditioner
    number: int
    """1 for the first step of the training."""
    validation: Validation
    second_order: bool
    processes: int
    done: Callable[[StepScores], None]
    """Takes the result."""
    ids: Iterable[Any] | None = None
    """Of the batch; None where `batch` announces them."""
    result: StepScores | None = None
    _batches: list[_Batch] = field(default_factory=list, init=False)
    _handles: list[Handle] = field(default_factory=list, init=False)

    def __enter__(self) -> "Step":
        """Take the validation gradient and place the hooks."""
        _refuse_batch_statistics(self.model)
        self._measured = self.validation.measure(self.components, as_matrices=self.preconditioner.changes)
        self._scales: list[Tensor | None] = [None] * len(self.components)
        if self.ids is not None:
            self.batch(self.ids)
        self._handles += observe(self.model, self.components, self._receive, self._measured.by_function)
        self._handles.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._after))
        self._probe = ScaleProbe(self.model, self.components)
        self._handles.append(self._probe)
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Take the hooks away; unless an error is under way, work out the scores and hand them on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None:
            self.result = self._finish()
            self.done(self.result)
        self._batches.clear()

    def batch(self, ids: Iterable[Any]) -> None:
        """Announce the ids of the examples of the next forward pass, in their order in the batch.

        Raises:
            DataError: there are none.
        """
        names = tuple(str(name) for name in (ids.tolist() if isinstance(ids, Tensor) else ids))
        if not names:
            raise DataError("A batch without examples has no step. Give at least one id.")
        count, keep = len(self.components), self.second_order
        late = self.preconditioner.changes
        sink = ScoreSink(self._measured.gradient, count, len(names), keep=keep, late=late)
        self._batches.append(_Batch(names, sink))

    def note_reduced(self) -> None:
        """Note that `.grad` is complete, as several processes leave it once they have averaged theirs."""
        self._probe.note_now()

    def _precondition(self) -> None:
        """Multiply the validation gradient by what the optimizer multiplies a gradient by, and take its products."""
        for number, component in enumerate(self.components):
            gradient = self.model.get_parameter(component.parameter).grad
            if gradient is None:
                continue
            own = parameter_view(self.model, component, stored=gradient)
            scale = self._scales[number] = self.preconditioner.scale(number, own)
            if scale is not None:
                self._measured.gradient.precondition(number, scale)
        for batch in self._batches:
            batch.sink.take_products()

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
        self._refuse_missed()
        if self.preconditioner.changes:
            self._precondition()
        # Several processes average their gradients: that is the share of each.
        factor = self._probe.factor() / self.processes
        rates = torch.tensor(self.rates, dtype=torch.float64)
        parts = [factor * batch.sink.scores for batch in self._batches]
        influence = [rates @ part for part in parts]
        if self.second_order:
            pieces = [(len(batch.ids), batch.sink.pieces) for batch in self._batches]
            bends = self.validation.curvature_terms(self.components, self.rates, self._scales, factor, pieces)
            influence = [first - bend for first, bend in zip(influence, bends, strict=True)]
        ids = tuple(name for batch in self._batches for name in batch.ids)
        scores, total = torch.cat([part.sum(0) for part in parts]), torch.cat(influence)
        losses = [None if batch.loss is None else float(batch.loss) for batch in self._batches]
        each = tuple(loss for loss, batch in zip(losses, self._batches, strict=True) for _ in batch.ids)
        rate = self.rates[0] if len(set(self.rates)) == 1 else None
        found = StepScores(self.number, ids, scores, total, rate, each, self._measured.loss)
        found = found if self.processes == 1 else _gather(found, self.processes)
        _refuse_nonfinite(found)
        return found

    def _refuse_missed(self) -> None:
        """Raise if no gradient arrived, or a parameter has one of which no example got a share."""
        names = enumerate(self.components)
        missed = [part for number, part in names if not any(one.sink.has_gradient(number) for one in self._batches)]
        if len(missed) == len(self.components):
            raise UserError(
                "No gradient arrived in this step. Call loss.backward() inside the block: "
                "`with engine.step(ids): loss = ...; loss.backward()`."
            )
        for component in missed:
            gradient = self.model.get_parameter(component.parameter).grad
            if gradient is not None and gradient.any():
                raise ModelError(
                    f"{component.name} has a gradient, but no example's share in it arrived: the model uses it in a "
                    f"way that no rule covers. Leave it out with components=['all', '!{component.name}']."
                )


def _refuse_batch_statistics(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ModelError(
                f"{path} ({type(module).__name__}) normalises with the statistics of the batch, so no example has a "
                "gradient of its own. Put that module into evaluation mode."
            )


def _gather(scores: StepScores, processes: int) -> StepScores:
    """Return the scores of the examples of all processes, in the order of their ranks, in each of them."""
    found: list[Any] = [None] * processes
    torch.distributed.all_gather_object(found, scores)
    return replace(
        scores,
        ids=tuple(name for each in found for name in each.ids),
        score=torch.cat([each.score for each in found]),
        influence=torch.cat([each.influence for each in found]),
        loss=tuple(loss for each in found for loss in each.loss),
    )


def _refuse_nonfinite(scores: StepScores) -> None:
    fine = (scores.score + scores.influence).isfinite().tolist()
    bad = [name for name, each in zip(scores.ids, fine, strict=True) if not each]
    if not bad:
        return
    shown = ", ".join(repr(name) for name in bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    shown_losses = dict.fromkeys(f"{loss:g}" for loss in scores.loss if loss is not None)
    raise NonFinite(
        f"Step {scores.step}: the gradient of {shown} is not finite"
        + (f" (loss {', '.join(shown_losses)})" if shown_losses else "")
        + ". "
        "The optimizer has not moved. Check these examples, or lower the learning rate."
    )
