"""Parameter names laid out as a grid of layers by modules, and component scores summed into its cells."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

_ENDINGS = ("weight", "bias", "default")
"""Last parts of a name that say nothing about where it stands; `default` is PEFT's adapter name."""

_LONGEST_NUMBER = 10
"""Digits of a layer's number; more of them are a part of a name."""


class Place(NamedTuple):
    """Where a component stands: its layer (None outside the layers) and its module within it."""

    layer: int | None
    module: str


def place_of(component: str) -> Place:
    """Return layer and module of a parameter name.

    The first number in the name is its layer, what follows is the module; weight and bias share a cell.

    >>> place_of("model.layers.3.self_attn.q_proj.weight")
    Place(layer=3, module='self_attn.q_proj')
    >>> place_of("transformer.wte.weight")
    Place(layer=None, module='wte')
    """
    parts = component.split(".")
    while len(parts) > 1 and parts[-1] in _ENDINGS:
        parts.pop()
    for number, part in enumerate(parts[:-1]):
        if part.isdecimal() and len(part) < _LONGEST_NUMBER:
            return Place(int(part), ".".join(parts[number + 1 :]))
    return Place(None, parts[-1])


@dataclass(frozen=True)
class Grid:
    """The cells of the heatmap. A cell is (layer number or None, module); order is the model's."""

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    others: tuple[str, ...]
    """Modules outside the layers: embeddings, final norm, output head."""
    cells: tuple[Place, ...]


def make_grid(components: Iterable[str]) -> Grid:
    """Return the grid that has a cell for each of `components`."""
    cells = tuple(dict.fromkeys(place_of(component) for component in components))
    return Grid(
        layers=tuple(sorted({cell.layer for cell in cells if cell.layer is not None})),
        modules=tuple(dict.fromkeys(cell.module for cell in cells if cell.layer is not None)),
        others=tuple(cell.module for cell in cells if cell.layer is None),
        cells=cells,
    )


def cell_sums(grid: Grid, scores: Mapping[str, float]) -> list[float]:
    """Return the score of each cell of `grid`: the sum over the components that stand in it."""
    sums = dict.fromkeys(grid.cells, 0.0)
    for component, score in scores.items():
        sums[place_of(component)] += score
    return list(sums.values())
