"""Influence functions with eigenvalue-corrected Kronecker factors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from vestige.curvature import Labels, ekfac_of
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


@method("ekfac")
@dataclass
class Ekfac(Preconditioned):
    """Influence function with EK-FAC: Kronecker eigenvectors, eigenvalues measured on per-example gradients.

    `score = <(C + d I)^-1 grad loss(query), grad loss(example)>` (Grosse et al. 2023, arXiv:2308.03296), one block for
    each layer with its bias; the exact Fisher matrix for lone vectors; the diagonal for embeddings.
    """

    needs_exact = True
    sweeps_damping = True
    works_sharded = True
    meaning = Meaning(
        sign=HELPS,
        unit=UNIT,
        target="this model",
        normalisation="EK-FAC approximation of the Fisher matrix of each layer",
        estimates=f"{ESTIMATES}.",
        cost="Three passes over the training data and one more forward to draw labels; memory for the whole gradient "
        "of every query and two square matrices for each layer.",
        limits="First order around one set of weights; layers are taken as independent, and within one only the "
        "diagonal in the Kronecker basis is exact; the damping sets its scale, so compare within a run.",
    )
    labels: Annotated[Labels, "Drawn from the model: the true Fisher matrix; or the data's: the empirical one."] = (
        "sampled"
    )

    def inverse(self, job: Job) -> Callable[[Vectors], Vectors]:
        """Measure the curvature in two passes, or read what an index keeps; return the preconditioner."""
        measured = curvature_data(job, self.name, self.labels)
        model, folder, work = job.model_for(self.name).fingerprint, curvature_folder(job), curvature_work(job)
        curvature = self.once("curvature", lambda: ekfac_of(measured, model, folder, work))
        return lambda vectors: curvature.precondition(vectors, job.settings.damping)
