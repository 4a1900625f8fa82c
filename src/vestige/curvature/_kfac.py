"""Kronecker-factored curvature: K-FAC, and EK-FAC, which measures the eigenvalues again.

The gradient of a layer is `G = sum_t b_t a_t^T`, with b the output gradient and a the input, whose last entry is the
constant one where the bias is attributed to as well. K-FAC (Martens and Grosse 2015, arXiv:1503.05671) takes tokens
as independent and b as independent of a:

    F = E[vec(G) vec(G)^T]  ~  T S (x) A,      S = mean_t b b^T,   A = mean_t a a^T,   T = tokens per example.

A token counts where it can influence the loss: at or before the last position that predicts a target. This follows from
the data alone, so neither padding nor the rounding of a kernel that leaves 1e-8 where another leaves 0 changes A. An
expert counts the tokens routed to it, and the output head the positions that predict a target, where alone it runs.

EK-FAC (George et al. 2018, arXiv:1806.03884) keeps the eigenvectors of S and A and measures the curvature along each
pair: `lambda_ij = E[(U_S^T G U_A)_ij^2]`. Its diagonal is exact in that basis, whatever tokens do.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.curvature._fisher import DiagonalSink, absolute_damping
from vestige.data import send
from vestige.errors import ModelError
from vestige.gradients import Factor, FactorSink, OneHot, materialise, multiply_wide
from vestige.models import Component
from vestige.progress import progress

BlockKind = Literal["matrix", "vector", "diagonal"]

_LINEAR_MAPS = {"linear", "conv1d", "experts", "router"}
"""Layers whose factors are output gradients and inputs, token by token; an expert's are those of its own tokens."""


class Block(NamedTuple):
    """Components that are preconditioned together.

    A layer with weight and bias is one matrix `[W | b]`: the bias is the last column, whose input is the constant one.
    """

    kind: BlockKind
    weight: int
    """Number of the component; of the vector, for a vector."""
    bias: int | None
    """Number of the bias in the last column, if any."""
    shape: tuple[int, int]
    """`(out, in)`, the bias column included."""

    def join(self, vectors: Sequence[Float[Tensor, "query _n"]]) -> Float[Tensor, "query out in"]:
        """Join one flat matrix per component into the block's matrices."""
        rows = self.shape[0]
        weight = vectors[self.weight].reshape(-1, rows, self.shape[1] - (self.bias is not None))
        return weight if self.bias is None else torch.cat([weight, vectors[self.bias].reshape(-1, rows, 1)], dim=2)

    def split(self, matrices: Float[Tensor, "query out in"]) -> dict[int, Float[Tensor, "query _n"]]:
        """Invert `join`: component number -> flat matrix."""
        if self.bias is None:
            return {self.weight: matrices.flatten(1)}
        return {self.weight: matrices[:, :, :-1].flatten(1), self.bias: matrices[:, :, -1]}


def find_blocks(components: Sequence[Component]) -> tuple[Block, ...]:
    """Return the blocks, in the order of their first component; every component is in exactly one."""
    biases = {
        component.uses[0].module: number
        for number, component in enumerate(components)
        if len(component.uses) == 1 and component.uses[0].role == "bias"
    }
    blocks, taken = [], set()
    for number, component in enumerate(components):
        kind = _kind(component)
        partner = biases.get(component.uses[0].module) if kind == "matrix" and len(component.uses) == 1 else None
        rows, columns = component.shape
        blocks.append(Block(kind, number, partner, (rows, columns + (partner is not None))))
        taken |= {partner}
    return tuple(block for block in blocks if block.weight not in taken)


def _kind(component: Component) -> BlockKind:
    if component.shape[1] > 1 and {use.kind for use in component.uses} <= _LINEAR_MAPS:
        return "matrix"
    # The inputs of an embedding are one-hot: their covariance has a row for every word of the vocabulary.
    return "vector" if component.shape[1] == 1 else "diagonal"


class KroneckerFactor(NamedTuple):
    """Second moments of one block: `F ~ tokens * left (x) right`."""

    left: Float[Tensor, "out out"]
    right: Float[Tensor, "in in"]
    tokens: float
    """Counted tokens per example."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file keeps of it."""
        return {"left": self.left, "right": self.right, "tokens": torch.tensor(self.tokens, dtype=torch.float64)}

    def eigenbasis(self) -> "Eigenbasis":
        """Return the same curvature by its eigenvectors; eigenvalues below zero are rounding and become zero."""
        left_values, left = torch.linalg.eigh(self.left.double())
        right_values, right = torch.linalg.eigh(self.right.double())
        values = self.tokens * torch.outer(left_values.clamp(min=0), right_values.clamp(min=0))
        dtype = self.left.dtype
        return Eigenbasis(left.to(dtype), right.to(dtype), values.to(dtype))

    def precondition_split(
        self, matrices: Float[Tensor, "query out in"], damping: float
    ) -> Float[Tensor, "query out in"]:
        """Return `(T S + sqrt(d) / p I)^-1 V (A + p sqrt(d) I)^-1`, p^2 the ratio of the mean eigenvalues of A and T S.

        The damping of Martens and Grosse (section 6.3): each factor gets its share, so each inverse is a small one.
        """
        left, right = self.tokens * self.left.double(), self.right.double()
        left_mean, right_mean = float(left.diagonal().mean()), float(right.diagonal().mean())
        absolute = absolute_damping(damping, left_mean * right_mean)
        ratio = (right_mean / left_mean) ** 0.5 if left_mean > 0 and right_mean > 0 else 1.0
        left = left + absolute**0.5 / ratio * torch.eye(len(left), dtype=left.dtype, device=left.device)
        right = right + absolute**0.5 * ratio * torch.eye(len(right), dtype=right.dtype, device=right.device)
        halfway = torch.linalg.solve(left, matrices.to(left.dtype))
        return torch.linalg.solve(right, halfway, left=False).to(matrices.dtype)


class Eigenbasis(NamedTuple):
    """Curvature that is diagonal after a rotation of both sides; no rotation for an embedding."""

    left: Float[Tensor, "out out"] | None
    right: Float[Tensor, "in in"] | None
    values: Float[Tensor, "out in"]
    """Eigenvalues: entry (i, j) belongs to column i of `left` and column j of `right`."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file keeps of it."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    def eigenbasis(self) -> "Eigenbasis":
        """Return itself."""
        return self

    def absolute_damping(self, damping: float) -> float:
        """Return what a damping relative to the mean eigenvalue adds to every eigenvalue."""
        return absolute_damping(damping, float(self.values.double().mean()))

    def precondition(self, matrices: Float[Tensor, "query out in"], damping: float) -> Float[Tensor, "query out in"]:
        """Return `U_S ((U_S^T V U_A) / (lambda + d)) U_A^T`, d relative to the mean eigenvalue."""
        damped = self.values + self.absolute_damping(damping)
        if self.left is None or self.right is None:
            return matrices / damped.to(matrices.dtype)
        rotated = self.left.T @ matrices.to(self.left.dtype) @ self.right
        return (self.left @ (rotated / damped) @ self.right.T).to(matrices.dtype)

    precondition_split = precondition


@dataclass(frozen=True)
class KroneckerCurvature:
    """Curvature block by block: Kronecker products as accumulated or by eigenvectors; diagonals for embeddings."""

    blocks: tuple[Block, ...]
    factors: tuple[KroneckerFactor | Eigenbasis, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file keeps, by block."""
        pairs = enumerate(self.factors)
        return {f"{number}.{side}": tensor for number, one in pairs for side, tensor in one.tensors().items()}

    def eigenbases(self) -> "KroneckerCurvature":
        """Return the same curvature by eigenvectors, with K-FAC's eigenvalues."""
        found = list[KroneckerFactor | Eigenbasis]()
        with progress(len(self.factors), "Eigenvectors", unit="components") as bar:
            for factor in self.factors:
                found.append(factor.eigenbasis())
                bar.advance()
        return KroneckerCurvature(self.blocks, tuple(found))

    def precondition(self, vectors: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Return `(C + d I)^-1 v`, block by block; `vectors[c]` is `[query, n]` for component c."""
        return self._solve(vectors, [one.eigenbasis().precondition for one in self.factors], damping)

    def precondition_split(self, vectors: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Apply the damped inverse, each factor damped for itself."""
        return self._solve(vectors, [one.precondition_split for one in self.factors], damping)

    def absolute_dampings(self, damping: float) -> list[float]:
        """Return what `precondition` adds to the diagonal, for every component."""
        found: dict[int, float] = {}
        for block, one in zip(self.blocks, self.factors, strict=True):
            added = one.eigenbasis().absolute_damping(damping)
            found |= {number: added for number in (block.weight, block.bias) if number is not None}
        return [found[number] for number in range(len(found))]

    def _solve(
        self, vectors: Sequence[Tensor], solvers: Sequence[Callable[[Tensor, float], Tensor]], damping: float
    ) -> list[Tensor]:
        solved: dict[int, Tensor] = {}
        for block, solve in zip(self.blocks, solvers, strict=True):
            solved |= block.split(solve(block.join(vectors), damping))
        return [solved[number] for number in range(len(vectors))]


class KroneckerSink(FactorSink):
    """Accumulates S and A of every block over batches, in float32 (float64 for a float64 model).

    A vector has one "token" per example, its whole gradient, and its block is the exact Fisher matrix.

    Args:
        components: The selected components.
        blocks: Those of them that are preconditioned together.
        heads: Numbers of the components of the output head.
    """

    def __init__(
        self, components: Sequence[Component], blocks: Sequence[Block], heads: Container[int] = frozenset()
    ) -> None:
        self._names = [component.name for component in components]
        self._blocks = {block.weight: block for block in blocks}
        self._heads = heads
        self._predicting: Tensor | None = None
        self._counted: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._stray: dict[int, tuple[Tensor, int]] = {}
        self._positions: Tensor | None = None
        self._left: dict[int, Tensor] = {}
        self._right: dict[int, Tensor] = {}
        self._tokens = dict.fromkeys(self._blocks, 0)
        self._totals: dict[int, Tensor] = {}
        self._diagonals = DiagonalSink([component.shape for component in components])
        self._batch = self._examples = 0

    def begin(self, examples: int, predicting: Bool[Tensor, "example token"] | None = None) -> None:
        """Start a batch; `predicting` on the CPU, where the rows that count are found without a wait for the device."""
        self._diagonals.begin(examples)
        self._batch, self._totals = examples, {}
        self._predicting, self._positions = predicting, None
        self._counted, self._stray = {}, {}
        self._examples += examples

    def locate(self, positions: Int[Tensor, "example row"]) -> None:
        """Note which tokens the rows of the next piece are."""
        self._positions = positions

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Add one piece; the bias of a matrix needs none of its own, it is the column of ones."""
        positions, self._positions = self._positions, None
        block = self._blocks.get(component)
        if block is None:
            return
        if block.kind == "diagonal":
            self._diagonals.accumulate(component, examples, left, right)
        elif block.kind == "vector":
            part = _wide(materialise(left, right)[:, :, 0])
            total = self._totals.setdefault(component, part.new_zeros(self._batch, part.shape[1]))
            total[examples] += part
        else:
            assert not isinstance(left, OneHot)
            rows = self._rows_that_count(component, examples, left, positions)
            sides = (one.flatten(0, 1) if rows is None else one.flatten(0, 1)[rows] for one in (left, right))
            # A card multiplies halves as they are.
            left, right = (one if one.device.type == "cuda" else _wide(one) for one in sides)
            self._add(component, left, _with_ones(right, block.bias is not None))

    def finish(self) -> None:
        """Add what needed the whole batch.

        Raises:
            ModelError: Rows of a component cannot be split by token.
        """
        self._diagonals.finish()
        if self._stray:
            found = [stray for stray, _ in self._stray.values()]
            # Of a model on several devices, each layer has its own; only once is the result waited for.
            if torch.stack([stray.to(found[0].device) for stray in found]).any():
                self._refuse(*next((one, rows) for one, (stray, rows) in self._stray.items() if stray))
        for component, total in self._totals.items():
            self._add(component, total, torch.ones_like(total[:, :1]))

    def sums(self) -> dict[str, Tensor]:
        """Return the sums of every block, and the number of examples and tokens in them."""
        found = {"examples": torch.tensor(self._examples)}
        found |= {f"{number}.squares": squares for number, squares in self._diagonals.squares.items()}
        for number, left in self._left.items():
            tokens = torch.tensor(self._tokens[number])
            found |= {f"{number}.left": left, f"{number}.right": self._right[number], f"{number}.tokens": tokens}
        return found

    def _rows_that_count(
        self, component: int, examples: slice, left: Tensor, positions: Tensor | None
    ) -> Int[Tensor, "row"] | None:
        """Return those rows of a piece, its examples flattened, whose tokens count; None if all do."""
        if self._predicting is None:
            return None
        head, device = component in self._heads, left.device
        rows = left.shape[1] if positions is None else 0
        key = head, examples.start, examples.stop, rows, device
        if key not in self._counted:
            counts = self._predicting[examples]
            if not head:
                # From a position on, does any other predict a target?
                counts = counts.flip(1).cumsum(1).flip(1) > 0
            if positions is None:
                if rows % counts.shape[1]:
                    self._refuse(component, rows)
                # A layer may split a token into several rows (one a head), token after token.
                counts = counts.repeat_interleave(rows // counts.shape[1], 1).flatten()
                self._counted[key] = send(counts.nonzero()[:, 0], device), send((~counts).nonzero()[:, 0], device)
            else:
                self._counted[key] = send(counts, device), counts
        counts, others = self._counted[key]
        if positions is not None:
            return (counts.gather(1, positions.clamp(min=0)) & (positions >= 0)).flatten().nonzero()[:, 0]
        if len(others):
            # Not a number is left to the loss to report: it names the example.
            stray = left.flatten(0, 1)[others].nan_to_num(0.0, 0.0, 0.0).any()
            self._stray[component] = stray | self._stray[component][0] if component in self._stray else stray, rows
        return counts

    def _refuse(self, component: int, rows: int) -> NoReturn:
        assert self._predicting is not None
        raise ModelError(
            f"{self._names[component]} receives {rows} rows for {self._predicting.shape[1]} tokens, and they cannot be "
            "split by token, which K-FAC and EK-FAC count. Leave it out with "
            f"--components '!{self._names[component]}', or type --method datainf."
        )

    def _add(self, number: int, left: Float[Tensor, "place out"], right: Float[Tensor, "place in"]) -> None:
        self._tokens[number] += len(left)
        for sums, side in ((self._left, left), (self._right, right)):
            if number not in sums:
                sums[number] = multiply_wide(side.T, side)
            elif side.dtype == sums[number].dtype:
                sums[number].addmm_(side.T, side)
            else:
                sums[number] += multiply_wide(side.T, side)


class EigenvalueSink(DiagonalSink):
    """Mean squares of the gradients in given eigenbases: EK-FAC's eigenvalues."""

    def __init__(self, curvature: KroneckerCurvature) -> None:
        super().__init__([block.shape for block in curvature.blocks])
        self._numbers = {block.weight: number for number, block in enumerate(curvature.blocks)}
        self._curvature = curvature

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Rotate both sides of a piece."""
        number = self._numbers.get(component)
        if number is None:
            return
        basis, block = self._curvature.factors[number].eigenbasis(), self._curvature.blocks[number]
        if basis.left is None or basis.right is None:
            return
        assert not isinstance(left, OneHot)
        turned = _with_ones(right.to(basis.right.dtype), block.bias is not None) @ basis.right
        super().accumulate(number, examples, left.to(basis.left.dtype) @ basis.left, turned)

    def sums(self) -> dict[str, Tensor]:
        """Return the sums of squares of every block, and the number of examples in them."""
        squares = {str(number): squares for number, squares in self.squares.items()}
        return {"examples": torch.tensor(self.examples), **squares}


def kronecker_factors(blocks: Sequence[Block], sums: Mapping[str, Tensor]) -> KroneckerCurvature:
    """Return the means of every block from what `KroneckerSink` added up; zeros where no gradient ever arrived."""
    examples = max(int(sums["examples"]), 1)

    def factor(block: Block) -> KroneckerFactor | Eigenbasis:
        number, (rows, columns) = block.weight, block.shape
        if block.kind == "diagonal":
            return Eigenbasis(None, None, sums.get(f"{number}.squares", torch.zeros(rows, columns)) / examples)
        tokens = int(sums.get(f"{number}.tokens", 0))
        left = sums.get(f"{number}.left", torch.zeros(rows, rows)) / max(tokens, 1)
        right = sums.get(f"{number}.right", torch.zeros(columns, columns)) / max(tokens, 1)
        return KroneckerFactor(left, right, tokens / examples)

    return KroneckerCurvature(tuple(blocks), tuple(map(factor, blocks)))


def with_eigenvalues(curvature: KroneckerCurvature, sums: Mapping[str, Tensor]) -> KroneckerCurvature:
    """Return EK-FAC from what `EigenvalueSink` added up in these bases; embeddings keep their diagonal."""
    examples = max(int(sums["examples"]), 1)

    def measured(number: int, basis: Eigenbasis) -> Eigenbasis:
        if basis.left is None:
            return basis
        squares = sums.get(str(number), torch.zeros_like(basis.values))
        return basis._replace(values=(squares / examples).to(basis.values))

    bases = [measured(number, one.eigenbasis()) for number, one in enumerate(curvature.factors)]
    return KroneckerCurvature(curvature.blocks, tuple(bases))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _with_ones(right: Tensor, bias: bool) -> Tensor:
    """Return the inputs with the bias's constant one as the last column."""
    return torch.cat([right, torch.ones_like(right[..., :1])], dim=-1) if bias else right
