"""Scores of the training examples as a work plan: pieces of the training data, each scored by the first free worker.

The query vectors are made once and kept beside the run; a piece leaves its scores there, and the reduce streams the
pieces in their order into the summary, so a run holds the same numbers whichever process computed them, and whenever.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, final

import numpy as np
import torch

from vestige.data import Example, StoredExamples
from vestige.errors import NonFinite
from vestige.folders import partial_folder
from vestige.launch import Compute, PieceFiles, phase, run_plan, step_done, worker_command
from vestige.lockstep import decided
from vestige.methods._gradient_method import GradientMethod, Prepared, piece_blocks
from vestige.methods._protocol import Job, Method
from vestige.methods._stores import ExactGradients, GradientStore, Vectors
from vestige.progress import progress
from vestige.row_order import RowOrder
from vestige.runs import ScoreBlock, ScoreCollector, ScoreSummary
from vestige.settings import AttributeSettings, LaunchSettings


class KeptVectors(NamedTuple):
    """The vectors, and whether products with them are to be divided by the example's length."""

    vectors: Vectors
    cosine: bool


@final
@dataclass(frozen=True)
class QueryVectors:
    """A plan of one piece: of several processes that start together, one writes and all read the same bytes.

    Computed twice they may be rounded differently, and scores of one run must come from the same vectors.
    """

    folder: Path
    files: PieceFiles
    queries: int
    prepare: Callable[[], Prepared]
    device: torch.device
    name: str = "Queries"
    unit: str = "queries"
    pieces: int = 1

    def is_done(self, piece: int) -> bool:
        """Return whether the vectors are there."""
        return self.files.is_done(piece)

    def weight(self, piece: int) -> float:  # noqa: ARG002
        """Return the number of queries."""
        return self.queries

    def open(self) -> AbstractContextManager[Compute]:
        """Open nothing: what is needed was made before."""
        return nullcontext(self._compute)

    def _compute(self, piece: int) -> None:
        prepared = self.prepare()
        vectors = {str(number): vector for number, vector in enumerate(prepared.vectors)}
        self.files.write(piece, {"cosine": torch.tensor(prepared.cosine), **vectors})

    def reduce(self) -> KeptVectors:
        """Read the kept vectors.

        Raises:
            CorruptFile: it is damaged.
        """
        kept = self.files.read(0)
        cosine = bool(kept.pop("cosine"))
        return KeptVectors([kept[str(number)].to(self.device) for number in range(len(kept))], cosine)

    def run(self) -> KeptVectors:
        """Return the vectors, made in this process unless they are there already."""
        self.files.forget_damaged([0])
        if not decided(lambda: self.files.is_done(0)):
            # Outside the plan, because the curvature is a plan of its own, in which this process may be a worker.
            self.prepare()
        return run_plan(self, LaunchSettings.model_validate({}), None)


FORMAT = 1
"""Raised when a piece of the same settings changes its meaning."""
OF_THE_OUTPUT = frozenset({"out", "k", "dense", "tokens", "trust", "self_influence", "profile", "overwrite"})
"""Settings that change no score: a piece made with others stays good."""

Result = TypeVar("Result")
Blocks = Callable[[int], Iterator[ScoreBlock]]
"""From the number of a piece to its scores."""


@dataclass(frozen=True)
class BlocksPlan(Generic[Result]):
    """Score blocks, piece by piece, and what they are collected into."""

    name: str
    unit: str
    folder: Path
    rows: tuple[int, ...]
    """Training examples in each piece."""
    lines: int
    """Scores for each of them."""
    blocks: Callable[[], Blocks]
    """Opens what the pieces are computed with."""
    collect: Callable[[Iterable[ScoreBlock]], Result]
    input: str
    """Everything that decides the scores."""

    @property
    def pieces(self) -> int:
        """The number of pieces that the training data falls into."""
        return len(self.rows)

    def is_done(self, piece: int) -> bool:
        """Return whether the piece's scores are there."""
        return self._files.is_done(piece)

    def weight(self, piece: int) -> float:
        """Return the number of the piece's scores: training examples times queries."""
        return self.rows[piece] * self.lines

    def open(self) -> AbstractContextManager[Compute]:
        """Open what the method needs; what the queries need was made before."""
        blocks = self.blocks()
        return nullcontext(lambda piece: self._compute(piece, blocks))

    def _compute(self, piece: int, blocks: Blocks) -> None:
        """Leave the scores of one piece."""
        found = []
        for block in blocks(piece):
            found.append(block)
            step_done(len(block.rows) * self.lines)
        rows, scores = torch.cat([each.rows for each in found]), torch.cat([each.scores for each in found], dim=1)
        self._files.write(piece, {"rows": rows, "scores": scores})

    def reduce(self) -> Result:
        """Collect the pieces, in their order, into the result.

        Raises:
            CorruptFile: a piece is missing or damaged.
        """
        return self.collect(ScoreBlock(**self._files.read(piece)) for piece in range(self.pieces))

    def run(self, settings: AttributeSettings) -> Result:
        """Return the result; a single piece leaves nothing on disk here, several continue where they were killed."""
        with phase(self.name, self.unit) as done:
            if self.pieces == 1 and settings.engine == "local":
                done.append(self.rows[0] * self.lines)
                return self.collect(self._watched())
            self._files.forget_damaged(range(self.pieces))
            done.extend(round(self.weight(piece)) for piece in range(self.pieces) if not self.is_done(piece))
            return run_plan(self, settings, worker_command(settings, "attribute"))

    def _watched(self) -> Iterator[ScoreBlock]:
        with progress(self.rows[0], self.name) as bar:
            for block in self.blocks()(0):
                yield block
                bar.advance(len(block.rows))

    @cached_property
    def _files(self) -> PieceFiles:
        return PieceFiles(self.folder / self.name.lower(), digest(self.input, self.rows, self.lines))


def summarised(job: Job, method: Method) -> ScoreSummary:
    """Stream the scores of every training example into the lists, the distribution and the groups."""
    return summarised_sets(job, method, 1)[0]


def summarised_sets(
    job: Job, method: Method, sets: int, watch: Callable[[ScoreBlock], None] | None = None
) -> list[ScoreSummary]:
    """Summarise lines of scores that hold all queries `sets` times, one set after another, as `summarised` does.

    Args:
        job: The question.
        method: Whose blocks have `sets * queries` lines.
        sets: How often the queries come.
        watch: Also sees every block.
    """

    def collect(blocks: Iterable[ScoreBlock]) -> list[ScoreSummary]:
        collectors = [
            ScoreCollector(
                len(job.queries),
                len(job.train),
                k=job.settings.k,
                sources=_sources(job.train.examples),
                dense=job.settings.dense,
                skipped=job.skipped,
            )
            for _ in range(sets)
        ]
        for block in blocks:
            if watch is not None:
                watch(block)
            for collector, scores in zip(collectors, block.scores.split(len(job.queries)), strict=True):
                collector.add(ScoreBlock(block.rows, scores))
        return [collector.finish() for collector in collectors]

    if not works_in_pieces(method, "blocks"):
        return collect(method.blocks(job))
    assert isinstance(method, GradientMethod)
    store = method.store(job)
    vectors, cosine = _kept_vectors(job, method, store)
    plan = BlocksPlan(
        "Scoring",
        "train x query pairs",
        partial_folder(job.settings.out),
        _rows(store),
        sets * len(job.queries),
        lambda: partial(piece_blocks, store, vectors, cosine),
        collect,
        digest(settings_key(job), store.identity, _digest_of(vectors)),
    )
    return plan.run(job.settings)


def _sources(examples: Sequence[Example]) -> Iterable[str | None]:
    if isinstance(examples, StoredExamples):
        return examples.column("source")
    return (example.source for example in examples)


def self_scores(job: Job, method: Any) -> np.ndarray:
    """Compute the score of every training example for itself, float64 [example] on the disk; NaN if left out.

    Raises:
        NonFinite: another is NaN or infinite.
    """

    def collect(blocks: Iterable[ScoreBlock]) -> np.ndarray:
        ordered, skipped = RowOrder(1, len(job.train), np.float64), job.skipped
        for block in blocks:
            kept = ~np.isin(block.rows.numpy(), skipped)
            rows, scores = block.rows.numpy()[kept], block.scores.numpy()[:, kept]
            _check_finite(rows, scores[0])
            ordered.add(rows, scores)
        return ordered.finish()[0]

    if not works_in_pieces(method, "self_scores"):
        return collect(method.self_scores(job))
    store = method.store(job)
    plan = BlocksPlan(
        "Self-influence",
        "examples",
        partial_folder(job.settings.out),
        _rows(store),
        1,
        lambda: method.self_blocks(job),
        collect,
        digest(settings_key(job), store.identity),
    )
    return plan.run(job.settings)


def _check_finite(rows: np.ndarray, scores: np.ndarray) -> None:
    if (bad := np.flatnonzero(~np.isfinite(scores))).size:
        raise NonFinite(
            f"The self-influence of training row {rows[bad[0]]} is {scores[bad[0]]}. Run again with --precision "
            "float32, or leave that row out: --skip-bad, of vestige index where there is one."
        )


def unscorable(job: Job) -> tuple[int, ...]:
    """Return the training rows whose loss or gradient is not finite, by a pass over the data."""
    store = ExactGradients(job)

    def blocks(piece: int) -> Iterator[ScoreBlock]:
        for rows, finite in store.piece_finite(piece):
            yield ScoreBlock(rows, finite[None].float())

    def collect(found: Iterable[ScoreBlock]) -> tuple[int, ...]:
        return tuple(sorted(row for block in found for row in block.rows[block.scores[0] == 0].tolist()))

    folder, identity = partial_folder(job.settings.out), digest(settings_key(job), store.identity)
    return BlocksPlan("Checking", "examples", folder, _rows(store), 1, lambda: blocks, collect, identity).run(
        job.settings
    )


def works_in_pieces(method: Any, what: str) -> bool:
    """Return whether a method's scores are those of `GradientMethod`, which divides its training data into pieces."""
    return isinstance(method, GradientMethod) and getattr(type(method), what) is getattr(GradientMethod, what)


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


def _kept_vectors(job: Job, method: GradientMethod, store: GradientStore) -> KeptVectors:
    """Return the query vectors; those of data in several pieces are kept beside the run."""
    if store.pieces == 1:
        prepared = method.prepare(job)
        return KeptVectors(prepared.vectors, prepared.cosine)
    folder = partial_folder(job.settings.out)
    files = PieceFiles(folder / "vectors", digest(settings_key(job), store.identity))
    return QueryVectors(folder, files, len(job.queries), lambda: method.prepare(job), store.device).run()


def _rows(store: GradientStore) -> tuple[int, ...]:
    return tuple(map(store.piece_rows, range(store.pieces)))
