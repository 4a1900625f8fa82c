"""`vestige evaluate sketch`: the error of inner products against the number of dimensions, for every compressor."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from vestige.errors import SpecError
from vestige.evaluate._kept import Computed, Kept
from vestige.evaluate._products import (
    Advance,
    Source,
    exact_products,
    projected_products,
    references_at_once,
    sketched_products,
    stored_products,
)
from vestige.evaluate._sketch_inputs import SketchInputs, all_components, read_sketch_inputs
from vestige.evaluate._sketch_report import SketchReport, build_report, write_report
from vestige.evaluate._sketched import Sketched, held_in_little_memory, planned_sketches
from vestige.gradients import CausalLoss, GradientPass
from vestige.indexes import Index
from vestige.models import Component
from vestige.progress import progress
from vestige.settings import SketchSettings, verb


class _Work(NamedTuple):
    """One piece of computing, which keeps its results itself."""

    examples: int
    """Gradients that it computes or reads."""
    run: Callable[[Advance], None]


@verb(SketchSettings)
def sketch(settings: SketchSettings) -> SketchReport:
    """Measure errors of compressed inner products against exact ones, by compressor and size, with table and figures.

    In `settings.out`: `sketch.json`, and the figures `rmse`, `relative` and `loglog`, each as PDF and PNG.

    Raises:
        UserError: Something about the model, the data, the settings, the memory or the disk needs the caller.
    """
    inputs = read_sketch_inputs(settings)
    sketches = planned_sketches(settings, inputs.components, inputs.indexes)
    reference_of = _references(settings, sketches)
    kept = Kept(settings.out, inputs.identity)
    work = [
        *_reference_work(settings, inputs, kept, reference_of),
        *_sketch_work(inputs, kept, [one for one in sketches if not kept.has(one.name)]),
    ]
    if work:
        with progress(sum(one.examples for one in work), "Comparing", "gradients") as bar:
            for one in work:
                one.run(bar.advance)
    names = {*(one.name for one in sketches), *reference_of.values()}
    computed = {name: kept.read(name) for name in sorted(names)}
    report = build_report(settings, inputs, sketches, reference_of, computed)
    write_report(report, settings.out)
    return report


def _references(settings: SketchSettings, sketches: Sequence[Sketched]) -> dict[Sketched, str]:
    """Return the name of the inner products that each sketch's are compared with.

    Raises:
        SpecError: There is no sketch of the reference's size among those on a sketch's curve.
    """
    mode, size = settings.reference_mode, settings.reference_size
    if size is None:
        return dict.fromkeys(sketches, f"exact {mode}")
    of_size = {(one.family, one.seed): one for one in sketches if one.size == size}
    for one in sketches:
        if (one.family, one.seed) not in of_size:
            sizes = {other.size for other in sketches if (other.family, other.seed) == (one.family, one.seed)}
            raise SpecError(
                f"--reference {settings.reference}: there is no '{one.family}' of {size} numbers with seed {one.seed}, "
                f"only of {', '.join(map(str, sorted(sizes)))}. Give one of these, or --reference full_layers."
            )
    chosen = {one: of_size[one.family, one.seed] for one in sketches}
    return {one: right.name if mode == "rank" else right.projected_name for one, right in chosen.items()}


def _reference_work(
    settings: SketchSettings, inputs: SketchInputs, kept: Kept, reference_of: dict[Sketched, str]
) -> list[_Work]:
    """Return the work for reference products that are missing; the sketches' own are made with the sketches."""
    if settings.reference_mode == "rank":
        return []
    if settings.reference_size is None:
        name = f"exact {settings.reference_mode}"
        return [] if kept.has(name) else [_exact_work(settings, inputs, kept, name)]
    of_size = {one.projected_name: one for one in reference_of if one.size == settings.reference_size}
    return [_projected_work(inputs, kept, one) for name, one in of_size.items() if not kept.has(name)]


def _exact_work(settings: SketchSettings, inputs: SketchInputs, kept: Kept, name: str) -> _Work:
    components = all_components(inputs.loaded) if settings.reference_mode == "full" else inputs.components
    memory = settings.memory_bytes or _free_memory(inputs.samples.test[0].batch.input_ids.device) // 2
    references, tests = inputs.samples.counts
    with _source(inputs, components) as source:
        passes = -(-references // references_at_once(source, memory))

    def run(advance: Advance) -> None:
        with _source(inputs, components) as source:
            kept.write(name, Computed(exact_products(source, inputs.samples, memory, advance), 0.0))

    return _Work(references + passes * tests, run)


def _projected_work(inputs: SketchInputs, kept: Kept, one: Sketched) -> _Work:
    def run(advance: Advance) -> None:
        with _source(inputs, inputs.components) as source:
            compressors = one.compressors(inputs.components, source.device)
            products = projected_products(source, inputs.samples, compressors, advance)
        kept.write(one.projected_name, Computed(products, 0.0))

    return _Work(inputs.samples.total, run)


def _sketch_work(inputs: SketchInputs, kept: Kept, sketches: Sequence[Sketched]) -> list[_Work]:
    """Return a pass for each sketch, or for all seeds of one spec where their maps are small; indexes are only read."""
    groups: dict[Any, list[Sketched]] = {}
    for one in sketches:
        together = one.spec if held_in_little_memory(one.spec) and one.stored is None else one.name
        groups.setdefault(together, []).append(one)
    return [
        _index_work(inputs, kept, group[0], group[0].stored) if group[0].stored else _pass_work(inputs, kept, group)
        for group in groups.values()
    ]


def _pass_work(inputs: SketchInputs, kept: Kept, group: Sequence[Sketched]) -> _Work:
    distinct = list({one.name: one for one in group}.values())

    def run(advance: Advance) -> None:
        with _source(inputs, inputs.components) as source:
            maps = [one.compressors(inputs.components, source.device) for one in distinct]
            results = sketched_products(source, inputs.samples, maps, advance)
        for one, result in zip(distinct, results, strict=True):
            kept.write(one.name, Computed(result.products, result.seconds))

    return _Work(inputs.samples.total, run)


def _index_work(inputs: SketchInputs, kept: Kept, one: Sketched, index: Index) -> _Work:
    references = inputs.samples.counts[0]

    def run(advance: Advance) -> None:
        def gradients_of(side: str, positions: Any) -> Tensor:
            advance(len(positions))
            return index.gradients_of(positions if side == "reference" else positions + references)

        columns = [span.columns for span in index.spans]
        kept.write(one.name, Computed(stored_products(columns, inputs.samples, gradients_of), 0.0))

    return _Work(inputs.samples.total, run)


@contextmanager
def _source(inputs: SketchInputs, components: Sequence[Component]) -> Iterator[Source]:
    model = inputs.loaded.model
    with GradientPass(model, components, CausalLoss(inputs.loss)) as gradient_pass:
        yield Source.of(gradient_pass, components, model)


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
