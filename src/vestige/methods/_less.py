"""LESS: does Adam's step on the example point where the query's gradient asks to go?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.curvature import Moments, adam_direction, component_moments, read_adam
from vestige.data import TokenizedData
from vestige.errors import ModelError, SpecError
from vestige.methods import (
    HELPS,
    Checkpoint,
    CheckpointMethod,
    ExactGradients,
    Job,
    Lines,
    Term,
    Vectors,
    check_memory,
    method,
    unit_length,
    watch,
)
from vestige.runs import Meaning


@method("less")
@dataclass
class Less(CheckpointMethod):
    """Cosine of Adam's step on the example with the query's gradient, weighted by learning rate over checkpoints.

    `score = sum_c w_c cos(A_c(grad loss(example)), grad loss(query))` with `A_c` the step that Adam's state in
    checkpoint c would make of this gradient, and `w_c` its share of the learning rates (Xia et al. 2024,
    arXiv:2402.04333). Whole gradients, where the paper projects them. Losses are means over an example's target tokens,
    because Adam's moments are of such a loss; each example is preconditioned alone.
    """

    meaning = Meaning(
        sign=HELPS,
        unit="cosine, from -1 to 1",
        target="this run: its path through the checkpoints",
        normalisation="length of the query's gradient and of Adam's step on the example",
        estimates="How well Adam's step on the example pointed along the one that lowers the query's loss, on average "
        "over training by learning rate.",
        cost="One forward and backward pass over the training data for each checkpoint, forming every example's whole "
        "gradient; memory for the whole gradients of the queries and three times the selected parameters.",
        limits="Says nothing about how far the step goes. Each step contains Adam's momentum, which all examples share "
        "and which lifts or lowers all scores of a query alike: compare examples, not signs, where it dominates.",
    )
    # Scores stay cosines.
    averages = True
    subtasks: Annotated[
        bool,
        "Average the gradients of queries of one `source`; an example's score, the same for all queries, is that for "
        "the source it serves best.",
    ] = False

    def lines(self, job: Job) -> int:
        """Return the number of queries, or of subtasks."""
        return len(self._groups(job))

    def key(self, job: Job) -> dict[str, Any]:
        """Return which queries belong together, and the optimizers."""
        return {"groups": self._groups(job), "optimizers": [_stamp(each) for each in job.checkpoints]}

    def combine(self, job: Job, sums: Float[Tensor, "line row"], parts: Tensor) -> Tensor:
        """Return the parts of the best subtask, by its whole sum over checkpoints, for every query."""
        if not self.subtasks:
            return parts
        best = sums.argmax(0)
        chosen = parts.gather(-2, best.expand(*parts.shape[:-2], 1, -1))
        return chosen.expand(*parts.shape[:-2], len(job.queries), -1)

    def term(self, job: Job, checkpoint: Checkpoint) -> "LessTerm":
        """Return Adam's state of this checkpoint, and the queries' directions."""
        # Another loss than the run's: a sum over tokens would outweigh the moments of a mean.
        job = replace(job, settings=job.settings.model_copy(update={"loss": "mean"}))
        loaded = job.model_for(self.name)
        check_memory(job)
        if isinstance(checkpoint.source, nn.Module):
            raise ModelError("LESS reads Adam's state beside the weights: give checkpoint folders, not live models.")
        found = read_adam(Path(checkpoint.source).expanduser(), loaded.model)
        moments = [component_moments(loaded.model, part, found) for part in job.components]
        if job.randomised:
            moments = _measure_moments(job, moments)
        groups, gradients = self._groups(job), ExactGradients(job).of_queries(job.queries)
        means = [torch.stack([vector[group].mean(0) for group in groups]) for vector in gradients]
        return LessTerm(job, moments, unit_length(means))

    def require_self_scores(self) -> None:
        """Refuse: preconditioned on one side and divided by both lengths, it ranks no example above another.

        Raises:
            SpecError: Always.
        """
        raise SpecError(
            "Self-influence with less compares an example's gradient with Adam's step on it, without their lengths: it "
            "would not rank by influence. Type --method tracin for checkpoints, or --method influence."
        )

    def _groups(self, job: Job) -> list[list[int]]:
        """Return the queries of each line."""
        if not self.subtasks:
            return [[query] for query in range(len(job.queries))]
        found: dict[str, list[int]] = {}
        for query, example in enumerate(job.queries.examples):
            if example.source is None:
                raise SpecError(
                    f'Query "{example.id}" has no `source`, and --option subtasks=true groups queries by it. Add the '
                    "column, or leave the option out: every query is then scored by itself."
                )
            found.setdefault(example.source, []).append(query)
        return list(found.values())


def _stamp(checkpoint: Checkpoint) -> list[Any]:
    """Return what distinguishes a checkpoint's optimizer from another one."""
    if isinstance(checkpoint.source, nn.Module):
        return []
    path = Path(checkpoint.source) / "optimizer.pt"
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []


@dataclass(frozen=True)
class LessTerm(Term):
    """Cosines at one checkpoint."""

    job: Job
    moments: list[Moments]
    vectors: Vectors
    """Mean gradient of each line's queries, at length one over all components."""

    def scores(self) -> Lines:
        """Yield the scores from one pass over the training data."""
        for rows, parts in watch(self._stream(self.job.train), len(self.job.train), "Scoring"):
            yield rows, parts.sum(0)

    def parts(self, rows: list[int]) -> Float[Tensor, "component line row"]:
        """Compute the parts of just these rows in a pass over them."""
        found = list(self._stream(self.job.train.subset(rows)))
        order = torch.argsort(torch.cat([places for places, _ in found]))
        return torch.cat([parts for _, parts in found], dim=2)[:, :, order]

    def _stream(self, data: TokenizedData) -> Iterator[tuple[Int[Tensor, "row"], Float[Tensor, "component line row"]]]:
        """Yield cosines, split over components, a few examples at a time: whole gradients are large."""
        device = self.vectors[0].device
        targets = torch.as_tensor(data.target_counts > 0, device=device)
        for rows, _, gradients in ExactGradients(self.job).stream_gradients(data):
            parts, squared = [], torch.zeros(len(rows), device=device)
            for gradient, moments, vector in zip(gradients, self.moments, self.vectors, strict=True):
                step = adam_direction(gradient, moments).flatten(1)
                parts.append(vector @ step.T)
                squared += step.square().sum(1)
            # Momentum alone is no influence of an example that has nothing to learn.
            shares = torch.where(squared > 0, squared.rsqrt(), 0.0) * targets[rows]
            yield rows, (torch.stack(parts) * shares).cpu()


def _measure_moments(job: Job, read: Sequence[Moments]) -> list[Moments]:
    """Return the mean gradient and mean squares at the model as it is, each as large as the moment that was read."""
    first = [torch.zeros_like(moments.first) for moments in read]
    second = [torch.zeros_like(moments.second) for moments in read]
    for _, _, gradients in ExactGradients(job).stream_gradients(job.train):
        for gradient, mean, squares in zip(gradients, first, second, strict=True):
            mean += gradient.sum(0)
            squares += gradient.square().sum(0)
    return [
        moments._replace(first=_as_large(mean, moments.first), second=_as_large(squares, moments.second))
        for moments, mean, squares in zip(read, first, second, strict=True)
    ]


def _as_large(values: Float[Tensor, "out in"], like: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    length = values.norm()
    return values * (like.norm() / length) if length > 0 else values
