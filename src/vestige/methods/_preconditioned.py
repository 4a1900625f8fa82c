"""Influence functions on whole gradients: the queries' gradients times the inverse of some curvature."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import psutil
from pydantic import StringConstraints

from vestige.curvature import (
    CurvatureData,
    CurvatureKind,
    CurvatureProduct,
    DataInf,
    KroneckerCurvature,
    Labels,
    ekfac_of,
    kfac_of,
    mean_eigenvalues,
)
from vestige.data import TokenizedData
from vestige.distributed import FSDP
from vestige.errors import SpecError, UserError
from vestige.jobs import worker_command
from vestige.methods import HELPS, ExactGradients, GradientMethod, Job, Prepared, Vectors, method
from vestige.methods._refine import PATTERN, Refinement, Residuals
from vestige.progress import announce, format_bytes
from vestige.runs import Check, Meaning
from vestige.storage import partial_folder

UNIT = "nats of query loss, times the number of training examples, up to the damping's scale"
ESTIMATES = (
    "How much the query's loss would rise if the example were left out of training (times N), to first order around "
    "these weights"
)
FISHER_BLOCKS = "approximation of the Fisher matrix of each layer"

# Options of several methods.
LabelsOption = Annotated[Labels, "Drawn from the model: the true Fisher matrix; or the data's: the empirical one."]

Inverse = Callable[[Vectors, float], Vectors]
"""From the queries' gradients and a damping to the preconditioned ones."""


def make_meaning(**facts: str) -> Meaning:
    """Return what scores of influence functions mean, with what differs between them."""
    return Meaning(sign=HELPS, unit=UNIT, target="this model", **facts)


@dataclass
class Preconditioned(GradientMethod):
    """Score = `<(C + d I)^-1 grad loss(query), grad loss(example)>`, whole gradients, C as the method has it.

    Stored gradients of an index are compressed and not used; its folder keeps what curvature can be kept.
    """

    needs_exact = True

    @abstractmethod
    def inverse(self, job: Job) -> Inverse:
        """Measure the curvature; return the map from the queries' gradients to the preconditioned ones."""

    def vectors(self, job: Job) -> Prepared:
        """Return the queries' gradients, preconditioned."""
        return self.at_dampings(job)(job.settings.damping)

    def at_dampings(self, job: Job) -> Callable[[float], Prepared]:
        """Measure the curvature once; return the map from a damping to the vectors.

        Raises:
            UserError: The whole gradients of the queries do not fit into memory.
        """
        check_memory(job)
        store, inverse = ExactGradients(job), self.inverse(job)
        gradients = store.of_queries(job.queries)

        def at(damping: float) -> Prepared:
            def transform(vectors: Vectors) -> Vectors:
                return inverse(vectors, damping)

            return Prepared(job, store, transform(gradients), transform)

        return at


def check_memory(job: Job) -> None:
    """Raise unless gradients before and after preconditioning fit into memory.

    On a GPU its memory is smaller, and torch reports that itself.

    Raises:
        UserError: They do not fit.
    """
    dampings = len(job.settings.damping) if job.settings.swept else 1
    needed = (1 + dampings) * 4 * len(job.queries) * sum(part.size for part in job.components)
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{job.settings.method} keeps whole gradients: {format_bytes(needed)} for {len(job.queries)} queries, and "
            f"{format_bytes(available)} of memory are free. Ask fewer queries at once, select fewer --components, or "
            "type --method influence, which compresses them."
        )


def curvature_data(job: Job, labels: Labels) -> CurvatureData:
    """Return the training data as a curvature is measured on it: without the examples that an index leaves out."""
    model, settings, data = job.model_for(job.settings.method).model, job.settings, leave_out_skipped(job)
    return CurvatureData(model, job.components, data, job.token_budget, settings.loss, labels, settings.seed)


def curvature_product(job: Job, data: TokenizedData, kind: CurvatureKind = "gauss-newton") -> CurvatureProduct:
    """Return products with the curvature of the job's model over the data."""
    model, settings = job.model_for(job.settings.method).model, job.settings
    return CurvatureProduct(model, job.components, data, job.token_budget, settings.loss, kind)


def leave_out_skipped(job: Job) -> TokenizedData:
    """Return the training examples without those that are left out."""
    if not job.skipped:
        return job.train
    return job.train.subset(np.setdiff1d(np.arange(len(job.train)), job.skipped))


def measure_factors(job: Job, labels: Labels, measure: Callable[..., KroneckerCurvature]) -> KroneckerCurvature:
    """Return the curvature that `ekfac_of` or `kfac_of` measures, or reads where it was kept.

    It is kept beside the index, else beside the run until that is written. Where the training data is a single piece
    of work without an index, nothing is kept.
    """
    if job.index is not None:
        folder = job.index.folder / "curvature"
    else:
        folder = partial_folder(job.settings.out) / "curvature" if ExactGradients(job).pieces > 1 else None
    fingerprint, command = job.model_for(job.settings.method).fingerprint, worker_command(job.settings, "attribute")
    return measure(curvature_data(job, labels), fingerprint, folder, job.settings, command)


@method("ekfac")
@dataclass
class Ekfac(Preconditioned):
    """Influence function with EK-FAC: Kronecker eigenvectors, eigenvalues measured on per-example gradients.

    `score = <(C + d I)^-1 grad loss(query), grad loss(example)>` (Grosse et al. 2023, arXiv:2308.03296), one block for
    each layer with its bias; the exact Fisher matrix for lone vectors; the diagonal for embeddings.
    """

    sweeps_damping = True
    works_sharded = True
    meaning = make_meaning(
        normalisation=f"EK-FAC {FISHER_BLOCKS}",
        estimates=f"{ESTIMATES}.",
        cost="Three passes over the training data and one more forward to draw labels; memory for the whole gradient "
        "of every query and two square matrices for each layer.",
        limits="First order around one set of weights; layers are taken as independent, and within one only the "
        "diagonal in the Kronecker basis is exact; the damping sets its scale, so compare within a run.",
    )
    labels: LabelsOption = "sampled"
    refine: Annotated[
        Annotated[str, StringConstraints(pattern=f"^{PATTERN}$")] | None,
        "Go on from EK-FAC's solution with products of the whole Gauss-Newton matrix: cg:N for N steps of conjugate "
        "gradients, neumann:N for N steps on an Nth of the data each.",
    ] = None
    _residuals: dict[float, Residuals] = field(default_factory=dict, repr=False, init=False, compare=False)

    def __post_init__(self) -> None:
        """Set what refined scores mean."""
        if self.refine is not None:
            passes = "three passes" if self.refine.startswith("neumann") else "a pass for each step and one"
            self.meaning = replace(
                type(self).meaning,
                normalisation=f"Gauss-Newton matrix of all selected parameters together ({self.refine} from EK-FAC)",
                cost=f"As ekfac, and {passes} more over the training data, with a second derivative for every query; "
                "self-influence pays the same for every example.",
                limits="First order around one set of weights; the damping, of each layer as in EK-FAC, sets its "
                "scale, so compare within a run; see the residual.",
            )

    def inverse(self, job: Job) -> Inverse:
        """Measure the curvature in two passes, or read what an index keeps; return the preconditioner.

        Raises:
            SpecError: A sharded model has no products to refine with.
        """
        if self.refine is not None and job.settings.device == FSDP:
            raise SpecError(f"A model under --device {FSDP} has no second derivatives. Drop --option refine.")
        curvature = measure_factors(job, self.labels, ekfac_of)
        if self.refine is None:
            return curvature.precondition
        product = curvature_product(job, leave_out_skipped(job))
        refinement = Refinement(product, curvature, self.refine, job.settings.seed)

        def solve(vectors: Vectors, damping: float) -> Vectors:
            solved, found = refinement.solve(vectors, damping)
            # The queries come first, before any example for itself.
            if self._residuals.setdefault(damping, found) is found:
                announce(f"{self.refine}: the relative residual was {found.before:.2g} and is {found.after:.2g}.")
            return solved

        return solve

    def checks(self, job: Job) -> list[Check]:
        """Return how far the refined solution is from solving the system."""
        if self.refine is None:
            return []
        self.prepare(job)
        before, after = self._residuals[job.settings.damping]
        fell = after < before
        reading = (
            f"|g - (G + D) x| / |g|, largest of the queries, is {after:.2g} after {self.refine}, and was {before:.2g} "
            f"with EK-FAC alone{'' if fell else ': the steps have not helped; take more, or a larger --damping'}."
        )
        return [
            Check(name="residual of the solution", value=after, reading=reading, verdict="good" if fell else "warn")
        ]


@method("kfac")
@dataclass
class Kfac(Preconditioned):
    """Influence function with K-FAC (Martens and Grosse 2015, arXiv:1503.05671), each layer with its bias a block."""

    sweeps_damping = True
    works_sharded = True
    meaning = make_meaning(
        normalisation=f"K-FAC {FISHER_BLOCKS}",
        estimates=f"{ESTIMATES}.",
        cost="Two passes over the training data and one more forward to draw labels; memory for the whole gradient of "
        "every query and two square matrices for each layer.",
        limits="First order around one set of weights; takes layers, tokens, and inputs and output gradients as "
        "independent, which ekfac corrects for one pass more; the damping sets its scale, so compare within a run.",
    )
    labels: LabelsOption = "sampled"
    split: Annotated[
        Literal["eigenvalues", "factors"],
        "Where the damping goes: on the eigenvalues of the product, or on each factor its share.",
    ] = "eigenvalues"

    def inverse(self, job: Job) -> Inverse:
        """Measure the factors in one pass, or read what an index keeps; return the preconditioner."""
        factors = measure_factors(job, self.labels, kfac_of)
        return factors.precondition_split if self.split == "factors" else factors.eigenbases().precondition


@method("datainf")
@dataclass
class DataInfMethod(Preconditioned):
    """Influence with the inverse of an average replaced by the average of inverses, in closed form.

    Kwon et al. 2024, arXiv:2310.00902, component by component.
    """

    sweeps_damping = True
    meaning = make_meaning(
        normalisation="average inverse of each example's own damped outer product, by component",
        estimates="An influence function whose inverse Fisher matrix is replaced by the average of the inverses that "
        "single examples would have.",
        cost="Three passes over the training data, and one more for each further set of queries; memory for the whole "
        "gradients of the queries, twice.",
        limits="The swap of inverse and average is exact only for one example; with many parameters it stays close to "
        "the inner product of gradients. The damping sets its scale, so compare within a run.",
    )

    def inverse(self, job: Job) -> Inverse:
        """Measure the damping in one pass; return the preconditioner, which needs one more for each set of vectors."""
        measured = curvature_data(job, "data")
        units = mean_eigenvalues(measured)
        return lambda vectors, damping: DataInf.with_damping(measured, units, damping).precondition(vectors)
