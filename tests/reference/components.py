"""Slow, obvious counterparts of the component search: plain loops over dictionaries, float64."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def full_cosine(first: dict[str, Tensor], second: dict[str, Tensor], names: Sequence[str]) -> float:
    """Cosine of two gradients that are put end to end."""
    one, other = (torch.cat([each[name].double().flatten() for name in names]) for each in (first, second))
    return float(one @ other / (one.norm() * other.norm()))


def subset_cosine(
    dots: Sequence[float], first: Sequence[float], second: Sequence[float], chosen: Sequence[int]
) -> float:
    """`sum d / sqrt(sum |q|^2 sum |n|^2)` over the chosen components."""
    lengths = math.sqrt(math.fsum(first[c] for c in chosen) * math.fsum(second[c] for c in chosen))
    return math.fsum(dots[c] for c in chosen) / lengths if lengths > 0 else 0.0


def share_right(scores: Sequence[float], right: Sequence[bool]) -> float:
    """What choosing among the best at random gets right."""
    best = [place for place, score in enumerate(scores) if score == max(scores)]
    return sum(right[place] for place in best) / len(best)


def greedy(values, query, example, rows, right, sizes, objective: str) -> tuple[list[int], list[float]]:
    """Forward selection, every set scored from scratch."""
    components, queries, width = len(values), len(rows), len(rows[0])

    def similarities(chosen):
        return [
            [
                subset_cosine(
                    [values[c][q][n] for c in range(components)],
                    [query[c][q] for c in range(components)],
                    [example[c][rows[q][n]] for c in range(components)],
                    chosen,
                )
                for n in range(width)
            ]
            for q in range(queries)
        ]

    full = [score for row in similarities(range(components)) for score in row]

    def worth(chosen):
        found = similarities(chosen)
        if objective == "accuracy":
            return sum(share_right(row, mask) for row, mask in zip(found, right, strict=True)) / queries
        flat = [score for row in found for score in row]
        lengths = math.sqrt(math.fsum(a * a for a in flat) * math.fsum(b * b for b in full))
        return math.fsum(a * b for a, b in zip(flat, full, strict=True)) / lengths

    order: list[int] = []
    path: list[float] = []
    while len(order) < components:
        left = sorted((c for c in range(components) if c not in order), key=lambda c: (sizes[c], c))
        tried = [worth([*order, c]) for c in left]
        best = max(tried)
        taken = next(place for place, value in enumerate(tried) if value >= best - 1e-12)
        order.append(left[taken])
        path.append(tried[taken])
    return order, path
