"""Sources of training data: models trained without each of them, and how scores agree with what that changes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.banks import EVERYTHING, Bank
from vestige.curvature import CurvatureProduct
from vestige.data import load_examples, tokenize
from vestige.evaluate import Estimate, make_interval, pearson, spearman
from vestige.methods import Arnoldi, Job, Lissa, UntracJob, attribute, borrow_weights, make_job, untrac
from vestige.models import load_model, select_components
from vestige.runs import Scores
from vestige.settings import AttributeSettings, UntracSettings
from vestige.training import bank
from vestige_recipes.common.training import Checkpoints, Training, train_checkpoints
from vestige_recipes.studies import OWN_SEED, StudySettings, keep_run

Table = Float[np.ndarray, "test source"]
Correlate = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of columns, such as `pearson`."""

_FEWEST = 3
"""Different sources in a draw: two points lie on a line."""


UNLEARNT = {"UnTrac": "untrac", "UnTrac-Inv": "inverse"}
"""Names in tables, and directions of unlearning."""


class Agreement(NamedTuple):
    """Of one method with the truth."""

    pearson: Estimate
    """Mean over test sets of the correlation over sources, mean over models; interval over sources, runs and models."""
    spearman: Estimate
    by_test: tuple[float, ...]
    """Pearson for each test set."""


class Measured(NamedTuple):
    """What leaving sources out does, and what models that are none of the bank's say of it."""

    bank: Bank
    """Models of everything and without each source."""
    scores: list[dict[str, Table]]
    """By method, for each model that was asked."""

    @property
    def truths(self) -> list[Table]:
        """What leaving out did, for each seed."""
        return left_out_truth(self.bank)

    def agreements(self, draws: int, seed: int) -> dict[str, Agreement]:
        """Return how well each method agrees with the truth."""
        tables = {name: [each[name] for each in self.scores] for name in self.scores[0]}
        truths = self.truths
        return {name: source_agreement(each, truths, draws=draws, seed=seed) for name, each in tables.items()}

    def to_json(self) -> dict[str, Any]:
        """Return truth and scores in JSON terms."""
        scores = [{name: table.tolist() for name, table in each.items()} for each in self.scores]
        return {"truth": [truth.tolist() for truth in self.truths], "scores": scores}


def measure_sources(
    settings: StudySettings,
    start: Any,
    files: tuple[Path, Path],
    folder: Path,
    training: Training,
    score: Callable[[int, Path, Checkpoints, Bank], dict[str, Table]],
    *,
    seed: int,
    seeds: int,
    checkpoints: int,
    from_scratch: bool = False,
) -> Measured:
    """Return models of everything and without each source, and scores of models that are none of them.

    All models have the same number of steps; the bank is in `folder/bank`, the others are in `folder/model-NUMBER`.

    Args:
        settings: Where the work runs.
        start: A model as every command takes it. Workers read a model from a folder, so a module is written to
            `folder/start` first.
        files: Training data, and queries whose `source` names their test set.
        folder: Of the study, or of one part of it.
        training: How long, at which rate; everything else is the bank's default.
        score: Takes the number of a model, a folder for its runs, its checkpoints, and the bank.
        seed: Of the bank's starts and orders.
        seeds: Runs of each subset, and models to compute scores on.
        checkpoints: Of each of these models.
        from_scratch: Draw the weights instead of beginning with the start's.
    """
    given, (data, queries) = start, files
    if isinstance(start, nn.Module):
        once = training._replace(steps=1)
        given = train_checkpoints(start, data, folder / "start", once, seed=seed, from_scratch=True).model
    truth = bank(
        model=given,
        data=str(data),
        queries=str(queries),
        out=folder / "bank",
        leave_source_out=True,
        from_scratch=from_scratch,
        seeds=seeds,
        steps=training.steps,
        batch_size=training.recipe.batch_size,
        learning_rate=training.recipe.learning_rate,
        seed=seed,
        **settings.launch_arguments,
    )
    scores: list[dict[str, Table]] = []
    own: dict[str, Any] = {"count": checkpoints, "from_scratch": from_scratch}
    for number in range(seeds):
        asked = train_checkpoints(start, data, folder / f"model-{number}", training, seed=OWN_SEED + number, **own)
        scores.append(score(number, folder / f"runs-{number}", asked, truth))
    return Measured(truth, scores)


def list_sources(truth: Bank) -> tuple[list[str], list[str]]:
    """Return the names of sources in ascending order, and of test sets in the order of the queries."""
    return sorted({str(name) for name in truth.sources}), list(dict.fromkeys(map(str, truth.query_sources)))


def left_out_truth(truth: Bank) -> list[Table]:
    """For each seed, how much the mean loss per token of each test set rises without each source: positive = it helps.

    Every run has the same number of steps, and the i-th runs share start and order as far as they can.
    """
    sources, tests = list_sources(truth)
    losses = truth.by_subset(truth.query_token_losses)
    names = np.array(truth.query_sources)
    means = np.stack([losses[..., names == test].mean(-1) for test in tests])
    whole = truth.subset_names.index(EVERYTHING)
    without = [truth.subset_names.index(source) for source in sources]
    return [means[:, without, seed] - means[:, [whole], seed] for seed in range(losses.shape[1])]


def source_agreement(scores: Sequence[Table], truths: Sequence[Table], *, draws: int, seed: int) -> Agreement:
    """How well the scores of each model correlate with the mean truth.

    A bootstrap draw takes sources, runs of the truth and scoring models with replacement: the interval holds what the
    choice of these sources contributes, which is most of it where they are few.
    """
    stacked = [(np.stack(scores), np.stack(truths))]
    random = np.random.default_rng(seed)
    linear, ranked = (_estimate(stacked, draws, random, each) for each in (pearson, spearman))
    return Agreement(linear, ranked, tuple(_correlate(*stacked[0], pearson).tolist()))


def pool_agreement(
    groups: Sequence[tuple[Sequence[Table], Sequence[Table]]], *, draws: int, seed: int
) -> tuple[Estimate, list[float]]:
    """Mean Pearson over groups, each of (scores by model, truths by run) about its own sources, and that of each group.

    A bootstrap draw resamples sources, runs and models inside every group: the groups themselves are few and fixed.
    """
    stacked = [(np.stack(scores), np.stack(truths)) for scores, truths in groups]
    own = [float(_correlate(*each, pearson).mean()) for each in stacked]
    return _estimate(stacked, draws, np.random.default_rng(seed), pearson), own


def _estimate(
    groups: Sequence[tuple[np.ndarray, np.ndarray]], draws: int, random: np.random.Generator, correlate: Correlate
) -> Estimate:
    drawn = [np.mean([_resample(*each, random, correlate) for each in groups]) for _ in range(draws)]
    value = np.mean([_correlate(*each, correlate).mean() for each in groups])
    return make_interval(float(value), np.array(drawn))


def truth_agreement(truths: Sequence[Table]) -> float:
    """Noise ceiling: Pearson correlation of two seeds' truths, mean over pairs and test sets; NaN for one seed."""
    pairs = [_correlate(one[None], other[None], pearson).mean() for one, other in combinations(truths, 2)]
    return float(np.mean(pairs)) if pairs else float("nan")


def unlearn(out: Path, **arguments: Any) -> Table:
    """Return the scores of `vestige untrac`, which lists sources by name and test sets as they come."""
    return keep_run(untrac, out, **arguments).dense().astype(np.float64)


def attribute_sources(out: Path, truth: Bank, **arguments: Any) -> Table:
    """Return the scores of `vestige attribute`, added up."""
    return sum_by_source(keep_run(attribute, out, dense=True, trust=False, **arguments), truth)


def sum_by_source(run: Scores, truth: Bank) -> Table:
    """Add up the scores of examples for queries over both."""
    dense, tests, sources = run.dense(), np.array(truth.query_sources), np.array(truth.sources)
    names = list_sources(truth)
    by_source = np.stack([dense[:, sources == source].sum(1, dtype=np.float64) for source in names[0]], axis=1)
    return np.stack([by_source[tests == test].sum(0) for test in names[1]])


def _resample(scored: np.ndarray, right: np.ndarray, random: np.random.Generator, correlate: Correlate) -> float:
    """Return the agreement of one draw; NaN where it has too few sources."""
    columns = random.integers(scored.shape[-1], size=scored.shape[-1])
    if len(np.unique(columns)) < _FEWEST:
        return float("nan")
    models, runs = (random.integers(len(side), size=len(side)) for side in (scored, right))
    return float(_correlate(scored[models][..., columns], right[runs][..., columns], correlate).mean())


def _correlate(
    scored: Float[np.ndarray, "model test source"], right: Float[np.ndarray, "run test source"], correlate: Correlate
) -> Float[np.ndarray, "test"]:
    """Return the correlation of each model's scores with the mean truth, mean over models."""
    return correlate(np.moveaxis(scored, -1, 0), right.mean(0).T[:, None]).mean(0)


CURVATURE_EXAMPLES = 256
"""On which a step of LiSSA or of Arnoldi looks at the curvature, as published."""
Inverses = Mapping[str, Lissa | Arnoldi]
INVERSES: Inverses = {
    "HIF, LiSSA": Lissa(sample=CURVATURE_EXAMPLES),
    "HIF, Arnoldi": Arnoldi(examples=CURVATURE_EXAMPLES),
}
"""Influence functions by the columns that they fill, with as many steps as they have by default."""
AS_PUBLISHED: Inverses = {
    "HIF, LiSSA": Lissa(sample=CURVATURE_EXAMPLES, depth=10),
    "HIF, Arnoldi": Arnoldi(examples=CURVATURE_EXAMPLES, steps=25, rank=25),
}
"""The same with the fewer steps that UnTrac's authors gave them."""


@dataclass(frozen=True)
class Asked:
    """A model with the sets that it is asked about, and what a method of `vestige attribute` needs of it."""

    job: UntracJob
    methods: Job

    def gradients(self) -> list[Float[Tensor, "set n"]]:
        """Gradients of the loss per token of every test set and of every source, by one backward pass over each."""
        components = self.methods.components
        layout = CurvatureProduct(self.methods.model_for("lissa").model, components, self.methods.train, 1)
        with borrow_weights(self.job.loaded) as weights:
            found = []
            for side in (self.job.tests, self.job.train):
                vectors = []
                for each in side.sets:
                    weights.backward(side.data, each.rows, "sum", self.job.token_budget)
                    slopes = [cast(Tensor, weights.parameters[part.name].grad) for part in components]
                    vectors.append(layout.flatten(slopes))
                found.append(torch.stack(vectors))
        return found


def first_order_scores(
    checkpoints: Sequence[str], data: Path, queries: Path, *, seed: int, inverses: Inverses = INVERSES
) -> dict[str, Table]:
    """GradDot, GradCos, TracIn and two influence functions of every source for every test set, positive if it helps.

    All are of the last checkpoint but TracIn, the sum of the inner products at all of them. As published, GradCos
    divides by the length of the source's gradient alone, which changes nothing for a test set.

    Args:
        checkpoints: Folders of one model while it was trained; the last is the one that is asked.
        data: Rows with a `source`.
        queries: Rows of the test sets, which their `source` names.
        seed: Of the examples on which curvature is measured.
        inverses: The influence functions.
    """
    asked = [open_sets(folder, data, queries, seed) for folder in checkpoints]
    found = [each.gradients() for each in asked]
    products = [_multiply(*each) for each in found]
    tests, sources = found[-1]
    scores = {
        "GradDot": products[-1],
        "GradCos": products[-1] / sources.double().norm(dim=1).cpu().numpy(),
        "TracIn": np.sum(products, axis=0),
    }
    job = asked[-1].methods
    parts = list(tests.split([component.size for component in job.components], dim=1))
    for name, method in inverses.items():
        solved = method.inverse(job)(parts, job.settings.damping)
        scores[name] = _multiply(torch.cat(solved, dim=1), sources)
    return scores


def _multiply(tests: Float[Tensor, "test n"], sources: Float[Tensor, "source n"]) -> Table:
    return (tests.double() @ sources.double().T).cpu().numpy()


def open_sets(model: str, data: Path, queries: Path, seed: int) -> Asked:
    """Return the model in a folder, the sources and the test sets."""
    loaded = load_model(model)
    train, tests = (
        tokenize(load_examples(str(path)), loaded.tokenizer, max_length=loaded.context_length, name=path.name)
        for path in (data, queries)
    )
    common = {"model": model, "data": str(data), "queries": str(queries), "out": Path("unused"), "seed": seed}
    return Asked(
        make_job(UntracSettings.model_validate(common), loaded, train, tests),
        Job(train, tests, AttributeSettings.model_validate(common), loaded, select_components(loaded.model, ("all",))),
    )
