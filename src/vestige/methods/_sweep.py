"""Several dampings of one method in one pass: measured once, scored together, compared, kept as runs of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import log
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vestige import curvature
from vestige.errors import NonFinite
from vestige.lazy import torch
from vestige.methods import GradientMethod, GradientStore, Job, Method, Prepared
from vestige.methods._plan import Member, summarise
from vestige.methods._trust import CHANCE_HIDES, find_proponents
from vestige.progress import announce
from vestige.runs import Check, ScoreBlock, ScoreSummary, sample_rows

COMPARED = 10
"""Length of the lists that are compared, or less where fewer are kept."""
SAMPLED_NUMBERS = 2**22
"""Most scores that are kept for the correlation of ranks."""
UNSTABLE = 0.5
"""Below it, half of a list depends on the damping, and nothing without retraining says which damping is right."""


class Neighbours(NamedTuple):
    """How alike two neighbouring dampings rank the examples, on average over queries."""

    lower: float
    higher: float
    overlap: float
    """Share of the first examples that both name."""
    correlation: float
    """Spearman's, over all examples or a sample of them."""


class DampingSweep(GradientMethod):
    """One method at several dampings: the lines of its scores are the queries, damping by damping."""

    def __init__(self, job: Job, method: Method) -> None:
        """Measure once, and prepare the vectors of every damping at which the matrices can be inverted."""
        super().__init__()
        self.members: list[Prepared] = []
        at, failed = method.at_dampings(job), None
        for damping in job.settings.damping:
            own = replace(job, settings=job.settings.model_copy(update={"damping": damping}))
            try:
                self.members.append(replace(at(damping), job=own))
            except NonFinite as error:
                failed = error
                announce(f"The damping {damping:g} is left out. {error}")
        if failed is not None and not self.members:
            raise failed
        self.main = min(self.members, key=lambda one: abs(log(one.job.settings.damping / curvature.DAMPING)))
        """The run itself: the one closest to the default damping."""

    def vectors(self, job: Job) -> Prepared:
        """Return the vectors of all members, which become views of these: memory may not hold both."""
        stacked = []
        for number in range(len(self.main.vectors)):
            stacked.append(torch.cat([member.vectors[number] for member in self.members]))
            for member, part in zip(self.members, stacked[-1].split(len(job.queries)), strict=True):
                member.vectors[number] = part
        return Prepared(job, self.store(job), stacked, cosine=self.main.cosine)

    def store(self, job: Job) -> GradientStore:
        """Return one store for all members, with the lengths that each of them divides by."""
        return self.main.store.join([member.store for member in self.members], len(job.queries))


def sweep(job: Job, method: Method) -> tuple[list[Member], Check]:
    """Score at every damping of the job's settings: the training gradients are read once.

    Returns:
        The members, the main one first and the others by damping, and how stable the lists are over dampings.

    Raises:
        NonFinite: No damping was large enough.
    """
    found = DampingSweep(job, method)
    members, queries = found.members, len(job.queries)
    rows = sample_rows(len(job.train), max(COMPARED, SAMPLED_NUMBERS // (len(members) * queries)))
    sample = np.zeros((len(members) * queries, len(rows)))

    def add(block: ScoreBlock) -> None:
        numbers = block.rows.cpu().numpy()
        kept = np.isin(numbers, rows)
        sample[:, np.searchsorted(rows, numbers[kept])] = block.scores.cpu().numpy()[:, kept]

    summaries = summarise(job, found, len(members), add)
    length = min(COMPARED, job.settings.k)
    dampings = [member.job.settings.damping for member in members]
    neighbours = compare(dampings, summaries, sample.reshape(len(members), queries, -1), length)
    _announce(neighbours, length)
    runs = [
        Member(member.job, method.use(member, f"damping {damping:g}"), summary)
        for member, damping, summary in zip(members, dampings, summaries, strict=True)
    ]
    runs.sort(key=lambda run: run.job is not found.main.job)
    return runs, check_stability(neighbours, length, len(job.train))


def compare(
    dampings: Sequence[float],
    summaries: Sequence[ScoreSummary],
    scores: Float[np.ndarray, "damping query row"],
    length: int,
) -> list[Neighbours]:
    """Compare every damping with the next larger one, by lists of `length` and ranks of all these scores."""
    tops = [find_proponents(summary.ranked, scores.shape[1], length) for summary in summaries]
    from scipy.stats import rankdata  # half a second, for sweeps alone

    ranks = rankdata(scores, axis=2)
    return [
        Neighbours(
            dampings[one],
            dampings[other],
            float(np.mean([_overlap(*pair) for pair in zip(tops[one], tops[other], strict=True)])),
            float(np.mean([_correlate(*pair) for pair in zip(ranks[one], ranks[other], strict=True)])),
        )
        for one, other in pairwise(range(len(dampings)))
    ]


def check_stability(neighbours: Sequence[Neighbours], length: int, examples: int) -> Check:
    """Check the least overlap of two neighbouring dampings: it shows what the damping decides, not which is right."""
    name = "stability over dampings"
    if not neighbours:
        return Check(name=name, value=None, reading="There is one damping, nothing to compare.", verdict="unknown")
    least = min(neighbours, key=lambda pair: pair.overlap)
    correlations = [pair.correlation for pair in neighbours]
    reading = (
        f"Neighbouring dampings share {least.overlap:.0%} of the top {length} or more (least between "
        f"{least.lower:g} and {least.higher:g}), and their ranks correlate by {min(correlations):.2f} to "
        f"{max(correlations):.2f}"
    )
    if length / max(examples, 1) > CHANCE_HIDES:
        more, verdict = ", but there are few examples to choose from.", "unknown"
    elif least.overlap < UNSTABLE:
        more, verdict = ": the damping decides who leads.", "warn"
    else:
        more, verdict = ": the damping decides little.", "good"
    return Check(name=name, value=least.overlap, reading=reading + more, verdict=verdict)


def _overlap(one: Int[np.ndarray, " rank"], other: Int[np.ndarray, " rank"]) -> float:
    return len(set(one.tolist()) & set(other.tolist())) / max(len(one), len(other), 1)


def _correlate(one: Float[np.ndarray, " row"], other: Float[np.ndarray, " row"]) -> float:
    """Return Pearson's correlation of ranks; lists without any order agree with all others."""
    one, other = one - one.mean(), other - other.mean()
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths > 0 else 1.0


def _announce(neighbours: Sequence[Neighbours], length: int) -> None:
    lines = [f"{'damping':>9}  {'next':>9}  top {length} shared  rank correlation"]
    lines += [
        f"{pair.lower:>9g}  {pair.higher:>9g}  {pair.overlap:>12.0%}  {pair.correlation:>16.3f}" for pair in neighbours
    ]
    announce("\n".join(lines))
