"""Scores of the training examples as work plans: pieces of the training data, each scored by the first free worker.

The query vectors are made once and kept beside the run; a piece leaves its scores there, and the reduce streams the
pieces in their order into the summary, so a run holds the same numbers whichever process computed them, and whenever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np

from vestige.data import Example, StoredExamples
from vestige.distributed import broadcast_from_rank0
from vestige.errors import NonFinite
from vestige.launch import Compute, PieceFiles, phase, run_plan, step_done, worker_command
from vestige.lazy import torch
from vestige.methods._protocol import GradientStore, Job, Method, Vectors, watch
from vestige.runs import ScoreBlock, ScoreCollector, ScoreSummary
from vestige.settings import LaunchSettings
from vestige.storage import partial_folder

if TYPE_CHECKING:
    from torch import Tensor

    from vestige.methods._gradient_method import GradientMethod, Prepared

FORMAT = 1
"""Raised when a piece of the same settings changes its meaning."""
OF_THE_OUTPUT = frozenset({"out", "k", "dense", "tokens", "trust", "self_influence", "profile", "overwrite"})
"""Settings that change no score: a piece made with others stays good."""

Result = TypeVar("Result")
Tensors: TypeAlias = "dict[str, Tensor]"
Blocks = Callable[[int], Iterator[ScoreBlock]]
"""From the number of a piece to its scores."""


@dataclass(frozen=True)
class FilePlan(Generic[Result]):
    """A work plan whose pieces are files of tensors beside the run."""

    name: str
    unit: str
    folder: Path
    """The run's partial folder; the pieces lie in a folder of it."""
    weights: Sequence[int]
    """Units of work in each piece."""
    input: str
    """Everything that decides the content."""
    begin: Callable[[], AbstractContextManager[Callable[[int], Tensors]]]
    """Opens what the pieces are computed with."""
    collect: Callable[[Iterator[Tensors]], Result]
    """Makes the result from the pieces, in their order."""
    subfolder: str = ""
    """Where the pieces lie; not given: the name, in lower case."""

    @property
    def pieces(self) -> int:
        """The number of pieces."""
        return len(self.weights)

    @cached_property
    def files(self) -> PieceFiles:
        """The files of the pieces."""
        return PieceFiles(self.folder / (self.subfolder or self.name.lower().replace(" ", "-")), self.input)

    def is_done(self, piece: int) -> bool:
        """Return whether the piece is there."""
        return self.files.is_done(piece)

    def weight(self, piece: int) -> float:
        """Return the units of work in the piece."""
        return self.weights[piece]

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Open what the pieces need."""
        with self.begin() as compute:
            yield lambda piece: self.files.write(piece, compute(piece))

    def reduce(self) -> Result:
        """Collect the pieces, in their order.

        Raises:
            CorruptFile: A piece is missing or damaged.
        """
        return self.collect(map(self.files.read, range(self.pieces)))


class Member(NamedTuple):
    """The scores at one damping."""

    job: Job
    method: Method
    summary: ScoreSummary


def summarise(job: Job, method: Method) -> ScoreSummary:
    """Stream the scores of every training example into the lists, the distribution and the groups."""
    return summarise_sets(job, method, 1)[0]


def summarise_sets(
    job: Job, method: Method, sets: int, watch: Callable[[ScoreBlock], None] | None = None
) -> list[ScoreSummary]:
    """Summarise lines of scores that hold all queries `sets` times, one set after another.

    Args:
        job: The question.
        method: Whose blocks have `sets * queries` lines.
        sets: How often the queries come.
        watch: Also gets every block.
    """

    def collect(blocks: Iterable[ScoreBlock]) -> list[ScoreSummary]:
        options = {"k": job.settings.k, "dense": job.settings.dense, "skipped": job.skipped}
        collectors = [
            ScoreCollector(len(job.queries), len(job.train), sources=_sources(job.train.examples), **options)
            for _ in range(sets)
        ]
        for block in blocks:
            if watch is not None:
                watch(block)
            for number, collector in enumerate(collectors):
                own = slice(number * len(job.queries), (number + 1) * len(job.queries))
                collector.add(ScoreBlock(block.rows, block.scores[own]))
        return [collector.finish() for collector in collectors]

    if not method.works_in_pieces:
        return collect(method.blocks(job))
    gradients = cast("GradientMethod", method)
    store = gradients.store(job)
    prepared = _share_queries(job, gradients, store)
    key = digest(settings_key(job), store.identity, _digest_of(prepared.vectors))
    lines = sets * len(job.queries)
    return _run(job, "Scoring", "train x query pairs", store, lines, lambda: prepared.piece_blocks, collect, key)


def _sources(examples: Sequence[Example]) -> Iterable[str | None]:
    if isinstance(examples, StoredExamples):
        return examples.column("source")
    return (example.source for example in examples)


def compute_self_scores(job: Job, method: Method) -> np.ndarray:
    """Compute the score of every training example for itself, float64 [example]; NaN if left out.

    Raises:
        NonFinite: Another is NaN or infinite.
    """

    def collect(blocks: Iterable[ScoreBlock]) -> np.ndarray:
        found = np.full(len(job.train), np.nan)
        for block in blocks:
            kept = ~np.isin(block.rows.numpy(), job.skipped)
            rows, scores = block.rows.numpy()[kept], block.scores.numpy()[0, kept]
            if (bad := np.flatnonzero(~np.isfinite(scores))).size:
                raise NonFinite(
                    f"The self-influence of training row {rows[bad[0]]} is {scores[bad[0]]}. Run again with "
                    "--precision float32, or leave that row out: --skip-bad, of vestige index where there is one."
                )
            found[rows] = scores
        return found

    if not method.works_in_pieces:
        return collect(method.self_scores(job))
    gradients = cast("GradientMethod", method)
    store, key = gradients.store(job), settings_key(job)
    blocks = partial(gradients.self_blocks, job)
    return _run(job, "Self-influence", "examples", store, 1, blocks, collect, digest(key, store.identity))


def find_unscorable(job: Job) -> tuple[int, ...]:
    """Return the training rows whose loss or gradient is not finite, by a pass over the data."""
    from vestige.methods._stores import ExactGradients

    store = ExactGradients(job)

    def blocks(piece: int) -> Iterator[ScoreBlock]:
        for rows, finite in store.piece_finite(piece):
            yield ScoreBlock(rows, finite[None].float())

    def collect(found: Iterable[ScoreBlock]) -> tuple[int, ...]:
        return tuple(sorted(row for block in found for row in block.rows[block.scores[0] == 0].tolist()))

    key = digest(settings_key(job), store.identity)
    return _run(job, "Checking", "examples", store, 1, lambda: blocks, collect, key)


def _run(
    job: Job,
    name: str,
    unit: str,
    store: GradientStore,
    lines: int,
    open_blocks: Callable[[], Blocks],
    collect: Callable[[Iterable[ScoreBlock]], Result],
    key: str,
) -> Result:
    """Collect score blocks with `lines` scores an example, piece by piece of the store.

    A single piece leaves nothing on disk here; several continue where they were killed.
    """
    rows = [store.piece_rows(piece) for piece in range(store.pieces)]

    def begin() -> AbstractContextManager[Callable[[int], Tensors]]:
        blocks = open_blocks()

        def compute(piece: int) -> Tensors:
            found = []
            for block in blocks(piece):
                found.append(block)
                step_done(len(block.rows) * lines)
            return {
                "rows": torch.cat([each.rows for each in found]),
                "scores": torch.cat([each.scores for each in found], dim=1),
            }

        return nullcontext(compute)

    plan = FilePlan(
        name,
        unit,
        partial_folder(job.settings.out),
        [count * lines for count in rows],
        digest(key, rows, lines),
        begin,
        lambda pieces: collect(ScoreBlock(**piece) for piece in pieces),
    )
    with phase(name, unit) as done:
        if plan.pieces == 1 and job.settings.engine == "local":
            done.append(plan.weights[0])
            return collect(watch(open_blocks()(0), rows[0], name))
        plan.files.forget_damaged(range(plan.pieces))
        done.extend(plan.weights[piece] for piece in range(plan.pieces) if not plan.is_done(piece))
        return run_plan(plan, job.settings, worker_command(job.settings, "attribute"))


def _share_queries(job: Job, method: GradientMethod, store: GradientStore) -> Prepared:
    """Return the query vectors; those of data in several pieces are kept beside the run.

    Of several processes that start at once, one writes and all read the same bytes: computed twice they may be rounded
    differently, and scores of one run must come from the same vectors.
    """
    if store.pieces == 1:
        return method.prepare(job)

    def compute(_: int) -> Tensors:
        prepared = method.prepare(job)
        vectors = {str(number): vector for number, vector in enumerate(prepared.vectors)}
        return {"cosine": torch.tensor(prepared.cosine), **vectors}

    def collect(pieces: Iterator[Tensors]) -> Prepared:
        kept = next(pieces)
        cosine = bool(kept.pop("cosine"))
        vectors = [kept[str(number)].to(store.device) for number in range(len(kept))]
        from vestige.methods._gradient_method import Prepared

        return Prepared(job, store, vectors, cosine=cosine)

    folder, key = partial_folder(job.settings.out), digest(settings_key(job), store.identity)
    weights = [len(job.queries)]
    plan = FilePlan("Queries", "queries", folder, weights, key, lambda: nullcontext(compute), collect, "vectors")
    plan.files.forget_damaged([0])
    if not broadcast_from_rank0(lambda: plan.is_done(0)):
        # Outside the plan, because the curvature is a plan of its own, in which this process may be a worker.
        method.prepare(job)
    return run_plan(plan, LaunchSettings.model_validate({}), None)


def settings_key(job: Job) -> str:
    """Return a digest of all that the scores of a job depend on, but for the data and the model themselves."""
    ignored = OF_THE_OUTPUT | set(LaunchSettings.model_fields)
    recorded = {name: value for name, value in job.settings.record().items() if name not in ignored}
    return digest(FORMAT, version("vestige"), recorded, job.queries.fingerprint, len(job.queries))


def digest(*parts: Any) -> str:
    """Return the sha256 of anything that JSON can express."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _digest_of(vectors: Vectors) -> str:
    """Return the sha256 of the bytes of the query vectors."""
    whole = hashlib.sha256()
    for vector in vectors:
        whole.update(vector.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return whole.hexdigest()
