"""What an attribution method is: something that turns a job into blocks of scores."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import TokenizedData
from vestige.errors import UserError
from vestige.models import Component, LoadedModel, Selection
from vestige.runs import Meaning, ScoreBlock
from vestige.settings import AttributeSettings

if TYPE_CHECKING:
    from vestige.index import Index
    from vestige.methods._checkpoints import Checkpoint


@dataclass(frozen=True)
class Job:
    """One question: which rows of `train` made the model say `queries`."""

    train: TokenizedData
    queries: TokenizedData
    settings: AttributeSettings
    loaded: LoadedModel | None = None
    """The model; None when only text is compared."""
    selection: Selection | None = None
    """What is attributed to; None for methods that read no parameters or modules."""
    index: "Index | None" = None
    """Stored gradients of `train`, when there are any."""
    checkpoints: "tuple[Checkpoint, ...]" = ()
    """For methods over several models: all of them; the last one's is `loaded`."""
    left_out: tuple[int, ...] = ()
    """Without an index: training rows whose loss or gradient is not finite, where `--skip-bad` was requested."""
    randomised: bool = False
    """Whether the model's weights were replaced by noise: a file beside its checkpoint then is not about this model."""
    asked: str = ""
    """How questions were put, in words, where they differ from what was typed."""

    @property
    def skipped(self) -> tuple[int, ...]:
        """Training rows that have no gradients, because their loss was not finite (`--skip-bad`); never scored."""
        indexes = [self.index, *(each.index for each in self.checkpoints)]
        stored = {row for index in indexes if index is not None for row in index.skipped}
        return tuple(sorted(stored | set(self.left_out)))

    @property
    def components(self) -> tuple[Component, ...]:
        """The selected components, in the model's order; empty without a selection."""
        return self.selection.components if self.selection is not None else ()

    def model_for(self, method: str) -> LoadedModel:
        """Return the model that `method` runs.

        Raises:
            UserError: the job has none, which `method` needs.
        """
        if self.loaded is None:
            raise UserError(f"The method `{method}` runs the model, and none was given. Add --model MODEL.")
        return self.loaded


class Method(Protocol):
    """Scores every training example for every query. Nothing else knows which method runs.

    A new one is a class with these members and `@method("its-name")` above it; packages of others announce theirs
    with an entry point in the group `vestige.methods`.
    """

    name: str
    """Set by the decorator."""
    meaning: Meaning
    """What the scores mean; honest about sign and limits, for it is printed beside every score."""
    needs_model: bool
    """False for methods that read text alone: `Job.loaded` may be None."""
    needs_gradients: bool
    """True for methods that work on gradients of the selected components."""
    needs_index: bool
    """True for methods that read the training gradients more than once: without an index they make one."""
    needs_exact: bool
    """True for methods that work on whole gradients: compressed ones cannot stand in for them."""

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of all rows, each row once, in any order; memory must not grow with the training data."""
        ...


class ComponentBlock(NamedTuple):
    """Scores of some pairs, split over components."""

    names: list[str]
    """Components, by parameter name."""
    scores: Float[Tensor, "pair component"]
    """Each line adds up to the pair's score."""


@runtime_checkable
class SplitsByComponent(Protocol):
    """A method whose scores are sums over components."""

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> ComponentBlock:
        """Compute the scores of the pairs `(queries[i], rows[i])`, split over components."""
        ...
