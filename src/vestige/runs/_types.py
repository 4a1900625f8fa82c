"""The meaning of a score, and the blocks in which methods pass scores on."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

# Only named in annotations, so that a run opens without importing torch.
if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Meaning:
    """Sign, unit, target and normalisation of a score: carried by every run, printed in every report."""

    sign: str
    """Such as "positive: training on the example lowers the query's loss"."""
    unit: str
    """Such as "nats per unit of learning rate", "cosine", "BM25"."""
    target: str
    """"this model" or "the average run", or "text alone" for lexical retrieval."""
    normalisation: str
    """What the score was divided by, or "none"."""
    estimates: str
    """One sentence: what the number estimates."""
    cost: str
    """One sentence: passes, memory, disk."""
    limits: str
    """One sentence: when not to believe it."""

    def to_dict(self) -> dict[str, str]:
        """Return a plain dictionary for `run.json`."""
        return asdict(self)


class ScoreBlock(NamedTuple):
    """Scores of a few training examples for every query."""

    rows: 'Int[Tensor, "row"]'
    """Positions of the examples in the training data."""
    scores: 'Float[Tensor, "query row"]'
