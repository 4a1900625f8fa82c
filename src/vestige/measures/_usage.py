"""Whether a data set as a whole was trained on: one question about all examples, with a p-value."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vestige.errors import DataError, SpecError
from vestige.measures._attack import Interval, area, share

Scores = Float[np.ndarray, "example measure"]

FEWEST = 20
"""Examples, or pairs, on each side: half of them weigh the measures, the other half is tested."""
SPLITS = 25


class Usage(NamedTuple):
    """What the scores of two sets of examples say about one of them being trained on."""

    effect: Interval
    """Chance that an example of the data scores above a held-out one, or above its own twin; 0.5 by chance."""
    p_value: float
    """Of no difference, one-sided: small where the data score higher. Twice the median over random halves."""
    data: int
    holdout: int
    paired: bool


def infer_usage(data: Scores, holdout: Scores, *, paired: bool = False, splits: int = SPLITS, seed: int = 0) -> Usage:
    """Test whether examples of the data score higher than held-out ones, by all measures together.

    One half of the examples chooses a weight for every measure (logistic regression), the other half is tested with
    that one sum: by Welch's t-test of the two means, or, for pairs, by Wilcoxon's signed-rank test of the differences.
    Many halves are drawn; twice the median of their p-values is a p-value (DiCiccio et al. 2020). The interval is that
    of the half whose p-value is the median: DeLong's, or Clopper-Pearson's for pairs. Maini et al. 2024, "LLM dataset
    inference"; for pairs of which one was drawn at random to be trained on, Huang et al. 2024, "A general framework for
    data-use auditing of ML models".

    A small p-value says that the two sets differ for this model. That the model was trained on the data follows only
    if nothing else sets them apart: a holdout drawn at random from the same source, or twins chosen by a coin.

    Args:
        data: A value of every measure, oriented so that high speaks for membership; rows with NaN are left out.
        holdout: The same of examples that were not trained on.
        paired: Row i of the two belong together; rows in which either has NaN are left out.
        splits: Random halves.
        seed: Of the halves.

    Raises:
        DataError: Shapes that do not agree, or fewer than `FEWEST` examples on a side.
        SpecError: No splits.
    """
    fitting = data.ndim == holdout.ndim == 2 and data.shape[1] == holdout.shape[1]
    if not fitting or (paired and len(data) != len(holdout)):
        raise DataError(f"Scores {data.shape} and {holdout.shape}: give [example, measure], of pairs as many rows.")
    if splits < 1:
        raise SpecError(f"splits={splits}: give 1 or more.")
    if paired:
        data, holdout = (each[np.isfinite(data).all(1) & np.isfinite(holdout).all(1)] for each in (data, holdout))
    else:
        data, holdout = (each[np.isfinite(each).all(1)] for each in (data, holdout))
    fewest = min(len(data), len(holdout))
    if fewest < FEWEST:
        raise DataError(f"{len(data)} examples and {len(holdout)} held out have all measures; {FEWEST} of each needed.")
    draw, tests = np.random.default_rng(seed), []
    for _ in range(splits):
        halves = [draw.permutation(len(data)) % 2 == 0]
        halves.append(halves[0] if paired else draw.permutation(len(holdout)) % 2 == 0)
        tests.append(_test_half(data, holdout, halves, paired))
    tests.sort(key=lambda each: each[0])
    p_value, effect = tests[len(tests) // 2]
    return Usage(effect, min(1.0, 2 * p_value), len(data), len(holdout), paired)


def _test_half(data: Scores, holdout: Scores, halves: list[np.ndarray], paired: bool) -> tuple[float, Interval]:
    """Weigh the measures on one half, and return p-value and effect on the other."""
    from scipy.stats import ttest_ind, wilcoxon

    fit, tested = [(data[halves[0]], holdout[halves[1]]), (data[~halves[0]], holdout[~halves[1]])]
    weights = _weigh(*fit, paired=paired)
    ours, others = (each @ weights for each in tested)
    if not paired:
        if np.ptp(np.concatenate([ours, others])) == 0:
            return 1.0, area(ours, others)
        return _p_value(ttest_ind(ours, others, equal_var=False, alternative="greater")), area(ours, others)
    differences = ours - others
    differences = differences[differences != 0]
    effect = share(int((differences > 0).sum()), len(differences))
    return (_p_value(wilcoxon(differences, alternative="greater")) if len(differences) else 1.0), effect


def _p_value(test: Any) -> float:
    return float(test.pvalue)


def _weigh(data: Scores, holdout: Scores, *, paired: bool) -> Float[np.ndarray, "measure"]:
    """Return weights of the measures that set the two sides apart; of pairs, their differences from zero."""
    from sklearn.linear_model import LogisticRegression

    if paired:
        differences = data - holdout
        rows, labels = np.concatenate([differences, -differences]), np.repeat([1, 0], len(data))
    else:
        rows, labels = np.concatenate([data, holdout]), np.repeat([1, 0], [len(data), len(holdout)])
    scale = rows.std(0)
    scale[scale == 0] = 1.0
    centred = (rows - (0 if paired else rows.mean(0))) / scale
    model = LogisticRegression(C=1.0, max_iter=1000, class_weight="balanced", fit_intercept=not paired)
    return model.fit(centred, labels).coef_[0] / scale
