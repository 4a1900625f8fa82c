"""The free checks of every run: how far can these scores be trusted, as far as scores alone can show?

None of them validates a method; each can expose one that fails. Every threshold stands beside its reason.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Int

from vestige.data import TokenizedData
from vestige.gradients import Knowledge, Reduction
from vestige.methods._bm25 import Bm25, example_words
from vestige.methods._protocol import Job, Method
from vestige.models import Selection
from vestige.runs import Check, RankedScore, TopK

OVERLAP_WARNS = 0.5
"""Mean Jaccard index: two different questions then share two thirds of their lists of equal length."""

HUB_WARNS = 0.5
"""One example among the first of half of all queries explains none of them in particular."""

BM25_WARNS = 0.9
"""Nine of ten examples are what a word search finds in a second: then the gradients added nothing."""

COVERED = 0.5
"""Below half of the parameters, what is left out may well outweigh what is scored."""

COPIES_WARN = 0.3
"""Three of ten positions taken by copies: the list shows a third less than it seems to."""

CHANCE_HIDES = 0.25
"""Where random lists would overlap this much, or hold one example this often, an overlap says nothing."""

HUB_NEEDS = 4
"""Queries below which one shared example is no pattern."""

MEMORIZED = 0.05
"""Nats per token: the model gives every token a chance of 95 %, so a gradient has lost 95 % of its length and more of
its direction to rounding and the rest of the tokens. Where all was memorized, the mean reciprocal rank of the right
example fell from 0.71 to 0.12."""

BM25_NAME = "BM25 overlap"

Tops = Sequence[Int[np.ndarray, "rank"]]
"""Rows of the `k` first proponents of each query, best first."""


def free_checks(
    job: Job, method: Method, ranked: Sequence[RankedScore], *, losses: Sequence[float] | None = None, k: int = 10
) -> list[Check]:
    """Run every check that needs no further pass through the model; `randomised_correlation` is the one that does."""
    examples = len(job.train)
    tops = proponents(ranked, len(job.queries), k)
    ids = {int(row): job.train.examples[int(row)].id for row in np.unique(np.concatenate([*tops, []]))}
    by_parameter = method.needs_gradients or method.splits_components
    return [
        top_overlap(tops, examples),
        hub_rate(tops, examples, ids),
        _own_words(method) or bm25_overlap(tops, lexical_tops(job, k)),
        coverage(job.selection if by_parameter else None),
        finite(examples * len(job.queries), losses),
        memorized(job.queries, losses, job.settings.loss),
        duplicates(tops, job.train),
    ]


def _own_words(method: Method) -> Check | None:
    if not method.searches_words:
        return None
    return Check(name=BM25_NAME, value=None, reading="The method is the word search itself.", verdict="unknown")


def lexical_tops(job: Job, k: int = 10) -> list[Int[np.ndarray, "rank"]]:
    """Return the rows of the `k` best hits of a word search per query; fewer where fewer examples share a word."""
    top = TopK(len(job.queries), k)
    if any(example_words(example) for example in job.train.examples):
        for block in Bm25().blocks(job):
            rows, scores = block.rows.numpy(), block.scores.numpy()
            kept = ~np.isin(rows, job.skipped)
            top.add(rows[kept], scores[:, kept])
    return [top.rows(query, "proponent")[top.scores(query, "proponent") > 0] for query in range(len(job.queries))]


def proponents(ranked: Sequence[RankedScore], queries: int, k: int = 10) -> list[Int[np.ndarray, "rank"]]:
    """Return the rows of the `k` first proponents of each query, best first."""
    found = [entry for entry in ranked if entry.end == "proponent" and entry.rank <= k]
    found.sort(key=lambda entry: entry.rank)
    return [
        np.array([entry.row for entry in found if entry.query == query], dtype=np.int64) for query in range(queries)
    ]


def top_overlap(tops: Tops, examples: int) -> Check:
    """Check the mean Jaccard index of the top-k sets of two queries: 0 = nothing in common, 1 = the same examples."""
    name = "top-k overlap between queries"
    if len(tops) < 2:
        return Check(
            name=name, value=None, reading="There is one query, so nothing to compare it with.", verdict="unknown"
        )
    k = len(tops[0])
    sets = [set(top.tolist()) for top in tops]
    value = float(np.mean([len(one & other) / max(len(one | other), 1) for one, other in combinations(sets, 2)]))
    reading = f"Two queries share {value:.0%} of their top {k} on average"
    if k / max(2 * examples - k, 1) > CHANCE_HIDES:
        return Check(
            name=name, value=value, reading=f"{reading}, but so few examples overlap anyway.", verdict="unknown"
        )
    if value > OVERLAP_WARNS:
        return Check(
            name=name,
            value=value,
            reading=f"{reading}: the method names the same examples for every query.",
            verdict="warn",
        )
    return Check(
        name=name, value=value, reading=f"{reading}: different questions get different answers.", verdict="good"
    )


def hub_rate(tops: Tops, examples: int, ids: Mapping[int, str] | Sequence[str]) -> Check:
    """Check the largest share of queries that have one and the same example among their top k."""
    name = "hub rate"
    if len(tops) < HUB_NEEDS:
        reading = f"With fewer than {HUB_NEEDS} queries, an example that they share is no pattern."
        return Check(name=name, value=None, reading=reading, verdict="unknown")
    k = len(tops[0])
    counts = np.bincount(np.concatenate([np.asarray(top) for top in tops]), minlength=1)
    hub = int(counts.argmax())
    value = float(counts[hub]) / len(tops)
    reading = f"Example {ids[hub]} is among the top {k} of {value:.0%} of the queries"
    if k / max(examples, 1) > CHANCE_HIDES:
        return Check(name=name, value=value, reading=f"{reading}, but there are few to choose from.", verdict="unknown")
    if value >= HUB_WARNS:
        return Check(name=name, value=value, reading=f"{reading}: it may rank high for any question.", verdict="warn")
    return Check(name=name, value=value, reading=f"{reading}, no other more often.", verdict="good")


def bm25_overlap(tops: Tops, lexical: Tops) -> Check:
    """Check the share of the top k that a word search has in its top k too.

    `lexical` are the hits of the search, with a positive BM25 score only.
    """
    name = BM25_NAME
    if not any(len(words) for words in lexical):
        reading = "A word search finds no example for these queries, so there is nothing to compare."
        return Check(name=name, value=None, reading=reading, verdict="unknown")
    shares = [
        len(set(top.tolist()) & set(words.tolist())) / len(top)
        for top, words in zip(tops, lexical, strict=True)
        if len(top)
    ]
    if not shares:
        return Check(name=name, value=None, reading="There are no ranked examples to compare.", verdict="unknown")
    value = float(np.mean(shares))
    reading = f"A word search finds {value:.0%} of the top {len(tops[0])} too"
    if value >= BM25_WARNS:
        return Check(name=name, value=value, reading=f"{reading}: it would have given the same answer.", verdict="warn")
    return Check(name=name, value=value, reading=f"{reading}; the rest it would not have shown.", verdict="good")


def coverage(selection: Selection | None) -> Check:
    """Check the share of the model's parameters that the scores speak for."""
    name = "coverage"
    if selection is None:
        return Check(name=name, value=None, reading="The method does not attribute to parameters.", verdict="unknown")
    value = selection.fraction
    reading = f"The scores speak for {_percent(value)} of the model's parameters"
    if all("lora_" in component.name for component in selection.components) and selection.components:
        return Check(name=name, value=value, reading=f"{reading}: those of the adapter.", verdict="good")
    if value >= COVERED:
        return Check(name=name, value=value, reading=f"{reading}.", verdict="good")
    reading = f"{reading}; what the others contribute is not known."
    return Check(name=name, value=value, reading=reading, verdict="unknown")


def finite(scores: int, losses: Sequence[float] | None) -> Check:
    """Check that all scores and all losses of queries are finite numbers; a run is not written otherwise."""
    broken = 0 if losses is None else int((~np.isfinite(np.asarray(losses, dtype=np.float64))).sum())
    if broken:
        reading = f"{broken} queries have a loss that is not finite: their scores mean nothing."
        return Check(name="finite numbers", value=float(broken), reading=reading, verdict="warn")
    reading = f"All {scores} scores are finite numbers."
    return Check(name="finite numbers", value=0.0, reading=reading, verdict="good")


def knowledge_check(known: Knowledge) -> Check:
    """Check the loss per token of a sample of the training data, beside that of guessing without a model."""
    name = "learned by the model"
    if known.learned:
        return Check(name=name, value=known.model, reading=f"The model has {known.reading}.", verdict="good")
    reading = f"The model has {known.reading}: it has learned nothing of these texts that a score could trace back."
    return Check(name=name, value=known.model, reading=reading, verdict="warn")


def memorized(queries: TokenizedData, losses: Sequence[float] | None, reduction: Reduction) -> Check:
    """Check the share of the queries whose loss is near zero: there gradients vanish, and the ranking with them."""
    name = "queries with a loss near zero"
    if losses is None:
        return Check(name=name, value=None, reading="Without a model the queries have no loss.", verdict="unknown")
    ids = memorized_queries(queries, losses, reduction)
    value = len(ids) / max(len(queries), 1)
    if not ids:
        return Check(name=name, value=0.0, reading="The model is not sure of any query beforehand.", verdict="good")
    return Check(name=name, value=value, reading=memorized_reading(ids, len(queries)), verdict="warn")


def memorized_queries(queries: TokenizedData, losses: Sequence[float], reduction: Reduction) -> list[str]:
    """Return the ids of the queries whose mean loss per token is near zero."""
    tokens = np.maximum(queries.target_counts, 1) if reduction == "sum" else 1
    rows = np.flatnonzero(np.asarray(losses, dtype=np.float64) / tokens < MEMORIZED)
    return [queries.examples[row].id for row in rows.tolist()]


def memorized_reading(ids: Sequence[str], queries: int) -> str:
    """Describe what is wrong with these queries, in a sentence."""
    shown = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
    return (
        f"The model is all but certain of {len(ids)} of {queries} queries ({shown}; below {MEMORIZED} nats per "
        "token): their gradients are near zero, and lists by gradients are unreliable. Ask about another wording, or "
        "an earlier checkpoint."
    )


def duplicates(tops: Tops, train: TokenizedData) -> Check:
    """Check the share of positions in the top k that hold a text which is listed higher for the same query."""
    name = "duplicates in the top k"
    places = sum(len(top) for top in tops)
    if places == 0:
        return Check(name=name, value=None, reading="There are no ranked examples to compare.", verdict="unknown")
    distinct = sum(len({_content(train, int(row)) for row in top}) for top in tops)
    value = 1 - distinct / places
    if value >= COPIES_WARN:
        reading = f"{value:.0%} of the positions go to copies of texts listed higher: they share their influence."
        return Check(name=name, value=value, reading=reading, verdict="warn")
    reading = f"{value:.0%} of the positions go to copies of texts listed higher."
    return Check(name=name, value=value, reading=reading, verdict="good")


def _content(train: TokenizedData, row: int) -> str | bytes:
    return train.examples[row].display or train.input_ids[row].tobytes()


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.2%}"
