"""`vestige evaluate sketch`: the error of inner products against the number of dimensions, for every compressor."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from vestige.compress import CompressionSpec, Compressor, parse_spec
from vestige.data import TokenizedData, make_batch, plan_batches
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.evaluate._products import (
    Advance,
    Computed,
    KeptProducts,
    Rows,
    Samples,
    Source,
    exact_products,
    multiply_gradients,
    project_products,
    references_at_once,
    sketch_products,
)
from vestige.evaluate._sketch_report import Measured, SketchReport, build_report, measure_quality, write_report
from vestige.evaluate._sketch_stored import compare_stored
from vestige.gradients import CausalLoss, GradientPass
from vestige.indexes import Index, batch_tokens, read_inputs, tokens_at_most
from vestige.models import Component, LoadedModel, batch_sharing, select_components
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

    def compressors(self, source: Source) -> list[Compressor]:
        """Build its maps again from what a manifest holds: spec, seed, names and shapes."""
        return [self.spec.build(one.name, one.shape, self.seed, source.device) for one in source.components]


class _Inputs(NamedTuple):
    """Everything that is read before the work begins."""

    loaded: LoadedModel
    samples: Samples
    components: tuple[Component, ...]
    """Whose gradients are compressed."""
    indexes: tuple[Index, ...]
    test_tokens: int
    """Tokens of all tests."""
    parameters: int
    """Of the whole model."""
    identity: dict[str, Any]
    """What every inner product depends on."""


class _Work(NamedTuple):
    """One piece of computing, which keeps its results itself."""

    examples: int
    """Gradients that it computes or reads."""
    run: Callable[[Advance], None]


@with_settings(SketchSettings)
def sketch(settings: SketchSettings) -> SketchReport:
    """Measure errors of compressed inner products against exact ones, by compressor and size, with table and figures.

    In `settings.out`: `sketch.json`, and the figures `rmse`, `relative` and `loglog`, each as PDF and PNG.

    Raises:
        UserError: Something about the model, the data, the settings, the memory or the disk needs the caller.
    """
    if settings.model is None:
        return compare_stored(settings)
    inputs = _read_inputs(settings)
    sketches = _plan_sketches(settings, inputs)
    reference_of = _references(settings, sketches)
    kept = KeptProducts(settings.out, inputs.identity)
    work = [*_plan_references(settings, inputs, kept, reference_of), *_plan_products(inputs, kept, sketches)]
    if work:
        with progress(sum(one.examples for one in work), "Comparing", "gradients") as bar:
            for one in work:
                one.run(bar.advance)
    computed = {name: kept.read(name) for name in sorted({*(one.name for one in sketches), *reference_of.values()})}
    points: dict[str, dict[int, list[Measured]]] = {}
    for one in sketches:
        numbers = sum(one.spec.size_for(component.shape) for component in inputs.components)
        # What an index stores of an example; of a sketch that was not stored, its numbers in float32.
        size = one.stored.manifest.row_bytes if one.stored else 4 * numbers
        time = None if one.stored else 1e6 * computed[one.name].seconds / inputs.test_tokens
        products = computed[one.name].products, computed[reference_of[one]].products
        found = Measured(one.seed, numbers, size, time, measure_quality(*products))
        points.setdefault(one.family, {}).setdefault(one.size, []).append(found)
    report = build_report(settings, points, inputs.samples.counts, inputs.components, inputs.parameters)
    write_report(report, settings.out)
    every = [point for curve in report.curves.values() for point in curve]
    numbers = {f"{one.compress}/{one.size}/{name}": value for one in every for name, value in vars(one).items()}
    report_numbers(settings.report_to, settings.out, "sketch", numbers)
    return report


def _read_inputs(settings: SketchSettings) -> _Inputs:
    """Read the model, the examples and the indexes.

    Raises:
        DataError: There are no examples besides the references.
        IndexMismatch: An index is of another model, of other data, or of other parameters than the first one.
        SpecError: Components were chosen although the indexes say them.
    """
    indexes = tuple(Index.open(folder) for folder in settings.index)
    if indexes and settings.components != SketchSettings.model_fields["components"].default:
        raise SpecError("--components and --index were both given, and the indexes say which parameters. Drop one.")
    patterns = ("all",) if indexes else settings.components
    loaded, data, selection = read_inputs(settings, settings.model, settings.data, patterns)
    components = selection.components
    for index in indexes:
        _require_belongs(index, settings, loaded, data)
        components = _components_of(index, components, indexes[0])
    samples, tokens = _divide(settings, data, loaded)
    identity = {
        "model": loaded.fingerprint,
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "data": data.fingerprint,
        "references": samples.counts[0],
        "examples": sum(samples.counts),
        "loss": settings.loss,
        "max_length": tokens_at_most(settings, loaded),
        "components": [component.name for component in components],
    }
    return _Inputs(loaded, samples, components, indexes, tokens, selection.total_parameters, identity)


def _divide(settings: SketchSettings, data: TokenizedData, loaded: LoadedModel) -> tuple[Samples, int]:
    """Return references and tests, and the tokens of the tests."""
    total = min(settings.samples, len(data))
    if settings.num_ref >= total:
        raise DataError(
            f"{settings.num_ref} references leave nothing to compare with: {total} examples take part. "
            "Give a smaller --num-ref, or more examples (--samples, and --limit if it was given)."
        )
    rest, device = np.arange(settings.num_ref, total), next(loaded.model.parameters()).device
    lengths = data.lengths[rest]
    planned = plan_batches(lengths, batch_tokens(settings, loaded), sharing=batch_sharing(loaded.model))
    reference = tuple(
        Rows(np.array([row]), make_batch(data, np.array([row])).to(device)) for row in range(settings.num_ref)
    )
    test = tuple(Rows(places, make_batch(data, rest[places]).to(device)) for places in planned)
    return Samples(reference, test), int(lengths.sum())


def _require_belongs(index: Index, settings: SketchSettings, loaded: LoadedModel, data: TokenizedData) -> None:
    manifest = index.manifest
    pairs = (
        ("model", manifest.model.fingerprint, loaded.fingerprint),
        ("data", manifest.data.fingerprint, data.fingerprint),
        ("loss", manifest.loss, settings.loss),
    )
    for name, there, here in pairs:
        if there != here:
            raise IndexMismatch(
                f"The index {index.folder} was made with another {name} ({there[:12]}) than this evaluation "
                f"({here[:12]}), so their inner products cannot agree. Give the --{name} it was made with "
                "(and its --max-length, --chat and --limit), or make another index."
            )


def _components_of(index: Index, components: Sequence[Component], first: Index) -> tuple[Component, ...]:
    """Return the components that an index holds, in its order."""
    known = {component.name: component for component in components}
    wanted = [(part.name, part.shape) for part in index.manifest.components]
    if [(part.name, part.shape) for part in first.manifest.components] != wanted:
        raise IndexMismatch(f"{index.folder} and {first.folder} hold different parameters. Evaluate them one by one.")
    return tuple(known[name] for name, _ in wanted)


def _plan_sketches(settings: SketchSettings, inputs: _Inputs) -> list[_Sketch]:
    """Return everything to be measured, curve by curve; the size of the reference is among the sizes.

    Raises:
        SpecError: A compressor does not parse.
    """
    shapes, templates = [component.shape for component in inputs.components], settings.compress
    if not templates and not inputs.indexes:
        templates = _choose_published(settings, inputs.components)
    sizes: list[int] = sorted({*settings.sizes, *([settings.reference_size] if settings.reference_size else [])})
    found = []
    for family in map(Family, templates):
        specs = [(size, family.at(size)) for size in sizes]
        if not family.sized:
            specs = [(_rank(specs[0][1], shapes), specs[0][1])]
        seeds = range(settings.seeds if specs[0][1].stages else 1)
        found += [_Sketch(family.template, size, spec, seed) for size, spec in specs for seed in seeds]
    for index in inputs.indexes:
        spec = index.spec
        words = " | ".join(stage.name for stage in spec.stages) or "none"
        family_name = f"index of {words}, {index.manifest.dtype}"
        found.append(_Sketch(family_name, _rank(spec, shapes), spec, index.manifest.seed, index))
    return found


def _rank(spec: CompressionSpec, shapes: Sequence[tuple[int, int]]) -> int:
    """Return the numbers that a spec keeps of the component of which it keeps most: its size, where no K is in it."""
    return max(spec.size_for(shape) for shape in shapes)


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


def _references(settings: SketchSettings, sketches: Sequence[_Sketch]) -> dict[_Sketch, str]:
    """Return the name of the inner products that each sketch's are compared with.

    Raises:
        SpecError: There is no sketch of the reference's size among those on a sketch's curve.
    """
    mode, size = settings.reference_mode, settings.reference_size
    if size is None:
        return dict.fromkeys(sketches, f"exact {mode}")
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
    return found


def _plan_references(
    settings: SketchSettings, inputs: _Inputs, kept: KeptProducts, reference_of: dict[_Sketch, str]
) -> list[_Work]:
    """Return the work for reference products that are missing; the sketches' own are made with the sketches."""
    if settings.reference_mode == "rank":
        return []
    if settings.reference_size is None:
        name = f"exact {settings.reference_mode}"
        return [] if kept.has(name) else [_plan_exact(settings, inputs, kept, name)]

    def project(one: _Sketch, advance: Advance) -> None:
        with _open_source(inputs, inputs.components) as source:
            products = project_products(source, inputs.samples, one.compressors(source), advance)
        kept.write(one.projected_name, Computed(products))

    of_size = {one.projected_name: one for one in reference_of if one.size == settings.reference_size}
    missing = [one for name, one in of_size.items() if not kept.has(name)]
    return [_Work(sum(inputs.samples.counts), partial(project, one)) for one in missing]


def _plan_exact(settings: SketchSettings, inputs: _Inputs, kept: KeptProducts, name: str) -> _Work:
    components = _all_components(inputs.loaded) if settings.reference_mode == "full" else inputs.components
    device = inputs.samples.test[0].batch.input_ids.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    memory = settings.memory_bytes or free // 2
    references, tests = inputs.samples.counts
    with _open_source(inputs, components) as source:
        passes = -(-references // references_at_once(source, memory))

    def run(advance: Advance) -> None:
        with _open_source(inputs, components) as source:
            kept.write(name, Computed(exact_products(source, inputs.samples, memory, advance)))

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


def _plan_products(inputs: _Inputs, kept: KeptProducts, sketches: Sequence[_Sketch]) -> list[_Work]:
    """Return a pass for each sketch, or for all seeds of one spec where their maps are small; indexes are only read."""
    groups: dict[Any, dict[str, _Sketch]] = {}
    for one in sketches:
        if not kept.has(one.name):
            first = one.spec.stages[0] if one.spec.stages else None
            # Maps of the size of a side: those of several seeds fit beside one another.
            small = first is not None and (first.on_sides or first.kind.product == "circular")
            groups.setdefault(one.spec if small and one.stored is None else one.name, {})[one.name] = one
    return [_Work(sum(inputs.samples.counts), _plan_group(inputs, kept, group)) for group in groups.values()]


def _plan_group(inputs: _Inputs, kept: KeptProducts, group: dict[str, _Sketch]) -> Callable[[Advance], None]:
    """Return the function that computes the products of some sketches in one pass, or those of a stored one."""
    references, stored = inputs.samples.counts[0], next(iter(group.values())).stored

    def run(advance: Advance) -> None:
        with _open_source(inputs, inputs.components) as source:
            maps = [one.compressors(source) for one in group.values()]
            results = sketch_products(source, inputs.samples, maps, advance)
        for name, result in zip(group, results, strict=True):
            kept.write(name, result)

    def read(index: Index, advance: Advance) -> None:
        def gradients_of(side: str, rows: Rows) -> Tensor:
            advance(len(rows.positions))
            return index.gradients_of(rows.positions if side == "reference" else rows.positions + references)

        columns = [span.columns for span in index.spans]
        kept.write(next(iter(group)), Computed(multiply_gradients(columns, inputs.samples, gradients_of)))

    return run if stored is None else partial(read, stored)


@contextmanager
def _open_source(inputs: _Inputs, components: Sequence[Component]) -> Iterator[Source]:
    model = inputs.loaded.model
    with GradientPass(model, components, CausalLoss(inputs.identity["loss"])) as gradient_pass:
        yield Source.of(gradient_pass, components, model)
