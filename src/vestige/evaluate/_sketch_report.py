"""The outcome of a sketch evaluation: points on curves, as a table, as JSON and as figures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Group
from rich.table import Table

from vestige.evaluate._kept import Computed
from vestige.evaluate._measures import Quality, quality
from vestige.evaluate._sketch_figures import Curve, figures
from vestige.evaluate._sketch_inputs import SketchInputs
from vestige.evaluate._sketched import Sketched
from vestige.progress import format_bytes
from vestige.settings import SketchSettings
from vestige.storage import write_durably
from vestige.terminal import as_text

JSON_NAME = "sketch.json"
_FLOAT32 = 4
_TEXT_WIDTH = 160


@dataclass(frozen=True)
class SketchPoint:
    """One compressor at one size; errors are means over its seeds."""

    compress: str
    size: int
    seeds: tuple[int, ...]
    numbers_per_example: int
    bytes_per_example: int
    """What an index stores of an example; of a sketch that was not stored, its numbers in float32."""
    microseconds_per_token: float | None
    """Of compressing, without the model's own passes; None where it was read from an index."""
    rmse: float
    rmse_std: float
    """Spread over the references, mean over seeds."""
    relative_error_percent: float
    relative_error_percent_std: float
    """Spread over seeds; 0 for one seed."""
    nrmse: float
    spearman: float
    pearson: float


@dataclass(frozen=True)
class SketchReport:
    """Errors of compressed inner products: `str()` is a summary, `rich` prints a table."""

    curves: Mapping[str, tuple[SketchPoint, ...]]
    """By compressor, sizes ascending; the size that is the reference itself is left out."""
    reference: str
    num_ref_samples: int
    num_test_samples: int
    max_iters: int
    parameters: int
    """Whose gradients are compressed."""
    total_parameters: int
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return as_text(self, _TEXT_WIDTH)

    def __rich__(self) -> Group:
        title = (
            f"Inner products of {self.num_ref_samples} with {self.num_test_samples} examples, against {self.reference}"
        )
        return Group(title, _table(self), *self.files)

    def to_json(self) -> dict[str, Any]:
        """Return everything, with the published names of what was published."""
        return {
            "reference": self.reference,
            "num_ref_samples": self.num_ref_samples,
            "num_test_samples": self.num_test_samples,
            "max_iters": self.max_iters,
            "parameters": self.parameters,
            "total_parameters": self.total_parameters,
            "curves": [self._curve(name, points) for name, points in self.curves.items()],
        }

    def _curve(self, name: str, points: Sequence[SketchPoint]) -> dict[str, Any]:
        return {
            "results_pattern": name,
            "ranks": [point.size for point in points],
            "rmse_values": [point.rmse for point in points],
            "relative_errors_percent": [point.relative_error_percent for point in points],
            "points": [_finite(asdict(point)) for point in points],
        }


def build_report(
    settings: SketchSettings,
    inputs: SketchInputs,
    sketches: Sequence[Sketched],
    reference_of: Mapping[Sketched, str],
    computed: Mapping[str, Computed],
) -> SketchReport:
    """Return the errors of every sketch, averaged over seeds.

    Args:
        settings: What was requested.
        inputs: What was compared.
        sketches: What was measured.
        reference_of: The name of the right inner products for each sketch.
        computed: Inner products by name.
    """
    points: dict[str, dict[int, list[Sketched]]] = {}
    for one in sketches:
        points.setdefault(one.family, {}).setdefault(one.size, []).append(one)
    # A reference has no error against itself; the one that was projected again shows how far rounding goes.
    left_out = settings.reference_size if settings.reference_mode == "rank" else None
    curves = {
        family: tuple(
            _point(family, size, of_size[size], inputs, reference_of, computed)
            for size in sorted(of_size)
            if size != left_out
        )
        for family, of_size in points.items()
    }
    references, tests = inputs.samples.counts
    return SketchReport(
        curves,
        settings.reference,
        references,
        tests,
        references + tests,
        sum(component.size for component in inputs.components),
        inputs.parameters,
        tuple(str(settings.out / name) for name in (JSON_NAME, *_FIGURES)),
    )


_FIGURES = tuple(f"{name}.{kind}" for name in ("rmse", "relative", "loglog") for kind in ("pdf", "png"))


def write_report(report: SketchReport, folder: Path) -> None:
    """Write `sketch.json` and three figures, each as PDF and PNG."""
    write_durably(folder / JSON_NAME, [(json.dumps(report.to_json(), indent=1) + "\n").encode()])
    curves = [
        Curve(
            name,
            [point.size for point in points],
            [point.rmse for point in points],
            [point.rmse_std for point in points],
            [point.relative_error_percent for point in points],
            [point.relative_error_percent_std for point in points],
        )
        for name, points in report.curves.items()
        if points
    ]
    for name, content in figures(curves, report.reference):
        write_durably(folder / name, [content])


def _point(
    family: str,
    size: int,
    sketches: Sequence[Sketched],
    inputs: SketchInputs,
    reference_of: Mapping[Sketched, str],
    computed: Mapping[str, Computed],
) -> SketchPoint:
    found = [_quality(computed[one.name], computed[reference_of[one]]) for one in sketches]
    mean = Quality(*(fmean(values) for values in zip(*found, strict=True)))
    numbers = sum(sketches[0].spec.size_for(component.shape) for component in inputs.components)
    index = sketches[0].stored
    seconds = fmean(computed[one.name].seconds for one in sketches)
    return SketchPoint(
        compress=family,
        size=size,
        seeds=tuple(one.seed for one in sketches),
        numbers_per_example=numbers,
        bytes_per_example=index.manifest.row_bytes if index else _FLOAT32 * numbers,
        microseconds_per_token=None if index else 1e6 * seconds / inputs.test_tokens,
        rmse=mean.rmse,
        rmse_std=mean.rmse_std,
        relative_error_percent=100 * mean.relative,
        relative_error_percent_std=100 * stdev(one.relative for one in found) if len(found) > 1 else 0.0,
        nrmse=mean.nrmse,
        spearman=mean.spearman,
        pearson=mean.pearson,
    )


def _quality(estimate: Computed, exact: Computed) -> Quality:
    return quality(estimate.products.values[0], exact.products.values[0], exact.products.lengths[0])


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN, which JSON has not, by null."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def _short(value: float) -> str:
    """Format a value with three significant digits, without an exponent where a reader can do without."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _table(report: SketchReport) -> Table:
    table = Table()
    table.add_column("compressor", no_wrap=True)
    for heading in ("K", "per example", "RMSE", "relative error", "NRMSE", "Spearman", "Pearson", "µs / token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, points in report.curves.items():
        for place, point in enumerate(points):
            spread = f" ± {_short(point.relative_error_percent_std)}" if len(point.seeds) > 1 else ""
            table.add_row(
                name if place == 0 else "",
                str(point.size),
                format_bytes(point.bytes_per_example),
                f"{_short(point.rmse)} ± {_short(point.rmse_std)}",
                f"{_short(point.relative_error_percent)}{spread} %",
                f"{point.nrmse:.3g}",
                f"{point.spearman:.3f}",
                f"{point.pearson:.3f}",
                "" if point.microseconds_per_token is None else f"{point.microseconds_per_token:.3g}",
                end_section=place == len(points) - 1,
            )
    return table
