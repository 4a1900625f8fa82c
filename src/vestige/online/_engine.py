"""In-run attribution: what each training example did to a validation loss, measured while the model trains."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vestige.errors import DataError, ModelError, NonFinite, SpecError, UserError
from vestige.gradients import CausalLoss, Handle, Objective, Receive, observable, observe
from vestige.models import Component, select_components
from vestige.online._log import SCHEMA, OnlineLog, StepLog, begin_log
from vestige.online._sinks import ScaleProbe, ScoreSink
from vestige.online._validation import Selected, Validation
from vestige.progress import announce

SIGN = "positive: training on the example lowered the validation loss"
UNIT = "nats of the mean validation loss"


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
        validation: Validation,
        second_order: bool,
        done: Callable[[StepScores], None],
        ids: Iterable[Any] | None = None,
    ) -> None:
        self._model, self._components, self._rates, self._number = model, components, rates, number
        self._validation, self._second_order, self._done, self._ids = validation, second_order, done, ids
        self._batches: list[_Batch] = []
        self._handles: list[Handle] = []
        self.result: StepScores | None = None

    def __enter__(self) -> "Step":
        """Take the validation gradient and place the hooks."""
        _refuse_batch_statistics(self._model)
        self._measured = self._validation.measure(self._components)
        if self._ids is not None:
            self.batch(self._ids)
        self._handles += observe(self._model, self._components, self._receive, self._measured.by_function)
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
        """Announce the ids of the examples of the next forward pass, in their order in the batch.

        Raises:
            DataError: there are none.
        """
        names = tuple(str(name) for name in (ids.tolist() if isinstance(ids, Tensor) else ids))
        if not names:
            raise DataError("A batch without examples has no step. Give at least one id.")
        sink = ScoreSink(self._measured.gradient, len(self._components), len(names), keep=self._second_order)
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
        self._refuse_missed()
        factor = self._probe.factor()
        rates = torch.tensor(self._rates, dtype=torch.float64)
        parts = [factor * batch.sink.scores for batch in self._batches]
        influence = [rates @ part for part in parts]
        if self._second_order:
            pieces = [(len(batch.ids), batch.sink.pieces) for batch in self._batches]
            bends = self._validation.curvature_terms(self._components, self._rates, factor, pieces)
            influence = [first - bend for first, bend in zip(influence, bends, strict=True)]
        ids = tuple(name for batch in self._batches for name in batch.ids)
        scores, total = torch.cat([part.sum(0) for part in parts]), torch.cat(influence)
        losses = [None if batch.loss is None else float(batch.loss) for batch in self._batches]
        _refuse_nonfinite(self._number, ids, scores + total, losses)
        each = tuple(loss for loss, batch in zip(losses, self._batches, strict=True) for _ in batch.ids)
        rate = self._rates[0] if len(set(self._rates)) == 1 else None
        return StepScores(self._number, ids, scores, total, rate, each, self._measured.loss)

    def _refuse_missed(self) -> None:
        """Raise if no gradient arrived, or a parameter has one of which no example got a share."""
        names = enumerate(self._components)
        missed = [part for number, part in names if not any(one.sink.has_gradient(number) for one in self._batches)]
        if len(missed) == len(self._components):
            raise UserError(
                "No gradient arrived in this step. Call loss.backward() inside the block: "
                "`with engine.step(ids): loss = ...; loss.backward()`."
            )
        for component in missed:
            gradient = self._model.get_parameter(component.parameter).grad
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


def _refuse_nonfinite(
    number: int, ids: Sequence[str], values: Float[Tensor, "example"], losses: Sequence[float | None]
) -> None:
    bad = [name for name, fine in zip(ids, values.isfinite().tolist(), strict=True) if not fine]
    if not bad:
        return
    shown = ", ".join(repr(name) for name in bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    shown_losses = [f"{loss:g}" for loss in losses if loss is not None]
    raise NonFinite(
        f"Step {number}: the gradient of {shown} is not finite"
        + (f" (loss {', '.join(shown_losses)})" if shown_losses else "")
        + ". "
        "The optimizer has not moved. Check these examples, or lower the learning rate."
    )


class OnlineAttribution:
    """Scores of the training examples of every step, from the step's own backward pass, which they do not change.

        engine = OnlineAttribution(model, validation, optimizer=optimizer, out="run-log")
        for batch in batches:
            with engine.step(batch["id"]):
                loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        engine.flush()

    The score of example i in step t is `<share of i in the step's gradient, gradient of the validation loss>`: the
    share is what i adds to `.grad`, for any average in the loss, so the shares of a step add up to its gradient. The
    influence of an example is the sum of `learning rate * score` over its steps, the fall of the validation loss to
    first order in plain gradient descent (In-Run Data Shapley, Wang et al. 2024, arXiv:2406.11011, with the sign
    turned). Other optimizers' steps are scored as if they were plain.

    The validation loss is the mean of the validation examples' losses, in evaluation mode. Its gradient is taken at the
    start of each step in a pass of its own: batched together with the training examples it would change the shapes of
    the products, and with them the last bits of the training.
    """

    def __init__(
        self,
        model: nn.Module,
        validation: Any,
        *,
        optimizer: Any = None,
        components: Iterable[str] = ("all",),
        objective: Objective | None = None,
        second_order: bool = False,
        out: str | Path | None = None,
        flush_every: int = 100,
        start_step: int | None = 0,
        token_budget: int = 4096,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Check the model and the validation data; place nothing on the model before `step`.

        Args:
            model: The model in training.
            validation: `TokenizedData`, a `Batch`, keyword inputs with `input_ids` and `labels`, or what `objective`
                reads. Padding is on the right.
            optimizer: Where the learning rates are read, at the start of each step.
            components: As in `vestige index --components`; only parameters that train are scored.
            objective: Loss of one validation example; the mean over its target tokens by default.
            second_order: Add the curvature term to the influence: a Hessian-vector product a step, and the factors of
                the whole step in memory.
            out: Folder of the log; None keeps nothing.
            flush_every: Steps between two writes of the log.
            start_step: Steps that the training has behind it: those of the checkpoint that it continues from. None
                waits for `resume`.
            token_budget: Most validation tokens in one pass.
            context: Entered around the validation pass, such as `lambda: torch.autocast("cuda", torch.bfloat16)`.

        Raises:
            UserError: a setting, the validation data or the log folder do not fit.
        """
        self.model, self.optimizer = model, optimizer
        self._patterns = tuple(components)
        self._validation = Validation(model, validation, objective or CausalLoss("mean"), token_budget, context)
        if second_order:
            self._validation.as_data()
        self._second_order = second_order
        selection = select_components(model, self._patterns)
        self._components = tuple(component for component in selection.components if observable(component))
        self.components: tuple[Component, ...] = self._training()
        if not self.components:
            raise ModelError("None of the selected parameters trains (requires_grad). Choose others with components=.")
        self._announce_left_out()
        if out is not None and flush_every < 1:
            raise UserError(f"flush_every={flush_every}: give 1 or more steps.")
        self._log = StepLog(Path(out), SCHEMA, flush_every) if out is not None else None
        self.steps_done = 0
        """Number of the last step."""
        if start_step is not None:
            self.resume(start_step)

    def resume(self, step: int) -> None:
        """Continue with step `step + 1`; drop rows of the log after `step`, so that no step is in it twice.

        Raises:
            IndexMismatch: the log belongs to another training.
        """
        if step < 0:
            raise SpecError(f"start_step={step}: give the number of steps done, 0 for a new training.")
        if self._log is not None:
            self._log.flush()
            begin_log(self._log, self._header(), step)
        self.steps_done = step

    def step(self, ids: Iterable[Any] | None = None, *, learning_rate: float | None = None) -> Step:
        """Return a context for the forward and backward passes of one optimizer step.

        With several micro-batches, leave `ids` out and call `step.batch(ids)` before each.

        Args:
            ids: Of the batch's examples, in order.
            learning_rate: Of this step, instead of the optimizer's.

        Raises:
            SpecError: the learning rate is not known.
            NonFinite: on leaving, if a score is not finite; the ids are named, and what was logged before is kept.
        """
        components = self._training()
        rates = self._rates(components, learning_rate)
        number = self.steps_done + 1
        return Step(self.model, components, rates, number, self._validation, self._second_order, self._record, ids)

    def select(self, candidates: Any, k: int, *, learning_rate: float | None = None) -> Selected:
        """Select the `k` examples of a batch to train on next, by GREATS; then take an ordinary step on them alone.

        The candidates go through a pass of their own first, in evaluation mode, so the step on the chosen ones is
        exactly a step on that smaller batch. Costs that pass, without weight gradients, and the products of all pairs.

        Args:
            candidates: A `Batch`, keyword inputs, or what `objective` reads.
            k: How many.
            learning_rate: Of the coming step, instead of the optimizer's.

        Returns:
            Positions in the batch in the order of picking, with what each pick adds.
        """
        components = self._training()
        return self._validation.select(candidates, k, components, self._rates(components, learning_rate))

    def flush(self) -> None:
        """Write every step so far to the log on disk; call it before each checkpoint and at the end."""
        if self._log is not None:
            self._log.flush()

    @property
    def log(self) -> OnlineLog:
        """The complete log so far.

        Raises:
            SpecError: the engine writes no log.
        """
        if self._log is None:
            raise SpecError("This engine writes no log. Give it a folder: OnlineAttribution(..., out=FOLDER).")
        self.flush()
        return OnlineLog.open(self._log.folder)

    def __enter__(self) -> "OnlineAttribution":
        return self

    def __exit__(self, *_: object) -> None:
        """Flush, also when the training has failed."""
        self.flush()

    def _record(self, scores: StepScores) -> None:
        self.steps_done = scores.step
        if self._log is not None:
            count = len(scores.ids)
            every = [scores.learning_rate] * count, list(scores.loss), [scores.validation_loss] * count
            self._log.add(scores.step, list(scores.ids), scores.score.tolist(), scores.influence.tolist(), *every)

    def _rates(self, components: Sequence[Component], learning_rate: float | None) -> list[float]:
        """Return the rate at which the next step moves each component; zero for one that the optimizer does not hold.

        The optimizer is read at this moment, so a scheduler's changes count.
        """
        if learning_rate is not None:
            return [float(learning_rate)] * len(components)
        if self.optimizer is None:
            raise SpecError(
                "The learning rate of the step is not known. Give the engine optimizer=..., or the step "
                "learning_rate=..."
            )
        groups = self.optimizer.param_groups
        rates = {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}
        return [rates.get(id(self.model.get_parameter(component.parameter)), 0.0) for component in components]

    def _training(self) -> tuple[Component, ...]:
        """Return the components whose parameter trains at this moment."""
        return tuple(part for part in self._components if self.model.get_parameter(part.parameter).requires_grad)

    def _announce_left_out(self) -> None:
        scored = {component.parameter for component in self.components}
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        missing = [name for name in trained if name not in scored]
        if missing:
            share = sum(trained[name].numel() for name in missing) / sum(value.numel() for value in trained.values())
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            announce(f"Online scores leave out {share:.1%} of the trained parameters: {shown}.")

    def _header(self) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        return {
            "vestige": version("vestige"),
            "model": str(getattr(config, "_name_or_path", "") or type(self.model).__name__),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "scored_parameters": sum(component.size for component in self.components),
            "components": [component.name for component in self.components],
            "validation": {"ids": self._validation.ids, "fingerprint": self._validation.fingerprint},
            "second_order": self._second_order,
            "sign": SIGN,
            "unit": UNIT,
        }
