"""`vestige evaluate sketch`: the error of inner products against the number of dimensions, for every compressor."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from vestige.compress import CompressionSpec, Compressor, parse_spec
from vestige.errors import SpecError
from vestige.evaluate._products import (
    Advance,
    Computed,
    KeptProducts,
    Products,
    Rows,
    Source,
    exact_products,
    multiply_gradients,
    project_products,
    references_at_once,
    sketch_products,
)
from vestige.evaluate._sketch_inputs import SketchInputs, read_sketch_inputs
from vestige.evaluate._sketch_report import SketchPoint, SketchReport, average_seeds, quality, write_report
from vestige.gradients import CausalLoss, GradientPass
from vestige.indexes import IMPORTED_SPEC, Index
from vestige.models import Component, LoadedModel, select_components
from vestige.progress import announce, progress
from vestige.settings import SketchSettings, with_settings
from vestige.training import report_numbers

PUBLISHED = (
    "tensorsketch:K",
    "sjlt:K",
    "fjlt:K",
    "gauss:K",
    "rademacher:K",
    "logra:RxR",
    "mask:2Rx2R | sjlt:K",
    "mask:4K | sjlt:K",
    "mask:RxR",
    "mask:K",
)
"""Tensor sketch, SJLT, FJLT, dense projections, LoGra, FactGraSS and GraSS with their published intermediate size 4 K,
and the masks, each with about K numbers per component."""
_DENSE = ("gauss", "rademacher")
_DENSE_BYTES = 256 * 2**20
"""A dense projection of one component whose matrix is larger than this is left out unless it is requested by name."""
_SIZE = re.compile(r":[^,|]*")
_SYMBOL = re.compile(r"(\d*)([KR])")


@dataclass(frozen=True)
class Family:
    """Specs that differ in their size only: K is the size, R the side of a square of it; without both, just one."""

    template: str

    @property
    def sized(self) -> bool:
        """True if the size enters."""
        return any(map(_SYMBOL.search, _SIZE.findall(self.template)))

    def at(self, size: int) -> CompressionSpec:
        """Return the spec with `size` for K and the nearest whole number to its square root for R.

        Raises:
            SpecError: It does not parse.
        """
        values = {"K": size, "R": max(1, round(math.sqrt(size)))}

        def replace(part: re.Match[str]) -> str:
            return _SYMBOL.sub(lambda found: str(int(found[1] or 1) * values[found[2]]), part[0])

        return parse_spec(_SIZE.sub(replace, self.template))


class _Sketch(NamedTuple):
    """One random sketch of every component."""

    family: str
    """What sketches on one curve have in common."""
    size: int
    """Numbers that it keeps of the component of which it keeps most."""
    seed: int
    name: str
    """The name that its inner products are kept under."""
    numbers: int
    """Numbers that it keeps of an example."""
    spec: CompressionSpec | None
    """None for an index that other software made."""
    stored: Index | None = None
    """Where it is on disk already."""

    @property
    def projected_name(self) -> str:
        """The name that the inner products of exact gradients under the same maps are kept under."""
        assert self.spec is not None, "nothing is projected without a model"
        return f"projected {self.spec.canonical} seed {self.seed}"

    def compressors(self, source: Source) -> list[Compressor]:
        """Build its maps again from what a manifest holds: spec, seed, names and shapes."""
        assert self.spec is not None, "nothing is projected without a model"
        return [self.spec.build(one.name, one.shape, self.seed, source.device) for one in source.components]


class _Work(NamedTuple):
    """One piece of computing."""

    examples: int
    """Gradients that it computes or reads."""
    run: Callable[[Advance], dict[str, Computed]]
    """Returns inner products by their names."""


@with_settings(SketchSettings)
def sketch(settings: SketchSettings) -> SketchReport:
    """Measure errors of compressed inner products against exact ones, by compressor and size, with table and figures.

    Without a model, finished indexes of the same examples are compared with the widest of them, or with that of rank=K.
    In `settings.out`: `sketch.json`, and the figures `rmse`, `relative` and `loglog`, each as PDF and PNG.

    Raises:
        UserError: Something about the model, the data, the settings, the memory or the disk needs the caller.
    """
    inputs = read_sketch_inputs(settings)
    sketches = _plan_sketches(settings, inputs)
    reference, reference_of = _references(settings, inputs, sketches)
    kept = KeptProducts(settings.out, inputs.identity)
    work = [*_plan_references(settings, inputs, kept, reference_of), *_plan_products(inputs, kept, sketches)]
    if work:
        with progress(sum(one.examples for one in work), "Comparing", "gradients") as bar:
            for one in work:
                for name, found in one.run(bar.advance).items():
                    kept.write(name, found)
    computed = {name: kept.read(name) for name in sorted({*(one.name for one in sketches), *reference_of.values()})}
    points: dict[str, dict[int, list[SketchPoint]]] = {}
    for one in sketches:
        # A reference has no error against itself; the one that was projected again shows how far rounding goes.
        if one.name != reference_of[one]:
            found = _measure(one, inputs, computed[one.name], computed[reference_of[one]].products)
            points.setdefault(one.family, {}).setdefault(one.size, []).append(found)
    curves = {
        family: tuple(average_seeds(of_size[size]) for size in sorted(of_size)) for family, of_size in points.items()
    }
    counts, parameters = inputs.samples.counts, sum(component.size for component in inputs.components)
    report = write_report(
        SketchReport(curves, reference, *counts, sum(counts), parameters, inputs.parameters), settings.out
    )
    every = [point for curve in report.curves.values() for point in curve]
    numbers = {f"{one.compress}/{one.size}/{name}": value for one in every for name, value in vars(one).items()}
    report_numbers(settings.report_to, settings.out, "sketch", numbers)
    return report


def _measure(one: _Sketch, inputs: SketchInputs, computed: Computed, exact: Products) -> SketchPoint:
    """Return the errors of one sketch with one seed."""
    found = quality(computed.products.values[0], exact.values[0], exact.lengths[0])
    return SketchPoint(
        one.family,
        one.size,
        (one.seed,),
        one.numbers,
        one.stored.manifest.row_bytes if one.stored else 4 * one.numbers,
        None if one.stored else 1e6 * computed.seconds / inputs.test_tokens,
        found.rmse,
        found.rmse_std,
        100 * found.relative,
        0.0,
        found.nrmse,
        found.spearman,
        found.pearson,
    )


def _plan_sketches(settings: SketchSettings, inputs: SketchInputs) -> list[_Sketch]:
    """Return everything to be measured, curve by curve; the size of the reference is among the sizes."""
    shapes, templates = [component.shape for component in inputs.components], settings.compress
    if not templates and not inputs.indexes:
        templates = _choose_published(settings, inputs.components)
    sizes: list[int] = sorted({*settings.sizes, *([settings.reference_size] if settings.reference_size else [])})
    found = []
    for family in map(Family, templates):
        specs = [(size, family.at(size)) for size in sizes]
        if not family.sized:
            specs = [(max(specs[0][1].size_for(shape) for shape in shapes), specs[0][1])]
        for size, spec in specs:
            numbers = sum(spec.size_for(shape) for shape in shapes)
            for seed in range(settings.seeds if spec.stages else 1):
                name = f"{spec.canonical} seed {seed}"
                found.append(_Sketch(family.template, size, seed, name, numbers, spec))
    return [*found, *(_describe_index(index, inputs) for index in inputs.indexes)]


def _describe_index(index: Index, inputs: SketchInputs) -> _Sketch:
    """Return what is on disk as one of the sketches."""
    manifest = index.manifest
    spec = None if manifest.compression.spec == IMPORTED_SPEC else index.spec
    words = "other software" if spec is None else " | ".join(stage.name for stage in spec.stages) or "none"
    name = index.fingerprint
    if inputs.loaded is not None and spec is not None:
        name = f"{spec.canonical} seed {manifest.seed} of index {name}"
    size = max(span.columns.stop - span.columns.start for span in index.spans)
    return _Sketch(f"index of {words}, {manifest.dtype}", size, manifest.seed, name, manifest.width, spec, index)


def _choose_published(settings: SketchSettings, components: Sequence[Component]) -> tuple[str, ...]:
    """Return the published compressors, without those that would take hours on this model."""
    largest = 4 * max(component.size for component in components) * max(settings.sizes)
    left_out = [one for one in PUBLISHED if largest > _DENSE_BYTES and one.startswith(_DENSE)]
    if left_out:
        announce(
            f"{' and '.join(left_out)} are left out: their matrices would be made again for every batch. "
            f"Name what you want to have one of them: --compress {left_out[0]} --compress tensorsketch:K"
        )
    return tuple(one for one in PUBLISHED if one not in left_out)


def _references(
    settings: SketchSettings, inputs: SketchInputs, sketches: Sequence[_Sketch]
) -> tuple[str, dict[_Sketch, str]]:
    """Return what is right, in words, and the name of the inner products that each sketch's are compared with."""
    mode, size = settings.reference_mode, settings.reference_size
    if inputs.loaded is None:
        right = _find_right(size or max(one.size for one in sketches), sketches)
        return str(right.stored and right.stored.folder), dict.fromkeys(sketches, right.name)
    if size is None:
        return settings.reference, dict.fromkeys(sketches, f"exact {mode}")
    of_size = {(one.family, one.seed): one for one in sketches if one.size == size}
    found = {}
    for one in sketches:
        right = of_size.get((one.family, one.seed))
        if right is None:
            sizes = {other.size for other in sketches if (other.family, other.seed) == (one.family, one.seed)}
            raise SpecError(
                f"--reference {settings.reference}: there is no '{one.family}' of {size} numbers with seed {one.seed}, "
                f"only of {', '.join(map(str, sorted(sizes)))}. Give one of these, or --reference full_layers."
            )
        found[one] = right.name if mode == "rank" else right.projected_name
    return settings.reference, found


def _find_right(wanted: int, indexes: Sequence[_Sketch]) -> _Sketch:
    """Return the index that the others are compared with."""
    found = [one for one in indexes if one.size == wanted]
    if len(found) != 1:
        raise SpecError(
            f"{len(found)} of the indexes keep {wanted} numbers of a parameter, and one is to be right. They keep "
            f"{', '.join(map(str, sorted(one.size for one in indexes)))}: type --reference rank=K with one of these "
            "that is there once."
        )
    return found[0]


def _plan_references(
    settings: SketchSettings, inputs: SketchInputs, kept: KeptProducts, reference_of: dict[_Sketch, str]
) -> list[_Work]:
    """Return the work for reference products that are missing; the sketches' own are made with the sketches."""
    if settings.reference_mode == "rank" or inputs.loaded is None:
        return []
    if settings.reference_size is None:
        name = f"exact {settings.reference_mode}"
        return [] if kept.has(name) else [_plan_exact(settings, inputs, inputs.loaded, name)]

    def project(one: _Sketch, advance: Advance) -> dict[str, Computed]:
        with _open_source(inputs, inputs.components) as source:
            found = project_products(source, inputs.samples, one.compressors(source), advance)
        return {one.projected_name: Computed(found)}

    of_size = {one.projected_name: one for one in reference_of if one.size == settings.reference_size}
    missing = [one for name, one in of_size.items() if not kept.has(name)]
    return [_Work(sum(inputs.samples.counts), partial(project, one)) for one in missing]


def _plan_exact(settings: SketchSettings, inputs: SketchInputs, loaded: LoadedModel, name: str) -> _Work:
    components = _all_components(loaded) if settings.reference_mode == "full" else inputs.components
    device = inputs.samples.test[0].batch.input_ids.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    memory = settings.memory_bytes or free // 2
    references, tests = inputs.samples.counts
    with _open_source(inputs, components) as source:
        passes = -(-references // references_at_once(source, memory))

    def run(advance: Advance) -> dict[str, Computed]:
        with _open_source(inputs, components) as source:
            return {name: Computed(exact_products(source, inputs.samples, memory, advance))}

    return _Work(references + passes * tests, run)


def _all_components(loaded: LoadedModel) -> tuple[Component, ...]:
    """Return every parameter that has a rule; print so where that is not all of them."""
    selection = select_components(loaded.model, ("all",))
    if skipped := [row for row in selection.coverage if not row.selected]:
        announce(
            f"--reference full covers {selection.fraction:.1%} of the parameters: there is no rule for "
            f"{', '.join(row.name for row in skipped[:3])}{' ...' if len(skipped) > 3 else ''}."
        )
    return selection.components


def _plan_products(inputs: SketchInputs, kept: KeptProducts, sketches: Sequence[_Sketch]) -> list[_Work]:
    """Return a pass for each sketch, or for all seeds of one spec where their maps are small; indexes are only read."""
    total, groups, work = sum(inputs.samples.counts), dict[Any, list[_Sketch]](), list[_Work]()
    for one in sketches:
        if kept.has(one.name):
            continue
        if one.stored is not None:
            work.append(_Work(total, partial(_read_index, inputs, one.stored, one.name)))
            continue
        first = one.spec.stages[0] if one.spec is not None and one.spec.stages else None
        # Maps of the size of a side: those of several seeds fit beside one another.
        small = first is not None and (first.on_sides or first.kind.product == "circular")
        groups.setdefault(one.spec if small else one.name, []).append(one)
    return [*(_Work(total, partial(_compress, inputs, group)) for group in groups.values()), *work]


def _compress(inputs: SketchInputs, group: Sequence[_Sketch], advance: Advance) -> dict[str, Computed]:
    """Compute the products of some sketches in one pass."""
    with _open_source(inputs, inputs.components) as source:
        found = sketch_products(source, inputs.samples, [one.compressors(source) for one in group], advance)
    return dict(zip((one.name for one in group), found, strict=True))


def _read_index(inputs: SketchInputs, index: Index, name: str, advance: Advance) -> dict[str, Computed]:
    """Compute the products of what an index holds."""
    references = inputs.samples.counts[0]

    def gradients_of(side: str, rows: Rows) -> list[Tensor]:
        advance(len(rows.positions))
        return [index.gradients_of(rows.positions if side == "reference" else rows.positions + references)]

    (products,) = multiply_gradients([[span.columns for span in index.spans]], inputs.samples, gradients_of)
    return {name: Computed(products)}


@contextmanager
def _open_source(inputs: SketchInputs, components: Sequence[Component]) -> Iterator[Source]:
    assert inputs.loaded is not None, "indexes are read without a model"
    model = inputs.loaded.model
    with GradientPass(model, components, CausalLoss(inputs.identity["loss"])) as gradient_pass:
        yield Source.of(gradient_pass, components, model)
