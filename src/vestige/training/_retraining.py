"""A recorded training that can be run again: by its settings, or by the function that makes its Trainer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer

from vestige.data import NO_TARGET, Example, TokenizedData, data_fingerprint
from vestige.errors import IndexMismatch, SpecError, UserError, differences, mismatch_message
from vestige.jobs import own_jobs
from vestige.models import quiet_transformers
from vestige.online import CollatorWithIds, RowsWithIds, restore_randomness
from vestige.registry import import_object
from vestige.settings import TrainSettings
from vestige.training._engine import Hook, Rows, fit, make_model
from vestige.training._examples import ALARM_OFF, TrainInputs, Watched, read_inputs, repeat_settings
from vestige.training._recorder import Recorder
from vestige.training._store import TrainingRun, checkpoint_folder, checkpoint_steps, last_resumable
from vestige.training._train import Plan, group_examples, make_plan, train


class Retraining(ABC):
    """A recorded training, and how its steps are taken again."""

    reweighs = False
    """Whether examples may be given a weight of 0."""
    id_column = "id"
    """Column of the data with the ids of the rows."""
    clip: float
    """Largest norm of a step's gradient; 0 does not clip."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run

    @property
    @abstractmethod
    def data(self) -> TokenizedData:
        """All examples, with the targets that are learned."""

    @property
    @abstractmethod
    def learned(self) -> list[str]:
        """Ids of the examples that the training took."""

    @property
    def steps(self) -> int:
        """The number that the recorded training took; the last checkpoint is behind them."""
        return checkpoint_steps(self.run.folder)[-1]

    @abstractmethod
    def repeat(self, folder: Path, segments: int) -> TrainingRun:
        """Run the training into a folder, or what is missing there, with whole checkpoints at the ends of segments.

        Raises:
            IndexMismatch: Model or data are not those of the record.
        """

    @abstractmethod
    def take(self, resume: Path | None, hooks: Sequence[Hook], without: Collection[str]) -> nn.Module:
        """Take steps from a checkpoint on, or all, until the end or a hook ends them; return the model.

        Args:
            resume: The checkpoint.
            hooks: Hooked into the Trainer.
            without: Ids of examples with a weight of 0; none where the training cannot reweigh.
        """


class CommandTraining(Retraining):
    """A training of `vestige train`."""

    reweighs = True

    def __init__(self, run: TrainingRun, **live: Any) -> None:
        """Read its settings.

        Args:
            run: The training.
            live: `model`, `data` and `tokenizer`, where they were objects in a Python program.

        Raises:
            SpecError: It cannot be replayed; the message says why.
        """
        super().__init__(run)
        settings = repeat_settings(run, **live)
        if settings.bf16:
            raise SpecError(
                f"{run.folder} was trained with --bf16: rounding to 8 bits makes its steps too rough to be walked "
                "backward. Train in float32."
            )
        if settings.select is not None:
            raise SpecError(
                f"{run.folder} was trained with --select: which examples a step learned from depends on the weights "
                "themselves, and is not followed backward. Train without --select."
            )
        # What is computed again for memory's sake alone could not be differentiated twice.
        changed: dict[str, Any] = {"gradient_checkpointing": False, "validation": None}
        changed |= {"losses": False, "keep_optimizer": True, "overwrite": False, "report_to": (), **ALARM_OFF}
        self.settings: TrainSettings = settings.model_copy(update=changed)
        self.clip = settings.clip

    @property
    def steps(self) -> int:
        """The number that were to be taken.

        Raises:
            SpecError: They were not.
        """
        steps, done = int(self.run.record["identity"]["steps"]), checkpoint_steps(self.run.folder)
        if not done or done[-1] != steps:
            raise SpecError(f"{self.run.folder} is not finished. Type its `vestige train` command again first.")
        return steps

    @property
    def data(self) -> TokenizedData:
        """As the command read them."""
        return self._inputs.data

    @property
    def learned(self) -> list[str]:
        """Members with something to learn."""
        return [self.data.examples[int(row)].id for row in self._plan.rows]

    def repeat(self, folder: Path, segments: int) -> TrainingRun:
        """Run the command again, with other checkpoints."""
        epochs = self.settings.passes or self.run.record["epochs"]
        borders = ",".join(f"{epochs * number / segments:.9f}" for number in range(segments + 1))
        changed = self.settings.model_copy(update={"out": folder, "checkpoints": borders})
        again = train(**changed.arguments())
        same = ("model", "data", "examples", "precision", "steps")
        pairs = [{name: each.record["identity"].get(name) for name in same} for each in (self.run, again)]
        if found := differences(pairs[0], pairs[1], self.run.record["names"], again.record["names"]):
            raise IndexMismatch(mismatch_message(f"The training in {self.run.folder}", found))
        return again

    def take(self, resume: Path | None, hooks: Sequence[Hook], without: Collection[str]) -> nn.Module:
        """Take the steps by the engine of the command."""
        inputs, plan, settings = self._inputs, self._plan, self.settings
        model = make_model(settings, inputs.loaded, settings.seed)
        left = np.array([example.id in without for example in self.data.examples]) if without else None
        fit(
            model,
            Rows(inputs.data, plan.rows, plan.weights, left),
            settings,
            steps=plan.steps,
            seed=settings.seed,
            hooks=hooks,
            resume=resume,
            tokenizer=inputs.loaded.tokenizer,
        )
        return model

    @cached_property
    def _inputs(self) -> TrainInputs:
        return read_inputs(self.settings)

    @cached_property
    def _plan(self) -> Plan:
        groups = group_examples(self.settings, self.data, self.run.record)
        return make_plan(self.settings, self.data, self._inputs.weights, groups)


class TrainerTraining(Retraining):
    """A training of one's own Trainer, recorded by a `Recorder`."""

    def __init__(self, run: TrainingRun, maker: str) -> None:
        """Find the function that makes the Trainer.

        Args:
            run: The record.
            maker: `module:function`; each call returns the Trainer as it was before `Recorder(trainer, ...)`, with the
                model as it was before its first step.

        Raises:
            SpecError: There is no such function, or the training cannot be replayed.
        """
        super().__init__(run)
        self.id_column = run.record.get("id_column", "id")
        try:
            self._maker: Callable[[], Trainer] = import_object(maker)
        except (ImportError, AttributeError, ValueError) as error:
            raise SpecError(
                f"trainer={maker}: no function is found there ({error}). Give module:function, of a module that Python "
                "imports from here; it returns the Trainer that was recorded."
            ) from error
        with _apart():
            trainer = self._make()
        if trainer.args.bf16 or trainer.args.fp16:
            raise SpecError(f"{run.folder} was trained in 16 bits: its steps are too rough to be walked backward.")
        self.clip = float(trainer.args.max_grad_norm or 0.0)
        self._trainer = trainer

    @cached_property
    def data(self) -> TokenizedData:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The rows of the Trainer's data, as its collator makes them."""
        trainer: Any = self._trainer
        collate = CollatorWithIds(trainer._get_collator_with_removed_columns(trainer.data_collator))
        watched = Watched(RowsWithIds(trainer.train_dataset, self.id_column), collate, 1)
        ids, masks = [], []
        for batch in watched.batches():
            tokens, labels = batch["input_ids"][0].cpu(), batch["labels"][0].cpu()
            mask = (labels != NO_TARGET) & (torch.arange(len(labels)) > 0)
            if (labels[mask] != tokens[mask]).any():
                raise SpecError(f"{self.run.folder}: a label is another token than its input, which is not followed.")
            ids.append(tokens.numpy().astype(np.int32))
            masks.append(mask.numpy())
        tokenizer: Any = trainer.processing_class
        texts = ["" if tokenizer is None else tokenizer.decode(each) for each in ids]
        examples = [Example(id=name, row=row, text=texts[row]) for row, name in enumerate(watched.ids)]
        fingerprint = data_fingerprint(examples, ids, masks)
        return TokenizedData(examples, ids, masks, np.zeros(len(ids), dtype=bool), fingerprint, "train_dataset")

    @property
    def learned(self) -> list[str]:
        """The ids in the log."""
        return list(dict.fromkeys(self.run.steps["example_id"].to_pylist()))

    def repeat(self, folder: Path, segments: int) -> TrainingRun:
        """Run the Trainer again, recorded."""
        with _apart():
            batches = len(self._make().get_train_dataloader())
        per_epoch = max(1, math.ceil(batches / self._trainer.args.gradient_accumulation_steps))
        borders = ",".join(f"{self.steps / per_epoch * number / segments:.9f}" for number in range(segments + 1))
        last = last_resumable(folder)
        if last < self.steps:
            with _apart():
                trainer = self._make()
                Recorder(trainer, folder, checkpoints=borders, watch=None, id_column=self.id_column, overwrite=True)
                trainer.train(resume_from_checkpoint=str(checkpoint_folder(folder, last)) if last else None)
        again = TrainingRun.open(folder)
        one, other = (each.record["model"]["fingerprint"] for each in (self.run, again))
        if one != other:
            raise IndexMismatch(f"{self.run.folder} began with another model than the Trainer has. Nothing was scored.")
        return again

    def take(self, resume: Path | None, hooks: Sequence[Hook], without: Collection[str]) -> nn.Module:  # noqa: ARG002
        """Take the steps by a new Trainer."""
        with _apart():
            trainer: Any = self._make()
            for hook in hooks:
                hook(trainer)
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer.model

    def _make(self) -> Trainer:
        """Return the Trainer, which saves nothing of its own and computes nothing twice."""
        trainer: Any = self._maker()
        if not isinstance(trainer, Trainer):
            raise UserError(f"The function of trainer= returned a {type(trainer).__name__}, expected a Trainer.")
        trainer.args.save_strategy, trainer.args.load_best_model_at_end = "no", False
        trainer.args.gradient_checkpointing = False
        for shown in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(shown)
        return trainer


@contextmanager
def _apart() -> Iterator[None]:
    """Leave the random numbers of this process as they are: a Trainer sets their seeds."""
    with torch.random.fork_rng(), restore_randomness(), own_jobs(), quiet_transformers():
        yield
