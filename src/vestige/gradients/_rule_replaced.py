"""Mixture of experts as transformers stores it: all experts of a layer in one three-dimensional parameter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vestige.gradients._factors import OneHot
from vestige.gradients._rules import Handle, Kept, Receive, Replacement, deliver_vector, keep, locate, per_token, watch


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
