"""How far a replay can be trusted: growth of what is walked, trainings without some examples, agreement of runs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from vestige.gradients import Reduction
from vestige.methods import Job, query_loss
from vestige.runs import Check
from vestige.storage import temporary_path
from vestige.training._replay import Replay

_GROWTH_WARNS = 1e7
"""Of float32's seven digits nothing is left, then, of what the adjoints began with. Large factors are no fault: where
a gradient begins at zero, as that of half of LoRA's matrices, the first steps of Adam are steep."""
_SMOOTH = 0.9
"""Below it, the training is too rough for its derivative to tell most of what leaving rows out does."""
_AGREES = 0.5
"""Below it, the runs' rankings share less than a quarter of their variance."""


def query_losses(replay: Replay, job: Job, queries: Sequence[int]) -> Iterator[Tensor]:
    """Yield the loss of each query under the weights that the replay's model has, one after another."""
    model = replay.model.eval()
    reduction: Reduction = job.settings.loss
    for query in queries:
        yield query_loss(model, job.queries, query, reduction)


def check_growth(norms: Float[np.ndarray, "step"]) -> Check:
    """Return how far the derivatives grew, from their mean lengths behind each step that was walked, from the last."""
    if not norms[0] > 0:
        reading = "No query's loss depends on the weights, so there is nothing to walk back."
        return Check(name="growth of adjoints", value=None, reading=reading, verdict="unknown")
    growth = float(norms.max() / norms[0])
    smooth = growth <= _GROWTH_WARNS
    steps = len(norms) - 1
    words = (
        f"Walked back over {steps:,} steps, the derivatives in the weights grew by a factor of at most {growth:.3g}, "
        f"{growth ** (1 / max(steps, 1)):.3g} a step"
    )
    reading = (
        f"{words}: float32 holds them."
        if smooth
        else f"{words}: they have lost their first digits, so do not trust the scores."
    )
    return Check(name="growth of adjoints", value=growth, reading=reading, verdict="good" if smooth else "warn")


def check_drops(replay: Replay, job: Job, scores: Tensor, rows: dict[str, int], drops: int, work: Path) -> Check:
    """Compare predicted with actual changes of the queries' losses for trainings without some examples."""
    if not replay.training.reweighs:
        reading = "A Trainer of your own has no weights of examples that could be set to 0."
        return Check(name="predicted and actual changes", value=None, reading=reading, verdict="unknown")
    learned = [rows[name] for name in replay.training.learned]
    size = max(1, round(len(learned) / 20))
    replay.load_end()
    with torch.no_grad():
        before = torch.stack([*query_losses(replay, job, range(len(job.queries)))]).double().cpu()
    predicted, actual = [], []
    for number in range(drops):
        path = work / f"drop-{number}.pt"
        chosen = np.sort(np.random.default_rng([job.settings.seed, number]).permutation(learned)[:size])
        if not path.is_file():
            replay.run_without(
                {job.train.examples[int(row)].id for row in chosen}, f"Without {size} examples, {number + 1} of {drops}"
            )
            with torch.no_grad():
                after = torch.stack([*query_losses(replay, job, range(len(job.queries)))]).double().cpu()
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
    if value < _SMOOTH:
        # Seen on 120,576 parameters and 48 steps: 0.72, and 0.98 after a warm-up of 12 steps.
        reading += (
            " The first steps of Adam at the full learning rate follow the signs of gradients, which flip where no "
            "derivative sees it: a training with a warm-up (--warmup) is predicted better."
        )
    return Check(name=name, value=value, reading=reading, verdict=verdict)


def compare_runs(runs: Sequence[Tensor]) -> Check:
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
