"""`vestige evaluate randomisation`: do scores change when the model forgets all it has learned?"""

from typing import Any

import numpy as np
from jaxtyping import Float

from vestige.errors import SpecError
from vestige.evaluate import (
    Evaluation,
    EvaluationRow,
    Mark,
    Scored,
    collect_scores,
    estimate_mean,
    interval_figure,
    keep_run,
    mean_of_known,
    read_together,
    spearman,
    write_evaluation,
)
from vestige.methods import METHODS, randomise
from vestige.models import load_model
from vestige.runs import Scores
from vestige.settings import RandomisationSettings, with_settings


@with_settings(RandomisationSettings)
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
    found = collect_scores(settings, "randomisation")
    scored = [one for one in found.scored if METHODS.find(one.run.run.method).needs_model]
    text_alone = [one.name for one in found.scored if one not in scored]
    tables = {one.name: _correlate_with_noise(settings, one) for one in scored}
    rows = [EvaluationRow.of(one, _values(tables[one.name], settings)) for one in scored]
    result = Evaluation(
        "randomisation",
        f"Rank correlation with the scores from {settings.seeds} models of random weights, mean of queries",
        tuple(rows),
        (
            "Near 0: the ranking needs what was learned. Near 1: it is there without any learning, in lengths and "
            "shared tokens.",
            f"Intervals: 95 %, {settings.draws} bootstrap draws of queries.",
            *([f"{', '.join(text_alone)}: no weights are used, so nothing can change."] if text_alone else []),
            *found.notes,
        ),
        {"seeds": settings.seeds, "per_query": {name: table.tolist() for name, table in tables.items()}},
    )
    marks = [Mark.of(row, "correlation") for row in rows]
    figure = interval_figure("randomisation", marks, "rank correlation with scores from random weights")
    return write_evaluation(result, settings.out, figure, settings.report_to)


def _correlate_with_noise(settings: RandomisationSettings, scored: Scored) -> Float[np.ndarray, "seed query"]:
    table = []
    for number in range(settings.seeds):
        run = _score_noise(settings, scored.run.run.method, settings.seed + number)
        queries, _, tables = read_together([scored, Scored(scored.name, run)])
        pairs = (tuple(each.of_query(query)[:, None] for each in tables) for query in range(len(queries)))
        table.append(np.concatenate([spearman(*pair) for pair in pairs]))
    return np.array(table)


def _score_noise(settings: RandomisationSettings, method: str, seed: int) -> Scores:
    folder = settings.out / "runs" / f"{method}-random-weights-{seed}"
    loaded = load_model(settings.model, **settings.loading)
    with randomise(loaded.model, seed) as model:
        live: dict[str, Any] = {"model": model, "tokenizer": loaded.tokenizer, "precision": "auto", "device": "auto"}
        # The same answers: a model of noise would generate noise.
        return keep_run(settings, folder, {"method": method, "answer": "given"}, live)


def _values(table: np.ndarray, settings: RandomisationSettings) -> dict[str, Any]:
    of_queries, means = table.mean(0), [mean_of_known(row) for row in table]
    return {
        "correlation": estimate_mean(of_queries, settings.draws, settings.seed),
        "single models": f"{min(means):.3f} … {max(means):.3f}" if len(means) > 1 else None,
        "undefined queries": int(np.isnan(of_queries).sum()),
    }
