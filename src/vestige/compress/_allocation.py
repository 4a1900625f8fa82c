"""The division of a total rank between the two sides of a gradient."""

from fractions import Fraction
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4096)
def allocate(shape: tuple[int, int], total: int, minimum: int) -> tuple[int, int]:
    """Return `(k_out, k_in)` for a gradient `[n_out, n_in]`: the product as close to `total` as integers allow.

    Over all `min(minimum, n) <= k <= n` on each side, minimises `|k_out * k_in - total|`. Among pairs that are
    equally close, the one with `k_in / k_out` closest (as a ratio) to `n_out / n_in` wins, at which the two
    projections `k_out * n_out` and `k_in * n_in` cost the same; then the smaller product, then the smaller `k_in`.

    The published rule starts from `k_in = sqrt(total * n_out / n_in)` and tries two steps around it, which
    misses pairs: 6x5 for a rank of 64 on sides of 20 and 5, where 16x4 and 13x5 fit.

    The minimum wins over the total: with two minimal sides of 8, a total of 20 gives 8x8.
    """
    rows, columns = shape
    inputs = np.arange(min(minimum, columns), columns + 1, dtype=np.int64)
    # For one k_in, the best k_out is one of the two integers around total / k_in, or the nearest allowed one.
    outputs = np.stack([total // inputs, -(-total // inputs)]).clip(min(minimum, rows), rows)
    misses = np.abs(outputs * inputs - total)
    best = [(int(outputs[one, at]), int(inputs[at])) for one, at in np.argwhere(misses == misses.min())]

    def preference(pair: tuple[int, int]) -> tuple[Fraction, int, int]:
        output, input_ = pair
        imbalance = Fraction(input_ * columns, output * rows)
        return max(imbalance, 1 / imbalance), output * input_, input_

    return min(best, key=preference)
