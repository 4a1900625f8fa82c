"""Ascents as a work plan: each is a piece, computed from the same start, by any free worker."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from vestige.launch import Compute, PieceFiles, run_plan, worker_command
from vestige.settings import LaunchSettings
from vestige.storage import partial_folder
from vestige.unlearn._ascent import Ascent, ascend
from vestige.unlearn._job import UntracJob
from vestige.unlearn._losses import Losses
from vestige.unlearn._recipe import AscentRecipe
from vestige.unlearn._retained import Retained
from vestige.unlearn._self_test import EXAMPLES, Identity, first_order_identity
from vestige.unlearn._weights import Weights, borrowed_weights

FORMAT = 1
"""Raised when a piece of the same settings changes its meaning."""
_OF_THE_OUTPUT = frozenset({"out", "k", "dense", "overwrite", "learning_rate", "points", "stop", "weigh_by_size"})
"""Settings that decide no ascent by themselves; the recipe has what it needs of them."""
SELF_TESTED = 4
"""Ascents before which the first-order identity is tried: it holds for the code and the model, not for the data."""


class Ascents(NamedTuple):
    """What all ascents did."""

    batch_loss: Float[np.ndarray, "ascent step"]
    before: Float[np.ndarray, "measured"]
    """Losses at the start."""
    after: Float[np.ndarray, "ascent point measured"]
    mirrored: Float[np.ndarray, "ascent point measured"]
    """Losses on the other side of the start; without points if not requested."""
    identities: list[Identity]
    moved: int
    """How many weights moved."""


@dataclass(frozen=True)
class AscentPlan:
    """One ascent for each set, and the losses of everything that is measured, at each of the recipe's points."""

    name: str
    job: UntracJob
    recipe: AscentRecipe
    self_tested: int = SELF_TESTED
    unit: str = "examples"

    @property
    def folder(self) -> Path:
        """Beside the run, until that is written."""
        return partial_folder(self.job.settings.out)

    @property
    def pieces(self) -> int:
        """The number of ascents."""
        return len(self.job.ascended.sets)

    def is_done(self, piece: int) -> bool:
        """Return whether the result of the ascent is there."""
        return self._files.is_done(piece)

    def weight(self, piece: int) -> float:
        """Return the number of examples that pass through the model."""
        size = min(self.recipe.batch_size, len(self.job.ascended.sets[piece].rows))
        looks = len(self.recipe.looks) * (2 if self.recipe.mirror else 1)
        tested = 9 * EXAMPLES if piece < self.self_tested else 0
        return self.recipe.steps * (size + 2 * self.recipe.retain) + looks * len(self.job.measured.rows) + tested

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Open the model with weights that may move, and the losses where they begin."""
        settings, measured = self.job.settings, self.job.measured
        with borrowed_weights(
            self.job.loaded,
            lora_rank=settings.lora_rank,
            seed=settings.seed,
            checkpointing=settings.gradient_checkpointing,
        ) as weights:
            losses = Losses(weights.model, measured.data, settings.loss, self.recipe.token_budget)
            before = torch.from_numpy(losses.of(measured.rows))
            retained = Retained.measured(weights, self.job.train.data, self.recipe) if self.recipe.retain else None

            def compute(piece: int) -> None:
                identity = self._identity(weights, piece)
                rows = self.job.ascended.sets[piece].rows
                data, measure = self.job.ascended.data, lambda: losses.of(measured.rows)
                done = ascend(weights, data, rows, measure, self.recipe, retained)
                moved = torch.tensor(weights.count)
                self._files.write(piece, {"before": before, "identity": identity, "moved": moved, **done._asdict()})

            yield compute

    def reduce(self) -> Ascents:
        """Return the results of all ascents, in order.

        Raises:
            CorruptFile: A piece is missing or damaged.
        """
        read = [self._files.read(piece) for piece in range(self.pieces)]
        stacked = {name: np.stack([each[name].numpy() for each in read]) for name in Ascent._fields}
        return Ascents(
            before=read[0]["before"].numpy(),
            identities=[Identity(*each["identity"].tolist()) for each in read if len(each["identity"])],
            moved=int(read[0]["moved"]),
            **stacked,
        )

    def run(self) -> Ascents:
        """Return the results of all ascents; after a kill, the same call continues."""
        self._files.forget_damaged(range(self.pieces))
        return run_plan(self, self.job.settings, worker_command(self.job.settings, "untrac"))

    def _identity(self, weights: Weights, piece: int) -> torch.Tensor:
        if piece >= self.self_tested:
            return torch.zeros(0)
        ascended, measured = self.job.ascended, self.job.measured
        other = max(measured.sets, key=lambda each: measured.data.target_counts[each.rows].sum())
        found = first_order_identity(
            weights, (ascended.data, ascended.sets[piece].rows), (measured.data, other.rows), self.recipe
        )
        return torch.tensor(found, dtype=torch.float64)

    @cached_property
    def _files(self) -> PieceFiles:
        ignored = _OF_THE_OUTPUT | set(LaunchSettings.model_fields)
        recorded = {name: value for name, value in self.job.settings.record().items() if name not in ignored}
        sides = [
            (side.data.fingerprint, [(each.name, each.rows.tolist()) for each in side.sets])
            for side in (self.job.ascended, self.job.measured)
        ]
        parts = (FORMAT, version("vestige"), recorded, self.job.loaded.fingerprint, sides, asdict(self.recipe))
        return PieceFiles(self.folder / self.name.lower().replace(" ", "-"), _digest(parts))


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
