"""What the methods share that know the curvature by its products alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vestige.curvature import CurvatureKind, CurvatureProduct, absolute_damping
from vestige.errors import SpecError
from vestige.indexes import batch_tokens
from vestige.methods._exact_gradients import ExactGradients
from vestige.methods._preconditioned import scored_data
from vestige.methods._protocol import Job
from vestige.methods._stores import Vectors
from vestige.models import Component


@dataclass(frozen=True)
class Problem:
    """The curvature of the training data, its damping, and the layout of its vectors."""

    product: CurvatureProduct
    damping: float
    """Absolute."""

    @property
    def components(self) -> Sequence[Component]:
        """Whose vectors these are."""
        return self.product.components

    def join(self, vectors: Vectors) -> Float[Tensor, "query n"]:
        """Return one flat vector for each query."""
        return torch.cat(vectors, dim=1)

    def split(self, vectors: Float[Tensor, "query n"]) -> Vectors:
        """Undo `join`."""
        return list(vectors.split([component.size for component in self.components], dim=1))

    def random_vector(self, seed: int) -> Float[Tensor, "n"]:
        """Draw a start for the search of eigenvectors: normal numbers, drawn on the CPU, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        size = sum(component.size for component in self.components)
        device = next(self.product.model.parameters()).device
        return torch.randn(size, generator=generator).to(device)


def problem(job: Job, method: str, kind: CurvatureKind, examples: int | None) -> Problem:
    """Return the curvature of all scored training data, or of `examples` of them, drawn with the job's seed.

    The damping is relative to the mean eigenvalue of the empirical Fisher matrix of the same examples, which is known
    exactly: their mean squared gradient norm over the number of parameters.
    """
    data = scored_data(job)
    if examples is not None:
        data = data.subset(drawn_rows(len(data), examples, job.settings.seed))
    measured = Job(data, job.queries, job.settings, job.loaded, job.selection)
    loaded, size = job.model_for(method), sum(part.size for part in job.components)
    absolute_damping(job.settings.damping, 1.0)
    squared = sum(float(part.double().sum()) for _, part in ExactGradients(measured).squared_norms())
    product = CurvatureProduct(
        loaded.model, job.components, data, batch_tokens(job.settings, loaded), job.settings.loss, kind
    )
    return Problem(product, absolute_damping(job.settings.damping, squared / max(len(data), 1) / size))


def drawn_rows(rows: int, count: int, seed: int) -> np.ndarray:
    """Draw `count` of the rows without repetition, in order; all of them when there are not more.

    Raises:
        SpecError: no row was requested.
    """
    if count < 1:
        raise SpecError(f"Curvature needs training examples to be measured on, and {count} were requested.")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:count])
