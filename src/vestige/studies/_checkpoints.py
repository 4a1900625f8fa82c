"""The model that is asked: trained on all data by itself, apart from the bank, and kept at several points."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vestige.data import load_examples, tokenize
from vestige.files import write_durably
from vestige.models import Recipe, Step, load_model, save_trained, shuffled_batches, train, trainable_copy
from vestige.progress import announce, progress

_OPTIMIZER = "optimizer.pt"


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


def trained(
    start: Any,
    data: Path,
    out: Path,
    training: Training,
    *,
    seed: int,
    count: int = 1,
    from_scratch: bool = False,
    optimizer: bool = False,
) -> Checkpoints:
    """`count` checkpoints, spread evenly over the training of `start` on everything in `data`.

    They are in `out/checkpoint-STEP`; a training that is all there is not done again.

    Args:
        start: A model as every verb takes it.
        data: A file of examples.
        out: Folder of the checkpoints.
        training: How long, and how.
        seed: Of the order of batches, and of the weights if they are drawn.
        count: How many checkpoints.
        from_scratch: Draw the weights instead of beginning with the start's.
        optimizer: Also keep the optimizer's state in each, as a Trainer does.
    """
    steps = [training.steps * (number + 1) // count for number in range(count)]
    folders = {step: out / f"checkpoint-{step}" for step in steps}
    found = Checkpoints(
        [str(folder) for folder in folders.values()],
        [training.recipe.rate(step - 1, training.steps) for step in steps],
    )
    if all((folder / _OPTIMIZER if optimizer else folder).exists() for folder in folders.values()):
        return found
    loaded = load_model(start)
    texts = tokenize(load_examples(str(data)), loaded.tokenizer, max_length=loaded.context_length, name=data.name)
    batches = shuffled_batches(texts, np.arange(len(texts)), training.batch_size, training.steps, seed)
    model = trainable_copy(loaded, from_scratch=from_scratch, seed=seed)
    with progress(training.steps, f"Training {out.name}", unit="steps") as counter:

        def after(step: Step) -> None:
            counter.advance()
            if step.number in folders and not folders[step.number].is_dir():
                announce(f"{out.name}, step {step.number}: loss {step.loss / step.targets:.3f} nats per token")
                folders[step.number].parent.mkdir(parents=True, exist_ok=True)
                save_trained(model, loaded, folders[step.number])
            if step.number in folders and optimizer:
                _save_optimizer(step, folders[step.number])

        train(model, texts, batches, training.recipe, after)
    return found


def _save_optimizer(step: Step, folder: Path) -> None:
    """With the names of the parameters, so that nobody has to guess whose moments they are."""
    saved = step.state()
    state, names = saved["optimizer"], list(saved["weights"])
    for group in state["param_groups"]:
        group["param_names"] = [names[number] for number in group["params"]]
    content = io.BytesIO()
    torch.save(state, content)
    write_durably(folder / _OPTIMIZER, [content.getbuffer()])
