"""Slow, obvious versions of the evaluations: loops over pairs, subsets and orders."""

import math
from fractions import Fraction
from itertools import pairwise, permutations

from scipy.stats import pearsonr, spearmanr


def area(scores, wrong):
    """Share of pairs (wrong, right) in which the wrong one scores higher, ties one half: O(n^2)."""
    marked = list(zip(scores, wrong, strict=True))
    pairs = [(a, b) for a, x in marked for b, y in marked if x and not y]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def orders(scores):
    """Every ranking that the scores allow, ties in every order."""
    return [
        order for order in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]


def expected_reciprocal_rank(scores, right):
    ranks = [1 + min(place for place, row in enumerate(order) if right[row]) for order in orders(scores)]
    return float(sum(Fraction(1, rank) for rank in ranks) / len(ranks))


def expected_recall(scores, right, k):
    found = [sum(bool(right[row]) for row in order[:k]) for order in orders(scores)]
    return sum(found) / len(found) / sum(map(bool, right))


def average_precision(scores, wrong):
    """Step by step over distinct thresholds."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [bool(w) for s, w in zip(scores, wrong, strict=False) if s >= threshold]
        recall = sum(chosen) / sum(map(bool, wrong))
        total += (recall - before) * sum(chosen) / len(chosen)
        before = recall
    return total


def lds(scores, subsets, losses):
    """Mean over queries of Spearman over subsets of the summed scores with minus the loss."""
    found = []
    for query, row in enumerate(scores):
        sums = [sum(row[example] for example in subset) for subset in subsets]
        value = spearmanr(sums, [-loss[query] for loss in losses]).statistic
        if not math.isnan(value):
            found.append(value)
    return sum(found) / len(found)


def group_correlation(scores, groups, truth):
    """Pearson over groups, effects of all queries added up."""
    predicted = [sum(row[example] for row in scores for example in group) for group in groups]
    return pearsonr(predicted, [sum(effects) for effects in truth]).statistic
