"""What all curvature shares (damping, whole gradients, measurements in pieces), and the empirical Fisher matrix.

With compressed gradients g_i [k] of n examples, `F = (1/n) sum_i g_i g_i^T` (uncentred), one block per component.
Influence preconditions the *query*: `(F + d I)^-1 q`, so a change of damping rewrites nothing on disk.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vestige.errors import NonFinite, SpecError
from vestige.gradients import Factor, FactorSink, materialise
from vestige.jobs import PieceFiles, Pieces, Tensors, count_steps, run_with_rate, tensor_pieces
from vestige.progress import progress
from vestige.settings import LaunchSettings
from vestige.storage import make_folder, write_durably
from vestige.timing import time_phase

DAMPING = 1.0
"""Relative damping by default: the mean eigenvalue of each block, chosen without labels. It halves the weight of a
direction of average curvature and bounds every amplification by the ratio of the largest eigenvalue to the mean.
Against retraining of convex models its correlation lay within 0.07 of the best value between 0.01 and 10; values of 0.1
and less lost up to 0.3 there, because the empirical Fisher matrix is far from the Hessian where a model fits well."""
CHUNK_NUMBERS = 2**25
"""Most numbers of whole gradients alive at once."""


def absolute_damping(damping: float, mean_eigenvalue: float) -> float:
    """Return `damping` times the mean eigenvalue; curvature that is zero throughout has no scale of its own and gets 1.

    Raises:
        SpecError: the damping is zero or negative: the inverse would divide by zero.
    """
    if not damping > 0:
        raise SpecError(
            f"The damping is {damping}, and the inverse of a curvature matrix needs one above zero. It is relative to "
            "the mean eigenvalue; type for example --damping 0.1."
        )
    return damping * mean_eigenvalue or 1.0


class WholeGradients(FactorSink):
    """A sink that hands on whole gradients, of one matrix after another and a few examples at a time.

    A square needs the whole gradient: the uses of a tied weight and the chunks of a loss have cross terms. Only the
    factors of a batch are kept, which are smaller than the gradients as long as tokens are fewer than columns.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], add: Callable[[int, Tensor], None]) -> None:
        """Hand the gradients of matrix `number`, at least float32 `[example, out, in]`, to `add(number, gradients)`."""
        self._shapes, self._add = tuple(shapes), add
        self._kept: list[list[tuple[slice, Factor, Tensor]]] = []
        self._batch = self.examples = 0

    def begin(self, examples: int, predicting: Tensor | None = None) -> None:  # noqa: ARG002
        """Start a batch."""
        self._batch, self._kept = examples, [[] for _ in self._shapes]
        self.examples += examples

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Keep the piece until the gradient is whole."""
        self._kept[component].append((examples, left, right))

    def finish(self) -> None:
        """Add the batch's gradients."""
        for number in range(len(self._shapes)):
            for gradients in self._take(number):
                self._add(number, gradients)

    def _take(self, number: int) -> Iterator[Float[Tensor, "example out in"]]:
        kept, self._kept[number] = self._kept[number], []
        if not kept:
            return
        shape, right = self._shapes[number], kept[0][2]
        step = max(1, CHUNK_NUMBERS // (shape[0] * shape[1]))
        for start in range(0, self._batch, step):
            stop = min(start + step, self._batch)
            dtype = torch.promote_types(right.dtype, torch.float32)
            total = torch.zeros(stop - start, *shape, dtype=dtype, device=right.device)
            for piece in kept:
                _add_piece(total, start, *piece)
            yield total


def _add_piece(total: Tensor, start: int, examples: slice, left: Factor, right: Tensor) -> None:
    """Add the part of a piece that concerns the examples of `total`, which begin at `start`."""
    first, last = max(start, examples.start), min(start + len(total), examples.stop)
    if first >= last:
        return
    inside = slice(first - examples.start, last - examples.start)
    part = left[inside] if isinstance(left, Tensor) else left._replace(ids=left.ids[inside])
    total[first - start : last - start] += materialise(part, right[inside]).to(total.dtype)


class DiagonalSink(WholeGradients):
    """Sums of squares of every entry, `squares[c]` `[out, in]`, of the matrices of which a gradient arrived."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        squares: dict[int, Float[Tensor, "_out _in"]] = {}

        def add(number: int, gradients: Float[Tensor, "example _out _in"]) -> None:
            total = gradients.square().sum(0)
            squares[number] = squares[number].add_(total) if number in squares else total

        # No method of its own, which would keep the sums alive with it until cycles are collected.
        super().__init__(shapes, add)
        self.squares = squares


@final
@dataclass(frozen=True)
class SavedPieces:
    """Pieces of tensors that become one result, which is kept in a file or only returned.

    Any process that computes a piece writes equal bytes.
    """

    name: str
    folder: Path
    files: PieceFiles
    weights: Sequence[int]
    """Units of work in each piece."""
    compute: Callable[[int], Tensors]
    """From a piece's number to its tensors; it calls `step_done`."""
    combine: Callable[[Iterable[Tensors]], Tensors]
    """From the tensors of all pieces, in their order, to the result."""
    result: Path | None = None
    """File that the result is kept in: once it is there the pieces are removed. None: the pieces stay."""
    unit: str = "examples"

    @property
    def pieces(self) -> Pieces[Tensors]:
        """The pieces; with a file for the result they are done when that is there, and gone then."""
        pieces = tensor_pieces(
            self.name,
            self.files,
            self.weights,
            lambda: nullcontext(self.compute),
            self.combine,
            unit=self.unit,
            folder=self.folder,
        )
        if (path := self.result) is None:
            return pieces

        def reduce() -> Tensors:
            found = read_tensors(path)
            found = write_tensors(path, pieces.reduce()) if found is None else found
            self.files.remove()
            return found

        return replace(pieces, reduce=reduce, is_done=lambda piece: pieces.is_done(piece) or path.exists())

    def run(self, settings: LaunchSettings | None = None, command: Sequence[str] | None = None) -> Tensors:
        """Compute what is missing or was left damaged, and return the result; as `run_pieces`, by default here."""
        if self.result is not None and read_tensors(self.result) is None:
            self.result.unlink(missing_ok=True)
        self.files.forget_damaged(range(len(self.weights)))
        return run_with_rate(self.pieces, settings or LaunchSettings.model_validate({}), command)

    def run_in_memory(self) -> Tensors:
        """Return the result of all pieces; nothing but the result's file, if there is one, touches the disk."""
        with progress(sum(self.weights), self.name) as bar, count_steps(lambda units: bar.advance(round(units))):
            return write_tensors(self.result, self.combine(map(self.compute, range(len(self.weights)))))


def add_pieces(parts: Iterable[Tensors]) -> Tensors:
    """Return the sum of the pieces, in their order."""
    total: Tensors = {}
    for part in parts:
        for name, tensor in part.items():
            total[name] = total[name].add_(tensor) if name in total else tensor
    return total


def read_tensors(path: Path) -> Tensors | None:
    """Return the tensors of a file, None if there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (FileNotFoundError, SafetensorError):
        return None


def write_tensors(path: Path | None, tensors: Tensors) -> Tensors:
    """Write the tensors, if there is a path; return them as a file holds them, so that a later run rounds alike."""
    kept = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    if path is not None:
        make_folder(path.parent)
        write_durably(path, [save(kept)])
    return kept


class FisherBlock(NamedTuple):
    """One component's Fisher matrix."""

    name: str
    matrix: Float[Tensor, "k k"]
    unit: float | None = None
    """What a damping of 1 adds to the diagonal; None: the mean eigenvalue."""

    @property
    def mean_eigenvalue(self) -> float:
        """Trace over size: the unit of relative damping."""
        return float(self.matrix.diagonal().double().mean())

    def add_damping(self, damping: float) -> Float[Tensor, "k k"]:
        """Return `F + d I` in float64, d relative to the mean eigenvalue, or to the unit where one was set.

        Raises:
            SpecError: the damping is not above zero.
        """
        # A component whose gradients are all zero has no scale of its own: any damping leaves it at zero.
        absolute = absolute_damping(damping, self.mean_eigenvalue if self.unit is None else self.unit)
        return self.matrix.double() + absolute * torch.eye(
            len(self.matrix), dtype=torch.float64, device=self.matrix.device
        )


@dataclass(frozen=True)
class FisherBlocks:
    """Block-diagonal Fisher matrix: block `c` acts on the columns `columns[c]` of a compressed gradient."""

    blocks: tuple[FisherBlock, ...]
    columns: tuple[slice, ...]

    def precondition(self, vectors: Float[Tensor, "query column"], damping: float) -> Float[Tensor, "query column"]:
        """Return `(F + d I)^-1 q` for every query, block by block.

        Raises:
            NonFinite: a block is not positive definite even when damped; names the component.
        """
        return self.inverse(damping).apply(vectors)

    def inverse(self, damping: float) -> "DampedInverse":
        """Return `(F + d I)^-1`, factorised once for any number of vectors.

        Raises:
            NonFinite: a block is not positive definite even when damped; names the component.
        """
        with time_phase("preconditioning"):
            return DampedInverse(tuple(_cholesky(block, damping) for block in self.blocks), self.columns)

    def in_unit_of_one(self) -> "FisherBlocks":
        """Return the same matrices, with a damping that is added as it is."""
        return FisherBlocks(tuple(block._replace(unit=1.0) for block in self.blocks), self.columns)

    def measure(self, damping: float, power: Literal[1, 2]) -> "Measure":
        """Return gradients' lengths: `sqrt(g^T (F + d I)^-1 g)` for power 1, `|(F + d I)^-1 g|` for power 2.

        Raises:
            NonFinite: a block is not positive definite even when damped; names the component.
        """
        matrices = self.whitener(damping)
        if power == 2:
            matrices = [white.T @ white for white in matrices]
        return Measure(f"power {power}", tuple(matrices), self.columns)

    def whitener(self, damping: float) -> list[Float[Tensor, "k k"]]:
        """Return matrices W with `|W g|^2 = g^T (F + d I)^-1 g`: the inverse Cholesky factors, float32."""
        factors = []
        for block in self.blocks:
            factor = _cholesky(block, damping)
            identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            factors.append(torch.linalg.solve_triangular(factor, identity, upper=False).float())
        return factors


class DampedInverse(NamedTuple):
    """The inverse of a damped Fisher matrix, block by block."""

    factors: tuple[Float[Tensor, "k k"], ...]
    """Lower Cholesky factors, float64."""
    columns: tuple[slice, ...]

    def apply(self, vectors: Float[Tensor, "query column"]) -> Float[Tensor, "query column"]:
        """Return `(F + d I)^-1 v` of every vector."""
        solved = torch.empty_like(vectors)
        with time_phase("preconditioning"):
            for factor, columns in zip(self.factors, self.columns, strict=True):
                solved[:, columns] = torch.cholesky_solve(vectors[:, columns].double().T, factor).T.to(vectors.dtype)
        return solved


class Measure(NamedTuple):
    """Length of a compressed gradient after a linear map of each of its parts."""

    name: str
    """Distinguishes the lengths that one curvature and damping allow."""
    matrices: tuple[Float[Tensor, "k k"], ...]
    columns: tuple[slice, ...]

    def to(self, device: torch.device) -> "Measure":
        """Return the same measure of gradients on a device."""
        return self._replace(matrices=tuple(matrix.to(device) for matrix in self.matrices))

    def __call__(self, gradients: Float[Tensor, "row column"]) -> Float[Tensor, "row"]:
        """Return the length of every row."""
        pairs = zip(self.matrices, self.columns, strict=True)
        squared = [(gradients[:, part] @ matrix.T).square().sum(1) for matrix, part in pairs]
        return torch.stack(squared).sum(0).sqrt()


class Measures(NamedTuple):
    """Several lengths of a compressed gradient, each for as many lines of scores."""

    measures: tuple[Measure, ...]
    lines: int
    """Lines that each length is for."""

    @property
    def name(self) -> str:
        """The names of all."""
        return " ".join(one.name for one in self.measures)

    def to(self, device: torch.device) -> "Measures":
        """Return the same measures of gradients on a device."""
        return self._replace(measures=tuple(one.to(device) for one in self.measures))

    def __call__(self, gradients: Float[Tensor, "row column"]) -> Float[Tensor, "line row"]:
        """Return the length of every row, line by line."""
        return torch.stack([one(gradients) for one in self.measures]).repeat_interleave(self.lines, dim=0)


def _cholesky(block: FisherBlock, damping: float) -> Float[Tensor, "k k"]:
    factor, failed = torch.linalg.cholesky_ex(block.add_damping(damping))
    if int(failed):
        raise NonFinite(
            f"The Fisher matrix of {block.name} is singular at --damping {damping}. Type a larger one, such as "
            f"--damping {DAMPING:g}."
        )
    return factor


def fisher_sums(
    columns: Sequence[slice], blocks: Iterable[Float[Tensor, "row column"]]
) -> tuple[list[Float[Tensor, "k k"]], int]:
    """Return `sum_i g_i g_i^T` of every component from a stream of gradients, on the CPU, and their number.

    Products are taken where the gradients lie.
    """
    sums, examples = [torch.zeros(part.stop - part.start, part.stop - part.start) for part in columns], 0
    for gradients in blocks:
        examples += len(gradients)
        sums = [total.to(gradients.device) for total in sums]
        with time_phase("preconditioning"):
            for total, part in zip(sums, columns, strict=True):
                piece = gradients[:, part]
                total.addmm_(piece.T, piece)
    return [total.cpu() for total in sums], examples


def accumulate_fisher(
    names: Sequence[str], columns: Sequence[slice], blocks: Iterable[Float[Tensor, "row column"]]
) -> FisherBlocks:
    """Return Fisher blocks from a stream of compressed gradients; memory is the blocks alone."""
    sums, examples = fisher_sums(columns, blocks)
    found = tuple(FisherBlock(name, total / max(examples, 1)) for name, total in zip(names, sums, strict=True))
    return FisherBlocks(found, tuple(columns))
