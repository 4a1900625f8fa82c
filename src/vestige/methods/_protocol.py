"""What an attribution method is: something that turns a job into blocks of scores."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import TokenizedData
from vestige.errors import UserError
from vestige.models import Component, LoadedModel, Selection
from vestige.runs import Meaning, ScoreBlock
from vestige.settings import AttributeSettings

if TYPE_CHECKING:
    from vestige.indexes import Index
    from vestige.methods._checkpoints import Checkpoint


Weighting = Literal["learning rate", "equal"]


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


class ComponentBlock(NamedTuple):
    """Scores of some pairs, split over components."""

    names: list[str]
    """Components, by parameter name."""
    scores: Float[Tensor, "pair component"]
    """Each line adds up to the pair's score."""


class Method(ABC):
    """Scores every training example for every query, and says what it can do: nothing else knows which method runs.

    A new one is a class with `blocks` and `meaning` and `@method("its-name")` above it, announced by an entry point in
    the group `vestige.methods`. Its options are dataclass fields whose type is `Annotated` with what they mean.
    """

    name: ClassVar[str] = ""
    """Set by the decorator."""
    meaning: Meaning
    """What the scores mean; honest about sign and limits, for it is printed beside every score."""
    needs_model: ClassVar[bool] = False
    """False for methods that read text alone: `Job.loaded` may be None."""
    needs_gradients: ClassVar[bool] = False
    """True for methods that work on gradients of the selected components."""
    needs_index: ClassVar[bool] = False
    """True for methods that read the training gradients more than once: without an index they make one."""
    needs_exact: ClassVar[bool] = False
    """True for methods that work on whole gradients: compressed ones cannot stand in for them."""
    weighting: ClassVar[Weighting | None] = None
    """How checkpoints are weighted, for methods whose scores are sums over several; None for one model."""
    searches_words: ClassVar[bool] = False
    """True for a word search: the overlap of other methods with it is a check."""
    splits_components: ClassVar[bool] = False
    """True where `components` takes scores apart."""
    splits_tokens: ClassVar[bool] = False
    """True where a score is an inner product with the gradient, which is a sum over tokens (see `GradientMethod`)."""
    sweeps_damping: ClassVar[bool] = False
    """True where what is measured serves any damping."""
    scores_itself: ClassVar[bool] = False
    """True where `self_scores` gives self-influence."""
    works_sharded: ClassVar[bool] = False
    """True for methods that a model can serve that is sharded over the processes of a process group."""

    @abstractmethod
    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of all rows, each row once, in any order; memory must not grow with the training data."""

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> ComponentBlock:
        """Compute the scores of the pairs `(queries[i], rows[i])`, split over components."""
        raise NotImplementedError(f"{self.name} does not split scores over components")

    def self_scores(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the score of every training example for itself, as one query."""
        raise NotImplementedError(f"{self.name} has no self-influence")
