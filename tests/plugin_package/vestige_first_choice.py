"""A measure of another package: how many of an example's tokens greedy decoding would choose."""

from torch import Tensor

from vestige.measures import Batch, measure


@measure("first_choice", "share of the target tokens that are the likeliest", sign=1, limits="coarse on short texts")
def first_choice(batch: Batch) -> Tensor:
    """Return a value for each example of the batch; NaN for one without targets."""
    first = (batch.scores.gap > 0) & batch.scores.wanted
    return first.sum(1) / batch.scores.wanted.sum(1)
