"""`vestige evaluate sources`: does the sum of a group's scores predict what the queries lose without the group?"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.errors import DataError
from vestige.evaluate import (
    AlignedScores,
    Estimate,
    Evaluation,
    EvaluationRow,
    Mark,
    bootstrap,
    collect_scores,
    estimate_mean,
    first_of_group,
    interval_figure,
    make_interval,
    mean_by_group,
    mean_of_known,
    open_truth,
    pearson,
    spearman,
    sum_over_sets,
    write_evaluation,
)
from vestige.settings import SourcesSettings, with_settings

_FEWEST_GROUPS = 3


class Effects(NamedTuple):
    """What leaving out each group did, and what the scores say it would do."""

    truth: Float[np.ndarray, "group query"]
    """Loss without the group minus loss with everything, means over seeds: positive where the group helps."""
    predicted: Float[np.ndarray, "group query"]
    """Sum of the group's scores."""


class Agreement(NamedTuple):
    """How well predicted and true effects of groups agree."""

    pearson: Estimate
    """Of the effects on all queries together, over groups; interval over queries."""
    spearman: Estimate
    pearson_per_query: Estimate
    """Mean over queries of the correlation over groups; interval over queries."""
    spearman_per_query: Estimate
    undefined: int
    """Queries whose effects do not vary over groups."""


@with_settings(SourcesSettings)
def sources(settings: SourcesSettings) -> Evaluation:
    """Correlate, over sources, summed scores with what the queries lose without the source.

    Works for every bank that leaves named groups out. In `settings.out`: `sources.json`, and the figure `sources`.

    Raises:
        UserError: The bank leaves out no groups, or scores and bank are not of the same data and queries.
    """
    truth = open_truth(settings.bank)
    found = collect_scores(settings, "sources")
    arrays = truth.bank.membership, truth.losses, truth.bank.subsets
    effects = {one.name: compute_effects(truth.scores_of(one), *arrays) for one in found.scored}
    noise = correlate_seeds(*arrays, truth.bank.seeds)
    whole = first_of_group(truth.bank.membership, truth.bank.subsets).all(1)
    groups = [truth.bank.subset_names[number] for number in np.unique(truth.bank.subsets)[~whole]]
    names = ("Pearson", "Spearman", "Pearson per query", "Spearman per query", "undefined queries")
    results = {name: correlate_effects(each, settings.draws, settings.seed) for name, each in effects.items()}
    rows = [EvaluationRow.of(one, dict(zip(names, results[one.name], strict=True))) for one in found.scored]
    result = Evaluation(
        "sources",
        f"Effects of {len(groups)} groups on {len(truth.bank.query_ids)} queries: summed scores against retraining "
        "without",
        tuple(rows),
        (
            f"Intervals: 95 %, {settings.draws} bootstrap draws of queries; the groups are few and stay.",
            "One seed: the noise of retraining is unknown."
            if np.isnan(noise)
            else f"Two seeds of the truth agree with each other at a Pearson correlation of {noise:.3f}.",
            *found.notes,
        ),
        {
            "groups": groups,
            "truth": next(iter(effects.values())).truth.mean(1).tolist(),
            "predicted": {name: each.predicted.mean(1).tolist() for name, each in effects.items()},
            "seed_agreement": noise,
            "bank": truth.bank.identity,
        },
    )
    marks = [Mark.of(row, "Pearson") for row in rows]
    label = "Pearson correlation over groups, queries together (95 % intervals)"
    figure = interval_figure("sources", marks, label, lines={"seed against seed": noise})
    return write_evaluation(result, settings.out, figure, settings.report_to)


def compute_effects(
    scores: "AlignedScores | Float[np.ndarray, 'query example']",
    membership: Bool[np.ndarray, "member example"],
    outputs: Float[np.ndarray, "member query"],
    subset: Int[np.ndarray, "member"],
) -> Effects:
    """Return true and predicted effects of the groups that a bank leaves out, in the order of its subsets.

    Which examples a group has is read from what the models were not trained on, never from a position in a list.

    Raises:
        DataError: No model was trained on everything, or there are fewer than three groups.
    """
    truth, left_out = _compare_left_out(membership, outputs, subset)
    return Effects(truth, sum_over_sets(scores, left_out))


def _compare_left_out(
    membership: Bool[np.ndarray, "member example"],
    outputs: Float[np.ndarray, "member query"],
    subset: Int[np.ndarray, "member"],
) -> tuple[Float[np.ndarray, "group query"], Bool[np.ndarray, "group example"]]:
    """Return the effect of leaving out each group, and which examples it has."""
    trained = first_of_group(membership, subset)
    whole = trained.all(1)
    if not whole.any():
        raise DataError(
            "The bank has no model of everything to compare with. Make one with --leave-source-out, --leave-out-lists "
            "or --leave-one-out; for random subsets there is `vestige evaluate lds`."
        )
    if (~whole).sum() < _FEWEST_GROUPS:
        raise DataError(
            f"The bank leaves out {int((~whole).sum())} groups; a correlation over groups needs {_FEWEST_GROUPS} at "
            "least."
        )
    means = mean_by_group(outputs, subset)
    return means[~whole] - means[whole].mean(0), ~trained[~whole]


def correlate_effects(found: Effects, draws: int = 1000, seed: int = 0) -> Agreement:
    """Return correlations over groups, with bootstrap intervals over queries.

    Groups are few and are not resampled: the interval says how much rests on these queries, not on these groups.
    """
    truth, predicted = found
    queries = truth.shape[1]

    def compute(rows: np.ndarray) -> Float[np.ndarray, "side group"]:
        return np.stack([side[:, rows].mean(1) for side in (predicted, truth)])

    drawn = np.ascontiguousarray(np.moveaxis(bootstrap(compute, [queries], draws, seed), 0, 2))
    together, per_query = [], []
    for correlate in (pearson, spearman):
        value = float(correlate(predicted.mean(1, keepdims=True), truth.mean(1, keepdims=True))[0])
        values = correlate(*drawn) if queries > 1 else np.zeros(0)
        together.append(make_interval(value, values))
        per_query.append(correlate(predicted, truth))
    one, other = (estimate_mean(values, draws, seed) for values in per_query)
    return Agreement(together[0], together[1], one, other, int(np.isnan(per_query[0]).sum()))


def correlate_seeds(
    membership: Bool[np.ndarray, "member example"],
    outputs: Float[np.ndarray, "member query"],
    subset: Int[np.ndarray, "member"],
    seeds: Int[np.ndarray, "member"],
) -> float:
    """Return the noise ceiling: mean Pearson correlation of the effects of two seeds, all queries pooled.

    NaN for a single seed.
    """
    sides = [seeds == run for run in np.unique(seeds)]
    truths = [_compare_left_out(membership[side], outputs[side], subset[side])[0].mean(1)[:, None] for side in sides]
    pairs = [pearson(one, other)[0] for place, one in enumerate(truths) for other in truths[:place]]
    return mean_of_known(np.array(pairs, dtype=np.float64))
