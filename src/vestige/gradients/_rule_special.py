"""Rules of layers that are no linear map of tokens: convolutions, experts in one parameter, relative position biases.

Convolutions are put into the canonical layout: a position is a token, an unfolded patch is its activation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vestige.gradients._factors import OneHot
from vestige.gradients._rules import (
    Handle,
    Kept,
    MatrixUse,
    Receive,
    Replacement,
    Weight,
    add_gradients,
    deliver_vector,
    keep,
    locate,
    per_token,
    watch,
)


class Geometry(NamedTuple):
    """Position and extent of the kernel of a convolution."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    """As `torch.nn.functional.pad` takes it: last axis first, both sides."""
    groups: int
    transposed: bool

    @classmethod
    def of_call(
        cls,
        kernel: tuple[int, ...],
        transposed: bool,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,  # noqa: ARG003
        groups: int = 1,
        dilation: Any = 1,
    ) -> "Geometry":
        """Return the geometry of a call of `torch.nn.functional.conv1d` and its kin."""
        rank = len(kernel)
        stride, dilation = _each(stride, rank), _each(dilation, rank)
        if isinstance(padding, str):
            totals = [
                step * (size - 1) if padding == "same" else 0 for step, size in zip(dilation, kernel, strict=True)
            ]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            sides = [(amount, amount) for amount in _each(padding, rank)]
        flat = tuple(amount for side in reversed(sides) for amount in side)
        return cls(kernel, stride, dilation, flat, groups, transposed)


def watch_convolution(
    receive: Receive,
    weight: Weight | None,
    bias: Weight | None,
    geometry: Geometry,
    images: Float[Tensor, "image channel *space"],
    output: Tensor,
) -> None:
    """Deliver the gradients of a convolution that has just been computed, of any rank, stride, padding and dilation.

    The weight `[row, column, *kernel]` is read as `[row, column * kernel]`. Plain: rows are output channels, left =
    output gradient, right = unfolded input. Transposed: rows are input channels, left = input, right = unfolded output
    gradient (a transposed convolution is the adjoint of a plain one).

    With groups the gradient is a small block per group, so it is formed and handed over row by row, as the rows of an
    embedding are: `left` is one-hot.
    """
    grouped_rows, use, positions = geometry.groups > 1, None, images.shape[2:]
    kept = keep(None, images)
    if weight is not None:
        first = channels_last(images) if geometry.transposed else patches(geometry, images)
        first = first.reshape(receive.examples, -1, first.shape[-1])
        use = MatrixUse(receive, weight, (len(weight.tensor), weight.tensor[0].numel()))
        side = "left" if geometry.transposed else "right"
        kept = keep(first if grouped_rows else use.keep(side, first), images)

    def backward(gradient: Tensor) -> None:
        if weight is not None and use is not None:
            first = kept.get("a convolution")
            second = patches(geometry, gradient, positions) if geometry.transposed else channels_last(gradient)
            second = second.reshape(receive.examples, -1, second.shape[-1])
            if grouped_rows:
                left, right = (first, second) if geometry.transposed else (second, first)
                add_gradients(receive, weight, multiply_groups(left, right, geometry.groups))
            else:
                other = use.keep("right" if geometry.transposed else "left", second)
                use.add(*((first, other) if geometry.transposed else (other, first)))
        if bias is not None:
            channels = channels_last(gradient)
            add_gradients(receive, bias, channels.reshape(receive.examples, -1, channels.shape[-1]).sum(1))

    watch(output, backward)


def channels_last(images: Float[Tensor, "image channel *space"]) -> Float[Tensor, "image position channel"]:
    """Return the positions in a row, as tokens."""
    return images.flatten(2).transpose(1, 2)


def patches(
    geometry: Geometry, images: Float[Tensor, "image channel *space"], positions: torch.Size | None = None
) -> Float[Tensor, "image position patch"]:
    """Return the input under the kernel at each of the first `positions` along each axis, channels first."""
    windows = torch.nn.functional.pad(images, list(geometry.padding)) if any(geometry.padding) else images
    for axis, (size, stride, dilation) in enumerate(
        zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        if positions is not None:
            windows = windows.narrow(axis, 0, positions[axis - 2])
    rank = len(geometry.kernel_size)
    windows = windows.movedim(1, 1 + rank)  # [image, *position, channel, *kernel]
    return windows.reshape(len(images), -1, windows[0].shape[rank:].numel())


def multiply_groups(
    left: Float[Tensor, "example position row"], right: Float[Tensor, "example position patch"], groups: int
) -> Float[Tensor, "example row column"]:
    """Return the weight gradient of a grouped convolution: rows of a group meet that group's channels only."""
    blocks = torch.einsum("epgr,epgc->egrc", left.unflatten(2, (groups, -1)), right.unflatten(2, (groups, -1)))
    return blocks.flatten(1, 2)


def _each(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """Return one number for each axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


class RelativeBiasTap:
    """T5's relative position bias: a look-up of `[query, key]` buckets, shared by the batch and by every layer.

    The embedding sits in an attention module whose `compute_bias` returns `[1, head, query, key]`. That is expanded to
    the batch; the expanded copy's gradient is each example's own.
    """

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        self._module, self._component, self._receive = module, components["weight"], receive

    def attach(self) -> Sequence[Handle]:
        """Replace `compute_bias` of the attention module."""
        return [Replacement(self._module.__dict__, "compute_bias", self._compute)]

    def _compute(self, *args: Any, **kwargs: Any) -> Tensor:
        bias = type(self._module).compute_bias(self._module, *args, **kwargs)  # type: ignore[attr-defined]
        if not torch.is_grad_enabled():
            return bias
        receive, buckets = self._receive(), self._buckets(args, kwargs)
        expanded = bias.expand(receive.examples, -1, -1, -1).contiguous()
        if expanded is bias or expanded.data_ptr() == bias.data_ptr():
            expanded = bias.clone()
        rows = buckets.reshape(1, -1).expand(receive.examples, -1)
        size = self._module.get_parameter("relative_attention_bias.weight").shape[0]
        left = receive.sink.reduce(self._component, "left", OneHot(rows, size))
        watch(expanded, lambda gradient: self._backward(receive, left, gradient))
        return expanded

    def _buckets(self, args: Any, kwargs: Any) -> Tensor:
        """Return the ids that `compute_bias` looks up."""
        with _Recorder() as recorder, torch.no_grad():
            type(self._module).compute_bias(self._module, *args, **kwargs)  # type: ignore[attr-defined]
        assert recorder.ids is not None
        return recorder.ids

    def _backward(self, receive: Receive, left: Any, gradient: Tensor) -> None:
        right = gradient.permute(0, 2, 3, 1).flatten(1, 2)
        kept = receive.sink.reduce(self._component, "right", right)
        receive.sink.accumulate(self._component, slice(0, receive.examples), left, kept)


class _Recorder(TorchFunctionMode):
    """Remembers the ids of the one look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding:
            self.ids = args[0]
        return func(*args, **(kwargs or {}))


class Routed(NamedTuple):
    """The tokens that were routed to one expert, example after example."""

    owners: Int[Tensor, "row"]
    """Indices of the examples that own them."""
    positions: Int[Tensor, "row"]
    """Which tokens of that example."""


class ExpertsTap:
    """One expert is one linear component: left = its output gradient, right = its input, at the tokens routed to it.

    The stacked products of transformers (`grouped_mm`, `batched_mm`) leave nowhere to put a hook, so the module's
    forward is replaced by the same computation expert by expert. Which example a routed token belongs to follows from
    its position, because tokens arrive example after example.
    """

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        self._module: Any = module
        self._components, self._receive = components, receive

    def attach(self) -> Sequence[Handle]:
        """Replace the forward."""
        return [Replacement(self._module.__dict__, "forward", self._forward)]

    def _forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        module = self._module
        if not torch.is_grad_enabled():  # the first of two passes of a checkpointed block
            return type(module).forward(module, hidden_states, top_k_index, top_k_weights)
        receive = self._receive()
        count = per_token(hidden_states, receive.examples).shape[1]
        total = torch.zeros_like(hidden_states)
        for number in range(module.num_experts):
            routed, place = torch.where(top_k_index == number)
            if len(routed) == 0:
                continue
            output = self._expert(number, hidden_states[routed], Routed(routed // count, routed % count), receive)
            output = output * top_k_weights[routed, place, None]
            total = total.index_add(0, routed, output.to(total.dtype))
        return total

    def _expert(self, number: int, states: Tensor, routed: Routed, receive: Receive) -> Tensor:
        module = self._module
        inner = self._linear("gate_up_proj" if module.has_gate else "up_proj", number, states, routed, receive)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        output = self._linear("down_proj", number, inner, routed, receive)
        return module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output

    def _linear(self, name: str, number: int, states: Tensor, routed: Routed, receive: Receive) -> Tensor:
        weight = getattr(self._module, name)[number]
        bias = getattr(self._module, f"{name}_bias")[number] if self._module.has_bias else None
        output = nn.functional.linear(states, weight.T if self._module.is_transposed else weight, bias)
        component = self._components.get(f"{name}[{number}]")
        shift = self._components.get(f"{name}_bias[{number}]")
        if component is not None or shift is not None:
            kept = keep(None, states)
            if component is not None:
                padded = rows_by_example(states.detach(), routed.owners, receive.examples)
                kept = keep(receive.sink.reduce(component, "right", padded), padded)
            watch(output, lambda gradient: self._backward(receive, component, shift, kept, routed, gradient))
        return output

    def _backward(
        self, receive: Receive, component: int | None, shift: int | None, kept: Kept, routed: Routed, gradient: Tensor
    ) -> None:
        padded = rows_by_example(gradient, routed.owners, receive.examples)
        if component is not None:
            # Rows that only fill are zero: with one added before, they differ from token 0.
            positions = rows_by_example(routed.positions[:, None] + 1, routed.owners, receive.examples) - 1
            locate(receive.sink, positions[..., 0])
            left = receive.sink.reduce(component, "left", padded)
            receive.sink.accumulate(component, slice(0, receive.examples), left, kept.get(type(self._module).__name__))
        if shift is not None:
            deliver_vector(receive, shift, padded)


def rows_by_example(
    values: Shaped[Tensor, "row side"], owners: Int[Tensor, "row"], examples: int
) -> Shaped[Tensor, "example token side"]:
    """Sort rows by the example that owns them, as `[example, token, side]`, padded with zeros to the longest."""
    counts = torch.bincount(owners, minlength=examples)
    place = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]
    padded = values.new_zeros(examples, int(counts.max()), values.shape[1])
    padded[owners, place] = values
    return padded
