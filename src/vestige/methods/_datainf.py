"""DataInf."""

from collections.abc import Callable
from dataclasses import dataclass

from vestige.curvature import DataInf, mean_eigenvalues
from vestige.methods._preconditioned import UNIT, Preconditioned, curvature_data
from vestige.methods._prepared import HELPS
from vestige.methods._protocol import Job
from vestige.methods._registry import method
from vestige.methods._stores import Vectors
from vestige.runs import Meaning


@method("datainf")
@dataclass
class DataInfMethod(Preconditioned):
    """Influence with the inverse of an average replaced by the average of inverses, in closed form.

    Kwon et al. 2024, arXiv:2310.00902, component by component.
    """

    needs_exact = True
    sweeps_damping = True
    meaning = Meaning(
        sign=HELPS,
        unit=UNIT,
        target="this model",
        normalisation="average inverse of each example's own damped outer product, by component",
        estimates="An influence function whose inverse Fisher matrix is replaced by the average of the inverses that "
        "single examples would have.",
        cost="Three passes over the training data, and one more for each further set of queries; memory for the whole "
        "gradients of the queries, twice.",
        limits="The swap of inverse and average is exact only for one example; with many parameters it stays close to "
        "the inner product of gradients. The damping sets its scale, so compare within a run.",
    )

    def inverse(self, job: Job) -> Callable[[Vectors], Vectors]:
        """Measure the damping in one pass; return the preconditioner, which needs one more for each set of vectors."""
        measured = curvature_data(job, self.name, "data")
        units = self.once("units", lambda: mean_eigenvalues(measured))
        return DataInf.with_damping(measured, units, job.settings.damping).precondition
