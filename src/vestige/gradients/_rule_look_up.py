"""Rules for modules whose one look-up or product is intercepted inside their forward: embeddings, routers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vestige.errors import ModelError
from vestige.gradients._rules import Handle, Receive, deliver_vector, keep, per_token, watch
from vestige.gradients._types import OneHot


class _InterceptingTap:
    """Puts a function mode around the forward of one module."""

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        self._module, self._components, self._receive = module, components, receive
        self._modes: list[TorchFunctionMode] = []

    def attach(self) -> Sequence[Handle]:
        """The call is intercepted between the two hooks."""
        return [
            self._module.register_forward_pre_hook(self._enter),
            self._module.register_forward_hook(self._leave, always_call=True),
        ]

    def mode(self, receive: Receive) -> TorchFunctionMode:
        """What watches one forward."""
        raise NotImplementedError

    def _enter(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002
        if not torch.is_grad_enabled():  # the first of two passes of a checkpointed block
            return
        mode = self.mode(self._receive())
        mode.__enter__()
        self._modes.append(mode)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002
        if self._modes:
            self._modes.pop().__exit__(None, None, None)


class EmbeddingTap(_InterceptingTap):
    """Embedding: left = one-hot of the token, right = output gradient.

    The look-up itself is intercepted, not the module: subclasses shift the ids first (OPT) or scale the result after
    it (Gemma). Ids that are shared by the batch (`[1, token]` or `[token]` positions) are expanded, or their gradients
    would arrive summed over the examples.
    """

    def mode(self, receive: Receive) -> TorchFunctionMode:
        """Watches the look-up."""
        return _LookUp(self._components["weight"], receive)


class _LookUp(TorchFunctionMode):
    """Sees the one call of `embedding` inside an embedding module."""

    def __init__(self, component: int, receive: Receive) -> None:
        super().__init__()
        self._component, self._receive = component, receive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.embedding:
            return func(*args, **kwargs)
        ids, weight, *rest = args
        receive, component = self._receive, self._component
        shared, ids = ids, _with_batch_axis(ids, receive.examples)
        if weight.requires_grad and ids is not shared:
            # A weight in training: adding the rows to those of every example sums their gradients over the batch before
            # the look-up is differentiated. Expanding the rows does the same, bit for bit; expanding the ids does not.
            output = func(shared, weight, *rest, **kwargs).expand(*ids.shape, -1)
        else:
            output = func(ids, weight, *rest, **kwargs)
        padding = rest[0] if rest else kwargs.get("padding_idx")
        rows = per_token(ids[..., None], receive.examples)[..., 0]
        left = receive.sink.reduce(component, "left", OneHot(rows, weight.shape[0]))
        watch(output, lambda gradient: self._backward(left, gradient, None if padding is None else ids == padding))
        return output

    def _backward(self, left: Any, gradient: Tensor, ignored: Tensor | None) -> None:
        receive, component = self._receive, self._component
        if ignored is not None:  # the row of `padding_idx` is never trained
            gradient = gradient.masked_fill(ignored[..., None], 0)
        right = receive.sink.reduce(component, "right", per_token(gradient, receive.examples))
        receive.sink.accumulate(component, slice(0, receive.examples), left, right)


def _with_batch_axis(ids: Tensor, examples: int) -> Tensor:
    """Ids whose first axis is the batch: those shared by all examples are expanded.

    Raises:
        ModelError: it cannot be told whether `[token]` ids are positions shared by the batch or one id an example.
    """
    if examples == 1 or ids.ndim == 0:
        return ids
    if ids.ndim == 1 and len(ids) != examples:
        return ids.expand(examples, -1)
    if ids.ndim == 1 and torch.equal(ids, torch.arange(examples, device=ids.device)):
        raise ModelError(
            f"An embedding is given the ids 0 to {examples - 1} without a batch axis in a batch of {examples}: "
            "they may be positions or one id per example. Give positions the shape [1, token]."
        )
    return ids.expand(examples, *ids.shape[1:]) if ids.ndim > 1 and ids.shape[0] == 1 else ids


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
        """The ids that `compute_bias` looks up."""
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
        """Put the class's own method, or the earlier replacement, back."""
        if self._before is None:
            del self._module.__dict__[self._name]
        else:
            self._module.__dict__[self._name] = self._before


class RouterTap(_InterceptingTap):
    """The router of a mixture of experts: its one linear product, whatever it makes of the logits afterwards."""

    def mode(self, receive: Receive) -> TorchFunctionMode:
        """Watches the product."""
        return _Product(self._module, self._components, receive)


class _Product(TorchFunctionMode):
    """Sees the call of `linear` with a weight of the module's shape."""

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Receive) -> None:
        super().__init__()
        self._module, self._receive = module, receive
        self._weight, self._bias = components.get("weight"), components.get("bias")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args[1].shape == self._module.get_parameter("weight").shape:
            sink, activation = self._receive.sink, per_token(args[0].detach(), self._receive.examples)
            kept = keep(None if self._weight is None else sink.reduce(self._weight, "right", activation), activation)
            watch(output, lambda gradient: self._backward(kept.unchanged(self._module), gradient))
        return output

    def _backward(self, right: Any, gradient: Tensor) -> None:
        sink, examples = self._receive.sink, self._receive.examples
        gradient = per_token(gradient, examples)
        if self._weight is not None:
            sink.accumulate(self._weight, slice(0, examples), sink.reduce(self._weight, "left", gradient), right)
        if self._bias is not None:
            deliver_vector(self._receive, self._bias, gradient)
