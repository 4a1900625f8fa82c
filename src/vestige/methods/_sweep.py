"""Several dampings of one method in one pass: measured once, scored together, compared, kept as runs of their own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata

from vestige.curvature import DAMPING, Measure, Measures
from vestige.errors import NonFinite
from vestige.methods._gradient_method import GradientMethod, Prepared
from vestige.methods._plan import summarised_sets
from vestige.methods._preconditioned import check_memory
from vestige.methods._protocol import Job, Method
from vestige.methods._stores import GradientStore, IndexedGradients, Vectors
from vestige.methods._trust import CHANCE_HIDES, proponents
from vestige.progress import announce
from vestige.runs import Check, ScoreBlock, ScoreSummary, sampled_rows

COMPARED = 10
"""Length of the lists that are compared, or less where fewer are kept."""
SAMPLED_NUMBERS = 2**22
"""Most scores that are kept for the correlation of ranks."""
UNSTABLE = 0.5
"""Below it, half of a list is decided by the damping, and nothing without retraining says which damping is right."""


class Member(NamedTuple):
    """One damping."""

    damping: float
    method: Any
    """A `GradientMethod` with all that `Method` requires."""
    job: Job


class Neighbours(NamedTuple):
    """How alike two neighbouring dampings rank the examples, on average over queries."""

    lower: float
    higher: float
    overlap: float
    """Share of the first examples that both name."""
    correlation: float
    """Spearman's, over all examples or a sample of them."""


class Swept(NamedTuple):
    """What a sweep found."""

    members: list[Member]
    """The main one first, then by damping."""
    summaries: list[ScoreSummary]
    check: Check


@dataclass
class DampingSweep(GradientMethod):
    """All members as one method: the lines of its scores are the queries, damping by damping."""

    of: Any
    """A `GradientMethod` whose measurements serve any damping."""
    dampings: tuple[float, ...]
    members: list[Member] = field(default_factory=list, init=False)
    """Those whose matrices could be inverted, by damping; known once they are prepared."""

    def open(self, job: Job) -> None:
        """Prepare every member; what they have in common is measured by the first.

        Raises:
            NonFinite: no damping was large enough.
        """
        if self.of.needs_exact:
            check_memory(job, len(self.dampings))
        shared, failed = {}, None
        for damping in self.dampings:
            method = replace(self.of)
            method.shared = shared
            own = replace(job, settings=job.settings.model_copy(update={"damping": damping}))
            try:
                method.prepare(own)
                text = f"{method.meaning.normalisation}; damping {damping:g}"
                method.meaning = replace(method.meaning, normalisation=text)
            except NonFinite as error:
                failed = error
                announce(f"The damping {damping:g} is left out. {error}")
            else:
                self.members.append(Member(damping, method, own))
        if not self.members:
            assert failed is not None
            raise failed

    def vectors(self, job: Job) -> Prepared:
        """Return the vectors of all members, which become views of these."""
        each = [member.method.prepare(member.job) for member in self.members]
        stacked: Vectors = []
        for number in range(len(each[0].vectors)):
            stacked.append(torch.cat([prepared.vectors[number] for prepared in each]))
            for prepared, part in zip(each, stacked[-1].split(len(job.queries)), strict=True):
                prepared.vectors[number] = part

        def transform(gradients: Vectors) -> Vectors:
            found = [prepared.transform(gradients) for prepared in each]
            return [torch.cat(parts) for parts in zip(*found, strict=True)]

        return Prepared(job, self.store(job), stacked, transform, each[0].cosine)

    def store(self, job: Job) -> GradientStore:
        """Return the members' store, with the lengths that each of them divides by."""
        stores = [member.method.prepare(member.job).store for member in self.members]
        measures = [store.measure for store in stores if isinstance(store, IndexedGradients)]
        kept = tuple(measure for measure in measures if isinstance(measure, Measure))
        if not kept or job.index is None:
            return stores[0]
        return IndexedGradients(job, job.index, Measures(kept, len(job.queries)))

    def self_blocks(self, job: Job) -> Callable[[int], Iterator[ScoreBlock]]:  # noqa: ARG002
        """Return the map of the main member."""
        main = self.members[main_of(self.members)]
        return main.method.self_blocks(main.job)


def sweep(job: Job, method: Method) -> Swept:
    """Score at every damping of the job's settings: the training gradients are read once.

    Raises:
        NonFinite: no damping was large enough.
    """
    found = DampingSweep(method, job.settings.damping)
    found.open(job)
    members, queries = found.members, len(job.queries)
    sample = _Sample(len(members) * queries, len(job.train))
    summaries = summarised_sets(job, cast(Method, found), len(members), sample.add)
    length = min(COMPARED, job.settings.k)
    neighbours = compared(members, summaries, sample.scores.reshape(len(members), queries, -1), length)
    _announce(neighbours, length)
    first = main_of(members)
    order = [first, *(number for number in range(len(members)) if number != first)]
    check = stability(neighbours, length, len(job.train))
    return Swept([members[number] for number in order], [summaries[number] for number in order], check)


def main_of(members: list[Member]) -> int:
    """Return the number of the member that is the run itself: the one closest to the default damping."""
    return min(range(len(members)), key=lambda number: abs(log(members[number].damping / DAMPING)))


def member_folder(run: Path, damping: float) -> Path:
    """Return the folder of the run at one damping of a sweep."""
    return run / f"damping-{damping!r}".removesuffix(".0")


def compared(
    members: list[Member], summaries: list[ScoreSummary], scores: Float[np.ndarray, "damping query row"], length: int
) -> list[Neighbours]:
    """Compare every damping with the next larger one, by lists of `length` and ranks of all these scores."""
    queries = scores.shape[1]
    tops = [proponents(summary.ranked, queries, length) for summary in summaries]
    ranks = rankdata(scores, axis=2)
    return [
        Neighbours(
            members[one].damping,
            members[other].damping,
            float(np.mean([_overlap(*pair) for pair in zip(tops[one], tops[other], strict=True)])),
            float(np.mean([_correlation(*pair) for pair in zip(ranks[one], ranks[other], strict=True)])),
        )
        for one, other in pairwise(range(len(members)))
    ]


def stability(neighbours: list[Neighbours], length: int, examples: int) -> Check:
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
        text = f"{reading}, but there are few examples to choose from."
        return Check(name=name, value=least.overlap, reading=text, verdict="unknown")
    if least.overlap < UNSTABLE:
        text = f"{reading}: the damping decides who leads."
        return Check(name=name, value=least.overlap, reading=text, verdict="warn")
    return Check(name=name, value=least.overlap, reading=f"{reading}: the damping decides little.", verdict="good")


class _Sample:
    """Scores of some examples, the same in every run."""

    def __init__(self, lines: int, examples: int) -> None:
        self._rows = sampled_rows(examples, max(COMPARED, SAMPLED_NUMBERS // lines))
        self.scores = np.zeros((lines, len(self._rows)))

    def add(self, block: ScoreBlock) -> None:
        """Keep what belongs to the sample."""
        rows = block.rows.cpu().numpy()
        kept = np.isin(rows, self._rows)
        self.scores[:, np.searchsorted(self._rows, rows[kept])] = block.scores.cpu().numpy()[:, kept]


def _overlap(one: Int[np.ndarray, " rank"], other: Int[np.ndarray, " rank"]) -> float:
    return len(set(one.tolist()) & set(other.tolist())) / max(len(one), len(other), 1)


def _correlation(one: Float[np.ndarray, " row"], other: Float[np.ndarray, " row"]) -> float:
    """Return Pearson's correlation of ranks; lists without any order agree with all others."""
    one, other = one - one.mean(), other - other.mean()
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths > 0 else 1.0


def _announce(neighbours: list[Neighbours], length: int) -> None:
    lines = [f"{'damping':>9}  {'next':>9}  top {length} shared  rank correlation"]
    lines += [
        f"{pair.lower:>9g}  {pair.higher:>9g}  {pair.overlap:>12.0%}  {pair.correlation:>16.3f}" for pair in neighbours
    ]
    announce("\n".join(lines))
