"""What an attribution method is, its options, and the registry of methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Float, Int

from vestige import indexes, methods, models
from vestige.data import TokenizedData
from vestige.errors import SpecError, UserError
from vestige.lazy import torch
from vestige.progress import progress
from vestige.registry import Registry, options_of
from vestige.runs import Check, Meaning, ScoreBlock
from vestige.settings import AttributeSettings
from vestige.terminal import lines_of_facts

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn


Weighting = Literal["learning rate", "equal"]
MethodClass = TypeVar("MethodClass", bound="type[Method]")


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights."""

    source: str | Path | nn.Module
    weight: float
    """Learning rate, or what `--checkpoint-weights` says; 1 where all count the same."""
    index: indexes.Index | None = None
    """Its stored gradients, when they were given."""

    @property
    def name(self) -> str:
        """The path that the user gave, or the class of a live model."""
        return type(self.source).__name__ if isinstance(self.source, torch.nn.Module) else str(self.source)


@dataclass(frozen=True)
class Job:
    """One question: which rows of `train` made the model say `queries`."""

    train: TokenizedData
    queries: TokenizedData
    settings: AttributeSettings
    loaded: models.LoadedModel | None = None
    """The model; None when only text is compared."""
    selection: models.Selection | None = None
    """What is attributed to; None for methods that read no parameters or modules."""
    index: indexes.Index | None = None
    """Stored gradients of `train`, when there are any."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """For methods over several models: all of them; the last one's is `loaded`."""
    left_out: tuple[int, ...] = ()
    """Without an index: training rows whose loss or gradient is not finite, where `--skip-bad` was requested."""
    randomised: bool = False
    """Whether the model's weights were replaced by noise: a file beside its checkpoint then is not about this model."""
    asked: str = ""
    """How questions were put, in words, where they differ from what was typed."""
    generated: tuple[bool, ...] = ()
    """Per query: whether the answer is the model's own."""
    row_weights: Float[np.ndarray, "row"] | None = None
    """What the gradient of each training example is multiplied with (`--weigh-by`); None: 1."""

    @property
    def skipped(self) -> tuple[int, ...]:
        """Training rows that have no gradients, because their loss was not finite (`--skip-bad`); never scored."""
        indexes = [self.index, *(each.index for each in self.checkpoints)]
        stored = {row for index in indexes if index is not None for row in index.skipped}
        return tuple(sorted(stored | set(self.left_out)))

    @property
    def components(self) -> tuple[models.Component, ...]:
        """The selected components, in the model's order; empty without a selection."""
        return self.selection.components if self.selection is not None else ()

    def model_for(self, method: str) -> models.LoadedModel:
        """Return the model that `method` runs.

        Raises:
            UserError: The job has none.
        """
        if self.loaded is None:
            raise UserError(f"The method `{method}` runs the model, and none was given. Add --model MODEL.")
        return self.loaded

    @property
    def token_budget(self) -> int:
        """Tokens in one pass of the model."""
        return indexes.batch_tokens(self.settings, self.model_for(self.settings.method))


class Method(ABC):
    """Scores every training example for every query, and says what it can do: nothing else knows which method runs.

    A new one is a class with `blocks` and `meaning` and `@method("its-name")` above it, announced by an entry point in
    the group `vestige.methods`. Its options are dataclass fields whose type is `Annotated` with what they mean. One
    whose scores are inner products with gradients is a `GradientMethod`.
    """

    name: ClassVar[str] = ""
    """Set by the decorator."""
    meaning: Meaning
    """What the scores mean; honest about sign and limits, for it is printed beside every score."""
    command: ClassVar[str] = "attribute"
    """The command that runs it: `vestige attribute` refuses the method of another command, and prints that one."""
    needs_model: ClassVar[bool] = False
    """False for methods that read text alone: `Job.loaded` may be None."""
    needs_gradients: ClassVar[bool] = False
    """True for methods that work on gradients of the selected components."""
    needs_index: ClassVar[bool] = False
    """True for methods that read the training gradients more than once: without an index they make one."""
    needs_training: ClassVar[bool] = False
    """True for methods that follow a recorded training, which they open in `adopt`."""
    needs_exact: ClassVar[bool] = False
    """True for methods that work on whole gradients: compressed ones cannot stand in for them."""
    weighting: ClassVar[Weighting | None] = None
    """How checkpoints are weighted, for methods whose scores are sums over several; None for one model."""
    searches_words: ClassVar[bool] = False
    """True for a word search: the overlap of other methods with it is a check."""
    splits_components: bool = False
    """True where `components` takes scores apart."""
    splits_tokens: ClassVar[bool] = False
    """True where a score is an inner product with the gradient, which is a sum over tokens (see `GradientMethod`)."""
    works_in_pieces: ClassVar[bool] = False
    """True where scores are computed piece by piece, which several processes share (see `GradientMethod`)."""
    sweeps_damping: ClassVar[bool] = False
    """True where what is measured serves any damping (see `GradientMethod.at_dampings`)."""
    scores_itself: ClassVar[bool] = False
    """True where `self_scores` gives self-influence."""
    constant_self_score: ClassVar[str | None] = None
    """What self-influence is, where that is the same for every example and ranks nothing."""
    baseline: ClassVar[int | None] = None
    """Position among the baselines, which every evaluation of scores judges too: what a method has to beat to be worth
    its cost. None for other methods."""
    at_random: ClassVar[bool] = False
    """True for scores that are drawn at random."""
    against_hubs: str = ""
    """What to type instead where the same few rows lead most lists, such as `--method grad-cos`: printed with them."""
    works_sharded: ClassVar[bool] = False
    """True for methods that a model can serve that is sharded over the processes of a process group."""
    weighs_rows: ClassVar[bool] = False
    """True where the weight of a training example multiplies its gradient (`--weigh-by`)."""
    reads_focus: ClassVar[tuple[str, ...]] = ()
    """Fields by which a query chooses what of it is explained, of `instead`, `span` and `weights`, that count in its
    scores; the method refuses queries with others."""

    def adopt(self, settings: AttributeSettings) -> AttributeSettings:
        """Return the settings with what the method knows better, such as the model of a recorded training."""
        return settings

    def read_train(self, loaded: models.LoadedModel) -> TokenizedData | None:  # noqa: ARG002
        """Return the training data, where the method knows them better than the settings; else None."""
        return None

    def require_focus(self, given: Mapping[str, str]) -> None:
        """Raise unless the fields by which queries choose what is explained count in the scores.

        Args:
            given: These fields, with the id of a query that has it.

        Raises:
            SpecError: One does not.
        """
        if others := [name for name in given if name not in self.reads_focus]:
            able = ", ".join(found.name for found in METHODS if others[0] in found.reads_focus)
            raise SpecError(
                f"Query {given[others[0]]!r} has `{others[0]}`, and {self.name} takes whole answers as they are. "
                f"Drop the column, or type --method with one of: {able}."
            )

    @abstractmethod
    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of all rows, each row once, in any order; memory must not grow with the training data."""

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> Tensor:
        """Compute the scores `[pair, component]` of `(queries[i], rows[i])`, split over the job's components."""
        raise NotImplementedError(f"{self.name} does not split scores over components")

    def token_scores(self, job: Job, query: int, rows: Sequence[int]) -> list[np.ndarray] | None:  # noqa: ARG002
        """Return the scores of some rows over the tokens of each, float64, where scoring has found them.

        None where they are to be computed from the vectors that `prepare` returns.
        """
        return None

    def checks(self, job: Job) -> list[Check]:  # noqa: ARG002
        """Return what the method itself can say of how far its scores can be trusted, once they are computed."""
        return []

    def store(self, job: Job) -> GradientStore:
        """Return the store of the training gradients; this and the next three are of methods that work in pieces."""
        raise NotImplementedError(f"{self.name} does not work in pieces")

    def prepare(self, job: Job) -> methods.Prepared:
        """Return the query vectors, made once for a job."""
        raise NotImplementedError(f"{self.name} does not work in pieces")

    def self_blocks(self, job: Job) -> Callable[[int], Iterator[ScoreBlock]]:
        """Return the map from a piece of the store to the scores of its training examples for themselves."""
        raise NotImplementedError(f"{self.name} does not work in pieces")

    def measured_losses(self, job: Job) -> list[float] | None:  # noqa: ARG002
        """Return the losses of the queries, where making the vectors has measured them in this process."""
        return None

    def at_dampings(self, job: Job) -> Callable[[float], methods.Prepared]:
        """Measure what serves any damping; return the map from a damping to the vectors (see `sweeps_damping`)."""
        raise NotImplementedError(f"{self.name} measures again for each damping")

    def use(self, prepared: methods.Prepared, note: str) -> Self:
        """Return the method for a job whose vectors are there already, with a note on the normalisation of scores."""
        raise NotImplementedError(f"{self.name} has no vectors")

    def require_self_scores(self) -> None:
        """Raise unless self-influence is defined and differs between examples.

        Raises:
            SpecError: It is not.
        """
        if not self.scores_itself:
            raise SpecError(
                f"Self-influence is defined for gradient methods, and {self.name} is none. Type --method influence."
            )
        if self.constant_self_score is not None:
            raise SpecError(
                f"Self-influence with {self.name} is {self.constant_self_score}. It would rank nothing. Type --method "
                "influence or --method grad-dot."
            )

    def self_scores(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the score of every training example for itself, as one query."""
        raise NotImplementedError(f"{self.name} has no self-influence")


Block = TypeVar("Block", bound=tuple[Any, ...])


def watch(blocks: Iterator[Block], rows: int, name: str) -> Iterator[Block]:
    """Yield blocks that begin with their rows, and show the progress."""
    with progress(rows, name) as bar:
        for block in blocks:
            yield block
            bar.advance(len(block[0]))


Vectors: TypeAlias = "list[Float[Tensor, 'query n']]"
"""A matrix for each component."""
ScoredRows: TypeAlias = "tuple[Tensor, Tensor, Tensor | None]"
"""(rows, scores [query, row], norms [row] or None)."""


class Products(NamedTuple):
    """Inner products of some rows with the query vectors."""

    scores: Float[Tensor, "component query row"]
    norms: Float[Tensor, "row"] | None
    """Length of each row's gradient, where it was requested."""


class GradientStore(ABC):
    """Per-example gradients of the training data, which fall into pieces of work."""

    device: torch.device
    """Where the vectors are multiplied with the gradients."""
    query_losses: Float[Tensor, "query"] | None = None
    """Losses of the queries, where `of_queries` has just measured them along with their gradients."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """The identity of these gradients: stores with the same one hold the same numbers."""

    @property
    @abstractmethod
    def pieces(self) -> int:
        """The number of pieces of work that the training examples fall into; follows from the data alone."""

    @abstractmethod
    def piece_rows(self, piece: int) -> int:
        """Return the number of training examples in a piece."""

    @abstractmethod
    def of_queries(self, data: TokenizedData) -> Vectors:
        """Return gradients of the queries."""

    @abstractmethod
    def piece_scores(self, piece: int, vectors: Vectors, *, norms: bool) -> Iterator[ScoredRows]:
        """Yield (rows, scores [query, row], norms [row] if requested) of the examples of a piece, each once."""

    @abstractmethod
    def piece_squared_norms(self, piece: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, squared gradient norms [row]) of the training examples of a piece."""

    @abstractmethod
    def piece_gradients(self, piece: int) -> Iterator[tuple[Tensor, Vectors]]:
        """Yield (rows, their gradients as for queries) of a piece, a few examples at a time."""

    @abstractmethod
    def products(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """Compute the scores of a few rows, split over components."""

    def totals(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """Compute the scores of a few rows as one sum over all components."""
        found = self.products(vectors, rows, norms=norms)
        return found._replace(scores=found.scores.sum(0, keepdim=True))

    @abstractmethod
    def direction(self, vectors: Vectors, query: int) -> list[Float[Tensor, "out in"]]:
        """Return the matrices whose inner product with an example's gradient is that query's score."""

    def join(self, stores: Sequence[GradientStore], lines: int) -> GradientStore:  # noqa: ARG002
        """Return one store for the vectors of several, `lines` of each, alike but for how lengths are taken."""
        return self

    def compute_squared_norms(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `piece_squared_norms` of all training examples, with progress shown."""
        blocks = chain.from_iterable(map(self.piece_squared_norms, range(self.pieces)))
        return watch(blocks, sum(map(self.piece_rows, range(self.pieces))), "Self-influence")


METHODS: Registry[type[Method]] = Registry("vestige.methods", "method", Method)


def method(name: str) -> Callable[[MethodClass], MethodClass]:
    """Register a class as the method `name`.

    Raises:
        SpecError: Another class has that name.
    """

    def register(found: MethodClass) -> MethodClass:
        METHODS.add(name, found)
        found.name = name
        return found

    return register


def get_method(name: str, **options: Any) -> Method:
    """Return the method called `name`, made with its options.

    Raises:
        SpecError: There is no such method, it has no such option, or the option's value is of another type.
    """
    found = METHODS.find(name)
    known = {one.name: one for one in options_of(found)}
    if unknown := [key for key in options if key not in known]:
        listed = "\n".join(["Its options, with their defaults:", *(one.line for one in known.values())])
        raise SpecError(f"The method {name} has no option {unknown[0]!r}. {listed if known else 'It has none.'}")
    return found(**{key: known[key].parse(value) for key, value in options.items()})


def method_table() -> Table:
    """Return a line for each method: its name, what it estimates, and what that costs."""
    from rich.table import Table

    table = Table("method", "estimates", "costs")
    for found in METHODS:
        meaning = found().meaning
        table.add_row(found.name, meaning.estimates, meaning.cost)
    return table


def describe_method(name: str) -> str:
    """Return what a method computes, what its scores mean, what it costs, when not to believe it, and its options.

    Raises:
        SpecError: There is no such method.
    """
    found = METHODS.find(name)
    options = [one.line for one in options_of(found)] or ["No options of its own."]
    if found.command != Method.command:
        options = [f"It has a command of its own: vestige {found.command} --help"]
    elif options_of(found):
        options.insert(0, "Options, with their defaults (--option name=value):")
    facts = lines_of_facts(found().meaning.to_dict())
    return "\n".join([f"{name}: {cleandoc(found.__doc__ or '')}", "", *facts, "", *options])
