"""Strategies: in which order examples are taken, why each, and which repeat one that is chosen already."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vestige.errors import UserError
from vestige.indexes import Index
from vestige.lazy import torch
from vestige.selection._inputs import Scored, ScoreSource, head

if TYPE_CHECKING:
    from torch import Tensor

_LOOK_AHEAD = 32
"""Candidates whose gradients are read at a time."""
_DIGITS = 5
"""Gains are rounded to this many digits, in units of an example: what is equal but for rounding is a tie."""
_BLOCK_NUMBERS = 2**24
"""Most similarities alive at once."""


class Candidate(NamedTuple):
    """The next example that a strategy would take."""

    row: int
    score: float | None
    """What the strategy went by; None where it went by none."""
    target: str | None
    """The query or target that chose it."""
    reason: str


Order = Iterator[Candidate]
"""Ends with a `UserError` where more may follow that the run does not hold."""


def uniforms(ids: Sequence[str], seed: int, purpose: Literal["ties", "random", "gumbel"]) -> Scored:
    """Return a number between 0 and 1 for each id, both ends excluded; no two purposes share them.

    They follow from id and seed alone: the order of the data decides nothing.
    """
    key = f"{purpose} {seed}".encode()
    words = (hashlib.blake2b(name.encode(), digest_size=8, key=key).digest() for name in ids)
    numbers = np.frombuffer(b"".join(words), dtype="<u8")
    # 52 bits and a half step: a float64 holds each exactly, and none is 0 or 1.
    return ((numbers >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52


def order_by_best(scores: ScoreSource, targets: dict[str, list[int]], ties: Scored, least: float | None) -> Order:
    """Order by the highest score for any one target, the mean over its queries; without targets over all queries.

    With targets it is the selection of LESS (Xia et al. 2024, arXiv:2402.04333).
    """
    names, count = list(targets), len(scores.queries)
    over = "score" if count == 1 else f"mean score over {count} queries"
    means, group = scores.best(list(targets.values()) or [range(count)])
    found = head(_drop_lower(means, least), scores.reliable, ties)
    for place, (row, score) in enumerate(zip(*found, strict=True), 1):
        target = names[group[row]] if names else None
        by = over if target is None else f"best target, {target}"
        yield Candidate(int(row), float(score), target, f"place {place} by {by}")
    if len(found[0]) == scores.reliable and not scores.complete:
        raise scores.needs_all("A budget of this size")


def order_round_robin(scores: ScoreSource, ties: Scored, least: float | None, *, look: int = 64) -> Order:
    """Take for each query, round-robin, its best example that is not taken yet, queries in their order.

    At least `look` of a query's ranking are read at a time.
    """
    taken: set[int] = set()
    going = {query: _read_ranking(scores, query, ties, look) for query in range(len(scores.queries))}
    while going:
        for query in list(going):
            name = scores.queries[query]
            for place, row, score in going[query]:
                if least is not None and score < least:
                    del going[query]
                    break
                if row not in taken:
                    taken.add(row)
                    yield Candidate(row, score, name, f"place {place} of query {name}")
                    break
            else:
                if not scores.complete:
                    raise scores.needs_all("A budget of this size")
                del going[query]


def _read_ranking(scores: ScoreSource, query: int, ties: Scored, look: int) -> Iterator[tuple[int, int, float]]:
    """Yield place, row and score of one query's ranking, read further only when its head is used up."""
    place = 0
    while True:
        rows, values = scores.ranking(query, max(look, 2 * place), ties)
        if place >= len(rows):
            return
        for row, value in zip(rows[place:].tolist(), values[place:].tolist(), strict=True):
            place += 1
            yield place, row, value


def order_by_gumbel(scores: ScoreSource, draws: Scored, ties: Scored, temperature: float, least: float | None) -> Order:
    """Draw without replacement, an example's odds being `exp(standardised mean score / temperature)`.

    Adding Gumbel noise to log-odds and taking the highest draws without replacement (Kool et al. 2019,
    arXiv:1903.06059). Scores are centred and divided by their standard deviation first, so that the temperature means
    the same for every method. `draws` holds a uniform number for each example.
    """
    means = scores.means()
    known = means[~np.isnan(means)]
    spread = known.std() if len(known) else 0.0
    noise = -np.log(-np.log(draws))
    # Where all scores are equal there is nothing to favour: every order is as likely.
    odds = (means - known.mean()) / (spread * temperature) if spread > 0 else np.where(np.isnan(means), np.nan, 0.0)
    keys = np.where(np.isnan(_drop_lower(means, least)), np.nan, odds + noise)
    for row in head(keys, len(keys), ties)[0]:
        yield Candidate(int(row), float(means[row]), None, f"drawn at temperature {temperature:g}")


def order_at_random(draws: Scored, ties: Scored, scores: ScoreSource | None, least: float | None) -> Order:
    """Yield rows in the order of `draws`, the same for the same ids and seed."""
    means = None if scores is None or least is None else scores.means()
    allowed = draws if means is None else np.where(np.isnan(_drop_lower(means, least)), np.nan, draws)
    for row in head(-allowed, len(draws), ties)[0]:
        yield Candidate(int(row), None if means is None else float(means[row]), None, "drawn at random")


def keep_texts_whole(order: Order, groups: Int[np.ndarray, "example"], most: int) -> Order:
    """Yield candidates such that of the copies of a text all or none are among the first `most`.

    Copies, which have the same group, follow each other in the order; rows of group -1 cannot be chosen.
    """
    sizes = np.bincount(groups[groups >= 0])
    begun: set[int] = set()
    taken = 0
    for each in order:
        group = int(groups[each.row])
        if group in begun or taken + sizes[group] <= most:
            begun.add(group)
            taken += 1
            yield each


def order_by_diversity(
    vectors: Float[Tensor, "row column"], rows: np.ndarray, ties: Scored, means: Scored | None
) -> Order:
    """Yield `rows` by facility location over their gradients, with what each adds to the share represented."""
    for place, gain in facility_location(vectors, torch.from_numpy(ties[rows])):
        row = int(rows[place])
        score = None if means is None else float(means[row])
        yield Candidate(row, score, None, f"adds {gain:.3g} to the mean similarity of all to the nearest chosen")


def facility_location(vectors: Float[Tensor, "row column"], ties: Float[Tensor, "row"]) -> Iterator[tuple[int, float]]:
    """Yield rows in greedy order, each with what it adds to `F(S) = mean_i max(0, max_{j in S} cos(i, j))`.

    F is monotone and submodular, so the greedy set reaches at least `1 - 1/e` of the best possible (Nemhauser et al.
    1978). A row's gain only falls as others are taken, so that an old gain is an upper bound, and only rows at the top
    of the heap are computed again (Minoux 1978): the order is the plain greedy one, ties in ascending order of `ties`.
    The start costs all pairs of rows, each later evaluation one product with `vectors`.
    """
    unit = _unit_rows(vectors)
    count = len(unit)
    covered = torch.zeros(count, dtype=unit.dtype)
    order = [float(tie) for tie in ties]
    heap = [(-round(gain, _DIGITS), order[row], row) for row, gain in enumerate(_first_gains(unit).tolist())]
    heapq.heapify(heap)
    while heap:
        _, _, row = heapq.heappop(heap)
        similar = (unit @ unit[row]).clamp_min(0)
        gain = round(float((similar - covered).clamp_min(0).sum(dtype=torch.float64)), _DIGITS)
        entry = (-gain, order[row], row)
        if heap and entry > heap[0]:
            heapq.heappush(heap, entry)
            continue
        covered = torch.maximum(covered, similar)
        yield row, gain / count


def without_twins(order: Order, index: Index, threshold: float) -> Iterator[tuple[Candidate, int | None, float]]:
    """Yield candidates in their order, each with the number of its twin and the cosine with it; None and 0 without.

    A candidate has a twin if its cosine with an earlier one without a twin reaches `threshold`. Of several such, the
    most similar one is named, and the earliest of equals. A gradient of zero is like none.
    """
    kept, count = torch.empty((256, index.width)), 0
    while True:
        chunk: list[Candidate] = []
        ended: UserError | None = None
        try:
            for candidate in islice(order, _LOOK_AHEAD):
                chunk.append(candidate)
        except UserError as error:  # no more is known of the order, but these are, and may be enough
            ended = error
        unit = _unit_rows(index.gradients_of([each.row for each in chunk])) if chunk else ()
        for candidate, vector in zip(chunk, unit, strict=True):
            cosines = kept[:count] @ vector
            most = int(cosines.argmax()) if count else 0
            # A copy's cosine with itself misses 1 by about this much.
            if count and float(cosines[most]) >= threshold - 4 * torch.finfo(vector.dtype).eps:
                yield candidate, most, min(float(cosines[most]), 1.0)
                continue
            if count == len(kept):
                kept = torch.cat([kept, torch.empty_like(kept)])
            kept[count] = vector
            count += 1
            yield candidate, None, 0.0
        if ended is not None:
            raise ended
        if not chunk:
            return


def _unit_rows(vectors: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """Divide rows by their lengths; one of length zero stays zero, and is like none."""
    lengths = vectors.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths.clamp_min(torch.finfo(vectors.dtype).tiny), 0.0)


def _first_gains(unit: Float[Tensor, "row column"]) -> Float[Tensor, "row"]:
    """Return what each row alone represents, summed over all rows."""
    step = max(1, _BLOCK_NUMBERS // max(len(unit), 1))
    blocks = (unit[start : start + step] @ unit.T for start in range(0, len(unit), step))
    return torch.cat([block.clamp_min(0).sum(1, dtype=torch.float64) for block in blocks])


def _drop_lower(scores: Scored, least: float | None) -> Scored:
    """Return the scores with NaN for those below `least`."""
    return scores if least is None else np.where(scores >= least, scores, np.nan)
