"""How early and how far the loss of an example fell while the model was trained."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from vestige.errors import DataError
from vestige.measures import measure

Column = Float[np.ndarray, "example"]


def loss_trajectory(losses: Float[np.ndarray, "checkpoint example"]) -> Column:
    """Return how far each example's loss lay below its first one, mean over the later checkpoints, nats per token.

        mean over t > 0 of (loss_0 - loss_t)

    High speaks for membership: what is trained on falls sooner and further. The trajectory is that of the training
    itself, so no shadow model is needed to interpret it; Liu et al. 2022, "Membership inference attacks by exploiting
    loss trajectory", distil one and let a classifier read it. The first checkpoint is the comparison that makes easy
    texts no better than hard ones; take one from before the examples were seen.

    Args:
        losses: Mean loss per target token, in the order of training.

    Returns:
        NaN where a loss is not finite.

    Raises:
        DataError: Fewer than two checkpoints.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 2 or len(losses) < 2:
        raise DataError(f"Losses {losses.shape}: give those of two or more checkpoints, [checkpoint, example].")
    losses = np.where(np.isfinite(losses), losses, np.nan)
    return (losses[0] - losses[1:]).mean(0)


@measure(
    "loss_trajectory",
    "fall of the loss since the first checkpoint, mean over the later ones",
    stage="checkpoints",
    needs=("token scores", "checkpoints"),
    sign=1,
    missing="no target token, or one checkpoint alone",
    cost="nothing beside the forward passes over every checkpoint",
    limits="needs a first checkpoint from before the examples were seen; texts like the training data fall too",
    order=35,
    curve=35,
    detail="from the first checkpoint to the model under audit {}",
)
def _loss_trajectory(losses: Float[np.ndarray, "checkpoint example"]) -> dict[str, Column]:
    if len(losses) < 2:
        return {"loss_trajectory": np.full(losses.shape[1], np.nan)}
    return {"loss_trajectory": loss_trajectory(losses), "loss_trajectory_fall": losses[0] - losses[-1]}
