"""Replay: the exact derivative of a query's loss under the trained weights in the weight of every example.

The training is run again and walked backward (see `vestige.training.Replay`), for some queries together: one piece of
work. What is walked is kept beside the run at the border of every segment, so a kill loses one segment.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import TokenizedData
from vestige.errors import IndexMismatch, NonFinite, SpecError
from vestige.jobs import PieceFiles, Tensors, note_kept, run_pieces, step_done, tensor_pieces, worker_command
from vestige.methods import EXACT_SHARE, HELPS, Job, Method, digest, method, settings_key
from vestige.models import LoadedModel
from vestige.progress import announce, quiet
from vestige.runs import Check, Meaning, ScoreBlock
from vestige.settings import AttributeSettings
from vestige.storage import make_folder, partial_folder, temporary_path
from vestige.training._adjoint import Adjoints
from vestige.training._examples import adopt_settings
from vestige.training._replay import KEPT_CLASSES, Derivatives, Replay
from vestige.training._replay_checks import check_drops, check_growth, compare_runs, query_losses
from vestige.training._retraining import CommandTraining, Retraining, TrainerTraining
from vestige.training._store import TrainingRun

_COPIES = 4
"""Numbers per trained parameter and query: adjoints of the weight and of two moments, and one on its way."""
_THREADS = "threads"
"""File with the number of threads at which the replayed weights were the recorded ones."""


@dataclass
class _Walk:
    """How far the adjoints of some queries have been walked."""

    after: int
    """The step behind which they stand."""
    adjoints: Adjoints
    norms: list[float]
    """Length of the adjoints of the weights behind each step that was walked, mean over queries, from the last."""
    scores: Float[Tensor, "query example"]
    tokens: Float[Tensor, "query position"] | None
    """Scores of all tokens of all examples, one after another; None where they are not requested."""
    components: Float[Tensor, "query example component"] | None


@method("replay")
@dataclass
class TrainingReplay(Method):
    """The exact derivative of the query's loss in the weight of every example, by walking the training backward.

    Metagradients (Engstrom et al. 2025, arXiv:2503.13751), as MAGIC scores examples with them (Ilyas and Engstrom 2025,
    arXiv:2504.16430). Step t of a training moves the weights by the optimizer's rule on `(1/N_t) sum_i w_i grad
    loss_i(theta_t)`, all w = 1; the score is `-d loss(query; theta_T) / d w_i` with `N_t` held. Decay, moments,
    clipping, schedule, accumulation and dropout are part of the derivative. Several trainings, of other seeds, are
    averaged: then the score is of models trained like these, not of one of them.
    """

    drops: Annotated[
        int, "Trainings without a random twentieth of the examples, whose losses are compared with the predicted ones."
    ] = 3
    together: Annotated[int, "Queries that are walked together; each such group is a piece of work for --workers."] = 8
    trainer: Annotated[
        str | None, "Of a training that a Recorder recorded: `module:function`, which returns its Trainer again."
    ] = None
    by_component: Annotated[bool, "Also score components, at the price of one pass more a step."] = False
    _typed: AttributeSettings = field(repr=False, init=False, compare=False)
    _trained: tuple[Retraining, ...] = field(default=(), repr=False, init=False)
    _known: tuple[str, Tensors, list[Check]] | None = field(default=None, repr=False, init=False)

    splits_tokens = True
    splits_components = True
    needs_model = True
    needs_training = True
    reads_focus = ("instead", "span", "weights")
    meaning = Meaning(
        sign=HELPS,
        unit="nats of query loss, to first order, if the example's weight fell from 1 to 0",
        target="this run, with its order of examples and its random numbers; the mean of several if several are given",
        normalisation="none",
        estimates="How much higher the query's loss would have ended, had the example counted nothing in the very "
        "training that was recorded.",
        cost="Two more runs of the training, and for each query about two to three of them backward; states at about "
        "the square root of the number of steps on disk.",
        limits="A first derivative: where training is not smooth (a high rate, small batches, float16) it predicts "
        "little, which the check of adjoints and the dropped examples show. Another order of examples is another run.",
    )

    def __post_init__(self) -> None:
        """Say what these options make possible."""
        if self.together < 1:
            raise SpecError(f"together={self.together}: walk 1 query or more at once.")
        self.splits_components = self.by_component

    def adopt(self, settings: AttributeSettings) -> AttributeSettings:
        """Open the recorded trainings; return the settings with the model of the first, and how it read its data."""
        self._typed, given = settings, settings.training
        folders = given if isinstance(given, list | tuple) else [given]
        live = {"model": settings.model, "data": settings.data, "tokenizer": settings.tokenizer}
        self._trained = tuple(self._find(TrainingRun.open(folder), live) for folder in folders)
        first = self._trained[0]
        saved = list(first.run.checkpoints.values())
        if not saved:
            raise SpecError(f"{first.run.folder} has no checkpoint yet. Let its training finish first.")
        trained = first.settings if isinstance(first, CommandTraining) else None
        return adopt_settings(settings, saved[-1], trained, model=str(saved[-1]))

    def _find(self, run: TrainingRun, live: dict[str, Any]) -> Retraining:
        """Return how the steps of a recorded training are taken again."""
        if run.id is not None:
            return CommandTraining(run, **live)
        if self.trainer is None:
            raise SpecError(
                f"{run.folder} was recorded from a Trainer of your own. Name the function that makes it again: "
                "--option trainer=module:function."
            )
        return TrainerTraining(run, self.trainer)

    def read_train(self, loaded: LoadedModel) -> TokenizedData:  # noqa: ARG002
        """Return all examples as the first training learned them."""
        return self._trained[0].data

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of all rows; an example that the training did not draw scores 0."""
        yield ScoreBlock(torch.arange(len(job.train)), self._walk_all(job)[0]["scores"])

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> Tensor:
        """Return what was added up by component on the way."""
        return self._walk_all(job)[0]["components"][queries, rows]

    def token_scores(self, job: Job, query: int, rows: Sequence[int]) -> list[np.ndarray] | None:
        """Return what was added up by token on the way."""
        found, begins = self._walk_all(job)[0]["tokens"], _first_tokens(job)
        return [found[query, begins[row] : begins[row + 1]].double().numpy() for row in rows]

    def checks(self, job: Job) -> list[Check]:
        """Return how the adjoints grew, how trainings without some examples ended, and how several runs agree."""
        return self._walk_all(job)[1]

    def _walk_all(self, job: Job) -> tuple[Tensors, list[Check]]:
        """Return the tensors of a walk, mean over trainings, and checks; all is on disk until the run is complete."""
        key = settings_key(job)
        if self._known is None or self._known[0] != key:
            runs = [self._open(job, number) for number in range(len(self._trained))]
            # Workers take part in walks alone, so these come before everything else.
            walked = [self._walk(job, replay, work) for replay, work in runs]
            checks = []
            for (replay, work), found in zip(runs, walked, strict=True):
                checks.append(check_growth(found["norms"].numpy()))
                if self.drops and job.settings.trust:
                    checks.append(check_drops(replay, job, found["scores"], _rows(job), self.drops, work))
            if len(runs) > 1:
                checks.append(compare_runs([found["scores"] for found in walked]))
            mean = {name: torch.stack([found[name] for found in walked]).mean(0) for name in walked[0]}
            self._known = key, mean, checks
        return self._known[1:]

    def _open(self, job: Job, number: int) -> tuple[Replay, Path]:
        """Run a training again, unless another process has, and return it with the folder of its replay."""
        trained = self._trained[number]
        key = digest(settings_key(job), trained.run.id, str(trained.run.folder), job.train.fingerprint)[:16]
        work = partial_folder(job.settings.out) / f"replay-{number}-{key}"
        make_folder(work)
        with FileLock(work / "training.lock"), _threads_of(work):
            replay = Replay(trained, work)
            (work / _THREADS).write_text(str(torch.get_num_threads()))
        if trained.data.fingerprint != job.train.fingerprint:
            raise IndexMismatch(
                f"{trained.run.folder} was trained on other data than {self._trained[0].run.folder}. Average trainings "
                "that differ in --seed alone."
            )
        return replay, work

    def _walk(self, job: Job, replay: Replay, work: Path) -> Tensors:
        """Walk all queries back, group by group, wherever the settings want that done."""
        count = len(job.queries)
        groups = [range(begin, min(begin + self.together, count)) for begin in range(0, count, self.together)]
        files = PieceFiles(work / "walks", digest(settings_key(job), replay.steps, [len(each) for each in groups]))
        files.forget_damaged(range(len(groups)))

        @contextmanager
        def open_walks() -> Iterator[Callable[[int], Tensors]]:
            with _threads_of(work):
                yield lambda piece: _walk_group(job, replay, groups[piece], work)

        def collect(pieces: Iterator[Tensors]) -> Tensors:
            found = list(pieces)
            sizes = torch.tensor([len(each) for each in groups], dtype=torch.float64)
            norms = (torch.stack([each.pop("norms") for each in found]) * sizes[:, None]).sum(0) / count
            return {"norms": norms} | {name: torch.cat([each[name] for each in found]) for name in found[0]}

        weights = [len(each) * replay.steps for each in groups]
        pieces = tensor_pieces("Replay", files, weights, open_walks, collect, unit="steps")
        return run_pieces(pieces, job.settings, worker_command(self._typed, "attribute"))


@contextmanager
def _threads_of(work: Path) -> Iterator[None]:
    """Compute with as many threads as gave the recorded weights: with others sums are rounded otherwise."""
    before, noted = torch.get_num_threads(), work / _THREADS
    if noted.is_file():
        torch.set_num_threads(int(noted.read_text()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows(job: Job) -> dict[str, int]:
    return {example.id: row for row, example in enumerate(job.train.examples)}


def _first_tokens(job: Job) -> Int[np.ndarray, "example+1"]:
    """Return where the tokens of each example begin, and the last ones end, when all stand in a row."""
    return np.concatenate([[0], np.cumsum(job.train.lengths)])


def _walk_group(job: Job, replay: Replay, queries: range, work: Path) -> Tensors:
    """Walk a group of queries back, as many of them at once as fit into memory."""
    size = _COPIES * sum(each.numel() * each.element_size() for each in replay.parameters.values())
    fitting = max(1, int(EXACT_SHARE * psutil.virtual_memory().available / size))
    parts = [queries[begin : begin + fitting] for begin in range(0, len(queries), fitting)]
    if len(parts) > 1:
        announce(f"The adjoints of {fitting} queries fit into memory: {len(parts)} walks, one after another.")
    with quiet():  # the bar counts the steps that are walked
        walks = [_walk(job, replay, part, work / f"walk-{part[0]}-{part[-1]}.pt") for part in parts]
    lengths = torch.tensor([[*walk.norms] for walk in walks], dtype=torch.float64)
    shares = torch.tensor([[len(part) / len(queries)] for part in parts], dtype=torch.float64)
    sums = {name: [getattr(walk, name) for walk in walks] for name in ("scores", "tokens", "components")}
    found = {name: torch.cat(each) for name, each in sums.items() if each[0] is not None}
    return found | {"norms": (lengths * shares).sum(0)}


def _walk(job: Job, replay: Replay, queries: range, kept: Path) -> _Walk:
    """Walk some queries back to the first step, from where an interrupted walk was."""
    rows, begins = _rows(job), torch.from_numpy(_first_tokens(job))
    names = [part.name for part in job.components]
    if kept.is_file():
        with torch.serialization.safe_globals([_Walk, *KEPT_CLASSES]):
            walk: _Walk = torch.load(kept, weights_only=True)
    else:
        walk = _begin(job, replay, queries, int(begins[-1]), len(names))
    for step, found in replay.walk_back(walk.adjoints, walk.after, names):
        for passed in found:
            _add(walk, passed, torch.tensor([rows[name] for name in passed.batch.ids]), begins)
        walk.norms.append(_length(walk.adjoints.weights))
        if not np.isfinite(walk.norms[-1]):
            raise NonFinite(
                f"Walked back to step {step.number}, the derivatives in the weights overflow: this training is too "
                "rough to be differentiated. Train with a smaller rate, larger batches or a longer warm-up."
            )
        walk.after = step.number - 1
        if walk.after in replay.borders:
            temporary = temporary_path(kept)
            torch.save(walk, temporary)
            temporary.rename(kept)
            note_kept()
        step_done(len(queries))
    return walk


def _begin(job: Job, replay: Replay, queries: range, positions: int, components: int) -> _Walk:
    ends, count, examples = _end(replay, job, queries), len(queries), len(job.train)
    return _Walk(
        replay.steps,
        Adjoints(ends),
        [_length(ends)],
        torch.zeros(count, examples, dtype=torch.float64),
        torch.zeros(count, positions) if job.settings.tokens else None,
        torch.zeros(count, examples, components) if components else None,
    )


def _add(walk: _Walk, passed: Derivatives, rows: Int[Tensor, "example"], begins: Int[Tensor, "example+1"]) -> None:
    """Add the derivatives of a pass to the scores of its examples: minus them."""
    walk.scores.index_add_(1, rows, -passed.tokens.sum(2).double())
    if walk.components is not None:
        assert passed.components is not None
        walk.components.index_add_(1, rows, -passed.components.permute(1, 2, 0).float())
    if walk.tokens is not None:
        for place, row in enumerate(rows.tolist()):
            begin, length = int(begins[row]), int(begins[row + 1] - begins[row])
            walk.tokens[:, begin : begin + length] -= passed.tokens[:, place, :length]


def _end(replay: Replay, job: Job, queries: Sequence[int]) -> dict[str, Tensor]:
    """Return the gradients of the queries' losses at the end of the training, by parameter [query, *shape]."""
    # An earlier walk has left the weights of the first step.
    replay.load_end()
    names, weights = zip(*replay.parameters.items(), strict=True)
    losses = query_losses(replay, job, queries)
    rows = [torch.autograd.grad(each, weights, allow_unused=True, materialize_grads=True) for each in losses]
    return {name: torch.stack(found) for name, found in zip(names, zip(*rows, strict=True), strict=True)}


def _length(tensors: dict[str, Tensor]) -> float:
    squares = torch.stack([each.flatten(1).square().sum(1) for each in tensors.values()]).sum(0)
    return float(squares.sqrt().mean())
