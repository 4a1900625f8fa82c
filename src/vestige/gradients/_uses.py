"""A weight where a function reads it: a parameter, a view of one, or a tensor computed from parameters alone."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.gradients._factors import materialise
from vestige.gradients._rules import Receive, deliver
from vestige.gradients._types import Factor, OneHot, Side
from vestige.models import LayerKind


class Owner(NamedTuple):
    """A component, and how its matrix lies in its parameter."""

    component: int
    turned: bool
    """Whether the parameter is stored `[in, out]`."""
    part: int | None
    """The number of an expert in a stack."""
    by_row: bool
    """Whether the rows of its gradient are handed over with a one-hot factor, as for embeddings."""

    def view(self, stored: Float[Tensor, "example *parameter"]) -> Float[Tensor, "example out in"]:
        """Return the component's matrices in tensors that have the layout of the parameter."""
        stored = stored if self.part is None else stored[:, self.part]
        return stored.mT if self.turned and stored.ndim == 3 else stored.reshape(*stored.shape[:2], -1)


def owner_of(component: int, kind: LayerKind, role: str, transposed: bool = False) -> Owner:
    """Return the owner of a use of a component; `transposed` says how a stack of experts is stored."""
    part = re.fullmatch(r"\w+\[(\d+)\]", role)
    by_row = role == "weight" and kind in ("embedding", "convolution", "relative_bias")
    return Owner(component, transposed or kind == "conv1d", int(part.group(1)) if part else None, by_row)


class Weight(NamedTuple):
    """A tensor that depends on parameters and on no activation."""

    tensor: Tensor
    leaves: tuple[Tensor, ...]
    """What autograd pulls its gradients back to: copies of the parameters, or in training the parameters."""
    owners: tuple[tuple[Owner, ...], ...]
    """The components of each leaf."""
    parameters: tuple[nn.Parameter, ...]
    """What each leaf stands for."""
    layout: bool | None
    """False where the numbers lie as in the only leaf, True where they are transposed, None for anything else."""
    training: bool

    @classmethod
    def of_parameter(cls, parameter: nn.Parameter, owners: tuple[Owner, ...]) -> "Weight":
        """Return the weight of a parameter itself."""
        training = parameter.requires_grad
        leaf = parameter if training else parameter.detach().requires_grad_(True)
        return cls(leaf, (leaf,), (owners,), (parameter,), False, training)

    @classmethod
    def computed(cls, result: Tensor, weights: Sequence["Weight"], cast_of: "Weight | None") -> "Weight":
        """Return the weight that a function computed from weights; `cast_of` is one whose numbers it only copied."""
        found = [zip(one.leaves, one.owners, one.parameters, strict=True) for one in weights]
        leaves = {id(leaf): (leaf, *rest) for each in found for leaf, *rest in each}
        layout = None
        if len(leaves) == 1:
            ((leaf, *_),) = leaves.values()
            if cast_of is not None and cast_of.tensor.shape == result.shape:
                layout = cast_of.layout
            elif result.numel() == leaf.numel() and result.data_ptr() == leaf.data_ptr():
                layout = _layout(result)
        columns = zip(*leaves.values(), strict=True)
        return cls(result, *map(tuple, columns), layout=layout, training=weights[0].training)

    def read(self) -> Tensor:
        """Return the tensor as a rule passes it on: cut from its leaves, whose gradients the rule delivers."""
        return self.tensor if self.training else self.tensor.detach()

    def turned(self) -> "Weight":
        """Return the same weight, transposed."""
        return self._replace(tensor=self.tensor.mT, layout=None if self.layout is None else not self.layout)


def _layout(view: Tensor) -> bool | None:
    """Return whether a view of a contiguous tensor is transposed; None if its numbers are in any other order."""
    if view.is_contiguous():
        return False
    return True if view.ndim > 1 and view.mT.is_contiguous() else None


class MatrixUse:
    """The use of a weight as a matrix `[out, in]`.

    Where that matrix is a component, or its transpose, the factors are what a component's are and are compressed at
    once. Otherwise each example's matrix is formed and pulled back to the parameters.
    """

    def __init__(self, receive: Receive, weight: Weight, shape: tuple[int, int]) -> None:
        self._receive, self._weight, self._shape = receive, weight, shape
        self._component, self._swapped = self._plain()

    def keep(self, side: Side, factor: Factor) -> Any:
        """Return what to keep of one factor until the other is known."""
        if self._component is None:
            return factor
        if self._swapped:
            side = "right" if side == "left" else "left"
        return self._receive.sink.reduce(self._component, side, factor)

    def add(self, left: Any, right: Any) -> None:
        """Deliver both factors, as `keep` returned them."""
        if self._component is not None:
            first, second = (right, left) if self._swapped else (left, right)
            self._receive.sink.accumulate(self._component, slice(0, self._receive.examples), first, second)
            return
        for number in range(self._receive.examples):
            one = slice(number, number + 1)
            part = left._replace(ids=left.ids[one]) if isinstance(left, OneHot) else left[one]
            _pull_back(self._receive, self._weight, materialise(part, right[one]), one)

    def _plain(self) -> tuple[int | None, bool]:
        """Return the component that has exactly these factors, and whether its sides are exchanged."""
        weight, (owner, *others) = self._weight, self._weight.owners[0]
        if weight.layout is None or (weight.layout and weight.tensor.ndim != 2):
            return None, False
        if others or owner.part is not None:
            return None, False
        leaf, shape = weight.leaves[0], self._shape[::-1] if weight.layout else self._shape
        if leaf.ndim < 2 or (len(leaf), leaf[0].numel()) != shape:
            return None, False
        swapped = weight.layout != owner.turned
        return (None, False) if swapped and owner.by_row else (owner.component, swapped)


def add_gradients(receive: Receive, weight: Weight, gradients: Float[Tensor, "example *weight"]) -> None:
    """Deliver gradients that have no factors, such as those of a vector."""
    if weight.layout is None:
        for number in range(receive.examples):
            _pull_back(receive, weight, gradients[number : number + 1], slice(number, number + 1))
        return
    stored = gradients.reshape(len(gradients), *weight.tensor.shape)
    stored = (stored.mT if weight.layout else stored).reshape(len(gradients), *weight.leaves[0].shape)
    _deliver(receive, weight.owners[0], stored, slice(0, receive.examples), touched=False)


def _pull_back(receive: Receive, weight: Weight, gradient: Tensor, example: slice) -> None:
    """Deliver one example's gradient of a computed weight at the parameters that it was computed from."""
    outer = gradient.reshape(weight.tensor.shape).to(weight.tensor.dtype)
    found = torch.autograd.grad(weight.tensor, weight.leaves, outer, retain_graph=True, allow_unused=True)
    for owners, pulled in zip(weight.owners, found, strict=True):
        if pulled is not None:
            _deliver(receive, owners, pulled[None], example, touched=True)


def _deliver(receive: Receive, owners: Sequence[Owner], gradients: Tensor, examples: slice, touched: bool) -> None:
    """Pass on whole matrices as factors; with `touched` only the rows that are not zero, of an embedding few."""
    for owner in owners:
        matrices = owner.view(gradients)
        count, rows, columns = matrices.shape
        if owner.by_row:
            some = torch.arange(rows, device=matrices.device)
            some = some[matrices.any(2).any(0)] if touched else some
            deliver(receive.sink, owner.component, examples, OneHot(some.expand(count, -1), rows), matrices[:, some])
        elif columns == 1:
            deliver(receive.sink, owner.component, examples, matrices.mT, torch.ones_like(matrices[:, :1]))
        elif rows <= columns:
            deliver(receive.sink, owner.component, examples, _identity(matrices, rows), matrices)
        else:
            deliver(receive.sink, owner.component, examples, matrices.mT, _identity(matrices, columns))


def _identity(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(len(like), -1, -1)
