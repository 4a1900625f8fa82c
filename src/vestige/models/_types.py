"""The types of the models package: a loaded model, a component of it, and what a selection covers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

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
