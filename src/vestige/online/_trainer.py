"""The online engine inside the Trainer of transformers, which goes on training as it would without."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from vestige.errors import DataError, UserError
from vestige.online._engine import OnlineAttribution
from vestige.online._step import Step

ID_KEY = "vestige_id"
"""Carries the ids from the data set through the sampler, the collator and the loader to the training step."""


class Attached(NamedTuple):
    """An engine at work in a Trainer."""

    engine: OnlineAttribution
    callback: "VestigeCallback"
    trainer: Trainer

    def detach(self) -> None:
        """Restore the Trainer as it was before `attach`; what was scored is on disk."""
        self.engine.flush()
        self.callback.release(self.trainer)


def attach(
    trainer: Trainer, validation: Any, *, id_column: str = "id", select: int | None = None, **settings: Any
) -> Attached:
    """Score every training step of a Trainer; call it before `trainer.train()`.

        attach(trainer, validation, out="run-log")
        trainer.train()

    Ids come from the column `id_column` of the training data, else they are row numbers; they travel with the
    rows, so it does not matter how the sampler shuffles. Clipping, gradient accumulation, bfloat16 and resuming from a
    checkpoint are taken care of: the log is flushed with every checkpoint, and a resumed training drops what was logged
    after it.

    Args:
        trainer: Its model, data and collator are used as they are.
        validation: As in `OnlineAttribution`.
        id_column: Column of the training data that holds the ids.
        select: Train only on the best `select` examples of every batch (`OnlineAttribution.select`); None: on all.
        **settings: Of `OnlineAttribution`: `components`, `objective`, `second_order`, `out`, `flush_every`.

    Raises:
        UserError: the Trainer runs on several devices, or in float16, or `select` is combined with accumulation.
    """
    _refuse_unsupported(trainer, select)
    accelerator = trainer.accelerator
    engine = OnlineAttribution(trainer.model, validation, start_step=None, context=accelerator.autocast, **settings)  # type: ignore[arg-type]
    callback = VestigeCallback(engine, trainer, id_column, select)
    trainer.add_callback(callback)
    return Attached(engine, callback, trainer)


class VestigeCallback(TrainerCallback):
    """Opens a step of the engine with every step of the Trainer, and closes it between clipping and the optimizer."""

    def __init__(self, engine: OnlineAttribution, trainer: Trainer, id_column: str, select: int | None) -> None:
        self._engine, self._select = engine, select
        self._open: Step | None = None
        self._trainer, self._plain_step = trainer, trainer.training_step
        self._collator, self._data = trainer.data_collator, trainer.train_dataset
        trainer.train_dataset = RowsWithIds(trainer.train_dataset, id_column)  # type: ignore[assignment]
        trainer.data_collator = CollatorWithIds(trainer.data_collator)
        trainer.training_step = self._training_step  # type: ignore[method-assign]
        # The Trainer drops every key that the model's forward does not name.
        trainer._set_signature_columns_if_needed()
        trainer._signature_columns.append(ID_KEY)  # type: ignore[union-attr]

    def release(self, trainer: Trainer) -> None:
        """Undo what the constructor did; a second time does nothing."""
        self._abandon()
        if "training_step" not in trainer.__dict__:
            return
        trainer.train_dataset, trainer.data_collator = self._data, self._collator  # type: ignore[assignment]
        del trainer.__dict__["training_step"]
        trainer._signature_columns.remove(ID_KEY)  # type: ignore[union-attr]
        trainer.remove_callback(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Continue the log where the checkpoint stands."""
        self._abandon()
        self._engine.optimizer = self._trainer.optimizer
        self._engine.resume(self._trainer.state.global_step)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Open a step."""
        self._abandon()
        if self._select is None:
            self._open = self._engine.step().__enter__()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Close it: the gradient is clipped, the weights have not moved."""
        if self._open is not None:
            opened, self._open = self._open, None
            opened.__exit__(None)

    def on_save(self, *_: Any, **__: Any) -> None:
        """Write the log up to the checkpoint."""
        self._engine.flush()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Free the memory."""
        self._abandon()
        self._engine.flush()

    def _training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        ids = inputs.pop(ID_KEY, None)
        if ids is None:
            raise DataError("The batch has lost its ids: build the training loader with the Trainer's own collator.")
        if self._select is not None:
            ids, inputs, num_items_in_batch = self._chosen(ids, inputs)
            self._open = self._engine.step().__enter__()
        if self._open is not None:
            self._open.batch(ids)
        return self._plain_step(model, inputs, num_items_in_batch)

    def _chosen(self, ids: list[str], inputs: dict[str, Any]) -> tuple[list[str], dict[str, Any], Any]:
        """Return the best rows of the batch, and how many target tokens they have."""
        assert self._select is not None
        prepared = self._trainer._prepare_inputs(inputs)
        rows = self._engine.select(prepared, min(self._select, len(ids))).rows
        kept = {
            name: value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == len(ids) else value
            for name, value in prepared.items()
        }
        return (
            [ids[row] for row in rows],
            kept,
            self._trainer._get_num_items_in_batch([kept], self._trainer.args.device),
        )

    def _abandon(self) -> None:
        """Take the hooks of a step away that an error has cut short."""
        if self._open is not None:
            opened, self._open = self._open, None
            opened.__exit__(UserError)


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


def _refuse_unsupported(trainer: Trainer, select: int | None) -> None:
    arguments = trainer.args
    if arguments.world_size > 1 or arguments.n_gpu > 1:
        raise UserError("Online scores need all examples of a step in one process. Train on one device.")
    if arguments.fp16:
        raise UserError("Float16 skips steps whose gradient overflows, which a log cannot record. Use bf16=True.")
    if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
        raise UserError("The Trainer has no train_dataset with rows, so no ids. Give it one before attach().")
    if isinstance(trainer.train_dataset, RowsWithIds):
        raise UserError("An engine is attached to this Trainer already. Call detach() on it first.")
    if select is not None and arguments.gradient_accumulation_steps > 1:
        raise UserError("select= chooses within one batch a step. Set gradient_accumulation_steps=1.")
    if select is not None and select < 1:
        raise UserError(f"select={select}: train on 1 example or more.")
