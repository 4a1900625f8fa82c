"""The rule for relative position biases, which are looked up once for the whole batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vestige.gradients._rules import Handle, Receive, watch
from vestige.gradients._types import OneHot


class RelativeBiasTap:
    """T5's relative position bias: a look-up of `[query, key]` buckets, shared by the batch and by every layer.

    The embedding sits in an attention module whose `compute_bias` returns `[1, head, query, key]`. That is expanded to
    the batch; the expanded copy's gradient is each example's own.
    """

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        self._module, self._component, self._receive = module, components["weight"], receive

    def attach(self) -> Sequence[Handle]:
        """Replace `compute_bias` of the attention module."""
        return [ReplacedMethod(self._module, "compute_bias", self._compute)]

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


class ReplacedMethod:
    """A method of one module instance, replaced until `remove`."""

    def __init__(self, module: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        self._module, self._name = module, name
        self._before = module.__dict__.get(name)
        module.__dict__[name] = replacement

    def remove(self) -> None:
        """Restore the class's own method, or the earlier replacement."""
        if self._before is None:
            del self._module.__dict__[self._name]
        else:
            self._module.__dict__[self._name] = self._before
