"""Slow, obvious versions of the audit's measures: loops over examples, models, directions and thresholds."""

import math
from functools import cache
from statistics import NormalDist, fmean, pvariance

import numpy as np


def log_softmax(row):
    top = max(row)
    total = math.log(sum(math.exp(value - top) for value in row)) + top
    return [value - total for value in row]


def token_values(logits, labels):
    """(log p of the target, standardised log p) of each target, row by row."""
    found = []
    for rows, targets in zip(logits, labels, strict=True):
        pairs = []
        for row, target in zip(rows, targets, strict=True):
            if target == -100:
                continue
            chances = log_softmax(row)
            mean = sum(math.exp(c) * c for c in chances)
            spread = math.sqrt(sum(math.exp(c) * (c - mean) ** 2 for c in chances))
            pairs.append((chances[target], (chances[target] - mean) / spread))
        found.append(pairs)
    return found


def lowest_mean(values, share):
    keep = max(1, int(len(values) * share))
    return fmean(sorted(values)[:keep])


def gaussian_information(values, labels):
    """Pointwise mutual information of a number and its label, with a Gaussian per label."""
    fits = {c: [v for v, y in zip(values, labels, strict=True) if y == c] for c in set(labels)}
    priors = {c: len(each) / len(values) for c, each in fits.items()}
    shape = {c: (fmean(each), pvariance(each)) for c, each in fits.items()}

    def log_density(value, c):
        mean, variance = shape[c]
        return -((value - mean) ** 2) / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)

    found = []
    for value, label in zip(values, labels, strict=True):
        terms = [math.log(priors[c]) + log_density(value, c) for c in fits]
        top = max(terms)
        found.append(log_density(value, label) - top - math.log(sum(math.exp(t - top) for t in terms)))
    return found


def mahalanobis(states, dimensions):
    """With the covariance of the first principal components and its inverse, as matrices."""
    centred = np.asarray(states) - np.mean(states, axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    reduced = centred @ vectors[:, np.argsort(values)[::-1][:dimensions]]
    inverse = np.linalg.inv(reduced.T @ reduced / len(reduced))
    return [math.sqrt(row @ inverse @ row) for row in reduced]


def lira(target, values, membership, taken, shrinkage):
    """Example by example, with `NormalDist` densities; None where there are fewer than two models on a side."""
    sides = []
    for wanted in (True, False):
        groups = [
            [values[m][i] for m in taken if membership[m][i] == wanted and math.isfinite(values[m][i])]
            for i in range(len(target))
        ]
        squares = [sum((v - fmean(g)) ** 2 for v in g) if len(g) > 1 else 0.0 for g in groups]
        pooled = sum(squares) / sum(len(g) - 1 for g in groups if len(g) > 1)
        sides.append(
            [
                NormalDist(fmean(g), math.sqrt((s + shrinkage * pooled) / (len(g) - 1 + shrinkage)))
                if len(g) > 1
                else None
                for g, s in zip(groups, squares, strict=True)
            ]
        )
    return [
        None if a is None or b is None else math.log(a.pdf(t)) - math.log(b.pdf(t))
        for t, a, b in zip(target, *sides, strict=True)
    ]


def edit_distance(one, other):
    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        )

    return distance(len(one), len(other))


def true_rate(scores, members, level):
    """Largest share of members flagged by any threshold that flags at most `level` of the others."""
    right = [s for s, m in zip(scores, members, strict=True) if m]
    wrong = [s for s, m in zip(scores, members, strict=True) if not m]
    rates = [
        (sum(s >= t for s in right) / len(right), sum(s >= t for s in wrong) / len(wrong)) for t in [*scores, math.inf]
    ]
    return max(true for true, false in rates if false <= level)


def false_rate(scores, members, level):
    """Smallest share of others flagged by any threshold that flags at least `level` of the members."""
    right = [s for s, m in zip(scores, members, strict=True) if m]
    wrong = [s for s, m in zip(scores, members, strict=True) if not m]
    rates = [(sum(s >= t for s in right) / len(right), sum(s >= t for s in wrong) / len(wrong)) for t in scores]
    return min(false for true, false in rates if true >= level)


def delong_variance(right, wrong):
    """From the placements, pair by pair."""

    def wins(a, b):
        return 1.0 if a > b else 0.5 if a == b else 0.0

    above = [fmean(wins(a, b) for b in wrong) for a in right]
    below = [fmean(wins(a, b) for a in right) for b in wrong]
    return np.var(above, ddof=1) / len(right) + np.var(below, ddof=1) / len(wrong)


def rmia(target, values, membership, taken, ratio, population):
    """Every pair of examples in turn, probabilities as they are; None without a model on either side."""
    count = len(target)
    relative = []
    for i in range(count):
        sides = [[math.exp(values[m][i]) for m in taken if membership[m][i] == side] for side in (True, False)]
        relative.append(math.exp(target[i]) / ((fmean(sides[0]) + fmean(sides[1])) / 2) if all(sides) else None)
    return _beaten(relative, ratio, population)


def rmia_offline(target, values, membership, ratio, population, slope):
    relative = []
    for i in range(len(target)):
        out = [math.exp(row[i]) for row, inside in zip(values, membership, strict=True) if not inside[i]]
        relative.append(math.exp(target[i]) / (((1 + slope) * fmean(out) + 1 - slope) / 2) if out else None)
    return _beaten(relative, ratio, population)


def _beaten(relative, ratio, population):
    found = []
    for i, own in enumerate(relative):
        others = [each for j, each in enumerate(relative) if j != i and population[j] and each is not None]
        found.append(None if own is None else fmean(own / each >= ratio for each in others))
    return found


def sampled_chance(logits, tokens, top_k, temperature):
    """Probability of a text under sampling: a product over its tokens, one softmax over the likeliest at a time."""
    chance = 1.0
    for row, token in zip(logits, tokens, strict=True):
        kept = sorted(row, reverse=True)[: top_k or len(row)]
        if row[token] < kept[-1]:
            return 0.0
        top = max(kept)
        weights = [math.exp((value - top) / temperature) for value in row if value >= kept[-1]]
        chance *= math.exp((row[token] - top) / temperature) / sum(weights)
    return chance


def binomial_tail(hits, count, chance):
    """P(at least `hits` of `count`)."""
    return sum(math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(hits, count + 1))
