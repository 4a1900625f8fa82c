"""What one pass of the model says: every representation with its accuracy, agreement and cost; no model runs again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from torch import nn

from vestige.evaluate._components_inputs import Candidates, ComponentInputs, read_component_inputs
from vestige.evaluate._components_pass import KINDS, OnePass, output_modules, read_seconds
from vestige.evaluate._components_search import (
    CHOOSING,
    OBJECTIVES,
    ComponentProducts,
    CrossValidation,
    Objective,
    Path,
    centre_lists,
    compute_agreement,
    credit,
    cross_validate,
    greedy_path,
    values_along,
)
from vestige.evaluate._result import Estimate, bootstrap, estimate_mean, make_interval, open_folder
from vestige.jobs import is_worker, run_pieces, worker_command
from vestige.models import Component, layer_number, select_components
from vestige.settings import ComponentsSettings
from vestige.storage import check_disk

FULL = "full gradient"
HIDDEN = "last hidden state"
"""Name of the output that `rep-sim` compares."""
_BYTES = 4
_BLOCK = re.compile(r"^.*?\.\d+\.")


class OnePassResult(NamedTuple):
    """Products of everything with everything that was requested; every similarity follows from them."""

    inputs: ComponentInputs
    gradients: dict[str, ComponentProducts]
    """By the number of candidates that was requested, such as `5`."""
    outputs: dict[str, ComponentProducts]
    """The same of layer outputs: a module each, its width in place of the parameters; the last hidden state last."""
    projected: dict[str, ComponentProducts]
    """Of projections: one each, with the numbers kept in place of the parameters."""
    published: dict[str, ComponentProducts]
    """Of the same projections in the published form, which lacks the factor 1/sqrt(k) of each tensor."""
    computed: int
    """Gradients that were computed for this."""
    seconds: dict[str, float]
    """Of the passes of the model (`gradients`), of `products`, and of each projection, over all processes."""


def one_pass_result(settings: ComponentsSettings) -> OnePassResult:
    """Return the products, computed now or found in `settings.out`: each distinct gradient exactly once.

    Raises:
        IndexMismatch: The folder holds products of something else; nothing was changed.
        UserError: The folder holds other files, the disk is too small, or an input needs the caller.
    """
    inputs = read_component_inputs(settings)
    compared, plans = inputs.compared, OnePass(inputs.compared)
    if not is_worker():
        open_folder(settings.out, compared.identity, "launch")
        plans.forget_damaged()
    command = worker_command(settings, "evaluate components")
    if plans.products.missing():
        if not is_worker():
            check_disk(settings.out, int(compared.factor_bytes(np.arange(len(compared.wanted))).sum()))
        run_pieces(plans.queries, settings, command)
    pieces = run_pieces(plans.products, settings, command)
    computed, seconds = read_seconds(settings.out)
    sizes = [sum(one.plan.sizes) for one in compared.projections]
    names: dict[str, tuple[list[str], list[int]]] = {
        "values": ([part.name for part in compared.components], [part.size for part in compared.components]),
        "outputs": ([*output_modules(compared), HIDDEN], pieces[0]["widths"].tolist()),
        "projected": ([one.plan.name for one in compared.projections], sizes),
        "published": ([one.plan.name for one in compared.projections], sizes),
    }
    kinds = (_collect_products(inputs, pieces, kind, *names[kind]) for kind in KINDS)
    return OnePassResult(inputs, *kinds, computed=computed, seconds=seconds)


def _collect_products(
    inputs: ComponentInputs, pieces: Sequence[dict[str, Any]], kind: str, names: list[str], sizes: list[int]
) -> dict[str, ComponentProducts]:
    """Return one kind of products from all pieces, for each choice of candidates."""
    pairs, rows = (np.concatenate([one[name].numpy() for one in pieces]) for name in ("pairs", "rows"))
    number = np.full(inputs.compared.wanted.shape, -1, dtype=np.int64)
    number[pairs[:, 0], pairs[:, 1]] = np.arange(len(pairs))
    values, norms = (
        np.concatenate([one[name].numpy() for one in pieces], axis=1) for name in (kind, f"{kind}.example")
    )
    example = np.zeros((len(norms), len(inputs.compared.data)), dtype=norms.dtype)
    example[:, rows] = norms
    query = pieces[0][f"{kind}.query"].numpy()[:, inputs.query_place]
    found = {}
    for words, candidates in inputs.candidates.items():
        place = np.where(candidates.rows >= 0, inputs.example_place[candidates.rows], -1)
        pair = np.where(place >= 0, number[inputs.query_place[:, None], place], -1)
        own = np.where(pair >= 0, values[:, pair], 0)
        found[words] = ComponentProducts(tuple(names), np.array(sizes, dtype=np.int64), own, query, example, place)
    return found


def backward_shares(model: nn.Module, components: Sequence[Component]) -> Float[np.ndarray, " component"]:
    """Return the share of a complete backward pass that each component's gradient needs, between 0 and 1.

    With frozen weights the graph begins at the lowest component, and what is differentiated above it costs about one
    multiplication a parameter and token. So the share is that of the parameters in and above the component's lowest
    module: 1 for the embedding, next to nothing for the head. A set costs as much as its lowest member.
    """
    place = {path: number for number, (path, _) in enumerate(model.named_modules())}
    everything = select_components(model, ("all",)).components
    heights = np.array([max(place[use.module] for use in part.uses) for part in everything])
    # An embedding has no input to differentiate unless it is the head.
    matrices = [min(part.shape) > 1 and any(use.kind != "embedding" for use in part.uses) for part in everything]
    sizes = np.array([part.size for part in everything], dtype=np.float64) * matrices
    lowest = [min(place[use.module] for use in part.uses) for part in components]
    return np.array([sizes[heights >= each].sum() for each in lowest]) / max(sizes.sum(), 1.0)


def component_type(name: str) -> str:
    """Return the name of a component in every block, such as `mlp.down_proj`; its own name where it is in none."""
    return _BLOCK.sub("", name).removesuffix(".weight").removesuffix(".default")


class Representation(NamedTuple):
    """One way of comparing examples, and how well it does: a row of the table."""

    name: str
    accuracy: Estimate
    against_full: Estimate | None
    """Accuracy minus that of the full gradient, pair by pair of queries."""
    agreement: Estimate | None
    centred: Estimate | None
    parameters: float | None
    """Share of the parameters that take part."""
    backward: float | None = None
    """Share of a complete backward pass."""
    bytes: int | None = None
    """Of one example's vector, in float32."""
    seconds: float | None = None
    opponent: bool = False


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
    along: dict[str, tuple[float, ...]]
    """Both objectives after each step."""
    chosen: tuple[int, ...]
    """Chosen on all queries: the set that is saved."""
    held_out: CrossValidation


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
    searches: dict[str, SearchFinding]
    wrong: tuple[dict[str, Any], ...]


class _Measure:
    """Turns similarities about one choice of candidates into rows of the table."""

    def __init__(self, settings: ComponentsSettings, result: OnePassResult, words: str) -> None:
        self.settings, self.result, self.words = settings, result, words
        self.products, self.groups = result.gradients[words], result.inputs.groups
        self.right, self.listed = result.inputs.candidates[words].right, self.products.listed
        self.full = self.products.cosine()

    def credit(self, scores: np.ndarray) -> Float[np.ndarray, " query"]:
        return credit(scores, self.right, self.listed)

    def estimate(self, values: Float[np.ndarray, " query"]) -> Estimate:
        return estimate_mean(values, self.settings.draws, self.settings.seed, self.groups)

    def agreement(self, scores: Float[np.ndarray, "query candidate"], *, centred: bool) -> Estimate:
        """Return the agreement with the full gradient, with a bootstrap interval over groups of queries."""
        value = float(compute_agreement(scores, self.full, self.listed, centred=centred))
        both = (centre_lists(each, self.listed) if centred else each for each in (scores, self.full))
        first, second = (each * self.listed for each in both)
        _, group = np.unique(self.groups, return_inverse=True)
        parts = [np.bincount(group, row.sum(1)) for row in (first * second, first**2, second**2)]
        if len(parts[0]) < 2:
            return Estimate(value, float("nan"), float("nan"))

        def compute(rows: np.ndarray) -> float:
            both, one, other = (part[rows].sum() for part in parts)
            return both / np.maximum(np.sqrt(one * other), 1e-300)

        return make_interval(value, bootstrap(compute, [len(parts[0])], self.settings.draws, self.settings.seed))

    def row(
        self,
        name: str,
        scores: Float[np.ndarray, "query candidate"] | None = None,
        credits: Float[np.ndarray, " query"] | None = None,
        *,
        numbers: float | None = None,
        parameters: float | None = None,
        **facts: Any,
    ) -> Representation:
        """Return the row; `numbers` is the length of one example's vector, `parameters` the gradients it is made of."""
        own = self.credit(scores) if credits is None and scores is not None else credits
        assert own is not None
        return Representation(
            name,
            self.estimate(own),
            None if name == FULL else self.estimate(own - self.credit(self.full)),
            None if scores is None else self.agreement(scores, centred=False),
            None if scores is None else self.agreement(scores, centred=True),
            None if parameters is None else parameters / self.result.inputs.total_parameters,
            bytes=None if numbers is None else round(_BYTES * numbers),
            **facts,
        )


def find(settings: ComponentsSettings, result: OnePassResult, words: str) -> Findings:
    """Return everything about one choice of candidates; no model runs."""
    measure = _Measure(settings, result, words)
    shares = backward_shares(result.inputs.compared.loaded.model, result.inputs.compared.components)
    searches = {one: _search(measure, one) for one in OBJECTIVES}
    rows = [*_measure_sets(measure, shares, searches), *_measure_projections(measure), *_measure_baselines(measure)]
    return Findings(
        words,
        measure.products,
        result.inputs.candidates[words],
        measure.full,
        measure.right,
        tuple(rows),
        _measure_components(measure, shares),
        searches,
        tuple(_list_wrong(measure)),
    )


def _search(measure: _Measure, objective: Objective) -> SearchFinding:
    settings, products, right = measure.settings, measure.products, measure.right
    enough = settings.enough if objective == "agreement" else None
    path = greedy_path(products.first(CHOOSING), right[:, :CHOOSING], objective)
    along = {one: values_along(products, right, path.order, one) for one in OBJECTIVES}
    limits: dict[str, Any] = {"folds": settings.folds, "seed": settings.seed, "longest": settings.longest}
    found = cross_validate(products, right, objective, measure.groups, **limits, enough=enough)
    return SearchFinding(path, along, path.best(enough), found)


def _measure_sets(
    measure: _Measure, shares: Float[np.ndarray, " component"], searches: dict[str, SearchFinding]
) -> list[Representation]:
    products, settings = measure.products, measure.settings
    sizes, total = products.parameters, int(products.parameters.sum())
    work = [measure.result.seconds.get(name, 0.0) for name in ("gradients", "products")]

    def measure_set(name: str, found: CrossValidation) -> Representation:
        count = float(np.mean([sizes[list(chosen)].sum() for chosen in found.chosen]))
        deep = float(np.mean([shares[list(chosen)].max() for chosen in found.chosen]))
        # With frozen weights the backward pass costs what the forward pass does.
        seconds = work[0] * (1 + deep) / 2 + work[1] * count / total
        cost: dict[str, Any] = {"numbers": count, "parameters": count, "backward": deep, "seconds": seconds}
        return measure.row(name, found.cosine, credits=found.credit, **cost)

    whole: dict[str, Any] = {
        "numbers": total,
        "parameters": total,
        "backward": float(shares.max()),
        "seconds": sum(work),
    }
    # Every component counts the same, however long its gradient is.
    cosines = sum((products.each([number])[0] for number in range(len(sizes))), np.zeros(products.rows.shape))
    single = cross_validate(
        products, measure.right, "accuracy", measure.groups, folds=settings.folds, seed=settings.seed, longest=1
    )
    return [
        measure.row(FULL, measure.full, **whole),
        measure.row("full gradient, inner product", products.values.sum(0, dtype=np.float64), **whole),
        measure.row("mean of the components' cosines", cosines / len(sizes), **whole),
        measure_set("best component, held out", single),
        *(measure_set(f"greedy for {one}, held out", searches[one].held_out) for one in OBJECTIVES),
    ]


def _measure_projections(measure: _Measure) -> list[Representation]:
    result, rows = measure.result, []
    parameters = int(measure.products.parameters.sum())
    for number, name in enumerate(result.projected[measure.words].names):
        seconds = sum(result.seconds.get(part, 0.0) for part in ("gradients", f"projection {name}"))
        for form, label in ((result.projected, ""), (result.published, ", as published")):
            one = form[measure.words]
            cost: dict[str, Any] = {
                "numbers": int(one.parameters[number]),
                "parameters": parameters,
                "seconds": seconds,
            }
            rows.append(measure.row(f"projection {name}{label}", one.each([number])[0], backward=1.0, **cost))
    return rows


def _measure_baselines(measure: _Measure) -> list[Representation]:
    """Return the rows of layer outputs, of the last hidden state, of BM25 and of chance."""
    outputs, right = measure.result.outputs[measure.words], measure.right
    last, rows = len(outputs.names) - 1, []
    cost: dict[str, Any] = {"seconds": measure.result.seconds.get("gradients", 0.0) / 2, "opponent": True}
    if last:
        count = int(outputs.parameters[:-1].sum())
        cosine, product = outputs.cosine(range(last)), outputs.values[:-1].sum(0)
        rows.append(measure.row("layer outputs, cosine", cosine, numbers=count, **cost))
        rows.append(measure.row("layer outputs, inner product", product, numbers=count, **cost))
    if size := int(outputs.parameters[-1]):
        rows.append(measure.row("rep-sim", outputs.cosine([last]), numbers=size, **cost))
    place = -np.broadcast_to(np.arange(right.shape[1], dtype=np.float64), right.shape)
    chance = right.sum(1) / np.maximum(measure.listed.sum(1), 1)
    rows.append(measure.row("bm25 of the prompts", credits=measure.credit(place), opponent=True))
    return [*rows, measure.row("random", credits=chance, opponent=True)]


def _measure_components(measure: _Measure, shares: Float[np.ndarray, " component"]) -> tuple[ComponentFinding, ...]:
    outputs, right = measure.result.outputs[measure.words], measure.right
    place_of = {name: number for number, name in enumerate(outputs.names[:-1])}
    found = []
    for number, part in enumerate(measure.result.inputs.compared.components):
        cosine = measure.products.each([number])[0]
        place = next((place_of[use.module] for use in part.uses if use.module in place_of), None)
        found.append(
            ComponentFinding(
                part.name,
                component_type(part.name),
                layer_number(part.name),
                part.size,
                float(shares[number]),
                measure.estimate(measure.credit(cosine)),
                float(compute_agreement(cosine, measure.full, measure.listed)),
                float(compute_agreement(cosine, measure.full, measure.listed, centred=True)),
                None if place is None else float(measure.credit(outputs.cosine([place])).mean()),
                float(cosine[right].mean()) if right.any() else float("nan"),
            )
        )
    return tuple(found)


def _list_wrong(measure: _Measure) -> list[dict[str, Any]]:
    """Return the queries whose original the full gradient does not put first."""
    inputs, found = measure.result.inputs, []
    candidates = inputs.candidates[measure.words]
    ranked = np.where(measure.listed, measure.full, -np.inf)
    for query in np.flatnonzero(measure.credit(measure.full) < 1).tolist():
        picked = int(candidates.rows[query, int(ranked[query].argmax())])
        originals = candidates.rows[query][measure.right[query]].tolist()
        found.append(
            {
                "query": inputs.queries.examples[query].id,
                "picked": inputs.train.examples[picked].id,
                "similarity": float(ranked[query].max()),
                "originals": [inputs.train.examples[row].id for row in originals],
                "original_listed": bool(originals),
                "original_similarity": float(measure.full[query][measure.right[query]].max()) if originals else None,
                "rank_by_bm25": int(candidates.rank[query]),
                "query_tokens": int(inputs.queries.lengths[query]),
                "picked_tokens": int(inputs.train.lengths[picked]),
                "original_tokens": [int(inputs.train.lengths[row]) for row in originals],
            }
        )
    return found
