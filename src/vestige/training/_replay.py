"""A recorded training, run again step by step and walked backward: what each example's weight did to the result.

Steps are run by the very Trainer that took them, from checkpoints at about the square root of the number of steps, so
memory holds one step and the disk two times the square root of them. The replayed weights at the end have to be the
recorded ones bit for bit: whatever differs (order, dropout, a library, the number of threads) is found there.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

from vestige.data import NO_TARGET, Batch
from vestige.errors import IndexMismatch, SpecError
from vestige.gradients import CausalLoss, DotSink, GradientPass, Second, second_derivatives
from vestige.models import parameter_view, select_components
from vestige.online import ID_KEY, CarriedIds, Rule, read_rule, unwrap_optimizer
from vestige.progress import announce, progress
from vestige.storage import check_disk
from vestige.training._adjoint import Adjoints, Moved, unclip
from vestige.training._engine import WEIGHT, Hook
from vestige.training._retraining import Retraining
from vestige.training._store import checkpoint_folder, checkpoint_steps

LOSS_SLACK = 1e-3
"""Largest relative difference between the loss that a step had and the one that its derivative is taken of."""
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
        random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        labels = inputs["labels"]
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


KEPT_CLASSES = [RecordedStep, MicroBatch, Moved, Rule, Adjoints]
"""What files of a replay hold beside tensors and plain values: nothing else is unpickled."""


class Derivatives(NamedTuple):
    """How the final quantities depend on the weights of the examples of one forward pass."""

    batch: MicroBatch
    tokens: Float[Tensor, "quantity example token"]
    """Derivatives with respect to the weight of each token's loss; those of an example add up to its own."""
    components: Float[Tensor, "component quantity example"] | None
    """Derivatives by component, which add up to the example's own; None where they are not requested."""


class Replay:
    """A training that is run again in `work`, where an interrupted replay continues."""

    def __init__(self, training: Retraining, work: Path) -> None:
        """Run the training again with checkpoints close enough together, and compare its end with the recorded one.

        Raises:
            IndexMismatch: Model, data or the trained weights are not those of the record.
            SpecError: The weights are of less than 32 bits, or the training is unfinished.
        """
        self.training, self._work, self._folder = training, work, work / "training"
        segments = max(1, math.isqrt(training.steps))
        announce(
            f"Replay: the {training.steps:,} steps of {training.run.folder} are run again, in {segments} segments."
        )
        training.repeat(self._folder, segments)
        self._require_same()
        self.borders = checkpoint_steps(self._folder)
        """Steps at which a segment ends and the next begins; the first is 0."""
        self.load_end()
        weight = next(self.model.parameters())
        if weight.dtype.itemsize < 4:
            raise SpecError(
                f"{training.run.folder}: weights in {weight.dtype} are too coarse. Train with --precision float32."
            )

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.borders[-1]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    def walk_back(
        self, adjoints: Adjoints, after: int, names: Sequence[str] = ()
    ) -> Iterator[tuple[RecordedStep, list[Derivatives]]]:
        """Walk from the step `after`, one of `borders`, to the first; `adjoints` are those of the weights by then.

        Args:
            adjoints: What is walked.
            after: Where it begins.
            names: Components over which derivatives are split, at the price of a pass more.

        Yields:
            Each step, from the last to the first, with the derivatives of its passes; by then `adjoints` are those
            before the step.

        Raises:
            IndexMismatch: The loss of a pass is not the one that the training had.
        """
        borders = [border for border in self.borders if border <= after]
        for end, begin in zip(borders[:0:-1], borders[-2::-1], strict=True):
            # Others may walk other adjoints through the same segment.
            with TemporaryDirectory(dir=self._work, prefix="steps-") as folder:
                files = self._record(begin, end, Path(folder))
                self.model.train()
                for path in reversed(files):
                    with torch.serialization.safe_globals(KEPT_CLASSES):
                        step: RecordedStep = torch.load(path, weights_only=True)
                    yield step, self._step_back(step, adjoints, names)
                    path.unlink()

    def _step_back(self, step: RecordedStep, adjoints: Adjoints, names: Sequence[str]) -> list[Derivatives]:
        parameters = self.parameters
        with torch.no_grad():
            for name, moved in step.moved.items():
                parameters[name].copy_(moved.weight)
        steps = {name: each.to(parameters[name].device) for name, each in step.moved.items()}
        gradients = {name: each.gradient for name, each in steps.items()}
        changes = unclip(adjoints.step_back(steps), gradients, step.norm, self.training.clip)
        found: list[Derivatives] = []
        for batch in step.batches:
            second = self._derive(step.number, batch, changes)
            split = self._split(batch, changes, names) if names else None
            found.append(Derivatives(batch, second.derivatives.cpu(), split))
            for name, curved in second.products.items():
                adjoints.weights[name] += curved
        return found

    def _derive(self, number: int, batch: MicroBatch, changes: dict[str, Tensor]) -> Second:
        shares = (batch.weights / batch.divisor)[:, None]
        inputs = self._inputs_of(batch)
        _set_random(batch.random)
        second = second_derivatives(self.model, inputs, shares.to(inputs.labels.device), changes)
        loss = float((second.losses.double().cpu() * shares).sum())
        if abs(loss - batch.loss) > LOSS_SLACK * max(abs(batch.loss), 1e-6):
            raise IndexMismatch(
                f"Step {number}: the training had a loss of {batch.loss:.6g}, and the replay finds {loss:.6g}. Its "
                "loss is more than the mean over target tokens (a router's, for instance), or dropout falls otherwise. "
                "This training cannot be replayed."
            )
        return second

    def _split(
        self, batch: MicroBatch, changes: dict[str, Tensor], names: Sequence[str]
    ) -> Float[Tensor, "component quantity example"]:
        """Return the derivatives of a pass by component: inner products of every example's gradient."""
        model, components = self.model, select_components(self.model, names).components
        inputs = self._inputs_of(batch)
        vectors = [
            torch.stack([parameter_view(model, part, stored=each) for each in changes[part.parameter]])
            if part.parameter in changes
            else torch.zeros(len(next(iter(changes.values()))), *part.shape)
            for part in components
        ]
        _set_random(batch.random)
        sink = DotSink(vectors)
        sink.begin(len(batch.ids))
        # The attention of `second_derivatives`, for the same dropout.
        with sdpa_kernel(SDPBackend.MATH), GradientPass(model, components, CausalLoss("sum")) as gradient_pass:
            gradient_pass.run(inputs, sink)
        return sink.scores.cpu() * (batch.weights / batch.divisor)

    def _inputs_of(self, batch: MicroBatch) -> Batch:
        inputs = Batch(torch.arange(len(batch.ids)), batch.input_ids, batch.labels)
        return inputs.to(next(self.model.parameters()).device)

    def load_end(self) -> None:
        """Give the model the weights that the training ended with, by taking the steps of the last segment."""
        self._run(self.borders[-2], self.steps, "Steps to the end of the training")

    def run_without(self, ids: Collection[str], title: str) -> None:
        """Take all steps with the weight of some examples at 0: order, batches and divisors stay; keep the model."""
        self._run(0, self.steps, title, without=ids)

    def _require_same(self) -> None:
        run, steps = self.training.run, self.training.steps
        one, other = (_read_weights(checkpoint_folder(folder, steps)) for folder in (run.folder, self._folder))
        unlike = [name for name in one if name not in other or not torch.equal(one[name], other[name])]
        if unlike or one.keys() != other.keys():
            largest = max(
                (float((one[name] - other[name]).abs().max()) for name in unlike if name in other), default=0.0
            )
            raise IndexMismatch(
                f"The replayed weights are not those of {run.folder}: {len(unlike):,} of {len(one):,} "
                f"tensors differ, by up to {largest:.2g}. Nothing was scored. Replay on the machine, with the number "
                f"of threads and with the versions that the training had: {run.record.get('versions', {})}."
            )

    def _record(self, begin: int, end: int, folder: Path) -> list[Path]:
        """Run the steps of a segment once more, and leave a file for each."""
        size = sum(each.numel() * each.element_size() for each in self.parameters.values())
        check_disk(folder, 4 * size * (end - begin))
        tape = Tape(folder, end, self.training.id_column)
        self._run(begin, end, f"Replay of steps {begin + 1} to {end}", tape)
        return tape.files

    def _run(self, begin: int, end: int, title: str, *hooks: Hook, without: Collection[str] = ()) -> None:
        """Take the steps after `begin`, with something hooked in; the model is kept."""
        resume = checkpoint_folder(self._folder, begin) if begin else None
        counting = TrainerCallback()
        with progress(end - begin, title, unit="steps") as bar:
            counting.on_step_end = lambda *_, **__: bar.advance()
            self.model = self.training.take(resume, [lambda trainer: trainer.add_callback(counting), *hooks], without)


def _keep(value: Any) -> Any:
    return None if value is None else value.detach().clone()


def _set_random(states: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint holds, whole or of an adapter."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
