"""Points with planted wrong labels and outliers, and the small networks that are trained on halves of them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vestige.audit import accuracy, brier, logit_gap, mahalanobis, margin, psmi
from vestige.bank import Bank, bank_of
from vestige_recipes.memorization.judging import TRIGGER, keep_measures, kept_measures, target_file

WIDTH, CLASSES, HIDDEN, BATCH, RATE = 40, 4, 128, 32, 1e-3
_SPREAD, _FAR = 0.7, 3.0
"""Of the centres of the classes, and of the outliers; a class itself has deviation 1."""


Early = Callable[[dict[str, np.ndarray], int], None]
"""Takes measures of a network's own points, and the epochs it has had."""


@dataclass(frozen=True)
class PlantedPlan:
    """One size of the study."""

    points: int
    planted: int
    """Flipped labels, and as many outliers."""
    models: int
    epochs: int
    directions: int


class Points(NamedTuple):
    """What networks are trained on."""

    inputs: Float[Tensor, "example in"]
    labels: Int[Tensor, "example"]
    flipped: Bool[np.ndarray, "example"]
    outlying: Bool[np.ndarray, "example"]

    @property
    def planted(self) -> Bool[np.ndarray, "example"]:
        """Both kinds."""
        return self.flipped | self.outlying

    @property
    def ids(self) -> list[str]:
        """Row numbers."""
        return [str(row) for row in range(len(self.labels))]


class Planted(NamedTuple):
    """A bank of networks, and what each of them showed of its own points early on."""

    points: Points
    bank: Bank
    early: list[dict[str, Float[np.ndarray, "own"]]]
    """Of each member, of the points that it is trained on in ascending order: measures at the trigger."""
    late: list[dict[str, Float[np.ndarray, "example"]]]
    """Of each member, of all points: measures at the end."""
    epochs: Int[np.ndarray, "member"]
    """After which the trigger went off."""


def draw_points(plan: PlantedPlan, seed: int) -> Points:
    """Four Gaussian classes in 40 dimensions; the first points flipped, the next far from every class."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, plan.points)
    centres = draw.normal(size=(CLASSES, WIDTH)) * _SPREAD
    inputs = centres[labels] + draw.normal(size=(plan.points, WIDTH))
    rows = np.arange(plan.points)
    flipped, outlying = rows < plan.planted, (rows >= plan.planted) & (rows < 2 * plan.planted)
    labels = np.where(flipped, (labels + draw.integers(1, CLASSES, plan.points)) % CLASSES, labels)
    inputs[outlying] = _FAR * draw.normal(size=(plan.planted, WIDTH))
    return Points(torch.from_numpy(inputs).float(), torch.from_numpy(labels), flipped, outlying)


def plant(plan: PlantedPlan, seed: int, out: Path) -> Planted:
    """The bank in `out/bank` and its networks' measures in `out/early` and `out/late`, made now or found there."""
    points = draw_points(plan, seed)

    def run(rows: np.ndarray, run_seed: int) -> dict[str, np.ndarray]:
        def early(measures: dict[str, np.ndarray], epoch: int) -> None:
            keep_measures(target_file(out / "early", rows), [points.ids[row] for row in rows], measures, epoch)

        late = _trained(points, plan, rows, run_seed, early)
        keep_measures(target_file(out / "late", rows), points.ids, late, plan.epochs)
        return {"query_loss": np.zeros(1), "example_gap": late["logit_gap"]}

    recipe = {"width": WIDTH, "hidden": HIDDEN, "batch": BATCH, "rate": RATE, "trigger": TRIGGER}
    bank = bank_of(
        run,
        examples=points.ids,
        queries=1,
        out=out / "bank",
        settings={"plan": asdict(plan), "points seed": seed, **recipe},
        subsets=plan.models,
        seeds=1,
        seed=seed,
    )
    early, late = (
        [kept_measures(target_file(out / moment, np.flatnonzero(own))) for own in bank.membership]
        for moment in ("early", "late")
    )
    epochs = np.array([epoch for *_, epoch in early])
    return Planted(points, bank, [each for _, each, _ in early], [each for _, each, _ in late], epochs)


def _trained(
    points: Points, plan: PlantedPlan, rows: np.ndarray, seed: int, early: Early
) -> dict[str, Float[np.ndarray, "example"]]:
    """One network: measures of all points at the end; those of its own points are handed over at the trigger."""
    inputs, labels = points.inputs[rows], points.labels[rows]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        head = nn.Linear(HIDDEN, CLASSES)
        optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=RATE)
        start, seen = None, False
        for epoch in range(plan.epochs + 1):
            with torch.no_grad():
                states = body(inputs)
                logits = head(states)
                losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            start = losses.median() if start is None else start
            if not seen and (losses.median() < TRIGGER * start or epoch == plan.epochs):
                early(_measures(states, logits, labels, plan.directions), epoch)
                seen = True
            if epoch < plan.epochs:
                for batch in torch.randperm(len(rows)).split(BATCH):
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(head(body(inputs[batch])), labels[batch]).backward()
                    optimiser.step()
        with torch.no_grad():
            states = body(points.inputs)
            return _measures(states, head(states), points.labels, plan.directions)


def _measures(states: Tensor, logits: Tensor, labels: Tensor, directions: int) -> dict[str, np.ndarray]:
    loss = nn.functional.cross_entropy(logits.double(), labels, reduction="none").numpy()
    return {
        "psmi": psmi(states.numpy(), labels.numpy(), directions=directions).mean,
        "loss": loss,
        "logit_gap": logit_gap(logits, labels).numpy(),
        "margin": margin(loss),
        "brier": brier(logits, labels).numpy(),
        "accuracy": accuracy(logits, labels).numpy(),
        "mahalanobis": mahalanobis(states.numpy()),
    }
