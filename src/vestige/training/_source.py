"""SOURCE: a training unrolled through a few segments, each with one curvature, rate and mean gradient."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt
from torch import Tensor

from vestige.curvature import CurvatureData, KroneckerCurvature, Labels, ekfac_of
from vestige.data import TokenizedData
from vestige.errors import SpecError
from vestige.indexes import batch_tokens
from vestige.methods import (
    HELPS,
    Checkpoint,
    CheckpointMethod,
    ExactGradients,
    GradientTerm,
    Job,
    Lines,
    Method,
    Prepared,
    Vectors,
    check_memory,
    checkpoint_job,
    method,
)
from vestige.models import LoadedModel
from vestige.progress import announce
from vestige.runs import Meaning, ScoreBlock
from vestige.settings import AttributeSettings, TrainSettings
from vestige.storage import partial_folder
from vestige.training._examples import adopt_settings, read_learned, repeat_settings
from vestige.training._store import TrainingRun


class Segment(NamedTuple):
    """Some steps of a training, taken together."""

    curvature: KroneckerCurvature
    """Of the mean loss of an example, in nats."""
    scale: float
    """From that loss to the one that the steps descend: examples over target tokens."""
    reach: float
    """Sum of the learning rates of the steps."""


def unroll(queries: Vectors, segments: Sequence[Segment]) -> list[Vectors]:
    """Return the vectors whose products with an example's mean gradients in the segments add up to its effect.

    With `H` the curvature of a segment's loss and `t` the sum of its rates, gradient descent in small steps shrinks a
    change of the weights by `S = exp(-t H)`, and moves it by `-(I - S) H^-1 g` under a constant gradient `g` (Bae et
    al. 2024, arXiv:2405.12186). The vector of segment l is `(I - S_l) C_l^-1 S_(l+1) ... S_L q` for the curvature `C`
    of an example's loss, `H = scale * C`; all matrices are symmetric, and each has its own eigenvectors.

    Args:
        queries: Gradients of the queries at the end, for each component [query, n].
        segments: In the order of the training.
    """
    found: list[Vectors] = []
    for segment in reversed(segments):
        reach = segment.scale * segment.reach
        moved = _apply(segment.curvature, queries, lambda values, reach=reach: _moved(values, reach))
        found.append(moved)
        queries = _apply(segment.curvature, queries, lambda values, reach=reach: torch.exp(-reach * values))
    return found[::-1]


def _moved(values: Tensor, reach: float) -> Tensor:
    """Return `(1 - exp(-reach v)) / v`, which is `reach` where v is 0."""
    small = values * reach < 1e-12
    return torch.where(small, reach, -torch.expm1(-reach * values) / torch.where(small, 1.0, values))


def _apply(curvature: KroneckerCurvature, vectors: Vectors, function: Callable[[Tensor], Tensor]) -> Vectors:
    """Return a function of the curvature's eigenvalues times the vectors."""
    found: dict[int, Tensor] = {}
    for block, factor in zip(curvature.blocks, curvature.factors, strict=True):
        basis, matrices = factor.eigenbasis(), block.join(vectors)
        factors = function(basis.values.double()).to(matrices.dtype)
        if basis.left is None or basis.right is None:
            found |= block.split(factors * matrices)
        else:
            left, right = basis.left.to(matrices.dtype), basis.right.to(matrices.dtype)
            found |= block.split(left @ (factors * (left.T @ matrices @ right)) @ right.T)
    return [found[number] for number in range(len(vectors))]


@dataclass(frozen=True)
class _Learned(GradientTerm):
    """Products with the examples that the training learned from; the others had no effect."""

    learned: Int[np.ndarray, "row"]

    def scores(self) -> Lines:
        """Yield the scores from one pass over the training data."""
        for rows, scores in super().scores():
            kept = torch.from_numpy(np.isin(rows.cpu().numpy(), self.learned)).to(scores.device)
            yield rows, torch.where(kept, scores, 0.0)


@method("source")
@dataclass
class Source(CheckpointMethod):
    """The effect of leaving an example out of a recorded training, unrolled through a few segments of it.

    `score = sum_l <S_L ... S_(l+1) (I - S_l) H_l^-1 g_l(example), g(query)> / N`, with `S_l = exp(-t_l H_l)`, `t_l` the
    sum of the learning rates of segment l, `g_l` the mean of the example's gradient over the checkpoints in it, and
    `H_l` EK-FAC at the middle one of them (SOURCE, Bae et al. 2024, arXiv:2405.12186).
    """

    segments: Annotated[PositiveInt, "Parts of the training, of the same number of steps; each needs a checkpoint."] = 3
    labels: Annotated[Labels, "Drawn from the model: the true Fisher matrix; or the data's: the empirical one."] = (
        "sampled"
    )
    _run: TrainingRun = field(repr=False, init=False, compare=False)
    _trained: TrainSettings = field(repr=False, init=False, compare=False)
    _unrolled: tuple[Job, list[Vectors]] | None = field(default=None, repr=False, init=False)

    needs_training = True
    weighting = "equal"
    scores_itself = False
    self_scores = Method.self_scores
    meaning = Meaning(
        sign=HELPS,
        unit="nats of query loss",
        target="this run: its path through the checkpoints",
        normalisation="EK-FAC of each segment, to the reach of its learning rates",
        estimates="How much higher the query's loss would have ended, had the example been left out of the training: "
        "unrolled differentiation, with each segment of the training taken for gradient descent in one quadratic.",
        cost="EK-FAC's passes over the training data for each segment, and one pass for each checkpoint; memory for "
        "the whole gradients of the queries for each segment.",
        limits="Adam's denominators are not followed, only its rates; curvature and gradients change within a segment; "
        "the order of the examples is averaged out.",
    )

    def adopt(self, settings: AttributeSettings) -> AttributeSettings:
        """Open the recorded training; return the settings with its checkpoints, and how it read its data."""
        given = settings.training
        if isinstance(given, list | tuple) and len(given) != 1:
            raise SpecError(f"source unrolls one training, and {len(given)} were given. Give one --training.")
        self._run = run = TrainingRun.open(given[0] if isinstance(given, list | tuple) else given)
        self._trained = repeat_settings(run, model=settings.model, data=settings.data, tokenizer=settings.tokenizer)
        held = {self._segment(step) for step in run.checkpoints if step}
        if missing := [number for number in range(self.segments) if number not in held]:
            raise SpecError(
                f"{run.folder}: no checkpoint lies in {len(missing)} of {self.segments} segments of its "
                f"{self._steps:,} steps. Train with more --checkpoints, or type --option segments={len(held) or 1}."
            )
        saved = [str(path) for step, path in run.checkpoints.items() if step]
        last = run.checkpoints[self._steps]
        return adopt_settings(settings, last, self._trained, model=None, checkpoints=saved)

    def read_train(self, loaded: LoadedModel) -> TokenizedData:
        """Return all examples as the training learned them."""
        data, weights = read_learned(self._trained, loaded)
        if weights is not None:
            raise SpecError(
                "The examples of this training have weights, which source does not follow: --method replay."
            )
        return data

    def weights(self, checkpoints: tuple[Checkpoint, ...]) -> list[float]:
        """Return for each checkpoint one over the number of those in its segment."""
        numbers = [self._segment(_step(each)) for each in checkpoints]
        return [1 / numbers.count(number) for number in numbers]

    def key(self, job: Job) -> dict[str, Any]:  # noqa: ARG002
        """Return the options and the training."""
        return {"segments": self.segments, "labels": self.labels, "training": self._run.id}

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of all training examples; one that the training did not draw scores 0."""
        self._unroll(job)
        yield from super().blocks(job)

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> Tensor:
        """Compute the scores of pairs, split over components."""
        self._unroll(job)
        return super().components(job, queries, rows)

    def term(self, job: Job, checkpoint: Checkpoint) -> _Learned:
        """Return the products of the segment's vectors with gradients at this checkpoint."""
        assert self._unrolled is not None
        vectors = self._unrolled[1][self._segment(_step(checkpoint))]
        job = _of_sums(job)
        return _Learned(Prepared(job, ExactGradients(job), vectors), self._learned(job))

    @property
    def _steps(self) -> int:
        return int(self._run.record["identity"]["steps"])

    def _segment(self, step: int) -> int:
        """Return the segment of a step, counted from 1."""
        return (step - 1) * self.segments // self._steps

    def _learned(self, job: Job) -> Int[np.ndarray, "row"]:
        """Return the rows that the training drew."""
        members = self._run.members
        inside = np.array([example.id in members for example in job.train.examples])
        return np.flatnonzero(inside & (job.train.target_counts > 0))

    def _unroll(self, job: Job) -> None:
        """Measure the curvature of every segment, and walk the queries' gradients back through them."""
        if self._unrolled is not None and self._unrolled[0] is job:
            return
        check_memory(job)
        learned = self._learned(job)
        queries = ExactGradients(_of_sums(job)).of_queries(job.queries)
        if job.settings.loss == "mean":
            counts = torch.from_numpy(np.maximum(job.queries.target_counts, 1)).to(queries[0])
            queries = [each / counts[:, None] for each in queries]
        targets, found = int(job.train.target_counts[learned].sum()), []
        for number, reach in enumerate(self._reaches()):
            curvature = self._measure(job, number, learned)
            found.append(Segment(curvature, len(learned) / targets, reach / (1 - self._trained.momentum)))
        # `unroll` is for mean gradients over examples, of which one example has one part in their number.
        vectors = [[each / len(learned) for each in some] for some in unroll(queries, found)]
        self._unrolled = job, vectors

    def _reaches(self) -> Float[np.ndarray, "segment"]:
        """Return the sum of the learning rates of each segment's steps."""
        table = self._run.steps
        steps, first = np.unique(table["step"].to_numpy(), return_index=True)
        rates = table["learning_rate"].to_numpy()[first]
        return np.bincount((steps - 1) * self.segments // self._steps, rates, self.segments)

    def _measure(self, job: Job, segment: int, learned: Int[np.ndarray, "row"]) -> KroneckerCurvature:
        """Return EK-FAC at the middle checkpoint of a segment."""
        inside = [number for number, each in enumerate(job.checkpoints) if self._segment(_step(each)) == segment]
        number = inside[len(inside) // 2]
        announce(f"Curvature of segment {segment + 1} of {self.segments}, at {job.checkpoints[number].name}")
        there = checkpoint_job(job, number)
        loaded = there.model_for(self.name)
        data = job.train.subset(learned)
        budget, seed = batch_tokens(job.settings, loaded), job.settings.seed
        measured = CurvatureData(loaded.model, there.components, data, budget, "sum", self.labels, seed)
        return ekfac_of(measured, loaded.fingerprint, partial_folder(job.settings.out) / "curvature")


def _step(checkpoint: Checkpoint) -> int:
    return int(Path(checkpoint.name).name.rpartition("-")[2])


def _of_sums(job: Job) -> Job:
    """Return the job with the loss of an example as the sum over its target tokens, as the steps add them up."""
    return replace(job, settings=job.settings.model_copy(update={"loss": "sum"}))
