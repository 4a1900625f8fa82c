"""Loaded models, and the components of one: layer rules, canonical shapes and uses of its parameters."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LayerKind = Literal[
    "linear", "conv1d", "embedding", "norm", "convolution", "relative_bias", "router", "experts", "function"
]
"""The layer rule; `conv1d` is GPT-2's linear layer of that name, `convolution` every convolution of PyTorch, `function`
a parameter that no module of its own applies (the rows of PEFT's `trainable_token_indices`)."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with every weight frozen, and what identifies it."""

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase | None"
    name: str
    """What the user gave: hub id, folder, or the class name of a live module."""
    fingerprint: str
    """sha256 over parameter names, shapes, dtypes and bytes."""
    context_length: int | None
    """Maximum number of tokens that the model accepts, None if it states none."""
    measured: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What was measured of the model and is not measured again, by name."""

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that the model has embeddings for, None if it states none."""
        embeddings: Any = getattr(self.model, "get_input_embeddings", lambda: None)()
        weight = getattr(embeddings, "weight", None)
        return None if weight is None else int(weight.shape[0])


class Use(NamedTuple):
    """One use of a parameter in the computation."""

    module: str
    """Dotted path of the module in the model."""
    kind: LayerKind
    role: str
    """What the module calls the parameter: `weight`, `bias`, or `down_proj[3]` for one expert of a stack."""


@dataclass(frozen=True)
class Component:
    """One parameter tensor that is attributed to, with all its uses (two for tied weights)."""

    name: str
    """The parameter's name; for tied weights the first name that the model lists. One expert of a stack adds `[3]`."""
    shape: tuple[int, int]
    """Canonical `(out, in)`: a matrix maps `in` to `out`; a vector is `(n, 1)`; a GPT-2 Conv1D weight is
    transposed; the axes of a convolution's weight after the first are flattened into `in`."""
    uses: tuple[Use, ...]

    @property
    def parameter(self) -> str:
        """The parameter's name in the model: the component's own, without the number of an expert."""
        return self.name.partition("[")[0]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.shape[0] * self.shape[1]


class CoverageRow(NamedTuple):
    """One parameter of the model and whether it is attributed to."""

    name: str
    parameters: int
    selected: bool
    reason: str
    """Why it was skipped; empty when selected."""


@dataclass(frozen=True)
class Selection:
    """The components that are attributed to, in the model's own order, and what that leaves out."""

    components: tuple[Component, ...]
    coverage: tuple[CoverageRow, ...]

    @property
    def selected_parameters(self) -> int:
        """Number of parameters in the selected components."""
        return sum(component.size for component in self.components)

    @property
    def total_parameters(self) -> int:
        """Number of parameters in the model, tied ones once."""
        return sum(row.parameters for row in self.coverage)

    @property
    def fraction(self) -> float:
        """Share of the model's parameters that is attributed to."""
        return self.selected_parameters / max(self.total_parameters, 1)


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
        if _is_held_for_decoder(owned, path):
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


def _is_held_for_decoder(owned: OwnedParameter, path: str) -> bool:
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


def owners_of_parameters(model: nn.Module) -> Iterator[OwnedParameter]:
    """Yield every distinct parameter in the model's order, with all modules that hold it."""
    by_identity: dict[int, OwnedParameter] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            owned = by_identity.setdefault(id(parameter), OwnedParameter(name, parameter, []))
            owned.owners.append((path, module, attribute))
    yield from by_identity.values()
