"""What a Trainer's steps are overheard by: ids and losses of every example, from the logits that it makes anyway."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from vestige.errors import DataError
from vestige.online import ID_KEY, CollatorWithIds, RowsWithIds
from vestige.progress import announce
from vestige.training._losses import Losses, Watched, example_losses


class Listener:
    """Ids travel with the rows of a Trainer, and losses are read from its forward passes; nothing else is changed.

    Args:
        trainer: Its data, collator and `training_step` are wrapped until `release`.
        id_column: Column of the data that holds the ids; else they are row numbers.
    """

    def __init__(self, trainer: Any, id_column: str) -> None:
        self._trainer, self._id_column = trainer, id_column
        self._seen: list[tuple[list[str], Losses]] = []
        self._ids: list[str] = []
        self._labels: Tensor | None = None
        self._hook: Any = None
        self._plain_step = trainer.training_step
        self._data, self._collator = trainer.train_dataset, trainer.data_collator
        # In-run scores may travel with the rows already.
        self._owns_ids = not isinstance(trainer.train_dataset, RowsWithIds)
        if self._owns_ids:
            trainer.train_dataset = RowsWithIds(trainer.train_dataset, id_column)
            trainer.data_collator = CollatorWithIds(trainer.data_collator)
            trainer._set_signature_columns_if_needed()
            trainer._signature_columns.append(ID_KEY)
        trainer.training_step = self._training_step

    @property
    def ids(self) -> list[str]:
        """Examples of the step that is being taken, in the order in which the model saw them."""
        return [name for ids, _ in self._seen for name in ids]

    @property
    def losses(self) -> np.ndarray:
        """Their losses, float64 [example]."""
        losses = [part.loss for _, part in self._seen]
        return np.concatenate(losses) if losses else np.zeros(0)

    @property
    def targets(self) -> np.ndarray:
        """Their target tokens, int64 [example]."""
        return np.concatenate([part.targets for _, part in self._seen])

    def watched(self, rows: Any) -> Watched:
        """Return rows that are measured beside the training, collated as the Trainer does."""
        rows = rows if isinstance(rows, RowsWithIds) else RowsWithIds(rows, self._id_column)
        collate = self._trainer._get_collator_with_removed_columns(self._trainer.data_collator)
        return Watched(rows, collate, self._trainer.args.per_device_eval_batch_size)

    def begin(self) -> None:
        """Record the forward passes of training from now on."""
        self.end()
        self._hook = self._trainer.model.register_forward_hook(self._look, with_kwargs=True)

    def forget(self) -> None:
        """Forget the step, which is over."""
        self._seen = []

    def end(self) -> None:
        """Stop recording, and keep nothing in memory."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._seen, self._labels = [], None

    def release(self) -> bool:
        """Restore the Trainer; return whether there was anything to undo."""
        self.end()
        if self._trainer.__dict__.get("training_step") != self._training_step:
            return False
        self._trainer.train_dataset, self._trainer.data_collator = self._data, self._collator
        del self._trainer.__dict__["training_step"]
        if self._owns_ids:
            self._trainer._signature_columns.remove(ID_KEY)
        return True

    def _training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        ids = inputs.pop(ID_KEY) if self._owns_ids and ID_KEY in inputs else inputs.get(ID_KEY)
        labels = inputs.get("labels")
        if ids is None or not isinstance(labels, Tensor):
            missing = "ids: build the training loader with the Trainer's own collator" if ids is None else "`labels`"
            raise DataError(f"The batch has no {missing}.")
        before, self._labels = len(self._seen), labels
        self._ids = list(ids)
        try:
            return self._plain_step(model, inputs, num_items_in_batch)
        finally:
            self._labels = None
            if len(self._seen) == before and self._ids:
                announce("The model gave no logits for a batch: its losses are recorded as missing.")
                empty = np.full(len(self._ids), np.nan)
                self._seen.append((self._ids, Losses(empty, empty, np.zeros(len(self._ids), dtype=np.int64))))

    def _look(self, module: nn.Module, inputs: Any, named: Mapping[str, Any], output: Any) -> None:  # noqa: ARG002
        """Measure the losses of the batch from the logits that the training computes anyway."""
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if self._labels is not None and isinstance(logits, Tensor) and module.training:
            labels, self._labels = self._labels, None
            self._seen.append((self._ids, example_losses(logits.detach(), labels.to(logits.device))))
