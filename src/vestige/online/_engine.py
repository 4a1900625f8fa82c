"""In-run attribution: what each training example did to a validation loss, measured while the model trains."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from torch import nn

from vestige.errors import ModelError, SpecError, UserError
from vestige.gradients import CausalLoss, Objective, observable
from vestige.models import Component, select_components
from vestige.online._log import MEANING, SCHEMA, OnlineLog, StepLog, begin_log
from vestige.online._optimizers import Preconditioner, ScoreOptimizer
from vestige.online._step import Step, StepScores
from vestige.online._validation import Selected, Validation
from vestige.progress import announce


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

    The score of example i in step t is `<share of i in the step's gradient, P * gradient of the validation loss>`: the
    share is what i adds to `.grad`, for any average in the loss, so the shares of a step add up to its gradient. P is 1
    for SGD, and `1 / (sqrt(v_t / (1 - b2^t)) + eps)` elementwise for Adam and AdamW. The influence of an example is the
    sum of `learning rate * score` over its steps, the fall of the validation loss to first order (In-Run Data Shapley,
    Wang et al. 2024, arXiv:2406.11011, with the sign turned); with momentum, in this and the later steps.

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
        score_optimizer: ScoreOptimizer = "as-is",
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
            optimizer: Where the learning rates, and Adam's moments, are read at the start of each step.
            components: As in `vestige index --components`; only parameters that train are scored.
            objective: Loss of one validation example; the mean over its target tokens by default.
            score_optimizer: Score steps as the optimizer takes them, or "sgd": as if they were plain gradient descent.
                What Adam divides by depends on the whole gradient of the step, so the factors of the step stay in
                memory until its end, and the validation gradient is a matrix for each component.
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
        if score_optimizer not in get_args(ScoreOptimizer):
            raise SpecError(f'score_optimizer={score_optimizer!r}: give "as-is" or "sgd".')
        self.model, self.optimizer = model, optimizer
        self._score_optimizer: ScoreOptimizer = score_optimizer
        self.processes = 1
        """How many of them train the model together, each on examples of its own; all hold the same weights."""
        self._validation = Validation(model, validation, objective or CausalLoss("mean"), token_budget, context)
        if second_order:
            self._validation.as_data()
        self._second_order = second_order
        selection = select_components(model, tuple(components))
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
        self.validation_loss = math.nan
        """Mean loss of the validation examples before the last step, nats."""
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
            SpecError: the learning rate is not known, or the optimizer is none whose steps can be scored as they are.
            NonFinite: on leaving, if a score is not finite; the ids are named, and what was logged before is kept.
        """
        components = self._training()
        return Step(
            self.model,
            components,
            self._rates(components, learning_rate),
            Preconditioner(self.model, components, self.optimizer, self._score_optimizer),
            self.steps_done + 1,
            self._validation,
            self._second_order,
            self.processes,
            self._record,
            ids,
        )

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
        rates = self._rates(components, learning_rate)
        preconditioner = Preconditioner(self.model, components, self.optimizer, self._score_optimizer)
        return self._validation.select(candidates, k, components, rates, preconditioner)

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
        self.steps_done, self.validation_loss = scores.step, scores.validation_loss
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
            "score_optimizer": self._score_optimizer,
            "sign": MEANING.sign,
            "unit": "nats of the mean validation loss",
        }
