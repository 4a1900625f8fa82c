"""`vestige evaluate randomisation`: do scores change when the model forgets all it has learned?"""

from typing import Any

import numpy as np

from vestige.errors import SpecError
from vestige.evaluate._figures import Mark, interval_figure
from vestige.evaluate._result import Evaluation, EvaluationRow, write_evaluation
from vestige.evaluate._scored import Scored, judged, run_of, together
from vestige.evaluate._statistics import mean_estimate, spearman
from vestige.methods import METHODS, randomise
from vestige.models import load_model
from vestige.runs import Scores
from vestige.settings import RandomisationSettings, verb


@verb(RandomisationSettings)
def randomisation(settings: RandomisationSettings) -> Evaluation:
    """Rank correlation of each method's scores with those from randomised weights: near 0 where learning matters.

    The sanity check of Adebayo et al. (2018, arXiv:1810.03292). Every weight becomes normal noise of the mean and
    spread that its tensor had. In `settings.out`: `randomisation.json`, and the figure `randomisation`.

    Raises:
        SpecError: The scores cannot be made again: no model, data and queries, or finished runs were given.
    """
    if settings.run or settings.index is not None:
        raise SpecError(
            "Scores of randomised weights are made again, with the same settings. Type --methods NAMES with --model, "
            "--data and --queries, in place of --run and --index."
        )
    if settings.model is None:
        raise SpecError("There is no model whose weights could be randomised. Type --model MODEL.")
    found = judged(settings, "randomisation")
    scored = [one for one in found.scored if METHODS.find(one.run.run.method).needs_model]
    text_alone = [one.name for one in found.scored if one not in scored]
    tables = {one.name: _correlations(settings, one) for one in scored}
    rows = [EvaluationRow.of(one, _values(tables[one.name], settings)) for one in scored]
    notes = [f"{', '.join(text_alone)}: no weights are used, so nothing can change."] if text_alone else []
    result = Evaluation(
        "randomisation",
        f"Rank correlation with the scores from {settings.seeds} models of random weights, mean of queries",
        tuple(rows),
        (
            "Near 0: the ranking needs what was learned. Near 1: it is there without any learning, in lengths and "
            "shared tokens.",
            f"Intervals: 95 %, {settings.draws} bootstrap draws of queries.",
            *notes,
            *found.notes,
        ),
        {"seeds": settings.seeds, "per_query": {name: table.tolist() for name, table in tables.items()}},
    )
    marks = [
        Mark(one.name, mean_estimate(tables[one.name].mean(0), settings.draws, settings.seed), one.opponent)
        for one in scored
    ]
    figure = interval_figure("randomisation", marks, "rank correlation with scores from random weights")
    return write_evaluation(result, settings.out, figure)


def _correlations(settings: RandomisationSettings, scored: Scored) -> np.ndarray:
    """Rank correlations, [seed, query]."""
    table = []
    for number in range(settings.seeds):
        other = Scored(scored.name, _on_noise(settings, scored.run.run.method, settings.seed + number))
        queries, _, tables = together([scored, other])
        pairs = (tuple(each.of_query(query)[:, None] for each in tables) for query in range(len(queries)))
        table.append(np.concatenate([spearman(*pair) for pair in pairs]))
    return np.array(table)


def _on_noise(settings: RandomisationSettings, method: str, seed: int) -> Scores:
    # The same answers: a model of noise would generate noise.
    changes = {"answer": "given"}
    folder = settings.out / "runs" / f"{method}-random-weights-{seed}"
    loaded = load_model(
        settings.model, tokenizer=settings.tokenizer, precision=settings.precision, device=settings.device
    )
    with randomise(loaded.model, seed) as model:
        live: dict[str, Any] = {"model": model, "tokenizer": loaded.tokenizer, "precision": "auto", "device": "auto"}
        return run_of(settings, method, folder, changes=changes, live=live)


def _values(table: np.ndarray, settings: RandomisationSettings) -> dict[str, Any]:
    of_queries = table.mean(0)
    means = [float(np.mean(row[~np.isnan(row)])) if not np.isnan(row).all() else float("nan") for row in table]
    return {
        "correlation": mean_estimate(of_queries, settings.draws, settings.seed),
        "single models": f"{min(means):.3f} … {max(means):.3f}" if len(means) > 1 else None,
        "undefined queries": int(np.isnan(of_queries).sum()),
    }
