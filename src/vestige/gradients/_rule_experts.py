"""Mixture of experts as transformers stores it: all experts of a layer in one three-dimensional parameter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from vestige.gradients._rule_relative_bias import ReplacedMethod
from vestige.gradients._rules import Handle, Kept, Receive, deliver_vector, keep, locate, per_token, watch


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
        return [ReplacedMethod(self._module, "forward", self._forward)]

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
            receive.sink.accumulate(
                component, slice(0, receive.examples), left, kept.unchanged(type(self._module).__name__)
            )
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
