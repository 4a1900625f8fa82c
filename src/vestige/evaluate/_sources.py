"""`vestige evaluate sources`: do scores name the groups whose absence hurts?"""

import numpy as np

from vestige.evaluate._figures import Mark, interval_figure
from vestige.evaluate._group_measure import Agreement, agreement, effects, seed_agreement
from vestige.evaluate._result import Evaluation, EvaluationRow, Value, write_evaluation
from vestige.evaluate._scored import judged
from vestige.evaluate._statistics import first_rows
from vestige.evaluate._truth import open_truth
from vestige.settings import SourcesSettings, verb


@verb(SourcesSettings)
def sources(settings: SourcesSettings) -> Evaluation:
    """Correlate, over sources, summed scores with what the queries lose without the source.

    Works for every bank that leaves named groups out. In `settings.out`: `sources.json`, and the figure `sources`.

    Raises:
        UserError: The bank leaves out no groups, or scores and bank are not of the same data and queries.
    """
    truth = open_truth(settings.bank)
    found = judged(settings, "sources")
    effect = {one.name: effects(truth.of(one), truth.membership, truth.losses, truth.subset) for one in found.scored}
    results = {name: agreement(each, draws=settings.draws, seed=settings.seed) for name, each in effect.items()}
    noise = seed_agreement(truth.membership, truth.losses, truth.subset, truth.seeds)
    whole = first_rows(truth.membership, truth.subset).all(1)
    groups = [truth.names[number] for number in np.unique(truth.subset)[~whole]]
    first = next(iter(effect.values()))
    result = Evaluation(
        "sources",
        f"Effects of {len(groups)} groups on {len(truth.query_ids)} queries: summed scores against retraining without",
        tuple(EvaluationRow.of(one, _values(results[one.name])) for one in found.scored),
        (
            f"Intervals: 95 %, {settings.draws} bootstrap draws of queries; the groups are few and stay.",
            "One seed: the noise of retraining is unknown."
            if np.isnan(noise)
            else f"Two seeds of the truth agree with each other at a Pearson correlation of {noise:.3f}.",
            *found.notes,
        ),
        {
            "groups": groups,
            "truth": first.truth.mean(1).tolist(),
            "predicted": {name: each.predicted.mean(1).tolist() for name, each in effect.items()},
            "seed_agreement": noise,
            "bank": truth.bank.identity,
        },
    )
    marks = [Mark(one.name, results[one.name].pearson, one.opponent) for one in found.scored]
    label = "Pearson correlation over groups, queries together (95 % intervals)"
    figure = interval_figure("sources", marks, label, lines={"seed against seed": noise})
    return write_evaluation(result, settings.out, figure)


def _values(result: Agreement) -> dict[str, Value]:
    return {
        "Pearson": result.pearson,
        "Spearman": result.spearman,
        "Pearson per query": result.pearson_per_query,
        "Spearman per query": result.spearman_per_query,
        "undefined queries": result.undefined,
    }
