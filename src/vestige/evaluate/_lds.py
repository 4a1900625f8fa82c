"""`vestige evaluate lds`: do scores predict the losses of models retrained on random subsets?"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.errors import DataError, SpecError
from vestige.evaluate import (
    AlignedScores,
    Estimate,
    Evaluation,
    EvaluationRow,
    Mark,
    Scored,
    Truth,
    bootstrap,
    check_disjoint,
    collect_scores,
    estimate_mean,
    first_of_group,
    interval_figure,
    keep_run,
    make_interval,
    mean_by_group,
    mean_of_known,
    open_truth,
    spearman,
    sum_over_sets,
    write_evaluation,
)
from vestige.progress import announce
from vestige.runs import FIRST_RUNG, LadderRecord, Scores, add_part
from vestige.settings import AttributeSettings, LdsSettings, with_settings

_TRUTHS = {"loss": "minus the loss", "margin": "the margin"}
_FEWEST_SUBSETS = 3
"""Two subsets correlate perfectly or not at all."""


class Lds(NamedTuple):
    """How well scores predict retraining."""

    estimate: Estimate
    """Mean over queries of the rank correlation over subsets, with a bootstrap interval over queries and subsets."""
    per_query: Float[np.ndarray, "query"]
    """NaN where a query's losses or sums do not vary."""
    undefined: int
    """Queries that were left out for that reason."""
    seeds: tuple[float, ...]
    """The same mean against the models of each seed alone: how much one retraining more or less changes."""


class Ceiling(NamedTuple):
    """How well the retrained models predict each other: no scores can be expected to do better than `whole`."""

    half: float
    """Mean over queries of the rank correlation of one half of the seeds with the other; NaN for a single seed."""
    whole: float
    """What perfect scores would reach against the mean over all seeds: sqrt(2 r / (1 + r)) for r = `half`."""


@with_settings(LdsSettings)
def lds(settings: LdsSettings) -> Evaluation:
    """Measure the linear datamodeling score of each method, with intervals over queries and subsets and the ceiling.

    In `settings.out`: `lds.json`, and the figure `lds` as PDF and PNG.

    Raises:
        SpecError: A scoring model is itself a member of the bank.
        UserError: Scores and bank are not of the same data and queries.
    """
    truth = open_truth(settings.bank, settings.value)
    found = collect_scores(settings, "lds")
    warnings = [check_disjoint(settings.bank, truth, one, allowed=settings.shared_model) for one in found.scored]
    drawn = settings.draws, settings.seed
    results = {one.name: judge_by(truth, truth.scores_of(one), *drawn) for one in found.scored}
    limit = ceiling(truth.losses, truth.bank.subsets, truth.bank.seeds, seed=settings.seed)
    rows = [EvaluationRow.of(one, _values(results[one.name])) for one in found.scored]
    grid_rows, grid_notes, grid = _vary_damping(settings, truth) if settings.damping_grid else ((), (), None)
    subsets = len(np.unique(truth.bank.subsets))
    noise = f"Noise ceiling {limit.whole:.3f}: what perfect scores would reach (halves of the seeds agree at "
    result = Evaluation(
        "lds",
        f"LDS: rank correlation over {subsets} subsets of summed scores with {_TRUTHS[truth.value]}, mean of "
        f"{len(truth.bank.query_ids)} queries",
        (*rows, *grid_rows),
        (
            f"Intervals: 95 %, {settings.draws} bootstrap draws of queries and subsets. Ties share their mean rank.",
            "One seed: the noise of retraining is unknown. Give `vestige bank` --seeds 2 or more for a ceiling."
            if np.isnan(limit.half)
            else f"{noise}{limit.half:.3f}).",
            *dict.fromkeys(note for note in warnings if note),
            *grid_notes,
            *found.notes,
        ),
        {
            "value": truth.value,
            "subsets": subsets,
            "models": len(truth.losses),
            "queries": len(truth.bank.query_ids),
            "fraction": float(truth.bank.membership.mean()),
            "split_half": limit.half,
            "noise_ceiling": limit.whole,
            "bank": truth.bank.identity,
            "per_query": {name: one.per_query.tolist() for name, one in results.items()},
            "query_ids": truth.bank.query_ids,
            "seeds": {name: list(one.seeds) for name, one in results.items()},
            "damping_grid": grid,
        },
    )
    marks = [Mark.of(row, "LDS") for row in result.rows]
    figure = interval_figure("lds", marks, "LDS (95 % intervals)", lines={"noise ceiling": limit.whole})
    return write_evaluation(result, settings.out, figure, settings.report_to)


def judge_by(truth: Truth, scores: AlignedScores | np.ndarray, draws: int, seed: int) -> Lds:
    """Return the linear datamodeling score of scores in the order of the truth."""
    bank = truth.bank
    numbers = {"subset": bank.subsets, "seeds": bank.seeds}
    return datamodeling_score(scores, bank.membership, truth.losses, **numbers, draws=draws, seed=seed)


def _values(result: Lds) -> dict[str, Any]:
    spread = f"{min(result.seeds):.3f} … {max(result.seeds):.3f}" if len(result.seeds) > 1 else None
    return {"LDS": result.estimate, "single seeds": spread, "undefined queries": result.undefined}


def _vary_damping(settings: LdsSettings, truth: Truth) -> tuple[tuple[EvaluationRow], tuple[str], dict[str, Any]]:
    """Measure other dampings; the best is chosen on a tenth of the queries and judged on the rest."""
    dampings = sorted({*settings.damping_grid, settings.damping})
    method, runs = AttributeSettings.model_fields["method"].default, []
    for damping in dampings:
        folder = settings.out / "runs" / f"{method}-{damping:g}"
        run = keep_run(settings, folder, {"method": method, "damping": damping})
        runs.append(Scored(f"{method} damping {damping:g}", run))
    results = [judge_by(truth, truth.scores_of(run), settings.draws, settings.seed) for run in runs]
    best, others = choose_held_out([each.per_query for each in results], seed=settings.seed)
    values = results[best].per_query[others]
    row = {
        "LDS": estimate_mean(values, settings.draws, settings.seed),
        "undefined queries": int(np.isnan(values).sum()),
    }
    note = (
        f"{runs[best].name}: chosen among {', '.join(f'{one:g}' for one in dampings)} on "
        f"{len(truth.bank.query_ids) - len(others)} queries, judged on the other {len(others)} (interval over queries "
        "alone)."
    )
    table = {f"{damping:g}": each.estimate for damping, each in zip(dampings, results, strict=True)}
    return (EvaluationRow.of(runs[best], row),), (note,), {"chosen": dampings[best], "all_queries": table}


def datamodeling_score(
    scores: "AlignedScores | Float[np.ndarray, 'query example']",
    membership: Bool[np.ndarray, "member example"],
    outputs: Float[np.ndarray, "member query"],
    *,
    subset: Int[np.ndarray, "member"] | None = None,
    seeds: Int[np.ndarray, "member"] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Lds:
    """Compute the linear datamodeling score (Park et al. 2023, arXiv:2303.14186) of scores against measured losses.

    With the sum `p[s, q]` of a query's scores over the examples of subset `s`, and the mean loss `l[s, q]` of the
    query under the models trained on it, the Spearman correlation over subsets of `p` with `-l`, mean over queries. A
    positive score promises a lower loss, hence the sign.

    Args:
        scores: Positive = training on the example lowers the query's loss. An array, or those of a run on disk.
        membership: True where the model was trained on the example.
        outputs: Loss of each query under each model.
        subset: Which models were trained on the same subset: their losses are averaged. None: each on its own.
        seeds: Which run of its subset each model is, for the spread over seeds.
        draws: Bootstrap draws; 0 for no interval.
        seed: Of the draws.

    Raises:
        DataError: Shapes do not fit, there are fewer than three subsets, or a loss or score is not finite.
    """
    _check(scores, membership, outputs)
    subset = np.arange(len(membership)) if subset is None else subset
    sums = sum_over_sets(scores, first_of_group(membership, subset))
    gains = -mean_by_group(outputs, subset)
    if len(gains) < _FEWEST_SUBSETS:
        raise DataError(f"The bank has {len(gains)} subsets; a rank correlation needs {_FEWEST_SUBSETS} at least.")
    per_query = spearman(sums, gains)

    def compute(rows: np.ndarray, columns: np.ndarray) -> float:
        return mean_of_known(spearman(sums[rows], gains[rows])[columns])

    estimate = make_interval(mean_of_known(per_query), bootstrap(compute, gains.shape, draws, seed))
    number = np.searchsorted(np.unique(subset), subset)
    sides = [] if seeds is None else [seeds == run for run in np.unique(seeds)]
    by_seed = tuple(mean_of_known(spearman(sums[number[side]], -outputs[side])) for side in sides)
    return Lds(estimate, per_query, int(np.isnan(per_query).sum()), by_seed)


def _check(scores: "AlignedScores | np.ndarray", membership: np.ndarray, outputs: np.ndarray) -> None:
    expected = (len(membership), scores.shape[0])
    if scores.shape[1] != membership.shape[1] or outputs.shape != expected:
        raise DataError(
            f"Scores of {scores.shape[0]} queries x {scores.shape[1]} examples do not fit models of "
            f"{membership.shape[1]} examples with losses of shape {outputs.shape}; expected {expected}."
        )
    blocks = (part for _, part in scores.blocks()) if isinstance(scores, AlignedScores) else [scores]
    for name, parts in {"scores": blocks, "losses": [outputs]}.items():
        if broken := sum(int((~np.isfinite(values)).sum()) for values in parts):
            raise DataError(f"{broken} of the {name} are not finite numbers, so nothing can be ranked by them.")


def ceiling(
    outputs: Float[np.ndarray, "member query"],
    subset: Int[np.ndarray, "member"],
    seeds: Int[np.ndarray, "member"],
    *,
    splits: int = 20,
    seed: int = 0,
) -> Ceiling:
    """Estimate what the noise of retraining leaves to be predicted, from splits of the seeds into halves.

    Models of one half of the seeds predict the mean losses of the other half's; an odd seed is left out of a split. The
    correlation r of two halves rises to 2 r / (1 + r) for all seeds (Spearman and Brown), and perfect scores would
    correlate with noisy means at the square root of that.

    Args:
        outputs: Loss of each query under each model.
        subset: Of each model.
        seeds: Which run of its subset each model is.
        splits: How many splits are averaged, where there are as many.
        seed: Of the splits.
    """
    runs = np.unique(seeds)
    half = len(runs) // 2
    if not half:
        return Ceiling(float("nan"), float("nan"))
    random, found = np.random.default_rng(seed), []
    for _ in range(splits if len(runs) > 2 else 1):
        order = random.permutation(runs)
        sides = [np.isin(seeds, order[begin : begin + half]) for begin in (0, half)]
        means = [mean_by_group(outputs[side], subset[side]) for side in sides]
        found.append(mean_of_known(spearman(*means)))
    r = mean_of_known(np.array(found))
    # Below zero there is only noise, of which no root can be taken.
    return Ceiling(r, float(np.sqrt(2 * r / (1 + r))) if r > 0 else 0.0 if r <= 0 else float("nan"))


def choose_held_out(
    candidates: list[Float[np.ndarray, "query"]], *, share: float = 0.1, seed: int = 0
) -> tuple[int, Int[np.ndarray, "query"]]:
    """Return the candidate that is best on a random share of the queries, and the other queries, to judge it on.

    Args:
        candidates: The correlation of each query, for every candidate.
        share: Of the queries to choose on; one at least.
        seed: Of which queries these are.
    """
    order = np.random.default_rng(seed).permutation(len(candidates[0]))
    count = max(1, round(share * len(order)))
    means = [mean_of_known(each[order[:count]]) for each in candidates]
    return int(np.nanargmax(np.nan_to_num(means, nan=-np.inf))), np.sort(order[count:])


def judge_ladder(run: str | Path, bank: str | Path, *, draws: int = 1000, seed: int = 0) -> LadderRecord:
    """Measure the linear datamodeling score of the first and the last rung, and add it to the run's record.

    Both are judged by the candidates alone, what is not scored counting nothing: so the difference is what exact scores
    buy. The first rung is judged by all rows as well.

    Args:
        run: Folder of a run with `rerank`, made with all scores (`dense`).
        bank: Folder of a bank of the same data and queries.
        draws: Of the bootstrap, for intervals.
        seed: Of the draws.

    Raises:
        SpecError: The run has one ranking alone.
        IndexMismatch: The bank is of other data or queries.
        UserError: The run lacks the scores of all its rows.
    """
    folder, truth = Path(run), open_truth(Path(bank))
    last = Scores.open(folder)
    ladder = last.run.ladder
    if ladder is None:
        raise SpecError(f"{folder} has one ranking alone. Make it with vestige attribute --rerank 50.")
    rungs = [Scored(one.run.method, one) for one in (Scores.open(folder / FIRST_RUNG), last)]
    for rung in rungs:
        if warning := check_disjoint(Path(bank), truth, rung, allowed=False):
            announce(warning)
    tables = [truth.scores_of(rung) for rung in rungs]
    below, exact = (np.stack([table.of_query(query) for query in range(table.shape[0])]) for table in tables)
    scored = np.isfinite(exact)
    measure = partial(judge_by, truth, draws=draws, seed=seed)
    of_all, of_some = measure(below).estimate, measure(np.where(scored, below, 0.0)).estimate
    found = list(ladder.rungs)
    found[0] = found[0].model_copy(update={"lds": tuple(of_some), "lds_of_all": tuple(of_all)})
    found[-1] = found[-1].model_copy(update={"lds": tuple(measure(np.where(scored, exact, 0.0)).estimate)})
    ladder = ladder.model_copy(update={"rungs": found})
    add_part(folder, last.run, "", ladder=ladder)
    return ladder
