"""Influence functions with Kronecker factors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from vestige.curvature import Labels, kfac_of
from vestige.methods._preconditioned import (
    ESTIMATES,
    UNIT,
    Preconditioned,
    curvature_data,
    curvature_folder,
    curvature_work,
)
from vestige.methods._prepared import HELPS
from vestige.methods._protocol import Job
from vestige.methods._registry import method
from vestige.methods._stores import Vectors
from vestige.runs import Meaning


@method("kfac")
@dataclass
class Kfac(Preconditioned):
    """Influence function with K-FAC (Martens and Grosse 2015, arXiv:1503.05671), each layer with its bias a block."""

    needs_exact = True
    sweeps_damping = True
    works_sharded = True
    meaning = Meaning(
        sign=HELPS,
        unit=UNIT,
        target="this model",
        normalisation="K-FAC approximation of the Fisher matrix of each layer",
        estimates=f"{ESTIMATES}.",
        cost="Two passes over the training data and one more forward to draw labels; memory for the whole gradient of "
        "every query and two square matrices for each layer.",
        limits="First order around one set of weights; takes layers, tokens, and inputs and output gradients as "
        "independent, which ekfac corrects for one pass more; the damping sets its scale, so compare within a run.",
    )
    labels: Annotated[Labels, "Drawn from the model: the true Fisher matrix; or the data's: the empirical one."] = (
        "sampled"
    )
    split: Annotated[
        Literal["eigenvalues", "factors"],
        "Where the damping goes: on the eigenvalues of the product, or on each factor its share.",
    ] = "eigenvalues"

    def inverse(self, job: Job) -> Callable[[Vectors], Vectors]:
        """Measure the factors in one pass, or read what an index keeps; return the preconditioner."""
        measured = curvature_data(job, self.name, self.labels)
        model, folder, work = job.model_for(self.name).fingerprint, curvature_folder(job), curvature_work(job)
        factors = self.once("factors", lambda: kfac_of(measured, model, folder, work))
        if self.split == "factors":
            return lambda vectors: factors.precondition_split(vectors, job.settings.damping)
        curvature = self.once("curvature", factors.eigenbases)
        return lambda vectors: curvature.precondition(vectors, job.settings.damping)
