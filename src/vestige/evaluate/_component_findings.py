"""Everything about one choice of candidates, from the products alone; no model runs again."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from vestige.evaluate._component_files import FULL
from vestige.evaluate._component_pass import OnePassResult
from vestige.evaluate._component_sets import (
    CHOOSING,
    OBJECTIVES,
    CrossValidation,
    Objective,
    centre_lists,
    compute_agreement,
    credit,
    cross_validate,
    greedy_path,
)
from vestige.evaluate._result import Estimate, bootstrap, estimate_mean, make_interval
from vestige.models import Component, layer_number, select_components
from vestige.settings import ComponentsSettings

Finding = dict[str, Any]
_CANDIDATES_DRAWN = 5
_BYTES = 4
_BLOCK = re.compile(r"^.*?\.\d+\.")


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


def _if_known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


class Findings:
    """Everything about one choice of candidates, from the products alone; no model runs again.

    Findings are mappings in the terms of `components.json`, with an `Estimate` where that has a value and an interval.
    """

    def __init__(self, settings: ComponentsSettings, result: OnePassResult, words: str) -> None:
        self.words, self._settings, self._result = words, settings, result
        self.products, self.candidates = result.gradients[words], result.inputs.candidates[words]
        self.right, self.full = self.candidates.right, self.products.cosine()
        parts, model = result.inputs.components, result.inputs.loaded.model
        self._shares = np.full(len(parts), np.nan) if result.is_read else backward_shares(model, parts)
        held_out: dict[Objective, CrossValidation] = {one: self._judge(one) for one in OBJECTIVES}
        self.searches = {one: self._search(one, held_out[one]) for one in OBJECTIVES}
        self.representations = [*self._measure_sets(held_out), *self._measure_projections(), *self._measure_baselines()]
        self.components = [self._measure_component(number) for number in range(len(self.products.names))]
        self.wrong = [self._describe_wrong(int(query)) for query in np.flatnonzero(self._credit(self.full) < 1)]

    def to_json(self) -> Finding:
        """Return all of it."""
        ranks = self.candidates.rank
        return {
            "original_listed": float(self.right.any(1).mean()),
            "original_put_there": int(self.candidates.forced.sum()),
            "rank_of_original_by_bm25": {str(rank): int((ranks == rank).sum()) for rank in np.unique(ranks).tolist()},
            "representations": self.representations,
            "components": self.components,
            "searches": self.searches,
            "wrong": self.wrong,
        }

    def similarity(self) -> str:
        """Return cosines of each component for some queries, as CSV: query, candidate, right, component, cosine."""
        lines = ["query,candidate,right,component,cosine"]
        for query in self._most_divergent():
            products = self.products.of([query]).first(_CANDIDATES_DRAWN)
            cosines = np.stack([products.cosine([number])[0] for number in range(len(products.names))])
            quoted = '"' + self._result.inputs.queries.examples[query].id.replace('"', '""') + '"'
            for candidate, values in enumerate(cosines.T):
                start = f"{quoted},{candidate},{int(self.right[query, candidate])}"
                pairs = zip(self.products.names, values, strict=True)
                lines += [f"{start},{name},{value:.6g}" for name, value in pairs]
        return "\n".join(lines) + "\n"

    def _most_divergent(self) -> list[int]:
        """Return the three queries with the lowest cosine between the lists of the best component and the full one."""
        best = int(np.argmax([one["accuracy"].value for one in self.components]))
        cosine, full = self.products.cosine([best]), self.full
        lengths = np.sqrt((cosine**2).sum(1) * (full**2).sum(1))
        alike = np.where(lengths > 0, (cosine * full).sum(1) / np.maximum(lengths, 1e-300), 1.0)
        return np.argsort(alike, kind="stable")[:3].tolist()

    def _credit(self, scores: np.ndarray) -> Float[np.ndarray, " query"]:
        return credit(scores, self.right, self.products.listed)

    def _estimate(self, values: Float[np.ndarray, " query"]) -> Estimate:
        return estimate_mean(values, self._settings.draws, self._settings.seed, self._result.inputs.groups)

    def _agreement(self, scores: Float[np.ndarray, "query candidate"], *, centred: bool) -> Estimate:
        """Return the agreement with the full gradient, with a bootstrap interval over groups of queries."""
        listed = self.products.listed
        value = float(compute_agreement(scores, self.full, listed, centred=centred))
        first, second = (listed * (centre_lists(each, listed) if centred else each) for each in (scores, self.full))
        group = np.unique(self._result.inputs.groups, return_inverse=True)[1]
        parts = [np.bincount(group, row.sum(1)) for row in (first * second, first**2, second**2)]
        if len(parts[0]) < 2:
            return Estimate(value, float("nan"), float("nan"))

        def compute(rows: np.ndarray) -> float:
            both, one, other = (part[rows].sum() for part in parts)
            return both / np.maximum(np.sqrt(one * other), 1e-300)

        return make_interval(value, bootstrap(compute, [len(parts[0])], self._settings.draws, self._settings.seed))

    def _measure(
        self,
        name: str,
        scores: Float[np.ndarray, "query candidate"] | None = None,
        credits: Float[np.ndarray, " query"] | None = None,
        *,
        numbers: float | None = None,
        parameters: float | None = None,
        backward: float | None = None,
        seconds: float | None = None,
        opponent: bool = False,
    ) -> Finding:
        """Return a representation, one way of comparing examples: how well it does, and what it costs.

        `numbers` is the length of one example's vector, `parameters` the gradients that it is made of, and `backward`
        their share of a complete backward pass. `against_full` is accuracy minus that of the full gradient, in pairs.
        """
        if credits is None:
            assert scores is not None
            credits = self._credit(scores)
        return {
            "name": name,
            "accuracy": self._estimate(credits),
            "against_full": None if name == FULL else self._estimate(credits - self._credit(self.full)),
            "agreement": None if scores is None else self._agreement(scores, centred=False),
            "centred": None if scores is None else self._agreement(scores, centred=True),
            "parameters": None if parameters is None else parameters / self._result.inputs.total_parameters,
            "backward": _if_known(backward),
            "bytes": None if numbers is None else round(_BYTES * numbers),
            "seconds": None if self._result.is_read else seconds,
            "opponent": opponent,
        }

    def _judge(self, objective: Objective, longest: int | None = None) -> CrossValidation:
        settings, enough = self._settings, self._settings.enough if objective == "agreement" else None
        limits: Finding = {"folds": settings.folds, "seed": settings.seed, "longest": longest or settings.longest}
        groups = self._result.inputs.groups
        return cross_validate(self.products, self.right, objective, groups, **limits, enough=enough)

    def _search(self, objective: Objective, held_out: CrossValidation) -> Finding:
        """Return the greedy path on all queries, the set that it chooses, and what sets chosen alike are worth."""
        products, names = self.products, np.array(self.products.names)
        path = greedy_path(products.first(CHOOSING), self.right[:, :CHOOSING], objective)
        along = {one: greedy_path(products, self.right, one, order=path.order).values for one in OBJECTIVES}
        chosen = path.best(self._settings.enough if objective == "agreement" else None)
        return {
            "path": names[list(path.order)].tolist(),
            **{f"{name}_along_path": list(values) for name, values in along.items()},
            "parameters_along_path": np.cumsum(products.parameters[list(path.order)]).tolist(),
            "chosen": names[list(chosen)].tolist(),
            "chosen_value": path.values[len(chosen) - 1],
            "chosen_by_fold": [names[list(fold)].tolist() for fold in held_out.chosen],
            "train": held_out.train,
            "held_out_accuracy": float(held_out.credit.mean()),
        }

    def _measure_sets(self, held_out: dict[Objective, CrossValidation]) -> list[Finding]:
        products, shares = self.products, self._shares
        sizes, total = products.parameters, int(products.parameters.sum())
        work = [self._result.seconds.get(name, 0.0) for name in ("gradients", "products")]
        whole: Finding = {"numbers": total, "parameters": total, "backward": float(shares.max()), "seconds": sum(work)}
        # Every component counts the same, however long its gradient is.
        cosines = sum((products.cosine([number]) for number in range(len(sizes))), np.zeros(products.rows.shape))
        rows = [
            self._measure(FULL, self.full, **whole),
            self._measure("full gradient, inner product", products.values.sum(0, dtype=np.float64), **whole),
            self._measure("mean of the components' cosines", cosines / len(sizes), **whole),
        ]
        names = {
            "best component": self._judge("accuracy", 1),
            **{f"greedy for {one}": held_out[one] for one in held_out},
        }
        for name, found in names.items():
            count = float(np.mean([sizes[list(chosen)].sum() for chosen in found.chosen]))
            deep = float(np.mean([shares[list(chosen)].max() for chosen in found.chosen]))
            # With frozen weights the backward pass costs what the forward pass does.
            seconds = work[0] * (1 + deep) / 2 + work[1] * count / total
            cost: Finding = {"numbers": count, "parameters": count, "backward": deep, "seconds": seconds}
            rows.append(self._measure(f"{name}, held out", found.cosine, found.credit, **cost))
        return rows

    def _measure_projections(self) -> list[Finding]:
        result, rows = self._result, []
        cost: Finding = {"parameters": int(self.products.parameters.sum()), "backward": 1.0}
        for number, name in enumerate(result.projected[self.words].names):
            cost["seconds"] = sum(result.seconds.get(part, 0.0) for part in ("gradients", f"projection {name}"))
            for form, label in ((result.projected, ""), (result.published, ", as published")):
                one = form[self.words]
                cost["numbers"] = int(one.parameters[number])
                rows.append(self._measure(f"projection {name}{label}", one.cosine([number]), **cost))
        return rows

    def _measure_baselines(self) -> list[Finding]:
        """Return layer outputs, the last hidden state, BM25 and chance."""
        outputs, right = self._result.outputs[self.words], self.right
        last, rows = len(outputs.names) - 1, []
        cost: Finding = {"seconds": self._result.seconds.get("gradients", 0.0) / 2, "opponent": True}
        if last:
            count = int(outputs.parameters[:-1].sum())
            cosine, product = outputs.cosine(range(last)), outputs.values[:-1].sum(0)
            rows.append(self._measure("layer outputs, cosine", cosine, numbers=count, **cost))
            rows.append(self._measure("layer outputs, inner product", product, numbers=count, **cost))
        if size := int(outputs.parameters[-1]):
            rows.append(self._measure("rep-sim", outputs.cosine([last]), numbers=size, **cost))
        place = -np.broadcast_to(np.arange(right.shape[1], dtype=np.float64), right.shape)
        chance = right.sum(1) / np.maximum(self.products.listed.sum(1), 1)
        rows.append(self._measure("bm25 of the prompts", credits=self._credit(place), opponent=True))
        return [*rows, self._measure("random", credits=chance, opponent=True)]

    def _measure_component(self, number: int) -> Finding:
        """Return one component by itself; `output_accuracy` is that of its module's outputs, where that has its own."""
        outputs, part = self._result.outputs[self.words], self._result.inputs.components[number]
        cosine, listed = self.products.cosine([number]), self.products.listed
        tapped = [outputs.names.index(use.module) for use in part.uses if use.module in outputs.names[:-1]]
        return {
            "name": part.name,
            "type": component_type(part.name),
            "layer": layer_number(part.name),
            "parameters": part.size,
            "backward": _if_known(float(self._shares[number])),
            "accuracy": self._estimate(self._credit(cosine)),
            "agreement": float(compute_agreement(cosine, self.full, listed)),
            "centred": float(compute_agreement(cosine, self.full, listed, centred=True)),
            "output_accuracy": float(self._credit(outputs.cosine(tapped[:1])).mean()) if tapped else None,
            "self_similarity": float(cosine[self.right].mean()) if self.right.any() else float("nan"),
        }

    def _describe_wrong(self, query: int) -> Finding:
        """Return a query whose original the full gradient does not put first."""
        inputs, rows, right = self._result.inputs, self.candidates.rows[query], self.right[query]
        ranked = np.where(rows >= 0, self.full[query], -np.inf)
        picked, originals = int(rows[int(ranked.argmax())]), rows[right].tolist()
        return {
            "query": inputs.queries.examples[query].id,
            "picked": inputs.train.examples[picked].id,
            "similarity": float(ranked.max()),
            "originals": [inputs.train.examples[row].id for row in originals],
            "original_listed": bool(originals),
            "original_similarity": float(self.full[query][right].max()) if originals else None,
            "rank_by_bm25": int(self.candidates.rank[query]),
            "query_tokens": int(inputs.queries.lengths[query]),
            "picked_tokens": int(inputs.train.lengths[picked]),
            "original_tokens": [int(inputs.train.lengths[row]) for row in originals],
        }
