"""Layer rules: which one covers a module, and the canonical shape that it gives to a parameter."""

import inspect
import re
from math import prod
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vestige.models._types import Component, LayerKind, Use

_EXPERTS_PATH = re.compile(r"(^|\.)experts(\.|$)")
_PART = re.compile(r"\w+\[(\d+)\]")


class OwnedParameter(NamedTuple):
    """A parameter with every owner: path, module, attribute."""

    name: str
    parameter: nn.Parameter
    owners: list[tuple[str, nn.Module, str]]


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Return the layer rule that covers a module, None if there is none."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    # DoRA's layer is linear in its magnitude vector, as a norm is in its scale.
    scales = ("RMSNorm", "T5LayerNorm", "DoraLinearLayer")
    if isinstance(module, nn.LayerNorm | nn.GroupNorm) or type(module).__name__.endswith(scales):
        return "norm"
    if isinstance(module, _ConvNd):
        return "convolution"
    if type(module).__name__.lower().endswith("topkrouter"):
        return "router"
    if all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "num_experts", "down_proj")):
        return "experts"
    return None


def components_of(model: nn.Module, owned: OwnedParameter) -> tuple[list[Component], str]:
    """Return the components of one parameter (one per expert of a stack), or none and the reason why no rule fits.

    Experts are components of their own because an expert is a matrix: its factors hold only the tokens routed to it,
    and compression and curvature see its `(out, in)`, not a stack in which all other blocks are zero.
    """
    uses: list[Use] = []
    for path, module, attribute in owned.owners:
        if _registered_for_its_decoder(owned, path):
            continue
        if path.endswith("trainable_tokens_delta"):
            uses.append(Use(path, "function", attribute))
            continue
        if reason := _why_no_rule(model, owned.parameter, path, module, attribute):
            return [], reason
        kind = layer_kind(module)
        assert kind is not None
        if kind == "experts":
            return _experts(owned, path, attribute, bool(module.is_transposed)), ""
        if path.endswith("relative_attention_bias"):
            path, kind = path.rpartition(".")[0], "relative_bias"
        uses.append(Use(path, kind, attribute))
    return [Component(owned.name, _canonical_shape(owned.parameter, uses[-1].kind), tuple(uses))], ""


def parameter_view(model: nn.Module, component: Component, stored: Tensor | None = None) -> Tensor:
    """Return the component's weights `[out, in]` as a view: what is written into it changes the model.

    It is detached from autograd, and works for every layout: transposed, flattened, one expert of a stack. With
    `stored`, the view is into that tensor, which has the layout of the parameter called `component.parameter`.
    """
    use = component.uses[0]
    stored = model.get_parameter(component.parameter).detach() if stored is None else stored
    transposed = use.kind == "conv1d"
    if found := _PART.fullmatch(use.role):
        stored = stored[int(found.group(1))]
        transposed = bool(model.get_submodule(use.module).is_transposed)
    return stored.T if transposed and stored.ndim == 2 else stored.view(component.shape)


def _why_no_rule(model: nn.Module, parameter: nn.Parameter, path: str, module: nn.Module, attribute: str) -> str:
    """Return why no rule covers this use of the parameter; empty when one does."""
    kind, where = layer_kind(module), f"{attribute!r} of {type(module).__name__}"
    if not parameter.is_floating_point():
        return f"no rule for {where}: packed as {parameter.dtype}; select a LoRA adapter, or load without quantisation"
    if kind == "experts":
        names = {"down_proj", "gate_up_proj" if module.has_gate else "up_proj"}
        ranks = dict.fromkeys(names, 3) | {f"{name}_bias": 2 for name in names}
        return "" if parameter.ndim == ranks.get(attribute) else f"no rule for {where}"
    if kind is None or attribute not in ("weight", "bias"):
        return f"no rule for {where}"
    if _EXPERTS_PATH.search(path):
        return f"no rule for {where}: its expert receives tokens gathered from the whole batch"
    if path.endswith("relative_attention_bias") and not _computes_bias(model.get_submodule(path.rpartition(".")[0])):
        return f"no rule for {where}: a relative position bias shared by the batch"
    return "" if _has_expected_rank(parameter, kind, attribute) else f"no rule for {where}"


def _has_expected_rank(parameter: nn.Parameter, kind: LayerKind, attribute: str) -> bool:
    if attribute == "weight" and kind == "convolution":
        return parameter.ndim > 2
    matrix = attribute == "weight" and kind in ("linear", "conv1d", "embedding", "router")
    return parameter.ndim == (2 if matrix else 1)


def _computes_bias(attention: nn.Module) -> bool:
    """Return whether a module computes its relative position bias as T5: `compute_bias(query_length, key_length)`."""
    compute = getattr(type(attention), "compute_bias", None)
    return compute is not None and {"query_length", "key_length"} <= set(inspect.signature(compute).parameters)


def _registered_for_its_decoder(owned: OwnedParameter, path: str) -> bool:
    """Return whether a module (BERT's prediction head) only holds the bias that its child `decoder` adds."""
    return any(
        other == f"{path}.decoder" and attribute == "bias" and isinstance(module, nn.Linear)
        for other, module, attribute in owned.owners
    )


def _experts(owned: OwnedParameter, path: str, attribute: str, transposed: bool) -> list[Component]:
    shape = (*owned.parameter.shape[1:], 1)[:2]
    if transposed and owned.parameter.ndim == 3:
        shape = shape[::-1]
    return [
        Component(f"{owned.name}[{number}]", (shape[0], shape[1]), (Use(path, "experts", f"{attribute}[{number}]"),))
        for number in range(owned.parameter.shape[0])
    ]


def _canonical_shape(parameter: nn.Parameter, kind: LayerKind) -> tuple[int, int]:
    if parameter.ndim == 1:
        return (parameter.shape[0], 1)
    rows, columns = parameter.shape[0], prod(parameter.shape[1:])
    return (columns, rows) if kind == "conv1d" else (rows, columns)
