"""The online engine inside the Trainer of transformers, which goes on training as it would without."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from vestige.errors import DataError, UserError
from vestige.online._engine import OnlineAttribution
from vestige.online._step import Step

ID_KEY = "vestige_id"
"""Carries the ids from the data set through the sampler, the collator and the loader to the training step."""


class CarriedIds:
    """Ids travel with the rows of a Trainer to a `training_step` of ours, until `release`.

    Args:
        trainer: Its data, collator and `training_step` are replaced.
        id_column: Column of the data that holds the ids; else they are row numbers.
        training_step: Takes the place of the Trainer's, which is `plain_step`; the ids are its `inputs[ID_KEY]`.
    """

    def __init__(self, trainer: Any, id_column: str, training_step: Callable[..., torch.Tensor]) -> None:
        self._trainer, self._step = trainer, training_step
        self._plain_step = trainer.training_step
        self._data, self._collator = trainer.train_dataset, trainer.data_collator
        self.first = not isinstance(trainer.train_dataset, RowsWithIds)
        """False where others have the ids travel already."""
        if self.first:
            trainer.train_dataset = RowsWithIds(trainer.train_dataset, id_column)
            trainer.data_collator = CollatorWithIds(trainer.data_collator)
            # The Trainer drops every key that the model's forward does not name.
            trainer._set_signature_columns_if_needed()
            trainer._signature_columns.append(ID_KEY)
        trainer.training_step = training_step

    def plain_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Take the step as it would be taken without us."""
        if self.first:
            inputs.pop(ID_KEY, None)
        return self._plain_step(model, inputs, num_items_in_batch)

    def release(self) -> bool:
        """Restore the Trainer; return whether there was anything to undo."""
        if self._trainer.__dict__.get("training_step") != self._step:
            return False
        self._trainer.train_dataset, self._trainer.data_collator = self._data, self._collator
        if self.first:
            del self._trainer.__dict__["training_step"]
            self._trainer._signature_columns.remove(ID_KEY)
        else:
            self._trainer.training_step = self._plain_step
        return True


class Attached(TrainerCallback):
    """An engine at work: its step opens with the one of the Trainer, and closes between clipping and optimizer."""

    def __init__(self, engine: OnlineAttribution, trainer: Trainer, id_column: str, select: int | None) -> None:
        self.engine, self._trainer, self._select = engine, trainer, select
        self._open: Step | None = None
        self._carried = CarriedIds(trainer, id_column, self._training_step)

    def detach(self) -> None:
        """Restore the Trainer as it was before `attach`; what was scored is on disk. A second time does nothing."""
        self.on_train_end()
        if self._carried.release():
            self._trainer.remove_callback(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Continue the log where the checkpoint stands."""
        self._close(UserError)
        self.engine.optimizer = self._trainer.optimizer
        self.engine.resume(self._trainer.state.global_step)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Open a step."""
        self._close(UserError)
        if self._select is None:
            self._open = self.engine.step().__enter__()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Close it: the gradient is clipped, the weights have not moved."""
        self._close(None)

    def on_save(self, *_: Any, **__: Any) -> None:
        """Write the log up to the checkpoint."""
        self.engine.flush()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Free the memory."""
        self._close(UserError)
        self.engine.flush()

    def _training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        ids = inputs.get(ID_KEY)
        if ids is None:
            raise DataError("The batch has lost its ids: build the training loader with the Trainer's own collator.")
        if self._select is not None:
            ids, inputs, num_items_in_batch = self._choose(ids, inputs)
            self._open = self.engine.step().__enter__()
        if self._open is not None:
            self._open.batch(ids)
        loss = self._carried.plain_step(model, inputs, num_items_in_batch)
        if self._open is not None and self.engine.processes > 1:
            self._open.note_reduced()
        return loss

    def _choose(self, ids: list[str], inputs: dict[str, Any]) -> tuple[list[str], dict[str, Any], Any]:
        """Return the best rows of the batch, and how many target tokens they have."""
        assert self._select is not None
        prepared = self._trainer._prepare_inputs(inputs)
        rows = self.engine.select(prepared, min(self._select, len(ids))).rows
        kept = {
            name: value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == len(ids) else value
            for name, value in prepared.items()
        }
        chosen = [ids[row] for row in rows]
        targets = self._trainer._get_num_items_in_batch([kept], self._trainer.args.device)
        return chosen, {**kept, ID_KEY: chosen}, targets

    def _close(self, error: type[Exception] | None) -> None:
        """Leave the open step, if there is one; of one that an error has cut short only the hooks are removed."""
        if self._open is not None:
            opened, self._open = self._open, None
            opened.__exit__(error)


class RowsWithIds(Dataset):
    """A data set whose rows carry their id."""

    def __init__(self, data: Any, id_column: str) -> None:
        self._data, self._id_column = data, id_column
        columns = getattr(data, "column_names", None)
        self._ids = [str(name) for name in data[id_column]] if columns and id_column in columns else None

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> dict[str, Any]:
        features = self._data[row]
        if not isinstance(features, Mapping):
            raise DataError(f"Row {row} of the training data is a {type(features).__name__}, expected a dictionary.")
        found = self._ids[row] if self._ids is not None else str(features.get(self._id_column, row))
        return {**features, ID_KEY: found}


class CollatorWithIds:
    """The Trainer's collator, with the ids of the rows beside what it makes of them."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        rest = [{name: value for name, value in row.items() if name != ID_KEY} for row in features]
        batch = self._collator(rest)
        # Evaluation uses the same collator on rows without ids.
        if all(ID_KEY in row for row in features):
            batch[ID_KEY] = [row[ID_KEY] for row in features]
        return batch


def attach(
    trainer: Trainer, validation: Any, *, id_column: str = "id", select: int | None = None, **settings: Any
) -> Attached:
    """Score every training step of a Trainer; call it before `trainer.train()`.

        attach(trainer, validation, out="run-log")
        trainer.train()

    Ids come from the column `id_column` of the training data, else they are row numbers; they travel with the
    rows, so it does not matter how the sampler shuffles. Clipping, gradient accumulation, bfloat16 and resuming from a
    checkpoint are taken care of: the log is flushed with every checkpoint, and a resumed training drops what was logged
    after it. Where several processes train the model together (DistributedDataParallel), call it in each: every
    process scores its own examples and gets the scores of all; the first one writes the log.

    Args:
        trainer: Its model, data and collator are used as they are.
        validation: As in `OnlineAttribution`.
        id_column: Column of the training data that holds the ids.
        select: Train only on the best `select` examples of every batch (`OnlineAttribution.select`); None: on all.
        **settings: Of `OnlineAttribution`: `components`, `objective`, `score_optimizer`, `second_order`, `out`,
            `flush_every`.

    Raises:
        UserError: one process of the Trainer has several devices, the model is in parts (FSDP, DeepSpeed), training is
            in float16, or `select` is combined with accumulation or several processes.
    """
    _refuse_unsupported(trainer, select)
    if trainer.args.process_index:
        settings["out"] = None
    context = trainer.accelerator.autocast
    engine = OnlineAttribution(trainer.model, validation, start_step=None, context=context, **settings)  # type: ignore[arg-type]
    engine.processes = trainer.args.world_size
    callback = Attached(engine, trainer, id_column, select)
    trainer.add_callback(callback)
    return callback


def _refuse_unsupported(trainer: Trainer, select: int | None) -> None:
    arguments = trainer.args
    if arguments.n_gpu > 1:
        raise UserError("One process with several GPUs splits a batch among them. Start one for each: torchrun.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError("FSDP and DeepSpeed keep parts of the weights. Online scores need them whole: train with DDP.")
    if arguments.world_size > 1 and select is not None:
        raise UserError("select= chooses from the batch of one process. Train in one.")
    if arguments.fp16:
        raise UserError("Float16 skips steps whose gradient overflows, which a log cannot record. Use bf16=True.")
    if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
        raise UserError("The Trainer has no train_dataset with rows, so no ids. Give it one before attach().")
    if any(isinstance(callback, Attached) for callback in trainer.callback_handler.callbacks):
        raise UserError("An engine is attached to this Trainer already. Call detach() on it first.")
    if select is not None and arguments.gradient_accumulation_steps > 1:
        raise UserError("select= chooses within one batch a step. Set gradient_accumulation_steps=1.")
    if select is not None and select < 1:
        raise UserError(f"select={select}: train on 1 example or more.")
