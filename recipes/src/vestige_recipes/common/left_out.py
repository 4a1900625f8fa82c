"""The truth of studies about sources: a bank of models, each trained without one of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vestige.bank import Bank, bank
from vestige_recipes.common.launched import launched
from vestige_recipes.common.registry import StudySettings
from vestige_recipes.common.training import Training, trained


def left_out_bank(
    settings: StudySettings,
    start: Any,
    files: Sequence[Path],
    folder: Path,
    training: Training,
    *,
    seed: int,
    seeds: int,
    from_scratch: bool = False,
) -> Bank:
    """Models of everything and without each source, for the same number of steps, in `folder/bank`.

    Args:
        settings: Where the work runs.
        start: A model as every verb takes it.
        files: Training data, and queries whose `source` names their test set.
        folder: Of the study, or of one part of it.
        training: How long, at which rate; everything else is the bank's default.
        seed: Of starts and orders.
        seeds: Runs of each subset.
        from_scratch: Draw the weights instead of beginning with the start's. Workers read a model from a folder, so a
            module is written to `folder/start` first.
    """
    if isinstance(start, nn.Module):
        start = trained(
            start, files[0], folder / "start", training._replace(steps=1), seed=seed, from_scratch=True
        ).model
    data, queries = (str(path) for path in files)
    return bank(
        model=start,
        data=data,
        queries=queries,
        out=folder / "bank",
        leave_source_out=True,
        from_scratch=from_scratch,
        seeds=seeds,
        steps=training.steps,
        batch_size=training.batch_size,
        learning_rate=training.recipe.learning_rate,
        seed=seed,
        **launched(settings),
    )
