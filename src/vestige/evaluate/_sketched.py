"""Which sketches are measured: every compressor at every size with every seed, and every index."""

from collections.abc import Sequence
from typing import NamedTuple

from vestige.compress import CompressionSpec, Compressor, parse_spec
from vestige.evaluate._families import PUBLISHED, Family, rank
from vestige.indexes import Index
from vestige.models import Component
from vestige.progress import announce
from vestige.settings import SketchSettings

_DENSE = ("gauss", "rademacher")
_DENSE_BYTES = 256 * 2**20
"""A dense projection of one component whose matrix is larger than this is left out unless it is requested by name."""


class Sketched(NamedTuple):
    """One random sketch of every component."""

    family: str
    """What sketches on one curve have in common."""
    size: int
    spec: CompressionSpec
    seed: int
    stored: Index | None = None
    """Where it is on disk already."""

    @property
    def name(self) -> str:
        """The name that its inner products are kept under."""
        stored = f" of index {self.stored.fingerprint}" if self.stored else ""
        return f"{self.spec.canonical} seed {self.seed}{stored}"

    @property
    def projected_name(self) -> str:
        """The name that the inner products of exact gradients under the same maps are kept under."""
        return f"projected {self.spec.canonical} seed {self.seed}"

    def compressors(self, components: Sequence[Component], device: object) -> list[Compressor]:
        """Build its maps again from what a manifest holds: spec, seed, names and shapes."""
        return [self.spec.build(one.name, one.shape, self.seed, device) for one in components]  # type: ignore[arg-type]


def planned_sketches(
    settings: SketchSettings, components: Sequence[Component], indexes: Sequence[Index]
) -> list[Sketched]:
    """Return everything to be measured, curve by curve; the size of the reference is among the sizes.

    Raises:
        SpecError: A compressor does not parse.
    """
    families = [Family(template) for template in settings.compress]
    if not families and not indexes:
        families = _published(settings, components)
    shapes = [component.shape for component in components]
    sizes = set(settings.sizes)
    if settings.reference_size:
        sizes.add(settings.reference_size)
    found = []
    for family in families:
        specs = [(size, family.at(size)) for size in sorted(sizes)]
        if not family.sized:
            specs = [(rank(specs[0][1], shapes), specs[0][1])]
        seeds = range(settings.seeds if specs[0][1].stages else 1)
        found += [Sketched(family.template, size, spec, seed) for size, spec in specs for seed in seeds]
    return found + [_of_index(index, shapes) for index in indexes]


def held_in_little_memory(spec: CompressionSpec) -> bool:
    """Return whether the maps are of the size of a side, so that those of several seeds fit beside one another."""
    first = spec.stages[0] if spec.stages else None
    return first is not None and (first.on_sides or first.kind.product == "circular")


def _published(settings: SketchSettings, components: Sequence[Component]) -> list[Family]:
    """Return the published compressors, without those that would take hours on this model."""
    largest = 4 * max(component.size for component in components) * max(settings.sizes)
    left_out = [one for one in PUBLISHED if largest > _DENSE_BYTES and one.startswith(_DENSE)]
    if left_out:
        announce(
            f"{' and '.join(left_out)} are left out: their matrices would be made again for every batch. "
            f"Name what you want to have one of them: --compress {left_out[0]} --compress tensorsketch:K"
        )
    return [Family(one) for one in PUBLISHED if one not in left_out]


def _of_index(index: Index, shapes: list[tuple[int, int]]) -> Sketched:
    spec = parse_spec(index.manifest.compression.spec)
    words = " | ".join(stage.name for stage in spec.stages) or "none"
    family = f"index of {words}, {index.manifest.dtype}"
    return Sketched(family, rank(spec, shapes), spec, index.manifest.seed, index)
