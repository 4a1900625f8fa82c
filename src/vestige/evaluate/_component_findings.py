"""What the products say: every representation with its accuracy, agreement and cost, for one choice of candidates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vestige.data import TokenizedData
from vestige.evaluate._component_cost import backward_shares, component_type
from vestige.evaluate._component_inputs import Candidates
from vestige.evaluate._component_judge import FULL, Judge, Representation
from vestige.evaluate._component_opponents import output_rows, projection_rows, text_rows
from vestige.evaluate._component_products import ComponentProducts, Objective, agreement, credit
from vestige.evaluate._component_run import OnePassResult
from vestige.evaluate._component_search import (
    CHOOSING,
    HeldOut,
    Path,
    greedy_path,
    held_out,
    values_along,
)
from vestige.evaluate._statistics import Estimate
from vestige.models import layer_number
from vestige.settings import ComponentsSettings

OBJECTIVES: tuple[Objective, ...] = ("accuracy", "agreement")


class ComponentFinding(NamedTuple):
    """One component by itself."""

    name: str
    type: str
    layer: int | None
    parameters: int
    backward: float
    accuracy: Estimate
    agreement: float
    centred: float
    output_accuracy: float | None
    """Of the outputs of its module; None where that has none of its own."""
    self_similarity: float
    """Mean cosine with the original."""


class SearchFinding(NamedTuple):
    """A greedy search: the path on all queries, and what chosen sets are worth on others."""

    path: Path
    along: dict[Objective, tuple[float, ...]]
    """Both objectives after each step."""
    chosen: tuple[int, ...]
    """Chosen on all queries: the set that is saved."""
    held_out: HeldOut


@dataclass(frozen=True)
class Findings:
    """Everything about one choice of candidates."""

    words: str
    products: ComponentProducts
    candidates: Candidates
    full: Float[np.ndarray, "query candidate"]
    right: Bool[np.ndarray, "query candidate"]
    representations: tuple[Representation, ...]
    components: tuple[ComponentFinding, ...]
    searches: dict[Objective, SearchFinding]
    wrong: tuple[dict[str, Any], ...]


def find(settings: ComponentsSettings, result: OnePassResult, words: str) -> Findings:
    """Return everything about one choice of candidates; no model runs."""
    judge = Judge(settings, result, words)
    compared = result.inputs.compared
    shares = backward_shares(compared.loaded.model, compared.components)
    searches: dict[Objective, SearchFinding] = {one: _search(settings, result, words, one) for one in OBJECTIVES}
    rows = [
        *_gradient_rows(settings, result, judge, shares, searches),
        *projection_rows(result, judge, words),
        *output_rows(result, judge, words),
        *text_rows(judge),
    ]
    return Findings(
        words,
        judge.products,
        result.inputs.candidates[words],
        judge.full,
        judge.right,
        tuple(rows),
        _component_findings(result, judge, words, shares),
        searches,
        _wrong(judge, result.inputs.queries, result.inputs.train, result.inputs.candidates[words]),
    )


def _search(settings: ComponentsSettings, result: OnePassResult, words: str, objective: Objective) -> SearchFinding:
    products, right = result.gradients[words], result.inputs.candidates[words].right
    enough = settings.enough if objective == "agreement" else None
    path = greedy_path(products.first(CHOOSING), right[:, :CHOOSING], objective)
    return SearchFinding(
        path,
        {one: values_along(products, right, path.order, one) for one in OBJECTIVES},
        path.best(enough),
        held_out(
            products,
            right,
            objective,
            result.inputs.groups,
            folds=settings.folds,
            seed=settings.seed,
            longest=settings.longest,
            enough=enough,
        ),
    )


def _gradient_rows(
    settings: ComponentsSettings,
    result: OnePassResult,
    judge: Judge,
    shares: Float[np.ndarray, " component"],
    searches: dict[Objective, SearchFinding],
) -> list[Representation]:
    products, spent = judge.products, result.seconds
    sizes, all_of_them = products.parameters, int(products.parameters.sum())
    work = spent.get("gradients", 0.0), spent.get("products", 0.0)

    def set_row(name: str, found: HeldOut) -> Representation:
        numbers = float(np.mean([sizes[list(chosen)].sum() for chosen in found.chosen]))
        deep = float(np.mean([shares[list(chosen)].max() for chosen in found.chosen]))
        # With frozen weights the backward pass costs what the forward pass does.
        seconds = work[0] * (1 + deep) / 2 + work[1] * numbers / all_of_them
        return judge.row(
            name,
            found.cosine,
            credits=found.credit,
            numbers=numbers,
            parameters=numbers,
            backward=deep,
            seconds=seconds,
        )

    whole: dict[str, Any] = {
        "numbers": all_of_them,
        "parameters": all_of_them,
        "backward": float(shares.max()),
        "seconds": sum(work),
    }
    single = held_out(
        products, judge.right, "accuracy", result.inputs.groups, folds=settings.folds, seed=settings.seed, longest=1
    )
    return [
        judge.row(FULL, judge.full, **whole),
        judge.row("full gradient, inner product", products.product(), **whole),
        judge.row("mean of the components' cosines", mean_of_cosines(products), **whole),
        set_row("best component, held out", single),
        set_row("greedy for accuracy, held out", searches["accuracy"].held_out),
        set_row("greedy for agreement, held out", searches["agreement"].held_out),
    ]


def mean_of_cosines(products: ComponentProducts) -> Float[np.ndarray, "query candidate"]:
    """Return the mean of the components' cosines: every component counts the same, however long its gradient is."""
    total = np.zeros(products.rows.shape)
    for number in range(len(products.names)):
        total += products.each([number])[0]
    return total / len(products.names)


def _component_findings(
    result: OnePassResult, judge: Judge, words: str, shares: Float[np.ndarray, " component"]
) -> tuple[ComponentFinding, ...]:
    products, outputs = judge.products, result.outputs[words]
    output_place = {name: number for number, name in enumerate(outputs.names[:-1])}
    found = []
    for number, part in enumerate(result.inputs.compared.components):
        cosine = products.each([number])[0]
        place = next((output_place[use.module] for use in part.uses if use.module in output_place), None)
        of_output = None
        if place is not None:
            of_output = float(credit(outputs.cosine([place]), judge.right, judge.listed).mean())
        found.append(
            ComponentFinding(
                part.name,
                component_type(part.name),
                layer_number(part.name),
                part.size,
                float(shares[number]),
                judge.estimate(credit(cosine, judge.right, judge.listed)),
                float(agreement(cosine, judge.full, judge.listed)),
                float(agreement(cosine, judge.full, judge.listed, centred=True)),
                of_output,
                float(cosine[judge.right].mean()) if judge.right.any() else float("nan"),
            )
        )
    return tuple(found)


def _wrong(
    judge: Judge, queries: TokenizedData, train: TokenizedData, candidates: Candidates
) -> tuple[dict[str, Any], ...]:
    """Return the queries whose original the full gradient does not put first."""
    found = []
    shown = np.where(judge.listed, judge.full, -np.inf)
    for query in np.flatnonzero(credit(judge.full, judge.right, judge.listed) < 1):
        picked = int(candidates.rows[query, int(shown[query].argmax())])
        originals = candidates.rows[query][judge.right[query]]
        found.append(
            {
                "query": queries.examples[int(query)].id,
                "picked": train.examples[picked].id,
                "similarity": float(shown[query].max()),
                "originals": [train.examples[int(row)].id for row in originals],
                "original_listed": bool(len(originals)),
                "original_similarity": float(judge.full[query][judge.right[query]].max()) if len(originals) else None,
                "rank_by_bm25": int(candidates.rank[query]),
                "query_tokens": int(queries.lengths[query]),
                "picked_tokens": int(train.lengths[picked]),
                "original_tokens": [int(train.lengths[int(row)]) for row in originals],
            }
        )
    return tuple(found)


def most_divergent(findings: Findings, count: int = 3) -> Sequence[int]:
    """Return the queries with the lowest cosine between lists of the most accurate component and the full gradient."""
    best = int(np.argmax([one.accuracy.value for one in findings.components]))
    cosine, full = findings.products.each([best])[0], findings.full
    lengths = np.sqrt((cosine**2).sum(1) * (full**2).sum(1))
    alike = np.where(lengths > 0, (cosine * full).sum(1) / np.maximum(lengths, 1e-300), 1.0)
    return [int(query) for query in np.argsort(alike, kind="stable")[:count]]
