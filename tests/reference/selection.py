"""Selection in plain loops over all scores, float64, sharing no code with `vestige.selection`."""

import math


def mean_over_queries(scores):
    """[example]; None where a score is not a number."""
    found = []
    for example in range(len(scores[0])):
        column = [float(row[example]) for row in scores]
        found.append(math.fsum(column) / len(column) if all(map(math.isfinite, column)) else None)
    return found


def best_target(scores, groups):
    """[example] of (score, target); groups: name -> queries."""
    found = []
    for example in range(len(scores[0])):
        if not all(math.isfinite(row[example]) for row in scores):
            found.append(None)
            continue
        means = {
            name: sum(float(scores[q][example]) for q in queries) / len(queries) for name, queries in groups.items()
        }
        best = max(means.values())
        found.append((best, next(name for name, value in means.items() if value == best)))
    return found


def highest(values, ties, count):
    """Rows of the `count` highest values that are not None; equal ones by the lower tie number."""
    left = [row for row, value in enumerate(values) if value is not None]
    chosen = []
    while left and len(chosen) < count:
        best = left[0]
        for row in left[1:]:
            if values[row] > values[best] or (values[row] == values[best] and ties[row] < ties[best]):
                best = row
        left.remove(best)
        chosen.append(best)
    return chosen


def round_robin(scores, ties, count):
    """(row, query) pairs: queries in turn, each its best that is left."""
    taken, found, query, idle = set(), [], 0, 0
    while len(found) < count and idle < len(scores):
        row_scores = [
            None if row in taken or not math.isfinite(value) else float(value)
            for row, value in enumerate(scores[query])
        ]
        best = highest(row_scores, ties, 1)
        if best:
            taken.add(best[0])
            found.append((best[0], query))
            idle = 0
        else:
            idle += 1
        query = (query + 1) % len(scores)
    return found


def cosine(one, two):
    """0 where a vector is zero."""
    lengths = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in two))
    return sum(a * b for a, b in zip(one, two, strict=True)) / lengths if lengths else 0.0


def represented(vectors, chosen):
    """Mean over all vectors of the cosine with the nearest chosen one, at least 0."""
    return sum(max([0.0, *(cosine(each, vectors[row]) for row in chosen)]) for each in vectors) / len(vectors)


def plain_greedy(vectors, ties, count):
    """Facility location by looking at every candidate every time: rows and gains; ties to five digits of an example."""
    chosen, gains = [], []
    while len(chosen) < count:
        now = represented(vectors, chosen)
        options = [
            (round(len(vectors) * (represented(vectors, [*chosen, row]) - now), 5), -ties[row], row)
            for row in range(len(vectors))
            if row not in chosen
        ]
        gain, _, row = max(options)
        chosen.append(row)
        gains.append(gain / len(vectors))
    return chosen, gains


def without_twins(order, vectors, threshold):
    """(kept rows, {kept row: rows left out for it})."""
    kept, replaced = [], {}
    for row in order:
        similar = [(cosine(vectors[row], vectors[other]), -place) for place, other in enumerate(kept)]
        if similar and max(similar)[0] >= threshold - 1e-6:
            replaced.setdefault(kept[-max(similar)[1]], []).append(row)
        else:
            kept.append(row)
    return kept, replaced
