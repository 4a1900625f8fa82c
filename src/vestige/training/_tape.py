"""What is written down of the steps of a Trainer while it takes them, for a walk back through them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import TrainerCallback

from vestige.data import NO_TARGET
from vestige.online import ID_KEY, CarriedIds, read_rule, unwrap_optimizer
from vestige.training._adjoint import Moved
from vestige.training._engine import WEIGHT

_WAY_OUT = "They cannot be walked backward: train with --optimizer adamw or sgd."


class MicroBatch(NamedTuple):
    """One forward pass of a step."""

    ids: list[str]
    input_ids: Int[Tensor, "example token"]
    labels: Int[Tensor, "example token"]
    weights: Float[Tensor, "example"]
    """1 where the data have no weights."""
    divisor: float
    """The sum of the losses of the target tokens, times their examples' weights, is divided by this."""
    random: tuple[Tensor, list[Tensor]]
    """States of the random numbers, of the CPU and of each GPU, before the pass, which decide dropout."""
    loss: float
    """As the training computed it."""


@dataclass(frozen=True)
class RecordedStep:
    """Everything that a walk backward needs of one step."""

    number: int
    """From 1."""
    moved: dict[str, Moved]
    batches: list[MicroBatch]
    norm: float
    """Of the whole gradient before clipping."""


class Tape(TrainerCallback):
    """A hook that writes down the steps of a Trainer up to one, after which it ends."""

    def __init__(self, folder: Path, end: int, id_column: str) -> None:
        self._folder, self._end, self._id_column = folder, end, id_column
        self.files: list[Path] = []
        self._batches: list[MicroBatch] = []
        self._before: dict[str, Tensor] = {}
        self._moved: dict[str, Moved] = {}
        self._norm = 0.0

    def __call__(self, trainer: Any) -> None:
        """Begin with this Trainer."""
        self._trainer = trainer
        self._carried = CarriedIds(trainer, self._id_column, self._training_step)
        trainer.add_callback(self)

    def _training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        ids = list(inputs[ID_KEY])
        if not self._batches:
            self._before = {name: _keep(each) for name, each in model.named_parameters() if each.requires_grad}
        labels, random = inputs["labels"], _read_random()
        targets = int((labels[:, 1:] != NO_TARGET).sum())
        scaled = self._trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        divisor: Any = num_items_in_batch if scaled else targets * self._trainer.current_gradient_accumulation_steps
        weights = inputs.get(WEIGHT, torch.ones(len(ids)))
        kept = (inputs["input_ids"].cpu(), labels.cpu(), weights.cpu())
        loss = self._carried.plain_step(model, inputs, num_items_in_batch)
        self._batches.append(MicroBatch(ids, *kept, float(divisor), random, float(loss)))
        norms = [torch.linalg.vector_norm(each.grad) for each in model.parameters() if each.grad is not None]
        self._norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        return loss

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Keep what the optimizer is given."""
        optimizer = self._optimizer
        names = {each: name for name, each in self._trainer.model.named_parameters()}
        self._moved = {
            names[each]: Moved(
                read_rule(optimizer, group, optimizer.state[each], _WAY_OUT),
                self._before[names[each]],
                _keep(each.grad),
            )
            for group in optimizer.param_groups
            for each in group["params"]
            if each.grad is not None
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Write the step, and end the training behind the last one that is wanted."""
        states = {name: self._optimizer.state[each] for name, each in self._trainer.model.named_parameters()}
        moved = {}
        for name, each in self._moved.items():
            first, second = (_keep(states[name].get(one)) for one in ("exp_avg", "exp_avg_sq"))
            moved[name] = replace(each, first=first, second=second)
        path = self._folder / f"step-{state.global_step:08}.pt"
        torch.save(RecordedStep(state.global_step, moved, self._batches, self._norm), path)
        self.files.append(path)
        self._batches = []
        if state.global_step == self._end:
            control.should_training_stop = True

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return unwrap_optimizer(self._trainer.optimizer)


def _keep(value: Any) -> Any:
    return None if value is None else value.detach().clone()


def _read_random() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
