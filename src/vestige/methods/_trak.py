"""TRAK: the model as a linear one in its projected gradients, averaged over several models."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.compress import Compressor, adjoint_gradient, compress_gradient, parse_spec
from vestige.curvature import absolute_damping, read_tensors, write_tensors
from vestige.errors import NonFinite
from vestige.methods import (
    Checkpoint,
    CheckpointMethod,
    IndexedGradients,
    Job,
    Lines,
    Term,
    compute_losses,
    method,
    open_checkpoint_store,
    watch,
)
from vestige.runs import Meaning

FEATURES = 4096
"""Most features: the matrix of their inner products has one row and one column for each, and is inverted."""

SMALLEST_DOUBT = 1e-6
"""Least 1 - p that is divided by: below it, float32 losses hold no digits of it."""


@method("trak")
@dataclass
class Trak(CheckpointMethod):
    """Tracing with the randomly-projected after kernel (Park et al. 2023, arXiv:2303.14186).

    For model m, `phi(z) = P grad f(z)` with the margin `f = log(p / (1 - p))`, where `log p` is minus the *mean* loss
    of the example's own target tokens, whatever `--loss` says, and P a random projection. Then

        score = mean_m [phi_m(query)^T (Phi_m^T Phi_m + d I)^-1 phi_m(example)] * mean_m [1 - p_m(example)],

    Phi having the rows of all training examples, and d relative to the mean eigenvalue. The margin is of each example:
    on the mean loss of a batch its logarithm would couple the examples. `grad f = -grad loss / (1 - p)`, so an index of
    plain gradients and losses holds all that is needed.
    """

    meaning = Meaning(
        sign="positive: training on the example raises the margin of the query, so it lowers the query's loss; "
        "negative: it raises it",
        unit="log odds of the query (of its mean token loss), up to the damping's scale",
        target="the average run, as far as several independently trained models were given",
        normalisation="kernel of the projected gradients of all training examples",
        estimates="How much the query's log odds would fall if the example were left out of training, for a model that "
        "is linear in its gradients.",
        cost="An index for each model (made on the way unless given) and two reads of it; a square matrix of up to "
        "4096 rows; 4 bytes on disk per model, query and example until the run is written.",
        limits="One model gives little: give several, best trained on random halves of the data. Projected gradients "
        "of one random projection are noisy; the damping sets the scale, so compare within a run.",
    )
    weighting = "equal"
    averages = True
    reads_focus = ("span",)

    def lines(self, job: Job) -> int:
        """Return the number of queries, and one more for 1 - p."""
        return len(job.queries) + 1

    def key(self, job: Job) -> dict[str, Any]:
        """Return the damping, which is inside the mean."""
        return {"damping": job.settings.damping}

    def combine(self, job: Job, sums: Float[Tensor, "line row"], parts: Tensor) -> Tensor:  # noqa: ARG002
        """Multiply by the mean of 1 - p."""
        return parts[..., : len(sums) - 1, :] * sums[-1]

    def term(self, job: Job, checkpoint: Checkpoint) -> "TrakTerm":  # noqa: ARG002
        """Return the scores by this model."""
        return TrakTerm(job, cast(IndexedGradients, open_checkpoint_store(job, stored=True)))


def doubt(mean_losses: Float[Tensor, "row"]) -> Float[Tensor, "row"]:
    """Return `1 - p` with p the geometric mean of the probabilities of an example's own target tokens."""
    return -torch.expm1(-mean_losses).clamp(max=-SMALLEST_DOUBT)


@dataclass(frozen=True)
class TrakTerm(Term):
    """`phi(query)^T (Phi^T Phi + d I)^-1 phi(example)` at one model, and below it 1 - p."""

    job: Job
    store: IndexedGradients

    def scores(self) -> Lines:
        """Yield the scores from one read of the index."""
        vectors = self._vectors
        for rows, gradients, factors, unsure in watch(self._blocks(), self.store.index.rows, "Scoring"):
            yield rows, torch.cat([vectors @ gradients.T * factors, unsure[None]])

    def self_scores(self) -> Lines:
        """Yield `phi^T (Phi^T Phi + d I)^-1 phi`, and below it 1 - p."""
        for rows, gradients, factors, unsure in self._blocks():
            features = (self._project(gradients) * factors[:, None]).double()
            whitened = torch.linalg.solve_triangular(self._factor, features.T, upper=False)
            yield rows, torch.stack([whitened.square().sum(0).float(), unsure])

    def parts(self, rows: list[int]) -> Float[Tensor, "component query row"]:
        """Return the numbers of the queries, component by component."""
        found = torch.zeros(len(self.job.train))
        for block_rows, _, factors, _ in self._blocks():
            found[block_rows] = factors
        products = self.store.products(self.store.split(self._vectors), rows, norms=False).scores
        return products * found[torch.as_tensor(rows)]

    @cached_property
    def _vectors(self) -> Float[Tensor, "query column"]:
        """The queries' features, preconditioned, and brought back to stored numbers by the transposed projection."""
        job, queries = self.job, self.job.queries
        losses = compute_losses(job.model_for(job.settings.method).model, queries, "mean", job.token_budget)
        scale = self._per_token(queries.target_counts) / doubt(torch.from_numpy(losses).float())
        features = self._project(torch.cat(self.store.of_queries(queries), dim=1).cpu()) * scale[:, None]
        solved = torch.cholesky_solve(features.double().T, self._factor).T.float()
        return solved if self._projection is None else adjoint_gradient(self._projection, solved)[:, :, 0]

    @cached_property
    def _factor(self) -> Float[Tensor, "feature feature"]:
        """Lower Cholesky factor of the damped kernel, float64."""
        kernel, damping = self._kernel(), self.job.settings.damping
        added = absolute_damping(damping, float(kernel.diagonal().mean()))
        factor, failed = torch.linalg.cholesky_ex(kernel + added * torch.eye(len(kernel), dtype=kernel.dtype))
        if int(failed):
            raise NonFinite(f"TRAK's kernel is singular at --damping {damping}. Type a larger one.")
        return factor

    @cached_property
    def _projection(self) -> Compressor | None:
        """A sparse projection of the stored numbers to features, None where they are few enough."""
        index = self.store.index
        if index.width <= FEATURES:
            return None
        return parse_spec(f"sjlt:{FEATURES}").build("trak", (index.width, 1), index.manifest.seed)

    def _project(self, rows: Float[Tensor, "row column"]) -> Float[Tensor, "row feature"]:
        return rows if self._projection is None else compress_gradient(self._projection, rows[:, :, None])

    def _per_token(self, counts: Int[np.ndarray, "row"]) -> Float[Tensor, "row"]:
        """Return the factors that turn the index's loss into a mean over tokens."""
        divisors = np.maximum(counts, 1) if self.store.index.manifest.loss == "sum" else np.ones(len(counts))
        return torch.from_numpy(1.0 / divisors).float()

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (rows, their stored gradients, factors that make them the margin's, 1 - p)."""
        counts = self.job.train.target_counts
        for block in self.store.index.blocks():
            scale = self._per_token(counts[block.example.numpy()])
            unsure = doubt(block.loss.float() * scale)
            yield block.example, block.gradients, scale / unsure, unsure

    def _kernel(self) -> Float[Tensor, "feature feature"]:
        """Return `Phi^T Phi` in float64, read from beside the index or measured and kept there."""
        index, size = self.store.index, min(self.store.index.width, FEATURES)
        path = index.folder / "curvature" / f"trak-{index.fingerprint[:16]}-{size}.safetensors"
        if (found := read_tensors(path)) is not None:
            return found["kernel"].double()
        total = torch.zeros(size, size, dtype=torch.float64)
        for _, gradients, factors, _ in watch(self._blocks(), index.rows, "Kernel"):
            scaled = self._project(gradients) * factors[:, None]
            # Blocks are small; float32 products added in float64 lose nothing to the number of rows.
            total += (scaled.T @ scaled).double()
        return write_tensors(path, {"kernel": total.float()})["kernel"].double()
