"""`vestige evaluate lds`: do scores predict the losses of models retrained on random subsets?"""

from typing import Any

import numpy as np

from vestige.evaluate._figures import Mark, interval_figure
from vestige.evaluate._lds_measure import Lds, ceiling, datamodeling_score, held_out_choice
from vestige.evaluate._result import Evaluation, EvaluationRow, write_evaluation
from vestige.evaluate._scored import Scored, judged, run_of
from vestige.evaluate._statistics import Estimate, mean_estimate
from vestige.evaluate._truth import Truth, check_disjoint, open_truth
from vestige.settings import LdsSettings, verb

DAMPED = "influence"
"""The method whose damping is varied by --damping-grid."""
_TOLD = {"loss": "minus the loss", "margin": "the margin"}


@verb(LdsSettings)
def lds(settings: LdsSettings) -> Evaluation:
    """Measure the linear datamodeling score of each method, with intervals over queries and subsets and the ceiling.

    In `settings.out`: `lds.json`, and the figure `lds` as PDF and PNG.

    Raises:
        SpecError: A scoring model is itself a member of the bank.
        UserError: Scores and bank are not of the same data and queries.
    """
    truth = open_truth(settings.bank, settings.value)
    found = judged(settings, "lds")
    notes = [check_disjoint(settings.bank, truth, one, allowed=settings.shared_model) for one in found.scored]
    results = {one.name: _measure(settings, truth, one) for one in found.scored}
    limit = ceiling(truth.losses, truth.subset, truth.seeds, seed=settings.seed)
    rows = [EvaluationRow.of(one, _values(results[one.name])) for one in found.scored]
    grid = _grid(settings, truth)
    members, subsets = len(truth.losses), len(np.unique(truth.subset))
    result = Evaluation(
        "lds",
        f"LDS: rank correlation over {subsets} subsets of summed scores with {_TOLD[truth.value]}, mean of "
        f"{len(truth.query_ids)} queries",
        (*rows, *grid["rows"]),
        (
            f"Intervals: 95 %, {settings.draws} bootstrap draws of queries and subsets. Ties share their mean rank.",
            _ceiling_note(limit.half, limit.whole),
            *dict.fromkeys(note for note in notes if note),
            *grid["notes"],
            *found.notes,
        ),
        {
            "value": truth.value,
            "subsets": subsets,
            "models": members,
            "queries": len(truth.query_ids),
            "fraction": float(truth.membership.mean()),
            "split_half": limit.half,
            "noise_ceiling": limit.whole,
            "bank": truth.bank.identity,
            "per_query": {name: one.per_query.tolist() for name, one in results.items()},
            "query_ids": truth.query_ids,
            "seeds": {name: list(one.seeds) for name, one in results.items()},
            "damping_grid": grid["details"],
        },
    )
    marks = [Mark(row.method, _estimate(row), row.opponent) for row in result.rows]
    figure = interval_figure("lds", marks, "LDS (95 % intervals)", lines={"noise ceiling": limit.whole})
    return write_evaluation(result, settings.out, figure)


def _measure(settings: LdsSettings, truth: Truth, scored: Scored) -> Lds:
    return datamodeling_score(
        truth.of(scored),
        truth.membership,
        truth.losses,
        subset=truth.subset,
        seeds=truth.seeds,
        draws=settings.draws,
        seed=settings.seed,
    )


def _values(result: Lds) -> dict[str, Any]:
    spread = f"{min(result.seeds):.3f} … {max(result.seeds):.3f}" if len(result.seeds) > 1 else None
    return {"LDS": result.estimate, "single seeds": spread, "undefined queries": result.undefined}


def _estimate(row: EvaluationRow) -> Estimate:
    value = row.values["LDS"]
    assert isinstance(value, Estimate)
    return value


def _ceiling_note(half: float, whole: float) -> str:
    if np.isnan(half):
        return "One seed: the noise of retraining is unknown. Give `vestige bank` --seeds 2 or more for a ceiling."
    return f"Noise ceiling {whole:.3f}: what perfect scores would reach (halves of the seeds agree at {half:.3f})."


def _grid(settings: LdsSettings, truth: Truth) -> dict[str, Any]:
    """Measure other dampings, the best of them chosen on a tenth of the queries and judged on the rest."""
    if not settings.damping_grid:
        return {"rows": (), "notes": (), "details": None}
    dampings = sorted({*settings.damping_grid, settings.damping})
    folder = settings.out / "runs"
    runs = [
        Scored(
            f"{DAMPED} damping {damping:g}",
            run_of(settings, DAMPED, folder / f"{DAMPED}-{damping:g}", changes={"damping": damping}),
        )
        for damping in dampings
    ]
    results = [_measure(settings, truth, run) for run in runs]
    best, others = held_out_choice([each.per_query for each in results], seed=settings.seed)
    judged_on = results[best].per_query[others]
    chosen = EvaluationRow.of(
        runs[best],
        {
            "LDS": mean_estimate(judged_on, settings.draws, settings.seed),
            "undefined queries": int(np.isnan(judged_on).sum()),
        },
    )
    note = (
        f"{runs[best].name}: chosen among {', '.join(f'{one:g}' for one in dampings)} on "
        f"{len(truth.query_ids) - len(others)} queries, judged on the other {len(others)} (interval over queries "
        "alone)."
    )
    table = {f"{damping:g}": each.estimate for damping, each in zip(dampings, results, strict=True)}
    return {"rows": (chosen,), "notes": (note,), "details": {"chosen": dampings[best], "all_queries": table}}
