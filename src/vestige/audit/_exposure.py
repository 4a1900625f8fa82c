"""How much sooner a planted secret would be guessed than chance has it."""

import numpy as np
from jaxtyping import Float

from vestige.errors import DataError


def exposure(
    canaries: Float[np.ndarray, "canary"], candidates: Float[np.ndarray, "candidate"]
) -> Float[np.ndarray, "canary"]:
    """Return the bits by which each canary's rank beats chance: 0 to log2(candidates + 1); high is memorized.

        log2(|R|) - log2(rank), R being the candidates and the canary itself

    Carlini et al. 2019, "The secret sharer". A canary that was never trained on has 1.44 bits on average (1 / log 2),
    not 0. Ranks that are tied are shared: the mean of the positions.

    Args:
        canaries: Loss of each planted secret.
        candidates: Losses of secrets of the same form that might have been planted and were not, drawn at random.

    Returns:
        NaN for a canary whose loss is not finite.

    Raises:
        DataError: No candidates, or one whose loss is not finite.
    """
    canaries, candidates = np.asarray(canaries, np.float64), np.sort(np.asarray(candidates, np.float64))
    if not len(candidates) or not np.isfinite(candidates).all():
        raise DataError(f"{len(candidates)} candidates: exposure needs at least one, all with finite losses.")
    below, upto = (np.searchsorted(candidates, canaries, side=side) for side in ("left", "right"))
    rank = 1 + (below + upto) / 2
    return np.where(np.isfinite(canaries), np.log2(len(candidates) + 1) - np.log2(rank), np.nan)
