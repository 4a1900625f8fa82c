"""Layer rules: how each kind of module brings its activations and output gradients into the canonical factors."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from vestige.errors import ModelError
from vestige.gradients._factors import Factor, FactorSink, OneHot, PositionSink, Side, materialise
from vestige.models import LayerKind


class Receive(NamedTuple):
    """Sink of the running batch and its number of examples."""

    sink: FactorSink
    examples: int


@runtime_checkable
class Handle(Protocol):
    """Undoes one change to a module."""

    def remove(self) -> None:
        """Restore the module as it was."""
        ...


class Replacement:
    """An entry of a dictionary, such as a module's own methods, that is replaced until `remove`."""

    def __init__(self, table: dict[str, Any], name: str, new: Any) -> None:
        self._table, self._name, self._before = table, name, table.get(name)
        table[name] = new

    def remove(self) -> None:
        """Restore the earlier entry, or that there was none."""
        if self._before is None:
            del self._table[self._name]
        else:
            self._table[self._name] = self._before


def per_token(tensor: Tensor, examples: int) -> Shaped[Tensor, "example token side"]:
    """Return `[example, token, side]` from a layer's tensor: token axes are flattened, a missing one is added."""
    if tensor.shape[0] % examples:
        raise ModelError(
            f"A selected layer works on a tensor of shape {tuple(tensor.shape)} in a batch of {examples} examples: its "
            "first axis is not the batch, so its gradient cannot be split by example. Leave the layer out with "
            "--components '!<name of the parameter>'."
        )
    return tensor.reshape(examples, -1, tensor.shape[-1])


def watch(output: Tensor, on_gradient: Callable[[Tensor], None]) -> None:
    """Call `on_gradient` with the output's gradient; starts the autograd graph here if nothing below needs it."""
    if not isinstance(output, Tensor):
        raise ModelError(
            f"A selected layer returns a {type(output).__name__}, not a tensor: there is no rule for it. Leave the "
            "layer out with --components '!<name of the parameter>'."
        )
    if not output.requires_grad:
        _StartGraph.apply(output, torch.zeros((), requires_grad=True))
    output.register_hook(on_gradient)


class _StartGraph(torch.autograd.Function):
    """Makes a tensor require its gradient without making it a leaf: a leaf could not be changed by ReLU in place."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, start: Tensor) -> Tensor:  # noqa: ARG004
        """Return the very same tensor, now with a history."""
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, None]:  # noqa: ARG004
        """Return no gradients: nothing lies below."""
        return None, None


class Kept(NamedTuple):
    """A value that a tap keeps from the forward to the backward pass, and the check that it is unchanged."""

    value: Any
    source: Tensor
    version: int

    def get(self, what: str) -> Any:
        """Return the kept value."""
        if isinstance(self.value, Tensor) and self.value._version != self.version and _same(self.value, self.source):
            raise ModelError(
                f"The input of {what} was changed in place after the layer had read it; training "
                "such a model fails too. Use the operation that returns a new tensor (`inplace=False`)."
            )
        return self.value


def keep(value: Any, source: Tensor) -> Kept:
    """Remember a value that may share memory with an activation."""
    return Kept(value, source, source._version)


def _same(value: Tensor, source: Tensor) -> bool:
    return value.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


def locate(sink: FactorSink, positions: Int[Tensor, "example row"]) -> None:
    """Pass on the tokens of the rows of the next factors, to a sink that counts them."""
    if isinstance(sink, PositionSink):
        sink.locate(positions)


def deliver(sink: FactorSink, component: int, examples: slice, left: Factor, right: Tensor) -> None:
    """Pass on both factors at once."""
    sink.accumulate(component, examples, sink.reduce(component, "left", left), sink.reduce(component, "right", right))


def deliver_vector(receive: Receive, component: int, gradient: Float[Tensor, "example token side"]) -> None:
    """Pass on the gradient of a vector: summed over tokens, as a matrix of one column."""
    total = gradient.sum(1, keepdim=True)
    deliver(receive.sink, component, slice(0, receive.examples), total, torch.ones_like(total[:, :, :1]))


class OutputTap(ABC):
    """Watches a module from its output on, which it does not change."""

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        self._module, self._receive = module, receive
        self._weight, self._bias = components.get("weight"), components.get("bias")

    def attach(self) -> Sequence[Handle]:
        """Place one forward hook, before any other; the backward one hangs on the output."""
        return [self._module.register_forward_hook(self._forward, prepend=True, with_kwargs=True)]

    def _forward(self, module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:  # noqa: ARG002
        if torch.is_grad_enabled():  # not in the first of two passes of a checkpointed block
            self._watch(self._receive(), inputs, named, output)

    @abstractmethod
    def _watch(self, receive: Receive, inputs: Any, named: dict[str, Any], output: Any) -> None:
        """Keep what the gradient needs of the input, and watch the output."""


@final
class LinearTap(OutputTap):
    """Linear and GPT-2's Conv1D: left = output gradient, right = input activation."""

    def _watch(self, receive: Receive, inputs: Any, named: dict[str, Any], output: Any) -> None:  # noqa: ARG002
        kept: Kept | None = None
        # A call on what is no batch, as DoRA's on an identity matrix, is refused once a gradient comes back from it.
        if self._weight is not None and inputs[0].shape[0] % receive.examples == 0:
            activation = per_token(inputs[0].detach(), receive.examples)
            kept = keep(receive.sink.reduce(self._weight, "right", activation), activation)
        watch(output, lambda gradient: self._backward(receive, kept, gradient))

    def _backward(self, receive: Receive, kept: Kept | None, gradient: Tensor) -> None:
        gradient = per_token(gradient, receive.examples)
        if self._weight is not None and kept is not None:
            left = receive.sink.reduce(self._weight, "left", gradient)
            receive.sink.accumulate(
                self._weight, slice(0, receive.examples), left, kept.get(type(self._module).__name__)
            )
        if self._bias is not None:
            deliver_vector(receive, self._bias, gradient)


@final
class NormTap(OutputTap):
    """LayerNorm, RMSNorm, GroupNorm, DoRA's magnitude: a scale's gradient is the output's times what it multiplies."""

    def _watch(self, receive: Receive, inputs: Any, named: dict[str, Any], output: Any) -> None:
        activation = inputs[0].detach()
        kept = keep(activation, activation)
        watch(output, lambda gradient: self._backward(receive, kept, named, gradient))

    def _backward(self, receive: Receive, kept: Kept, named: dict[str, Any], gradient: Tensor) -> None:
        module = self._module
        if self._weight is not None:
            scaled = gradient * _normalise(module, kept.get(type(module).__name__), named)
            deliver_vector(receive, self._weight, per_token(_features_last(module, scaled), receive.examples))
        if self._bias is not None:
            deliver_vector(receive, self._bias, per_token(_features_last(module, gradient), receive.examples))


def _features_last(module: nn.Module, tensor: Tensor) -> Tensor:
    """Move the features last: GroupNorm counts them along the second axis, the other norms along the last."""
    return tensor.movedim(1, -1) if isinstance(module, nn.GroupNorm) else tensor


def _normalise(module: nn.Module, activation: Tensor, named: dict[str, Any]) -> Tensor:
    """Return what the module multiplies its scale by: its output at scale one minus its output at scale zero.

    The module itself computes it, so that its own arithmetic (float32 inside, `1 + weight` in Gemma) is reproduced.
    """
    weight = module.get_parameter("weight")
    with torch.no_grad():
        at_one = functional_call(module, {"weight": torch.ones_like(weight)}, (activation,), named)
        at_zero = functional_call(module, {"weight": torch.zeros_like(weight)}, (activation,), named)
    return at_one - at_zero


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
    def of_result(cls, result: Tensor, weights: Sequence["Weight"], cast_of: "Weight | None") -> "Weight":
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

    def transpose(self) -> "Weight":
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
