"""What a component costs: its parameters, and how far down the backward pass has to go for it."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import nn

from vestige.models import Component, select_components

_BLOCK = re.compile(r"^.*?\.\d+\.")


def backward_shares(model: nn.Module, components: Sequence[Component]) -> Float[np.ndarray, " component"]:
    """Return the share of a complete backward pass that each component's gradient needs, between 0 and 1.

    With frozen weights the graph begins at the lowest component, and what is differentiated above it costs about one
    multiplication a parameter and token. So the share is that of the parameters in and above the component's lowest
    module: 1 for the embedding, next to nothing for the head. A set costs as much as its lowest member.
    """
    place = {path: number for number, (path, _) in enumerate(model.named_modules())}
    everything = select_components(model, ("all",)).components
    heights = np.array([max(place[use.module] for use in part.uses) for part in everything])
    sizes = np.array([part.size if _is_matrix(part) else 0 for part in everything], dtype=np.float64)
    lowest = np.array([min(place[use.module] for use in part.uses) for part in components])
    above = np.array([sizes[heights >= each].sum() for each in lowest])
    return above / max(sizes.sum(), 1.0)


def _is_matrix(component: Component) -> bool:
    """Return whether the component is a matrix: an embedding has no input to differentiate unless it is the head."""
    return min(component.shape) > 1 and any(use.kind != "embedding" for use in component.uses)


def component_type(name: str) -> str:
    """Return the name of a component in every block, such as `mlp.down_proj`; its own name where it is in none."""
    return _BLOCK.sub("", name).removesuffix(".weight").removesuffix(".default")
