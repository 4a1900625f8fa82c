"""A checkpoint: a folder that loads as a model, with all that attribution asks of it and a training goes on from."""

import copy
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vestige.models import quiet_transformers
from vestige.storage import remove_tree

OPTIMIZER = "optimizer.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = re.compile(r"checkpoint-\d+\.(part|gone)")
CHECKPOINT_FILES = tuple(
    f"checkpoint-[0-9]*/{name}"
    for name in (
        *("*.safetensors", "*.json", "*.bin", "*.model", "*.jinja", "optimizer.pt", "scheduler.pt", "rng_state*.pth"),
        *("merges.txt", "vocab.txt", "README.md", "losses.parquet"),
    )
)
"""What the Trainer, models and tokenizers write into a checkpoint, as for `require_no_others`."""


def planned_steps(epochs: Iterable[float], per_epoch: int, last: int) -> list[int]:
    """Return the steps after which to save: those nearest to the epochs, halves rounded up, and the last one."""
    return sorted({min(last, int(epoch * per_epoch + 0.5)) for epoch in epochs} | {last})


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"checkpoint-{step}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in the folder, ascending; each of them is whole."""
    found = (_NAME.fullmatch(path.name) for path in folder.glob("checkpoint-*"))
    return sorted(int(match[1]) for match in found if match is not None)


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, and one that a kill has cut short."""
    for path in [path for path in folder.glob("checkpoint-*") if _UNFINISHED.fullmatch(path.name)]:
        remove_tree(path)
    for later in reversed(checkpoint_steps(folder)):
        if later > step:
            gone = checkpoint_folder(folder, later).rename(folder / f"checkpoint-{later}.gone")
            shutil.rmtree(gone)


def write_checkpoint(trainer: Any, folder: Path, log: Sequence[dict[str, Any]], add: Callable[[Path], None]) -> None:
    """Write the checkpoint's folder, whole or not at all.

    It holds the model or its adapter, the tokenizer, `trainer_state.json` and, after the first step, the states of
    optimizer, scheduler and random numbers, under the names that the Trainer gives them.

    Args:
        trainer: Between two steps.
        folder: To be made; one that is there is left as it is.
        log: The state's `log_history`, with the learning rates of the way to this checkpoint.
        add: Writes what else belongs to it into the unfinished folder.
    """
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    _save_model(trainer, unfinished)
    if trainer.state.global_step:
        trainer._save_optimizer_and_scheduler(str(unfinished))
        trainer._save_rng_state(str(unfinished))
    state = copy.copy(trainer.state)
    state.log_history = list(log)
    state.save_to_json(str(unfinished / "trainer_state.json"))
    add(unfinished)
    for path in [*unfinished.rglob("*"), unfinished]:
        _flush(path)
    unfinished.rename(folder)
    _flush(folder.parent)


def keep_last_optimizer(folder: Path) -> None:
    """Remove the state of the optimizer from all checkpoints but the last."""
    for step in checkpoint_steps(folder)[:-1]:
        (checkpoint_folder(folder, step) / OPTIMIZER).unlink(missing_ok=True)


def trained_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the weights that a checkpoint holds."""
    saved = [weight for weight in model.parameters() if weight.requires_grad or not hasattr(model, "peft_config")]
    return sum(weight.numel() * weight.element_size() for weight in saved)


def _save_model(trainer: Any, folder: Path) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Left to find out by itself, PEFT would look the base model up on the hub.
    extra = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with quiet_transformers():
        model.save_pretrained(str(folder), **extra)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(str(folder))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
