"""Sums over checkpoints: the base of such methods, and TracIn. What each checkpoint adds is kept on disk.

One checkpoint's model is in memory beside the last one's, which the queries are put to. What a finished checkpoint
adds is a file beside the run, so an interrupted run continues with the next one, and the sum is read back row by row.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import IndexMismatch, ModelError, NonFinite, SpecError
from vestige.methods import (
    HELPS,
    Checkpoint,
    ExactGradients,
    GradientStore,
    IndexedGradients,
    Job,
    Method,
    Prepared,
    build_temporary_index,
    digest,
    gradients_fit,
    method,
    prepare_queries,
)
from vestige.models import load_model, select_components
from vestige.progress import announce
from vestige.runs import Meaning, ScoreBlock
from vestige.storage import check_disk, make_folder, partial_folder, temporary_path

Lines = Iterator[tuple[Int[Tensor, "row"], Float[Tensor, "line row"]]]
"""(rows, what one checkpoint adds to them): all training examples, each once, in any order."""

SUM_NUMBERS = 2**22
"""Most numbers of one checkpoint alive at once while the sum is read."""


class Term(ABC):
    """What one checkpoint adds to the scores. The first lines are the queries, unless the method says otherwise."""

    @abstractmethod
    def scores(self) -> Lines:
        """Yield the scores of all training examples."""

    @abstractmethod
    def parts(self, rows: list[int]) -> Float[Tensor, "component line row"]:
        """Compute the scores of a few rows, split over components; lines that are no such sum may be left out."""

    def self_scores(self) -> Lines:
        """Yield the same lines with each example as its own query, which is the first line."""
        raise NotImplementedError(f"{type(self).__name__} has no self-influence")


@dataclass
class CheckpointMethod(Method):
    """A method whose scores are made of one weighted sum over checkpoints."""

    needs_model = True
    needs_gradients = True
    needs_exact = True
    weighting = "learning rate"
    averages: ClassVar[bool] = False
    """True where the weights of the checkpoints are made to add up to 1, so that the sum is a mean."""
    splits_components = True
    scores_itself = True
    reads_focus = ("instead", "span", "weights")
    _last: tuple[Job, Term] | None = field(default=None, repr=False, init=False)

    @abstractmethod
    def term(self, job: Job, checkpoint: Checkpoint) -> Term:
        """Return what the checkpoint adds; the model of `job` is the checkpoint's."""

    def lines(self, job: Job) -> int:
        """Return the number of values that a checkpoint gives for each training example."""
        return len(job.queries)

    def weights(self, checkpoints: tuple[Checkpoint, ...]) -> list[float]:
        """Return the factor of each checkpoint's numbers in the sum over checkpoints."""
        total = sum(each.weight for each in checkpoints) if self.averages else 1.0
        return [each.weight / total for each in checkpoints]

    def combine(self, job: Job, sums: Float[Tensor, "line row"], parts: Tensor) -> Tensor:  # noqa: ARG002
        """Return scores `[..., query, row]` from `parts` `[..., line, row]` of which `sums` are the totals."""
        return parts

    def key(self, job: Job) -> dict[str, Any]:  # noqa: ARG002
        """Return the method's own settings on which the numbers of a checkpoint depend."""
        return {}

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of all training examples."""
        for rows, sums in self._sums(job, "scores", self.lines(job)):
            yield ScoreBlock(rows, self.combine(job, sums, sums))

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> Tensor:
        """Compute the scores of pairs, split over components.

        Each checkpoint is opened once more, for these rows alone.
        """
        distinct, place = torch.unique(rows, return_inverse=True)
        weighted = (
            weight * self._term(job, number).parts(distinct.tolist()).double().cpu()
            for number, weight in enumerate(self.weights(job.checkpoints))
            if weight > 0
        )
        total = torch.as_tensor(sum(weighted))
        _, sums = next(self._sums(job, "scores", self.lines(job), distinct.numpy()))
        return self.combine(job, sums, total)[:, queries, place].T

    def self_scores(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the score of every training example for itself, as one query."""
        self.require_self_scores()
        found = self._sums(job, "self_scores", 1 + self.lines(job) - len(job.queries))
        return (ScoreBlock(rows, self.combine(job, sums, sums)) for rows, sums in found)

    def _sums(self, job: Job, what: str, lines: int, rows: Int[np.ndarray, "row"] | None = None) -> Lines:
        """Yield weighted sums over the checkpoints, in float64; a part of the rows in one piece, or all of them."""
        weights = self.weights(job.checkpoints)
        counted = [number for number, weight in enumerate(weights) if weight > 0]
        kept = [(weights[number], self._load(job, number, what, lines)) for number in counted]
        examples, step = len(job.train), max(1, SUM_NUMBERS // lines)
        wanted = (np.arange(start, min(start + step, examples)) for start in range(0, examples, step))
        for part in wanted if rows is None else [rows]:
            total = sum(weight * np.asarray(numbers[:, part], dtype=np.float64) for weight, numbers in kept)
            yield torch.from_numpy(part), torch.from_numpy(np.asarray(total))

    def _load(self, job: Job, number: int, what: str, lines: int) -> Float[np.ndarray, "line row"]:
        """Return the numbers of one checkpoint, mapped; compute them unless they lie on disk."""
        path = partial_folder(job.settings.out) / f"{self._digest(job, number, what)}.npy"
        shape = (lines, len(job.train))
        if not path.exists():
            checkpoint = job.checkpoints[number]
            announce(f"Checkpoint {number + 1} of {len(job.checkpoints)}: {checkpoint.name}")
            term = self._term(job, number)
            _write(path, shape, getattr(term, what), job.skipped, checkpoint)
        return np.load(path, mmap_mode="r")

    def _term(self, job: Job, number: int) -> Term:
        last = number == len(job.checkpoints) - 1
        if last and self._last is not None and self._last[0] is job:
            return self._last[1]
        checkpoint = job.checkpoints[number]
        term = self.term(checkpoint_job(job, number), checkpoint)
        if last:
            self._last = (job, term)
        return term

    def _digest(self, job: Job, number: int, what: str) -> str:
        settings = job.settings
        return digest(
            [self.name, what, number, self.key(job)],
            _identity(job.checkpoints[number], job),
            [job.train.fingerprint, job.queries.fingerprint, len(job.queries)],
            [part.name for part in job.components],
            [settings.loss, settings.seed, settings.precision],
        )[:24]


def checkpoint_job(job: Job, number: int) -> Job:
    """Return the same question with the model of one checkpoint.

    Raises:
        ModelError: Its parameters are not those of the last checkpoint.
        IndexMismatch: Its index was made with other weights.
    """
    checkpoint, last = job.checkpoints[number], job.model_for(job.settings.method)
    if number == len(job.checkpoints) - 1:
        loaded, selection = last, job.selection
    else:
        loaded = load_model(checkpoint.source, **{**job.settings.loading, "tokenizer": last.tokenizer})
        try:
            selection = select_components(loaded.model, [part.name for part in job.components])
        except SpecError as error:
            raise ModelError(_unlike(checkpoint, job.checkpoints[-1])) from error
        if [(part.name, part.shape) for part in selection.components] != [
            (part.name, part.shape) for part in job.components
        ]:
            raise ModelError(_unlike(checkpoint, job.checkpoints[-1]))
    if checkpoint.index is not None and checkpoint.index.manifest.model.fingerprint != loaded.fingerprint:
        raise IndexMismatch(
            f"The index {checkpoint.index.folder} was made with other weights than {checkpoint.name}. Give the indexes "
            "in the order of the checkpoints, one for each."
        )
    return replace(job, loaded=loaded, selection=selection, index=checkpoint.index)


def _unlike(one: Checkpoint, other: Checkpoint) -> str:
    return f"The checkpoints {one.name} and {other.name} have different parameters, so their scores cannot be added up."


def open_checkpoint_store(job: Job, *, stored: bool = False) -> GradientStore:
    """Open the index of a checkpoint's job; without one the model itself, or an index beside the run.

    With `stored` the gradients are read more than once, so an index is made in any case.
    """
    if job.index is None and not stored and gradients_fit(job):
        return ExactGradients(job)
    loaded = job.model_for(job.settings.method)
    index = job.index or build_temporary_index(job, f"index-{loaded.fingerprint[:16]}", loaded.name)
    return IndexedGradients(replace(job, index=index))


def _identity(checkpoint: Checkpoint, job: Job) -> list[Any]:
    """Return what identifies a checkpoint as the one of last time, without reading all of it."""
    if checkpoint.index is not None:
        return [checkpoint.index.manifest.model.fingerprint, checkpoint.index.fingerprint]
    if checkpoint is job.checkpoints[-1] or not isinstance(checkpoint.source, str | Path):
        loaded = job.loaded if checkpoint is job.checkpoints[-1] else load_model(checkpoint.source)
        assert loaded is not None
        return [loaded.fingerprint]
    folder = Path(checkpoint.source)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [str(checkpoint.source), [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]]


def _write(
    path: Path, shape: tuple[int, int], produce: Callable[[], Lines], skipped: Sequence[int], checkpoint: Checkpoint
) -> None:
    """Write one file that is whole or absent, with zeros for the examples that are left out."""
    make_folder(path.parent)
    check_disk(path.parent, 4 * shape[0] * shape[1])
    temporary = temporary_path(path)
    try:
        numbers = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        scored = 0
        for rows, scores in produce():
            places, found = rows.cpu().numpy(), scores.detach().float().cpu().numpy()
            numbers[:, places] = found = np.where(np.isin(places, skipped), 0.0, found)
            scored += len(places)
            if not np.isfinite(found).all():
                raise NonFinite(f"The scores of {checkpoint.name} are not finite. Leave this checkpoint out.")
        assert scored == shape[1], "every training example is scored once"
        numbers.flush()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


@method("tracin")
@dataclass
class TracIn(CheckpointMethod):
    """Inner products of gradients at checkpoints, each times its learning rate (Pruthi et al. 2020, arXiv:2002.08484).

    `score = sum_c lr_c <grad loss(query; w_c), grad loss(example; w_c)>`. The loss of an example is normalised inside
    that example, so neither batches nor a ragged last one change a score.
    """

    meaning = Meaning(
        sign=HELPS,
        unit="nats of query loss, for one plain gradient step with each checkpoint's learning rate",
        target="this run: its path through the checkpoints",
        normalisation="none",
        estimates="How much the steps on the example lowered the query's loss during training, had each been a plain "
        "gradient step, one at each checkpoint.",
        cost="One forward and backward pass over the training data for each checkpoint, or one read of its index; "
        "4 bytes on disk per checkpoint, query and example until the run is written.",
        limits="Adam and momentum do not step along the gradient; few checkpoints stand for many steps; long or "
        "surprising examples have large gradients and lead many lists.",
    )

    weighs_rows = True

    def key(self, job: Job) -> dict[str, Any]:
        """Return the weights of the training examples."""
        return {} if job.row_weights is None else {"row_weights": job.row_weights.tolist()}

    def term(self, job: Job, checkpoint: Checkpoint) -> "GradientTerm":  # noqa: ARG002
        """Return the inner products at this checkpoint."""
        return GradientTerm(prepare_queries(job, open_checkpoint_store(job)))


@dataclass(frozen=True)
class GradientTerm(Term):
    """Inner products with the queries' gradients."""

    prepared: Prepared

    def scores(self) -> Lines:
        """Yield the scores from one pass over the training data, or one read of the index."""
        return ((block.rows, block.scores) for block in self.prepared.blocks())

    def self_scores(self) -> Lines:
        """Yield squared norms."""
        return ((rows, squared[None]) for rows, squared in self.prepared.store.compute_squared_norms())

    def parts(self, rows: list[int]) -> Float[Tensor, "component query row"]:
        """Compute inner products component by component."""
        return self.prepared.components(rows)
