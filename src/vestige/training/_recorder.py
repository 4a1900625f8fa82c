"""A callback that records a Trainer's run for attribution and audit, and leaves the training as it was, bit for bit."""

from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from vestige.errors import CorruptFile, DataError, IndexMismatch, UserError
from vestige.models import model_fingerprint
from vestige.online import ID_KEY, CarriedIds, RowsWithIds, StepLog
from vestige.parsing import parse_object
from vestige.progress import announce
from vestige.settings import list_epochs
from vestige.storage import make_folder, remove_durably
from vestige.training._alarm import Alarm, Trigger, answer_codes, find_at_risk, write_at_risk
from vestige.training._engine import Losses, example_losses, leave_no_trace
from vestige.training._examples import Watched
from vestige.training._store import (
    AT_RISK,
    LOG,
    RECORD,
    STEPS,
    TrainingRun,
    begin_record,
    checkpoint_folder,
    checkpoint_steps,
    keep_last_optimizer,
    merge_losses,
    plan_steps,
    remove_after,
    write_checkpoint,
    write_losses,
)


class Recorder(TrainerCallback):
    """Records a run of your own Trainer; make it before `trainer.train()`.

        Recorder(trainer, "recorded", checkpoints="0,0.5,...", alarm=Alarm())
        trainer.train()

    The folder then holds `checkpoint-STEP` folders, each of which loads as a model and has the optimizer's state (what
    `vestige attribute --checkpoints recorded --method tracin` or `less` reads), every example of every step in order
    with its loss and learning rate, the losses of all examples at the checkpoints, and what the alarm found. The
    Trainer saves its own checkpoints as it would without; resumed from one of them, the record goes on there. Weights,
    losses, dropout, optimizer and random numbers are the same bit for bit.
    """

    def __init__(
        self,
        trainer: Trainer,
        out: str | Path,
        *,
        checkpoints: str = "0,1,...",
        alarm: Alarm | None = None,
        watch: Any = "train",
        id_column: str = "id",
        keep_optimizer: bool = True,
        overwrite: bool = False,
        on_losses: Callable[[int, Losses], Any] = lambda *_: None,
    ) -> None:
        """Wrap the Trainer's data, collator and `training_step` until `release`.

        Args:
            trainer: Its model, data and collator are used as they are.
            out: Folder of the record; not the Trainer's own output folder, whose checkpoints it may delete.
            checkpoints: Epochs at which to save, such as `0,0.2,...,1,2,...`; the end is always saved.
            alarm: Ring when the median training loss has fallen, and list the training examples at risk.
            watch: Rows whose losses are measured at every checkpoint: the training data, other rows of the same
                form, or None to measure none.
            id_column: Column of the data that holds the ids; else they are row numbers.
            keep_optimizer: Keep the optimizer's state in every checkpoint, not in the last alone.
            overwrite: Drop what an earlier training has left in the folder when a new one begins.
            on_losses: Called at every checkpoint with its step and the losses of the watched rows.

        Raises:
            UserError: The Trainer runs on several devices, or has no rows, or is recorded already.
        """
        _refuse_unsupported(trainer, Path(out))
        list_epochs(checkpoints, 1.0)
        self.folder, self.alarm = Path(out), alarm
        self._trainer: Any = trainer
        self._epochs, self._overwrite = checkpoints, overwrite
        self._keep_optimizer, self._id_column, self._on_losses = keep_optimizer, id_column, on_losses
        self._log = StepLog(self.folder / LOG, STEPS)
        self._held = TrainingRun(self.folder, {})
        self._trigger: Trigger | None = None
        self._steps: frozenset[int] = frozenset()
        self._rates: list[float] = []
        self._entries: list[dict[str, Any]] = []
        self._rate = 0.0
        self._listener = _Listener(trainer, id_column)
        self._train = self._watch_rows(trainer.train_dataset, id_column)
        rows = trainer.train_dataset if isinstance(watch, str) else watch
        self._watch = None if rows is None else self._watch_rows(rows, id_column)
        trainer.add_callback(self)

    def _watch_rows(self, rows: Any, id_column: str) -> Watched:
        """Return rows that are measured beside the training, collated as the Trainer does."""
        rows = rows if isinstance(rows, RowsWithIds) else RowsWithIds(rows, id_column)
        collate = self._trainer._get_collator_with_removed_columns(self._trainer.data_collator)
        return Watched(rows, collate, self._trainer.args.per_device_eval_batch_size)

    @property
    def last_step(self) -> tuple[list[str], np.ndarray]:
        """Ids and losses of the step that is being taken, in the order in which the model saw the examples."""
        return self._listener.ids, self._listener.column("loss")

    def release(self) -> None:
        """Restore the Trainer, with what was recorded on disk. A second time does nothing."""
        if self._listener.release():
            self._trainer.remove_callback(self)
        self._log.flush()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Bring the record to where the training is, and save the checkpoint before the first step."""
        self._open(state.global_step)
        per_epoch = max(1, ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps))
        epochs = list_epochs(self._epochs, state.max_steps / per_epoch)
        self._steps = frozenset(plan_steps(epochs, per_epoch, state.max_steps))
        self._read_log(state.global_step)
        if self.alarm is not None and self.alarm.measure == "psmi":
            answer_codes(self._train.answers(self._trainer.model))
        if state.global_step == 0 and 0 in self._steps:
            self._save(0)
        self._listener.begin()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Note the rate of this step, before the scheduler changes it."""
        self._rate = float(self._trainer.optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Log the step, update the alarm, and save a checkpoint if one is due."""
        ids, losses = self.last_step
        self._log.add(state.global_step, ids, losses, self._listener.column("targets"), [self._rate] * len(ids))
        self._rates.append(self._rate)
        self._listener.seen = []
        if self._trigger is not None and self._trigger.update(losses):
            self._ring(state.global_step)
        if state.global_step in self._steps:
            self._save(state.global_step)

    def on_save(self, *_: Any, **__: Any) -> None:
        """Bring the record to where the Trainer's own checkpoint is."""
        self._log.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save the last step, also of a training that was stopped before its end."""
        self._listener.end()
        # The weights may be those of an earlier step by now.
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            self._save(state.global_step)
        self._log.flush()

    def _open(self, step: int) -> None:
        """Prepare the folder for what comes after `step`."""
        held = self._held.steps
        last = held["step"][-1].as_py() if len(held) else 0
        if step == 0 and last and not self._overwrite:
            raise IndexMismatch(
                f"{self.folder} holds the record of steps 1 to {last}; nothing was changed. To continue that training "
                "call trainer.train(resume_from_checkpoint=...); for a new one give another folder, or overwrite=True."
            )
        if not (self.folder / RECORD).is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise IndexMismatch(f"{self.folder} holds other files and is left alone. Give another folder.")
            make_folder(self.folder)
            begin_record(self.folder, **self._header())
        if last < step:
            announce(f"{self.folder} ends at step {last}, the training goes on after step {step}: a gap remains.")
        remove_after(self.folder, step)
        self._log.begin(step)
        found = self._held.at_risk
        if found is not None and found["step"][0].as_py() > step:
            for kind in ("parquet", "jsonl"):
                remove_durably(self.folder / f"{AT_RISK}.{kind}")
        merge_losses(self.folder)

    def _header(self) -> dict[str, Any]:
        args = self._trainer.args.to_dict()
        plain = {name: value for name, value in args.items() if isinstance(value, str | int | float | bool | None)}
        model = self._trainer.model
        name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
        return {
            "model": {"name": name, "fingerprint": model_fingerprint(model)},
            "examples": len(self._trainer.train_dataset),
            "id_column": self._id_column,
            "arguments": plain,
        }

    def _read_log(self, step: int) -> None:
        """Set rates and the alarm to where they were after `step`."""
        table = self._held.steps
        steps, rates, losses = (table[name].to_numpy() for name in ("step", "learning_rate", "loss"))
        saved = [done for done in checkpoint_steps(self.folder) if 0 < done <= step]
        before = saved[-1] if saved else 0
        self._entries = []
        if saved:
            path = checkpoint_folder(self.folder, before) / "trainer_state.json"
            try:
                self._entries = list(parse_object(path.read_bytes())["log_history"])
            except (OSError, LookupError, TypeError, ValueError) as error:
                raise CorruptFile(f"{path} is damaged ({error!r}). Remove its folder to go on before it.") from error
        _, first = np.unique(steps, return_index=True)
        self._rates = [float(rates[place]) for place in first if steps[place] > before]
        if self.alarm is None:
            return
        window = min(self.alarm.window, len(self._trainer.train_dataset))
        self._trigger = Trigger(self.alarm.below, window)
        for number in np.unique(steps):
            self._trigger.update(losses[steps == number])

    def _ring(self, step: int) -> None:
        assert self.alarm is not None
        assert self._trigger is not None
        assert self._trigger.first is not None
        trainer, first = self._trainer, self._trigger.first
        found = find_at_risk(self.alarm, self._train, trainer.model, first, trainer.accelerator.autocast)
        write_at_risk(self.folder, self._train.ids, found, step)
        announce(
            f"Alarm at step {step}: losses are below {self.alarm.below:.0%} of what they were; {found.flagged.sum():,} "
            f"of {len(found.value):,} examples are at risk ({found.rule}). {self.folder / AT_RISK}.jsonl lists them."
        )

    def _save(self, step: int) -> None:
        folder = checkpoint_folder(self.folder, step)
        if folder.is_dir():
            return
        self._log.flush()
        if self._rates:
            self._entries.append({"step": step, "learning_rate": sum(self._rates) / len(self._rates)})
            self._rates = []

        def add(unfinished: Path) -> None:
            if self._watch is not None:
                found = self._watch.losses(self._trainer.model, self._trainer.accelerator.autocast)
                write_losses(unfinished, step, self._watch.ids, found)
                self._on_losses(step, found)

        # Saving writes files and draws nothing, but what a library does there is not in our hands.
        with leave_no_trace(self._trainer.model):
            write_checkpoint(self._trainer, folder, self._entries, add)
        if not self._keep_optimizer:
            keep_last_optimizer(self.folder)
        merge_losses(self.folder)


class _Listener:
    """Ids travel with the rows of a Trainer, and losses are read from its forward passes; nothing else is changed."""

    def __init__(self, trainer: Any, id_column: str) -> None:
        self._trainer = trainer
        self.seen: list[tuple[list[str], Losses]] = []
        """Ids and measurements of each batch of the step that is being taken."""
        self._ids: list[str] = []
        self._labels: Tensor | None = None
        self._hook: Any = None
        self._carried = CarriedIds(trainer, id_column, self._training_step)

    @property
    def ids(self) -> list[str]:
        """Examples of the step, in the order in which the model saw them."""
        return [name for ids, _ in self.seen for name in ids]

    def column(self, name: str) -> np.ndarray:
        """Return one of their measurements, by its name in `Losses`."""
        return np.concatenate([getattr(losses, name) for _, losses in self.seen] or [np.zeros(0)])

    def begin(self) -> None:
        """Record the forward passes of training from now on."""
        self.end()
        self._hook = self._trainer.model.register_forward_hook(self._measure, with_kwargs=True)

    def end(self) -> None:
        """Stop recording, and keep nothing in memory."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self.seen, self._labels = [], None

    def release(self) -> bool:
        """Restore the Trainer; return whether there was anything to undo."""
        self.end()
        return self._carried.release()

    def _training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        ids, labels = inputs.get(ID_KEY), inputs.get("labels")
        if ids is None or not isinstance(labels, Tensor):
            missing = "ids: build the training loader with the Trainer's own collator" if ids is None else "`labels`"
            raise DataError(f"The batch has no {missing}.")
        before, self._labels = len(self.seen), labels
        self._ids = list(ids)
        try:
            return self._carried.plain_step(model, inputs, num_items_in_batch)
        finally:
            self._labels = None
            if len(self.seen) == before and self._ids:
                announce("The model gave no logits for a batch: its losses are recorded as missing.")
                empty = np.full(len(self._ids), np.nan)
                self.seen.append((self._ids, Losses(empty, empty, np.zeros(len(self._ids), dtype=np.int64), empty)))

    def _measure(self, module: nn.Module, inputs: Any, named: Mapping[str, Any], output: Any) -> None:  # noqa: ARG002
        """Measure the losses of the batch from the logits that the training computes anyway."""
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if self._labels is not None and isinstance(logits, Tensor) and module.training:
            labels, self._labels = self._labels, None
            self.seen.append((self._ids, example_losses(logits.detach(), labels.to(logits.device))))


def _refuse_unsupported(trainer: Trainer, out: Path) -> None:
    arguments = trainer.args
    if arguments.world_size > 1 or arguments.n_gpu > 1:
        raise UserError("A record needs all examples of a step in one process. Train on one device.")
    data = trainer.train_dataset
    if data is None or not hasattr(data, "__len__"):
        raise UserError("The Trainer has no train_dataset with rows, so no ids. Give it one before Recorder().")
    if any(isinstance(callback, Recorder) for callback in trainer.callback_handler.callbacks):
        raise UserError("This Trainer is recorded already. Call release() on its Recorder first.")
    own = arguments.output_dir
    if own is not None and Path(own).resolve() == out.resolve() and arguments.save_strategy != "no":
        raise UserError(f"{out} is the Trainer's own output folder, where it may delete checkpoints. Give another.")
