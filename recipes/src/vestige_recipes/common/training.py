"""The model that queries are put to: trained on all data by itself, apart from the bank, and kept at several points."""

import hashlib
import io
import pickle
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vestige.data import load_examples, tokenize
from vestige.models import Precision, Recipe, Step, load_model, save_trained, shuffle_batches, train, trainable_copy
from vestige.progress import announce, progress
from vestige.storage import make_folder, remove_durably, write_durably

_OPTIMIZER = "optimizer.pt"
_UNFINISHED = "unfinished.pt"
"""Weights, optimizer and step of a training that goes on."""
SECONDS_AT_RISK = 60.0
"""An interrupted training loses so much at most."""


class Training(NamedTuple):
    """How long, and how."""

    recipe: Recipe
    steps: int
    batch_size: int


class Checkpoints(NamedTuple):
    """Folders of one model while it was trained."""

    folders: list[str]
    """In order; the last is the model."""
    rates: list[float]
    """Learning rate of the step before each."""

    @property
    def model(self) -> str:
        """The trained model."""
        return self.folders[-1]


def train_checkpoints(
    start: Any,
    data: Path,
    out: Path,
    training: Training,
    *,
    seed: int,
    count: int = 1,
    from_scratch: bool = False,
    optimizer: bool = False,
    lora_rank: int | None = None,
    precision: Precision = "auto",
) -> Checkpoints:
    """`count` checkpoints, spread evenly over the training of `start` on everything in `data`.

    They are in `out/checkpoint-STEP`; a training that is all there is not done again, and one that was interrupted
    goes on where it was a minute before, to the same weights.

    Args:
        start: A model as every command takes it.
        data: A file of examples.
        out: Folder of the checkpoints.
        training: How long, and how.
        seed: Of the order of batches, and of the weights if they are drawn.
        count: How many checkpoints.
        from_scratch: Draw the weights instead of beginning with the start's.
        optimizer: Also keep the optimizer's state in each, as a Trainer does.
        lora_rank: Train LoRA matrices of this rank; None trains all weights.
        precision: Number format of the weights.
    """
    steps = [training.steps * (number + 1) // count for number in range(count)]
    folders = {step: out / f"checkpoint-{step}" for step in steps}
    found = Checkpoints(
        [str(folder) for folder in folders.values()],
        [training.recipe.rate(step - 1, training.steps) for step in steps],
    )
    if all((folder / _OPTIMIZER if optimizer else folder).exists() for folder in folders.values()):
        return found
    loaded = load_model(start, precision=precision)
    texts = tokenize(load_examples(str(data)), loaded.tokenizer, max_length=loaded.context_length, name=data.name)
    batches = shuffle_batches(texts, np.arange(len(texts)), training.batch_size, training.steps, seed)
    model = trainable_copy(loaded, lora_rank=lora_rank, from_scratch=from_scratch, seed=seed)
    make_folder(out)
    made_of = [loaded.fingerprint, texts.fingerprint, training, seed, steps, from_scratch, optimizer, lora_rank]
    interrupted = _Interrupted(out / _UNFINISHED, repr(made_of))
    before = interrupted.read()
    if before is not None and not all(folder.is_dir() for step, folder in folders.items() if step <= before["step"]):
        before = None
    with progress(training.steps, f"Training {out.name}", unit="steps") as counter:
        counter.advance(0 if before is None else before["step"])

        def after(step: Step) -> None:
            counter.advance()
            if step.number in folders and not folders[step.number].is_dir():
                announce(f"{out.name}, step {step.number}: loss {step.loss / step.targets:.3f} nats per token")
                save_trained(model, loaded, folders[step.number])
            if step.number in folders and optimizer:
                _save_optimizer(step, folders[step.number])
            interrupted.keep(step)

        train(model, texts, batches, training.recipe, after, before)
    interrupted.forget()
    return found


class _Interrupted:
    """The state of a training on disk, no older than `SECONDS_AT_RISK`, until it is finished."""

    def __init__(self, path: Path, made_of: str) -> None:
        self._path, self._made_of = path, hashlib.sha256(made_of.encode()).hexdigest()
        self._kept = time.monotonic()

    def keep(self, step: Step) -> None:
        """Write it, if the last time is long enough ago."""
        if time.monotonic() - self._kept < SECONDS_AT_RISK:
            return
        save_state(self._path, {"made_of": self._made_of, "state": step.state()})
        self._kept = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """Return what an interrupted training of the same kind left; None if there is nothing to go on from."""
        saved = read_state(self._path) or {}
        return saved.get("state") if saved.get("made_of") == self._made_of else None

    def forget(self) -> None:
        """Remove the state of a finished training."""
        if self._path.exists():
            remove_durably(self._path)


def _save_optimizer(step: Step, folder: Path) -> None:
    """With the names of the parameters, so that each moment is assigned to its parameter."""
    saved = step.state()
    state, names = saved["optimizer"], list(saved["weights"])
    for group in state["param_groups"]:
        group["param_names"] = [names[number] for number in group["params"]]
    save_state(folder / _OPTIMIZER, state)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and numbers; the file is whole or absent."""
    content = io.BytesIO()
    torch.save(state, content)
    write_durably(path, [content.getbuffer()])


def read_state(path: Path) -> dict[str, Any] | None:
    """Return what `save_state` wrote; None where the file is absent or damaged."""
    try:
        return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError):
        return None
