"""The model that is asked: trained on all data by itself, apart from the bank, and kept at several points."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vestige.data import load_examples, tokenize
from vestige.models import Recipe, Step, load_model, save_trained, shuffled_batches, train, trainable_copy
from vestige.progress import announce, progress


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
    start: Any, data: Path, out: Path, training: Training, *, seed: int, count: int = 1, from_scratch: bool = False
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
    """
    steps = [training.steps * (number + 1) // count for number in range(count)]
    folders = {step: out / f"checkpoint-{step}" for step in steps}
    found = Checkpoints(
        [str(folder) for folder in folders.values()],
        [training.recipe.rate(step - 1, training.steps) for step in steps],
    )
    if all(folder.is_dir() for folder in folders.values()):
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

        train(model, texts, batches, training.recipe, after)
    return found
