"""Sources of training data: models trained without each of them, and how scores agree with what that changes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor, nn

from vestige.banks import EVERYTHING, Bank, bank
from vestige.curvature import CurvatureProduct
from vestige.data import load_examples, tokenize
from vestige.evaluate import Estimate
from vestige.methods import Arnoldi, Job, Lissa, UntracJob, borrow_weights, make_job
from vestige.models import load_model, select_components
from vestige.settings import AttributeSettings, UntracSettings
from vestige_recipes.common.registry import OWN_SEED, StudySettings, launched
from vestige_recipes.common.training import Checkpoints, Training, trained


def left_out_bank(
    settings: StudySettings,
    start: Any,
    files: Sequence[Path],
    folder: Path,
    training: Training,
    *,
    seed: int,
    seeds: int,
    from_scratch: bool = False,
) -> Bank:
    """Models of everything and without each source, for the same number of steps, in `folder/bank`.

    Args:
        settings: Where the work runs.
        start: A model as every command takes it.
        files: Training data, and queries whose `source` names their test set.
        folder: Of the study, or of one part of it.
        training: How long, at which rate; everything else is the bank's default.
        seed: Of starts and orders.
        seeds: Runs of each subset.
        from_scratch: Draw the weights instead of beginning with the start's. Workers read a model from a folder, so a
            module is written to `folder/start` first.
    """
    if isinstance(start, nn.Module):
        start = trained(
            start, files[0], folder / "start", training._replace(steps=1), seed=seed, from_scratch=True
        ).model
    data, queries = (str(path) for path in files)
    return bank(
        model=start,
        data=data,
        queries=queries,
        out=folder / "bank",
        leave_source_out=True,
        from_scratch=from_scratch,
        seeds=seeds,
        steps=training.steps,
        batch_size=training.batch_size,
        learning_rate=training.recipe.learning_rate,
        seed=seed,
        **launched(settings),
    )


Table = Float[np.ndarray, "test source"]

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


def asked_models(
    start: Any,
    data: Path,
    folder: Path,
    training: Training,
    count: int,
    checkpoints: int,
    *,
    from_scratch: bool = False,
) -> Iterator[Checkpoints]:
    """Yield the models that scores are computed on, in `folder/model-NUMBER`, none of which is one of the bank's."""
    for number in range(count):
        out = folder / f"model-{number}"
        yield trained(start, data, out, training, seed=OWN_SEED + number, count=checkpoints, from_scratch=from_scratch)


def left_out_truth(truth: Bank, sources: Sequence[str], tests: Sequence[str]) -> list[Table]:
    """For each seed, how much the mean loss per token of each test set rises without each source: positive = it helps.

    Every run has the same number of steps, and the i-th runs share start and order as far as they can.
    """
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
    scored, right = np.stack(scores), np.stack(truths)
    random = np.random.default_rng(seed)
    found = {}
    for name, ranked in (("pearson", False), ("spearman", True)):
        drawn = [value for _ in range(draws) if (value := _drawn(scored, right, random, ranked)) is not None]
        low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (np.nan, np.nan)
        found[name] = Estimate(_mean(scored, right, ranked).mean().item(), float(low), float(high))
    return Agreement(found["pearson"], found["spearman"], tuple(_mean(scored, right, False).tolist()))


def pooled_agreement(
    groups: Sequence[tuple[Sequence[Table], Sequence[Table]]], *, draws: int, seed: int
) -> tuple[Estimate, list[float]]:
    """Mean Pearson over groups, each of (scores by model, truths by run) about its own sources, and that of each group.

    A bootstrap draw resamples sources, runs and models inside every group: the groups themselves are few and fixed.
    """
    stacked = [(np.stack(scores), np.stack(truths)) for scores, truths in groups]
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        values = [_drawn(scored, right, random, False) for scored, right in stacked]
        drawn += [np.mean([value for value in values if value is not None])] if None not in values else []
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (np.nan, np.nan)
    own = [float(_mean(scored, right, False).mean()) for scored, right in stacked]
    return Estimate(float(np.mean(own)), float(low), float(high)), own


def truth_agreement(truths: Sequence[Table]) -> float:
    """Noise ceiling: Pearson correlation of two seeds' truths, mean over pairs and test sets; NaN for one seed."""
    pairs = [_mean(np.stack([one]), np.stack([other]), False).mean() for one, other in combinations(truths, 2)]
    return float(np.mean(pairs)) if pairs else float("nan")


def summed_by_source(
    dense: Float[np.ndarray, "query example"],
    query_tests: Sequence[str | None],
    example_sources: Sequence[str | None],
    tests: Sequence[str],
    sources: Sequence[str],
) -> Table:
    """Scores of examples for queries, added up over both."""
    rows, columns = np.array(query_tests), np.array(example_sources)
    by_source = np.stack([dense[:, columns == source].sum(1, dtype=np.float64) for source in sources], axis=1)
    return np.stack([by_source[rows == test].sum(0) for test in tests])


def _drawn(scored: np.ndarray, right: np.ndarray, random: np.random.Generator, ranked: bool) -> float | None:
    pick: Callable[[int], np.ndarray] = lambda size: random.integers(size, size=size)  # noqa: E731
    columns = pick(scored.shape[-1])
    if len(np.unique(columns)) < _FEWEST:
        return None
    value = _mean(scored[pick(len(scored))][..., columns], right[pick(len(right))][..., columns], ranked).mean()
    return float(value) if np.isfinite(value) else None


def _mean(
    scored: Float[np.ndarray, "model test source"], right: Float[np.ndarray, "run test source"], ranked: bool
) -> Float[np.ndarray, "test"]:
    """Correlation of each model's scores with the mean truth, mean over models."""
    left, mean = scored, right.mean(0)[None]
    if ranked:
        left, mean = rankdata(left, axis=-1), rankdata(mean, axis=-1)
    left, mean = left - left.mean(-1, keepdims=True), mean - mean.mean(-1, keepdims=True)
    spread = np.sqrt((left**2).sum(-1) * (mean**2).sum(-1))
    return ((left * mean).sum(-1) / np.where(spread > 0, spread, np.nan)).mean(0)


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


class SetGradients(NamedTuple):
    """Gradients of the loss per token of every set, all weights in one vector."""

    tests: Float[Tensor, "test n"]
    sources: Float[Tensor, "source n"]

    def products(self, tests: Float[Tensor, "test n"] | None = None) -> Table:
        """Inner products of every test set, or of what was made of them, with every source."""
        left = self.tests if tests is None else tests
        return (left.double() @ self.sources.double().T).cpu().numpy()

    @property
    def lengths(self) -> Float[np.ndarray, "source"]:
        """Of the sources' gradients."""
        return self.sources.double().norm(dim=1).cpu().numpy()


@dataclass(frozen=True)
class Asked:
    """A model with the sets that it is asked about, and what a method of `vestige attribute` needs of it."""

    job: UntracJob
    methods: Job

    def gradients(self) -> SetGradients:
        """By one backward pass over every set."""
        components = self.methods.components
        layout = CurvatureProduct(self.methods.model_for("lissa").model, components, self.methods.train, 1)
        with borrow_weights(self.job.loaded) as weights:
            found = []
            for side in (self.job.tests, self.job.train):
                vectors = []
                for each in side.sets:
                    weights.backward(side.data, each.rows, "sum", self.job.token_budget)
                    slopes = [weights.parameters[part.name].grad for part in components]
                    assert all(slope is not None for slope in slopes)
                    vectors.append(layout.flatten([slope for slope in slopes if slope is not None]))
                found.append(torch.stack(vectors))
        return SetGradients(*found)


def first_order_scores(
    checkpoints: Sequence[str],
    data: Path,
    queries: Path,
    *,
    seed: int,
    inverses: Inverses = INVERSES,
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
    asked = [opened(folder, data, queries, seed) for folder in checkpoints]
    found = [each.gradients() for each in asked]
    last, products = found[-1], found[-1].products()
    scores = {
        "GradDot": products,
        "GradCos": products / last.lengths,
        "TracIn": np.sum([each.products() for each in found], axis=0),
    }
    job = asked[-1].methods
    for name, method in inverses.items():
        inverse = method.inverse(job)
        parts = list(last.tests.split([component.size for component in job.components], dim=1))
        scores[name] = last.products(torch.cat(inverse(parts, job.settings.damping), dim=1))
    return scores


def opened(model: str, data: Path, queries: Path, seed: int) -> Asked:
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
