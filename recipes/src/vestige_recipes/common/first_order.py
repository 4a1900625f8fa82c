"""Scores of whole sources that need a gradient of each set and no unlearning: what UnTrac is compared with.

Each is one step of UnTrac under some step rule (Isonuma and Titov 2024, arXiv:2401.15241, section 3): plain for inner
products, of unit length for cosines, a Newton step for influence functions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vestige.curvature import CurvatureProduct
from vestige.data import load_examples, tokenize
from vestige.methods import Arnoldi, Job, Lissa, UntracJob, borrow_weights, make_job
from vestige.models import load_model, select_components
from vestige.settings import AttributeSettings, UntracSettings
from vestige_recipes.common.sources import Table

CURVATURE_EXAMPLES = 256
"""On which a step of LiSSA or of Arnoldi looks at the curvature, as published."""
Inverses = Mapping[str, Lissa | Arnoldi]
INVERSES: Inverses = {
    "HIF, LiSSA": Lissa(sample=CURVATURE_EXAMPLES),
    "HIF, Arnoldi": Arnoldi(examples=CURVATURE_EXAMPLES),
}
"""Influence functions by the columns that they fill, with as many steps as they have by default."""
AS_PUBLISHED: Inverses = {
    "HIF, LiSSA": Lissa(sample=CURVATURE_EXAMPLES, depth=10),
    "HIF, Arnoldi": Arnoldi(examples=CURVATURE_EXAMPLES, steps=25, rank=25),
}
"""The same with the fewer steps that UnTrac's authors gave them."""


class SetGradients(NamedTuple):
    """Gradients of the loss per token of every set, all weights in one vector."""

    tests: Float[Tensor, "test n"]
    sources: Float[Tensor, "source n"]

    def products(self, tests: Float[Tensor, "test n"] | None = None) -> Table:
        """Inner products of every test set, or of what was made of them, with every source."""
        left = self.tests if tests is None else tests
        return (left.double() @ self.sources.double().T).cpu().numpy()

    @property
    def lengths(self) -> Float[np.ndarray, "source"]:
        """Of the sources' gradients."""
        return self.sources.double().norm(dim=1).cpu().numpy()


@dataclass(frozen=True)
class Asked:
    """A model with the sets that it is asked about, and what a method of `vestige attribute` needs of it."""

    job: UntracJob
    methods: Job

    def gradients(self) -> SetGradients:
        """By one backward pass over every set."""
        components = self.methods.components
        layout = CurvatureProduct(self.methods.model_for("lissa").model, components, self.methods.train, 1)
        with borrow_weights(self.job.loaded) as weights:
            found = []
            for side in (self.job.tests, self.job.train):
                vectors = []
                for each in side.sets:
                    weights.backward(side.data, each.rows, "sum", self.job.token_budget)
                    slopes = [weights.parameters[part.name].grad for part in components]
                    assert all(slope is not None for slope in slopes)
                    vectors.append(layout.flatten([slope for slope in slopes if slope is not None]))
                found.append(torch.stack(vectors))
        return SetGradients(*found)


def first_order_scores(
    checkpoints: Sequence[str],
    data: Path,
    queries: Path,
    *,
    seed: int,
    inverses: Inverses = INVERSES,
) -> dict[str, Table]:
    """GradDot, GradCos, TracIn and two influence functions of every source for every test set, positive if it helps.

    All are of the last checkpoint but TracIn, the sum of the inner products at all of them. As published, GradCos
    divides by the length of the source's gradient alone, which changes nothing for a test set.

    Args:
        checkpoints: Folders of one model while it was trained; the last is the one that is asked.
        data: Rows with a `source`.
        queries: Rows of the test sets, which their `source` names.
        seed: Of the examples on which curvature is measured.
        inverses: The influence functions.
    """
    asked = [opened(folder, data, queries, seed) for folder in checkpoints]
    found = [each.gradients() for each in asked]
    last, products = found[-1], found[-1].products()
    scores = {
        "GradDot": products,
        "GradCos": products / last.lengths,
        "TracIn": np.sum([each.products() for each in found], axis=0),
    }
    job = asked[-1].methods
    for name, method in inverses.items():
        inverse = method.inverse(job)
        parts = list(last.tests.split([component.size for component in job.components], dim=1))
        scores[name] = last.products(torch.cat(inverse(parts, job.settings.damping), dim=1))
    return scores


def opened(model: str, data: Path, queries: Path, seed: int) -> Asked:
    """Return the model in a folder, the sources and the test sets."""
    loaded = load_model(model)
    train, tests = (
        tokenize(load_examples(str(path)), loaded.tokenizer, max_length=loaded.context_length, name=path.name)
        for path in (data, queries)
    )
    common = {"model": model, "data": str(data), "queries": str(queries), "out": Path("unused"), "seed": seed}
    return Asked(
        make_job(UntracSettings.model_validate(common), loaded, train, tests),
        Job(train, tests, AttributeSettings.model_validate(common), loaded, select_components(loaded.model, ("all",))),
    )
