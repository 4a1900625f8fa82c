"""The free checks of every run: how far can these scores be trusted, as far as scores alone can show?

None of them validates a method; each can expose one that fails. Every threshold stands beside its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Int

from vestige import gradients, models
from vestige.data import TokenizedData, find_focus
from vestige.methods import Bm25, Job, Method, example_words
from vestige.runs import Check, RankedScore, TopK, Verdict

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


def run_free_checks(
    job: Job, method: Method, ranked: Sequence[RankedScore], *, losses: Sequence[float] | None = None, k: int = 10
) -> list[Check]:
    """Run every check that needs no further pass through the model."""
    examples = len(job.train)
    tops = find_proponents(ranked, len(job.queries), k)
    ids = {int(row): job.train.examples[int(row)].id for row in np.unique(np.concatenate([*tops, []]))}
    by_parameter = method.needs_gradients or method.splits_components
    if method.searches_words:
        words = make_check(BM25_NAME, None, "The method is the word search itself.")
    elif find_focus(job.queries.examples):
        words = make_check(
            BM25_NAME, None, "Queries choose what of an answer is explained; a word search takes it whole."
        )
    else:
        words = check_bm25_overlap(tops, find_lexical_tops(job, k))
    return [
        check_overlap(tops, examples),
        check_hubs(tops, examples, ids),
        words,
        check_coverage(job.selection if by_parameter else None),
        check_finite(examples * len(job.queries), losses),
        check_memorized(job.queries, losses, job.settings.loss),
        check_duplicates(tops, job.train),
    ]


def make_check(name: str, value: float | None, reading: str, verdict: Verdict = "unknown") -> Check:
    return Check(name=name, value=value, reading=reading, verdict=verdict)


def find_lexical_tops(job: Job, k: int = 10, search: Method | None = None) -> list[Int[np.ndarray, "rank"]]:
    """Return the rows of the `k` best hits of a word search (BM25 if none is given) for each query."""
    top = TopK(len(job.queries), k)
    if any(example_words(example) for example in job.train.examples):
        for block in (search or Bm25()).blocks(job):
            rows, scores = block.arrays()
            kept = ~np.isin(rows, job.skipped)
            top.add(rows[kept], scores[:, kept])
    return [top.rows(query, "proponent")[top.scores(query, "proponent") > 0] for query in range(len(job.queries))]


def find_proponents(ranked: Sequence[RankedScore], queries: int, k: int = 10) -> list[Int[np.ndarray, "rank"]]:
    """Return the rows of the `k` first proponents of each query, best first."""
    found = [entry for entry in ranked if entry.end == "proponent" and entry.rank <= k]
    found.sort(key=lambda entry: entry.rank)
    return [
        np.array([entry.row for entry in found if entry.query == query], dtype=np.int64) for query in range(queries)
    ]


def check_overlap(tops: Tops, examples: int) -> Check:
    """Check the mean Jaccard index of the top-k sets of two queries: 0 = nothing in common, 1 = the same examples."""
    name = "top-k overlap between queries"
    if len(tops) < 2:
        return make_check(name, None, "There is one query, so nothing to compare it with.")
    k = len(tops[0])
    sets = [set(top.tolist()) for top in tops]
    value = float(np.mean([len(one & other) / max(len(one | other), 1) for one, other in combinations(sets, 2)]))
    reading = f"Two queries share {value:.0%} of their top {k} on average"
    if k / max(2 * examples - k, 1) > CHANCE_HIDES:
        return make_check(name, value, f"{reading}, but so few examples overlap anyway.")
    if value > OVERLAP_WARNS:
        return make_check(name, value, f"{reading}: the method names the same examples for every query.", "warn")
    return make_check(name, value, f"{reading}: different questions get different answers.", "good")


def check_hubs(tops: Tops, examples: int, ids: Mapping[int, str] | Sequence[str]) -> Check:
    """Check the largest share of queries that have one and the same example among their top k."""
    name = "hub rate"
    if len(tops) < HUB_NEEDS:
        return make_check(name, None, f"With fewer than {HUB_NEEDS} queries, an example that they share is no pattern.")
    k = len(tops[0])
    counts = np.bincount(np.concatenate([np.asarray(top) for top in tops]), minlength=1)
    hub = int(counts.argmax())
    value = float(counts[hub]) / len(tops)
    reading = f"Example {ids[hub]} is among the top {k} of {value:.0%} of the queries"
    if k / max(examples, 1) > CHANCE_HIDES:
        return make_check(name, value, f"{reading}, but there are few to choose from.")
    if value >= HUB_WARNS:
        return make_check(name, value, f"{reading}: it may rank high for any question.", "warn")
    return make_check(name, value, f"{reading}, no other more often.", "good")


def check_bm25_overlap(tops: Tops, lexical: Tops) -> Check:
    """Check the share of the top k that a word search has in its top k too: `lexical`, of positive BM25 scores only."""
    if not any(len(words) for words in lexical):
        return make_check(
            BM25_NAME, None, "A word search finds no example for these queries, so there is nothing to compare."
        )
    shares = [
        len(set(top.tolist()) & set(words.tolist())) / len(top)
        for top, words in zip(tops, lexical, strict=True)
        if len(top)
    ]
    if not shares:
        return make_check(BM25_NAME, None, "There are no ranked examples to compare.")
    value = float(np.mean(shares))
    reading = f"A word search finds {value:.0%} of the top {len(tops[0])} too"
    if value >= BM25_WARNS:
        return make_check(BM25_NAME, value, f"{reading}: it would have given the same answer.", "warn")
    return make_check(BM25_NAME, value, f"{reading}; the rest it would not have shown.", "good")


def check_coverage(selection: models.Selection | None) -> Check:
    """Check the share of the model's parameters that the scores speak for."""
    name = "coverage"
    if selection is None:
        return make_check(name, None, "The method does not attribute to parameters.")
    value = selection.fraction
    share = f"{value:.0%}" if value >= 0.1 else f"{value:.2%}"
    reading = f"The scores speak for {share} of the model's parameters"
    if all("lora_" in component.name for component in selection.components) and selection.components:
        return make_check(name, value, f"{reading}: those of the adapter.", "good")
    if value >= COVERED:
        return make_check(name, value, f"{reading}.", "good")
    return make_check(name, value, f"{reading}; what the others contribute is not known.")


def check_finite(scores: int, losses: Sequence[float] | None) -> Check:
    """Check that all scores and all losses of queries are finite numbers; a run is not written otherwise."""
    broken = 0 if losses is None else int((~np.isfinite(np.asarray(losses, dtype=np.float64))).sum())
    if broken:
        reading = f"{broken} queries have a loss that is not finite: their scores mean nothing."
        return make_check("finite numbers", float(broken), reading, "warn")
    return make_check("finite numbers", 0.0, f"All {scores} scores are finite numbers.", "good")


def check_knowledge(known: gradients.Knowledge) -> Check:
    """Check the loss per token of a sample of the training data, beside that of guessing without a model."""
    name, reading = "learned by the model", f"The model has {known.reading}"
    if known.learned:
        return make_check(name, known.model, f"{reading}.", "good")
    more = "it has learned nothing of these texts that a score could trace back."
    return make_check(name, known.model, f"{reading}: {more}", "warn")


def check_memorized(queries: TokenizedData, losses: Sequence[float] | None, reduction: gradients.Reduction) -> Check:
    """Check the share of the queries whose loss is near zero: there gradients vanish, and the ranking with them."""
    name = "queries with a loss near zero"
    if losses is None:
        return make_check(name, None, "Without a model the queries have no loss.")
    ids = find_memorized(queries, losses, reduction)
    if not ids:
        return make_check(name, 0.0, "The model is not sure of any query beforehand.", "good")
    return make_check(name, len(ids) / len(queries), describe_memorized(ids, len(queries)), "warn")


def find_memorized(queries: TokenizedData, losses: Sequence[float], reduction: gradients.Reduction) -> list[str]:
    """Return the ids of the queries whose mean loss per token is near zero; a difference of losses says nothing."""
    tokens = np.maximum(queries.target_counts, 1) if reduction == "sum" else 1
    rows = np.flatnonzero(np.asarray(losses, dtype=np.float64) / tokens < MEMORIZED)
    found = [queries.examples[row] for row in rows.tolist()]
    return [one.id for one in found if not {"instead", "weights"} & find_focus([one]).keys()]


def describe_memorized(ids: Sequence[str], queries: int) -> str:
    """Describe what is wrong with these queries, in a sentence."""
    shown = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
    return (
        f"The model is all but certain of {len(ids)} of {queries} queries ({shown}; below {MEMORIZED} nats per "
        "token): their gradients are near zero, and lists by gradients are unreliable. Ask about another wording, or "
        "an earlier checkpoint."
    )


def check_duplicates(tops: Tops, train: TokenizedData) -> Check:
    """Check the share of positions in the top k that hold a text which is listed higher for the same query."""
    name = "duplicates in the top k"
    positions = sum(len(top) for top in tops)
    if positions == 0:
        return make_check(name, None, "There are no ranked examples to compare.")

    def content(row: int) -> str | bytes:
        return train.examples[row].display or train.input_ids[row].tobytes()

    value = 1 - sum(len({content(int(row)) for row in top}) for top in tops) / positions
    reading = f"{value:.0%} of the positions go to copies of texts listed higher"
    if value >= COPIES_WARN:
        return make_check(name, value, f"{reading}: they share their influence.", "warn")
    return make_check(name, value, f"{reading}.", "good")
