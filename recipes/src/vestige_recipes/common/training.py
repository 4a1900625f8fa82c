"""The model that queries are put to: trained on all data by itself, apart from the bank, and kept at several points."""

from pathlib import Path
from typing import Any, NamedTuple

from vestige.data import load_examples
from vestige.models import Precision
from vestige.training import Recipe, train


class Training(NamedTuple):
    """How long, and how."""

    recipe: Recipe
    steps: int


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
    """Return `count` checkpoints, spread evenly over the training of `start` on everything in `data`.

    They are in `out/checkpoint-STEP`; a training that is all there is not done again, and one that was interrupted
    goes on at its last checkpoint.

    Args:
        start: A model as every command takes it.
        data: A file of examples.
        out: Folder of the training.
        training: How long, and how.
        seed: Of the order of batches, and of the weights if they are drawn.
        count: How many checkpoints.
        from_scratch: Draw the weights instead of beginning with the start's.
        optimizer: Keep the optimizer's state in each, not in the last alone.
        lora_rank: Train LoRA matrices of this rank; None trains all weights.
        precision: Number format of the weights.
    """
    recipe, steps = training.recipe, [training.steps * (number + 1) // count for number in range(count)]
    per_epoch = -(-len(load_examples(str(data))) // recipe.batch_size)
    run = train(
        model=start,
        data=str(data),
        out=out,
        steps=training.steps,
        checkpoints=[round(step / per_epoch, 9) for step in steps],
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        warmup=recipe.warmup,
        from_scratch=from_scratch,
        lora_rank=lora_rank,
        keep_optimizer=optimizer,
        losses=False,
        precision=precision,
        seed=seed,
    )
    table = run.steps
    rates = dict(zip(table["step"].to_pylist(), table["learning_rate"].to_pylist(), strict=True))
    return Checkpoints([str(run.checkpoints[step]) for step in steps], [rates[step] for step in steps])
