"""What is unlearnt and what is measured: both directions of the same table of test sets and training sources."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vestige.data import TokenizedData, ask, load_queries, require_answers, tokenize
from vestige.errors import SpecError
from vestige.indexes import batch_tokens, read_data, tokens_at_most
from vestige.models import LoadedModel, generate_answers, load_model
from vestige.settings import UntracSettings
from vestige.unlearn._losses import loss_weights
from vestige.unlearn._recipe import AscentRecipe
from vestige.unlearn._sets import ExampleSet, set_means, single_examples, test_sets, training_sources

INVERSE_STEPS, INVERSE_BATCH = 5, 256
"""Isonuma and Titov (2024): UnTrac-Inv has its answer after a few full batches, and fails with single examples."""
RETAINED_STEPS = 40
"""Of UnTrac-Inv where training data hold it back: directions of little curvature take some steps to show as such."""


class Side(NamedTuple):
    """A data set and the sets in it."""

    data: TokenizedData
    sets: list[ExampleSet]

    @property
    def rows(self) -> Int[np.ndarray, "measured"]:
        """All rows of the sets, ascending, once each."""
        return np.unique(np.concatenate([each.rows for each in self.sets]))


@dataclass(frozen=True)
class UntracJob:
    """Training sources (or single examples), test sets, and the model between them."""

    settings: UntracSettings
    loaded: LoadedModel
    train: Side
    tests: Side
    generated: list[bool]
    """Per query: whether the answer is the model's own."""
    asked: str = ""
    """How questions were put, in words, where they became something else than what was typed."""

    @property
    def ascended(self) -> Side:
        """The sets that are unlearnt, one by one."""
        return self.train if self.settings.direction == "untrac" else self.tests

    @property
    def measured(self) -> Side:
        """The sets that are measured on the way."""
        return self.tests if self.settings.direction == "untrac" else self.train

    @property
    def token_budget(self) -> int:
        """Tokens in one pass of the model."""
        return batch_tokens(self.settings, self.loaded)

    @property
    def batch_size(self) -> int:
        """Examples in a step."""
        return self.settings.batch_size or (1 if self.settings.direction == "untrac" else INVERSE_BATCH)

    @property
    def steps(self) -> int:
        """Steps of each ascent: the same for all, or longer ones would score higher for being longer."""
        if self.settings.steps is not None:
            return self.settings.steps
        if self.settings.direction == "inverse":
            return INVERSE_STEPS if self.settings.retain is None else RETAINED_STEPS
        mean = np.mean([len(each.rows) for each in self.train.sets])
        return max(1, round(float(mean) / self.batch_size))

    def recipe(self, learning_rate: float, *, steps: int | None = None, points: int | None = None) -> AscentRecipe:
        """Return the recipe of the ascents at this rate."""
        settings = self.settings
        return AscentRecipe(
            learning_rate,
            steps or self.steps,
            self.batch_size,
            settings.optimizer,
            settings.momentum,
            settings.loss,
            points or settings.points,
            settings.stop == "auto" or points is not None,
            settings.seed,
            self.token_budget,
            settings.retain or 0,
            settings.accelerate,
        )

    def table(self, rises: Float[np.ndarray, "ascent measured"]) -> Float[np.ndarray, "test column"]:
        """Return scores of every training source or example for every test set, from rises of measured losses.

        Positive: unlearning raised the loss, so training on it lowers the loss. Nats per token of what is measured (per
        example for `loss=mean`); for single training examples measured one by one, nats of the example's loss.
        """
        side = self.measured
        places = [ExampleSet(each.name, np.searchsorted(side.rows, each.rows)) for each in side.sets]
        counted = loss_weights(side.data, self.settings.loss)[side.rows]
        if self.settings.direction == "untrac":
            return set_means(rises, counted, places).T
        if self.settings.level == "example":
            return rises[:, np.concatenate([each.rows for each in places])]
        return set_means(rises, counted, places)


def open_job(settings: UntracSettings) -> UntracJob:
    """Load model, training data and queries, tokenised alike; queries without an answer get the model's own.

    Raises:
        UserError: Something about the model or the data needs the caller.
    """
    loaded = load_model(
        settings.model, tokenizer=settings.tokenizer, precision=settings.precision, device=settings.device
    )
    train = read_data(settings, settings.data, loaded)
    given = load_queries(settings.queries, on_bad_text=settings.on_bad_text)
    examples, asked = ask(given, train.examples, chat=settings.chat, tokenizer=loaded.tokenizer)
    chat = bool(settings.chat)
    waiting = [each.lacks_answer for each in examples]
    if any(waiting):
        examples = generate_answers(loaded, examples, max_new_tokens=settings.max_new_tokens, chat=chat)
    queries = tokenize(
        examples,
        loaded.tokenizer,
        max_length=tokens_at_most(settings, loaded),
        name=settings.queries if isinstance(settings.queries, str) else "queries",
        chat=chat,
        vocabulary=loaded.vocabulary,
    )
    require_answers(queries, waiting, loaded.tokenizer)
    return replace(make_job(settings, loaded, train, queries, waiting), asked=asked)


def make_job(
    settings: UntracSettings,
    loaded: LoadedModel,
    train: TokenizedData,
    queries: TokenizedData,
    generated: list[bool] | None = None,
) -> UntracJob:
    """Make a job on data that is tokenised already.

    Raises:
        DataError: There is nothing to compare or to explain.
        SpecError: Training data are to be retained by an optimizer that cannot, or steps accelerated that lead to no
            summit.
    """
    if settings.retain is not None and settings.optimizer != "sgd":
        raise SpecError(
            f"--retain balances two gradients, and {settings.optimizer} rescales what is left of them. Type "
            "--optimizer sgd with it, or leave --retain out."
        )
    if settings.accelerate:
        _require_a_summit(settings)
    columns = training_sources(train, settings.samples) if settings.level == "source" else single_examples(train)
    return UntracJob(
        settings, loaded, Side(train, columns), Side(queries, test_sets(queries)), generated or [False] * len(queries)
    )


def _require_a_summit(settings: UntracSettings) -> None:
    if settings.retain is None or settings.direction != "inverse":
        # In a pass over a source, one example a step, the first examples would count for more than the last.
        raise SpecError(
            "--accelerate is for ascents that climb the same examples again and again towards a summit: with --retain "
            "and --direction inverse. Type these with it, or leave --accelerate out."
        )
    if settings.momentum:
        raise SpecError(
            "--accelerate is a momentum of its own, which follows from the number of steps. Drop --momentum."
        )


def smaller(job: UntracJob, ascents: int, measured: int, examples: int) -> UntracJob:
    """Return the job with fewer sets, and fewer examples in those that are measured: enough to choose settings by."""

    def thinned(side: Side, sets: int, rows: int | None) -> Side:
        chosen = _spread_values(side.sets, sets)
        return Side(side.data, [ExampleSet(each.name, np.array(_spread_values(each.rows, rows))) for each in chosen])

    def side(full: Side, is_ascended: bool) -> Side:
        return thinned(full, ascents, None) if is_ascended else thinned(full, measured, examples)

    untrac = job.settings.direction == "untrac"
    return replace(job, train=side(job.train, untrac), tests=side(job.tests, not untrac))


def _spread_values(values: list | np.ndarray, most: int | None) -> list:
    if most is None or len(values) <= most:
        return list(values)
    return [values[place] for place in np.linspace(0, len(values) - 1, most).round().astype(int)]
