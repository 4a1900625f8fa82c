"""Replay: the exact derivative of a query's loss under the trained weights in the weight of every example.

The training is run again and walked backward (see `vestige.training.Replay`). What is walked is kept beside the run at
the border of every segment, so a kill loses one segment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import psutil
import torch
from jaxtyping import Float
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from vestige.data import TokenizedData
from vestige.errors import IndexMismatch, SpecError
from vestige.gradients import Reduction
from vestige.methods import EXACT_SHARE, HELPS, Job, Method, digest, method, query_loss, settings_key
from vestige.models import LoadedModel
from vestige.progress import announce
from vestige.runs import Check, Meaning, ScoreBlock
from vestige.settings import AttributeSettings, TrainSettings
from vestige.storage import partial_folder, temporary_path
from vestige.training._adjoint import Adjoints
from vestige.training._examples import read_learned
from vestige.training._replay import KEPT_CLASSES, Replay, read_settings
from vestige.training._store import TrainingRun

_COPIES = 4
"""Numbers per trained parameter and query: adjoints of the weight and of two moments, and one on its way."""
_GROWTH_WARNS = 1e7
"""Of float32's seven digits nothing is left, then, of what the adjoints began with. Large factors are no fault: where
a gradient begins at zero, as that of half of LoRA's matrices, the first steps of Adam are steep."""
_AGREES = 0.5
"""Below it, the runs' rankings share less than a quarter of their variance."""


class Trained(NamedTuple):
    """A finished training of `vestige train`, and the settings to run it again."""

    run: TrainingRun
    settings: TrainSettings


@dataclass
class _Walk:
    """How far the adjoints of some queries have been walked."""

    after: int
    """The step behind which they stand."""
    adjoints: Adjoints
    scores: Float[Tensor, "query example"]
    norms: list[float]
    """Length of the adjoints of the weights behind each step that was walked, mean over queries, from the last."""


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
    _checks: list[Check] = field(default_factory=list, repr=False, init=False)
    _trained: tuple[Trained, ...] = field(default=(), repr=False, init=False)

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

    def adopt(self, settings: AttributeSettings) -> AttributeSettings:
        """Open the recorded trainings; return the settings with the model of the first, and how it read its data.

        Raises:
            SpecError: A training cannot be replayed, or has no checkpoint yet.
        """
        given = settings.training
        folders = given if isinstance(given, list | tuple) else [] if given is None else [given]
        live = {"model": settings.model, "data": settings.data, "tokenizer": settings.tokenizer}
        runs = [TrainingRun.open(folder) for folder in folders]
        self._trained = tuple(Trained(run, read_settings(run, **live)) for run in runs)
        first = self._trained[0]
        steps = first.run.checkpoints
        if not steps:
            raise SpecError(f"{first.run.folder} has no checkpoint yet. Let `vestige train` finish first.")
        changed: dict[str, Any] = {"model": str(steps[max(steps)]), "data": None}
        changed["max_length"] = first.settings.max_length
        if settings.chat is None:
            changed["chat"] = first.settings.chat
        return settings.model_copy(update=changed)

    def read_train(self, loaded: LoadedModel) -> TokenizedData:
        """Return all examples as the first training learned them."""
        return read_learned(self._trained[0].settings, loaded)[0]

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of all rows; an example that the training did not draw scores 0."""
        self._checks = []
        runs = [self._score(job, number, one) for number, one in enumerate(self._trained)]
        if len(runs) > 1:
            self._checks.append(_compare_runs(runs))
        scores = torch.stack(runs).mean(0)
        yield ScoreBlock(torch.arange(len(job.train)), scores)

    def checks(self, job: Job) -> list[Check]:  # noqa: ARG002
        """Return how the adjoints grew, how trainings without some examples ended, and how several runs agree."""
        return list(self._checks)

    def _score(self, job: Job, number: int, trained: Trained) -> Float[Tensor, "query example"]:
        key = digest(settings_key(job), trained.run.id, job.train.fingerprint)[:16]
        work = partial_folder(job.settings.out) / f"replay-{number}-{key}"
        replay = Replay(trained.run, trained.settings, work)
        if replay.data.fingerprint != job.train.fingerprint:
            raise IndexMismatch(
                f"{trained.run.folder} was trained on other data than {self._trained[0].run.folder}. Average trainings "
                "that differ in --seed alone."
            )
        rows = {example.id: row for row, example in enumerate(job.train.examples)}
        walks = [
            _walk(replay, job, some, rows, work / f"walk-{some[0]}-{some[-1]}.pt")
            for some in _split_queries(job, replay)
        ]
        scores = torch.cat([walk.scores for walk in walks])
        self._checks.append(_check_growth(walks))
        if self.drops and job.settings.trust:
            self._checks.append(_check_drops(replay, job, scores, rows, self.drops, work))
        return scores


def _split_queries(job: Job, replay: Replay) -> list[range]:
    """Return groups of queries whose adjoints fit into memory together."""
    size = _COPIES * sum(each.numel() * each.element_size() for each in replay.parameters.values())
    fitting = max(1, int(EXACT_SHARE * psutil.virtual_memory().available / size))
    count = len(job.queries)
    groups = [range(begin, min(begin + fitting, count)) for begin in range(0, count, fitting)]
    if len(groups) > 1:
        announce(f"The adjoints of {fitting} queries fit into memory: {len(groups)} walks, one after another.")
    return groups


def _walk(replay: Replay, job: Job, queries: range, rows: dict[str, int], kept: Path) -> _Walk:
    """Walk some queries back to the first step, from where an interrupted walk was."""
    if kept.is_file():
        with torch.serialization.safe_globals([_Walk, *KEPT_CLASSES]):
            walk: _Walk = torch.load(kept, weights_only=True)
    else:
        ends = _end(replay, job, queries)
        scores = torch.zeros(len(queries), len(job.train), dtype=torch.float64)
        walk = _Walk(replay.steps, Adjoints(ends), scores, [_length(ends)])
    for step, found in replay.walk_back(walk.adjoints, walk.after):
        for passed in found:
            into = torch.tensor([rows[name] for name in passed.batch.ids])
            walk.scores.index_add_(1, into, -passed.tokens.sum(2).double())
        walk.norms.append(_length(walk.adjoints.weights))
        walk.after = step.number - 1
        if walk.after in replay.borders:
            temporary = temporary_path(kept)
            torch.save(walk, temporary)
            temporary.rename(kept)
    return walk


def _end(replay: Replay, job: Job, queries: Sequence[int]) -> dict[str, Tensor]:
    """Return the gradients of the queries' losses at the end of the training, by parameter [query, *shape]."""
    # An earlier walk has left the weights of the first step.
    replay.load_end()
    parameters, rows = replay.parameters, []
    for losses in _query_losses(replay, job, queries):
        found = torch.autograd.grad(losses, [*parameters.values()], allow_unused=True)
        rows.append(
            [
                torch.zeros_like(one) if each is None else each
                for one, each in zip(parameters.values(), found, strict=True)
            ]
        )
    return {name: torch.stack([row[place] for row in rows]) for place, name in enumerate(parameters)}


def _query_losses(replay: Replay, job: Job, queries: Sequence[int]) -> Iterator[Tensor]:
    """Yield the loss of each query under the weights that the replay's model has, one after another."""
    model = replay.model.eval()
    reduction: Reduction = job.settings.loss
    for query in queries:
        yield query_loss(model, job.queries, query, reduction)


def _length(tensors: dict[str, Tensor]) -> float:
    squares = torch.stack([each.flatten(1).square().sum(1) for each in tensors.values()]).sum(0)
    return float(squares.sqrt().mean())


def _check_growth(walks: Sequence[_Walk]) -> Check:
    norms = np.mean([walk.norms for walk in walks], axis=0)
    if not norms[0] > 0:
        reading = "No query's loss depends on the weights, so there is nothing to walk back."
        return Check(name="growth of adjoints", value=None, reading=reading, verdict="unknown")
    growth = float(norms.max() / norms[0])
    smooth = growth <= _GROWTH_WARNS
    steps = len(norms) - 1
    words = f"Walked back over {steps:,} steps, the derivatives in the weights grew by a factor of at most {growth:.3g}"
    reading = (
        f"{words}: float32 holds them."
        if smooth
        else f"{words}: they have lost their first digits, so do not trust the scores."
    )
    return Check(name="growth of adjoints", value=growth, reading=reading, verdict="good" if smooth else "warn")


def _check_drops(replay: Replay, job: Job, scores: Tensor, rows: dict[str, int], drops: int, work: Path) -> Check:
    """Compare predicted with actual changes of the queries' losses for trainings without some examples."""
    learned = [rows[name] for name in replay.learned]
    size = max(1, round(len(learned) / 20))
    replay.load_end()
    with torch.no_grad():
        before = torch.stack([*_query_losses(replay, job, range(len(job.queries)))]).double().cpu()
    predicted, actual = [], []
    for number in range(drops):
        path = work / f"drop-{number}.pt"
        chosen = np.sort(np.random.default_rng([job.settings.seed, number]).permutation(learned)[:size])
        if not path.is_file():
            replay.run_without(
                {job.train.examples[int(row)].id for row in chosen}, f"Without {size} examples, {number + 1} of {drops}"
            )
            with torch.no_grad():
                after = torch.stack([*_query_losses(replay, job, range(len(job.queries)))]).double().cpu()
            temporary = temporary_path(path)
            torch.save(after, temporary)
            temporary.rename(path)
        actual.append(torch.load(path) - before)
        predicted.append(scores[:, chosen].sum(1))
    return _judge_drops(torch.cat(predicted).numpy(), torch.cat(actual).numpy(), size, drops)


def _judge_drops(predicted: np.ndarray, actual: np.ndarray, size: int, drops: int) -> Check:
    name, what = "predicted and actual changes", f"{drops} trainings without {size} random examples each"
    if len(predicted) < 3 or np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return Check(
            name=name, value=None, reading=f"{what}: too few different values to correlate.", verdict="unknown"
        )
    value = float(pearsonr(predicted, actual)[0])  # pyright: ignore[reportArgumentType]
    slope = float(predicted @ actual / (predicted @ predicted))
    verdict = "good" if value >= _AGREES else "warn"
    reading = (
        f"{what}: the queries' losses changed as predicted with a correlation of {value:.2f} and a slope of "
        f"{slope:.2f} over {len(predicted)} pairs."
    )
    return Check(name=name, value=value, reading=reading, verdict=verdict)


def _compare_runs(runs: Sequence[Tensor]) -> Check:
    """Return the mean rank correlation of the runs' scores, over pairs of runs and queries."""
    found = [
        spearmanr(one[query].numpy(), other[query].numpy())[0]
        for number, one in enumerate(runs)
        for other in runs[:number]
        for query in range(len(one))
    ]
    value = float(np.nanmean(np.array(found, dtype=np.float64)))
    verdict = "good" if value >= _AGREES else "warn"
    reading = f"Scores of {len(runs)} trainings rank the examples alike at a mean rank correlation of {value:.2f}."
    return Check(name="agreement of trainings", value=value, reading=reading, verdict=verdict)
