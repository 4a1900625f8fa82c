"""Influence functions on whole gradients: the queries' gradients times the inverse of some curvature."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import psutil
import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from vestige.curvature import (
    CurvatureData,
    CurvatureKind,
    CurvatureProduct,
    DataInf,
    Labels,
    absolute_damping,
    arnoldi,
    conjugate_gradient,
    ekfac_of,
    kfac_of,
    largest_eigenvalue,
    lissa,
    mean_eigenvalues,
)
from vestige.data import TokenizedData
from vestige.errors import SpecError, UserError
from vestige.indexes import batch_tokens
from vestige.jobs import worker_command
from vestige.methods import HELPS, ExactGradients, GradientMethod, Job, Prepared, Vectors, method
from vestige.progress import announce, format_bytes
from vestige.runs import Meaning
from vestige.settings import LaunchSettings
from vestige.storage import partial_folder

UNIT = "nats of query loss, times the number of training examples, up to the damping's scale"
ESTIMATES = (
    "How much the query's loss would rise if the example were left out of training (times N), to first order around "
    "these weights"
)
FISHER_BLOCKS = "approximation of the Fisher matrix of each layer"
GAUSS_NEWTON = "Gauss-Newton matrix of all selected parameters together"
POWER_STEPS = 8
"""Of the search for the largest eigenvalue."""

# Options of several methods.
LabelsOption = Annotated[Labels, "Drawn from the model: the true Fisher matrix; or the data's: the empirical one."]
KindOption = Annotated[CurvatureKind, "Which matrix of second derivatives."]
ExamplesOption = Annotated[PositiveInt | None, "Measure the curvature on N training examples; none: on all."]

Inverse = Callable[[Vectors, float], Vectors]
"""From the queries' gradients and a damping to the preconditioned ones."""


def _meaning(**facts: str) -> Meaning:
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


def curvature_data(job: Job, method: str, labels: Labels) -> CurvatureData:
    """Return the training data as a curvature is measured on it: without the examples that an index leaves out."""
    loaded, settings = job.model_for(method), job.settings
    budget, data = batch_tokens(settings, loaded), leave_out_skipped(job)
    return CurvatureData(loaded.model, job.components, data, budget, settings.loss, labels, settings.seed)


def leave_out_skipped(job: Job) -> TokenizedData:
    """Return the training examples without those that are left out."""
    if not job.skipped:
        return job.train
    return job.train.subset(np.setdiff1d(np.arange(len(job.train)), job.skipped))


def _fit_where(
    job: Job, method: str, labels: Labels
) -> tuple[CurvatureData, str, Path | None, LaunchSettings, list[str] | None]:
    """Return the data of Kronecker factors, the model's fingerprint, where they are kept, and where passes run.

    They are kept beside the index, else beside the run until that is written. Where the training data is a single piece
    of work without an index, nothing is kept.
    """
    if job.index is not None:
        folder = job.index.folder / "curvature"
    else:
        folder = partial_folder(job.settings.out) / "curvature" if ExactGradients(job).pieces > 1 else None
    return curvature_data(job, method, labels), job.model_for(method).fingerprint, folder, *curvature_work(job)


def curvature_work(job: Job) -> tuple[LaunchSettings, list[str] | None]:
    """Return where the passes for the curvature run: like everything else of the run."""
    return job.settings, worker_command(job.settings, "attribute")


@method("ekfac")
@dataclass
class Ekfac(Preconditioned):
    """Influence function with EK-FAC: Kronecker eigenvectors, eigenvalues measured on per-example gradients.

    `score = <(C + d I)^-1 grad loss(query), grad loss(example)>` (Grosse et al. 2023, arXiv:2308.03296), one block for
    each layer with its bias; the exact Fisher matrix for lone vectors; the diagonal for embeddings.
    """

    sweeps_damping = True
    works_sharded = True
    meaning = _meaning(
        normalisation=f"EK-FAC {FISHER_BLOCKS}",
        estimates=f"{ESTIMATES}.",
        cost="Three passes over the training data and one more forward to draw labels; memory for the whole gradient "
        "of every query and two square matrices for each layer.",
        limits="First order around one set of weights; layers are taken as independent, and within one only the "
        "diagonal in the Kronecker basis is exact; the damping sets its scale, so compare within a run.",
    )
    labels: LabelsOption = "sampled"

    def inverse(self, job: Job) -> Inverse:
        """Measure the curvature in two passes, or read what an index keeps; return the preconditioner."""
        return ekfac_of(*_fit_where(job, self.name, self.labels)).precondition


@method("kfac")
@dataclass
class Kfac(Preconditioned):
    """Influence function with K-FAC (Martens and Grosse 2015, arXiv:1503.05671), each layer with its bias a block."""

    sweeps_damping = True
    works_sharded = True
    meaning = _meaning(
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
        factors = kfac_of(*_fit_where(job, self.name, self.labels))
        return factors.precondition_split if self.split == "factors" else factors.eigenbases().precondition


@method("datainf")
@dataclass
class DataInfMethod(Preconditioned):
    """Influence with the inverse of an average replaced by the average of inverses, in closed form.

    Kwon et al. 2024, arXiv:2310.00902, component by component.
    """

    sweeps_damping = True
    meaning = _meaning(
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
        measured = curvature_data(job, self.name, "data")
        units = mean_eigenvalues(measured)
        return lambda vectors, damping: DataInf.with_damping(measured, units, damping).precondition(vectors)


@dataclass(frozen=True)
class Problem:
    """The curvature of the training data, the unit of its damping, and the layout of its vectors."""

    product: CurvatureProduct
    unit: float
    """What a damping of 1 is."""

    def join(self, vectors: Vectors) -> Float[Tensor, "query n"]:
        """Return one flat vector for each query."""
        return torch.cat(vectors, dim=1)

    def split(self, vectors: Float[Tensor, "query n"]) -> Vectors:
        """Undo `join`."""
        return list(vectors.split([component.size for component in self.product.components], dim=1))

    def random_vector(self, seed: int) -> Float[Tensor, "n"]:
        """Draw normal numbers to start a search of eigenvectors from: on the CPU, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        size = sum(component.size for component in self.product.components)
        device = next(self.product.model.parameters()).device
        return torch.randn(size, generator=generator).to(device)


def problem(job: Job, method: str, kind: CurvatureKind, examples: int | None) -> Problem:
    """Return the curvature of all scored training data, or of `examples` of them, drawn with the job's seed.

    The damping is relative to the mean eigenvalue of the empirical Fisher matrix of the same examples, which is known
    exactly: their mean squared gradient norm over the number of parameters.
    """
    data = leave_out_skipped(job)
    if examples is not None:
        data = data.subset(draw_rows(len(data), examples, job.settings.seed))
    measured = Job(data, job.queries, job.settings, job.loaded, job.selection)
    loaded, size = job.model_for(method), sum(part.size for part in job.components)
    squared = sum(float(part.double().sum()) for _, part in ExactGradients(measured).compute_squared_norms())
    product = CurvatureProduct(
        loaded.model, job.components, data, batch_tokens(job.settings, loaded), job.settings.loss, kind
    )
    return Problem(product, squared / max(len(data), 1) / size)


def draw_rows(rows: int, count: int, seed: int) -> np.ndarray:
    """Draw `count` of the rows without repetition, in order; all of them when there are not more.

    Raises:
        SpecError: No row was requested.
    """
    if count < 1:
        raise SpecError(f"Curvature needs training examples to be measured on, and {count} were requested.")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:count])


@method("cg")
@dataclass
class ConjugateGradient(Preconditioned):
    """Influence function with the whole Gauss-Newton matrix, solved in steps (Koh and Liang 2017, arXiv:1703.04730)."""

    meaning = _meaning(
        normalisation=GAUSS_NEWTON,
        estimates=f"{ESTIMATES}; no approximation of the matrix, only of its inverse.",
        cost="A pass over the training data for each step, 20 by default, each with a second derivative for every "
        "query; the check on randomised weights and self-influence pay the same again.",
        limits="First order around one set of weights; stops after a number of steps, with the residual announced; "
        "the damping sets its scale, so compare within a run.",
    )
    steps: Annotated[PositiveInt, "Most passes over the training data."] = 20
    tolerance: Annotated[PositiveFloat, "Residual, relative to the query's gradient, at which to stop."] = 1e-3
    kind: KindOption = "gauss-newton"
    examples: ExamplesOption = None

    def inverse(self, job: Job) -> Inverse:
        """Return the map that solves for each set of vectors separately."""
        found = problem(job, self.name, self.kind, self.examples)

        def solve(vectors: Vectors, damping: float) -> Vectors:
            absolute, limits = absolute_damping(damping, found.unit), {"steps": self.steps, "tolerance": self.tolerance}
            solution = conjugate_gradient(found.product, found.join(vectors), absolute, **limits)
            worst = float(solution.residuals.max())
            announce(f"Conjugate gradients: {solution.steps} steps, relative residual at most {worst:.1e}.")
            return found.split(solution.vectors)

        return solve


@method("lissa")
@dataclass
class Lissa(Preconditioned):
    """Influence function with the inverse summed up as a series (Agarwal et al. 2017, arXiv:1602.03943)."""

    meaning = _meaning(
        normalisation=GAUSS_NEWTON,
        estimates=f"{ESTIMATES}; the inverse is a series cut off after a number of steps.",
        cost="A pass over the training data, or over a sample of it, for each step, 100 by default, each with a second "
        "derivative for every query; the check on randomised weights and self-influence pay the same again.",
        limits="Directions of little curvature converge last and are underrated by a short series; cg needs fewer "
        "passes for the same answer. First order; the damping sets its scale, so compare within a run.",
    )
    depth: Annotated[PositiveInt, "Terms of the series: passes over the training data, or over a sample of it."] = 100
    sample: Annotated[PositiveInt | None, "Take N other training examples at every step; none: all at every step."] = (
        None
    )
    scale: Annotated[
        PositiveFloat | None, "Divisor of the curvature; none: 1.5 times its largest eigenvalue, 4 times with a sample."
    ] = None
    kind: KindOption = "gauss-newton"

    def inverse(self, job: Job) -> Inverse:
        """Measure the scale once; return the map that runs a series of its own for each set of vectors."""
        found, seed = problem(job, self.name, self.kind, None), job.settings.seed
        start = None if self.scale else found.random_vector(seed)[None]
        largest = 0.0 if start is None else largest_eigenvalue(found.product, start, steps=POWER_STEPS)

        def product(step: int, vectors: Tensor) -> Tensor:
            if self.sample is None:
                return found.product(vectors)
            rows = draw_rows(len(job.train), self.sample, seed + step)
            return replace(found.product, data=job.train.subset(rows))(vectors)

        def solve(vectors: Vectors, damping: float) -> Vectors:
            absolute = absolute_damping(damping, found.unit)
            scale = self.scale or (1.5 if self.sample is None else 4.0) * (largest + absolute)
            return found.split(lissa(product, found.join(vectors), absolute, scale=scale, depth=self.depth))

        return solve


@method("arnoldi")
@dataclass
class Arnoldi(Preconditioned):
    """Influence function in the span of dominant eigenvectors (Schioppa et al. 2022, arXiv:2112.03052)."""

    meaning = _meaning(
        normalisation=f"dominant eigenvalues of the {GAUSS_NEWTON}",
        estimates="The part of the influence function that lies in the span of the dominant eigenvectors.",
        cost="A pass with a second derivative over the training data for each step, 50 by default, once for all "
        "queries; memory for as many vectors of the size of the selected parameters.",
        limits="What lies outside the span is dropped, and that is where influence functions weigh most; the "
        "eigenvectors found last are rough. First order; compare within a run.",
    )
    steps: Annotated[PositiveInt, "Passes over the training data."] = 50
    rank: Annotated[
        PositiveInt, "Eigenvectors kept; about half of `steps`, since those found last have not converged."
    ] = 25
    kind: KindOption = "gauss-newton"
    examples: ExamplesOption = None

    def inverse(self, job: Job) -> Inverse:
        """Find the eigenvectors once; return the map that projects every set of vectors on them."""
        found = problem(job, self.name, self.kind, self.examples)
        start = found.random_vector(job.settings.seed)
        pairs = arnoldi(found.product, start, steps=self.steps, rank=self.rank)
        return lambda vectors, damping: found.split(
            pairs.precondition(found.join(vectors), absolute_damping(damping, found.unit))
        )
