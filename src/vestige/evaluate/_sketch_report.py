"""The outcome of a sketch evaluation: errors of inner products, as points on curves, a table, JSON and figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, ScalarFormatter
from rich.console import Group
from rich.table import Table
from scipy.stats import rankdata
from torch import Tensor

from vestige.evaluate._products import Products
from vestige.evaluate._result import MARKERS, TEXT_WIDTH, as_plain
from vestige.figures import COLOURS, finish_axes, make_figure, render_figure
from vestige.models import Component
from vestige.progress import format_bytes
from vestige.settings import SketchSettings
from vestige.storage import write_durably
from vestige.terminal import as_text

_FIGURES = ("rmse", "relative", "loglog")
_COLOURS = (*COLOURS[:6], "#000000", *COLOURS[6:], "#777777")


class Quality(NamedTuple):
    """Agreement of estimated inner products with the right ones."""

    rmse: float
    """Mean over references i of RMSE_i = sqrt(mean over tests j of (D_ij - E_ij)^2), in nats squared."""
    rmse_std: float
    """Spread of RMSE_i over the references: standard deviation, population form."""
    relative: float
    """`rmse` over the root mean square of the right inner products."""
    nrmse: float
    """Root mean square of (D_ij - E_ij) / (|g_i| |g_j|): the error of a cosine."""
    spearman: float
    """Mean over references of the rank correlation over tests."""
    pearson: float
    """Mean over references of the correlation over tests."""


def quality(
    estimate: Float[Tensor, "reference test"],
    exact: Float[Tensor, "reference test"],
    lengths: Float[Tensor, "reference test"],
) -> Quality:
    """Return the error measures of inner products `estimate`, of which `exact` are right.

    Args:
        estimate: D, inner products of compressed gradients.
        exact: E, what they should be.
        lengths: Product of the two gradients' norms. Pairs in which it is zero have no cosine and are left out of it.

    Returns:
        NaN for a correlation where no reference's products vary.
    """
    estimate, exact, lengths = (values.double().cpu() for values in (estimate, exact, lengths))
    errors = estimate - exact
    rmse = errors.square().mean(1).sqrt()
    known = lengths > 0
    cosine = (errors[known] / lengths[known]).square().mean().sqrt()
    ranks = (torch.from_numpy(np.asarray(rankdata(one.numpy(), axis=1), np.float64)) for one in (estimate, exact))
    return Quality(
        float(rmse.mean()),
        float(rmse.std(correction=0)),
        float(rmse.mean() / exact.square().mean().sqrt()),
        float(cosine),
        _correlate(*ranks),
        _correlate(estimate, exact),
    )


def _correlate(first: Tensor, second: Tensor) -> float:
    """Return the mean over rows of the correlation of two rows, those left out in which one does not vary."""
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    spread = first.norm(dim=1) * second.norm(dim=1)
    varies = spread > 0
    if not bool(varies.any()):
        return float("nan")
    return float(((first * second).sum(1)[varies] / spread[varies]).mean())


class Measured(NamedTuple):
    """One sketch of one size with one seed."""

    seed: int
    numbers_per_example: int
    bytes_per_example: int
    microseconds_per_token: float | None
    quality: Quality


def measure_quality(estimate: Products, exact: Products) -> Quality:
    """Return the errors of the products of whole gradients."""
    return quality(estimate.values[0], exact.values[0], exact.lengths[0])


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

    @classmethod
    def of(cls, compress: str, size: int, found: Sequence[Measured]) -> "SketchPoint":
        """Return the mean of what was measured with several seeds."""
        first, relative = found[0], [one.quality.relative for one in found]
        mean = Quality(*(fmean(values) for values in zip(*(one.quality for one in found), strict=True)))
        times = [one.microseconds_per_token for one in found if one.microseconds_per_token is not None]
        return cls(
            compress,
            size,
            tuple(one.seed for one in found),
            first.numbers_per_example,
            first.bytes_per_example,
            fmean(times) if times else None,
            mean.rmse,
            mean.rmse_std,
            100 * mean.relative,
            100 * stdev(relative) if len(found) > 1 else 0.0,
            mean.nrmse,
            mean.spearman,
            mean.pearson,
        )


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
        return as_text(self, TEXT_WIDTH)

    def __rich__(self) -> Group:
        title = (
            f"Inner products of {self.num_ref_samples} with {self.num_test_samples} examples, against {self.reference}"
        )
        return Group(title, _table(self), *self.files)

    def to_json(self) -> dict[str, Any]:
        """Return everything, with the published names of what was published."""
        facts = {name: value for name, value in vars(self).items() if name not in ("curves", "files")}
        curves = [
            {
                "results_pattern": name,
                "ranks": [point.size for point in points],
                "rmse_values": [point.rmse for point in points],
                "relative_errors_percent": [point.relative_error_percent for point in points],
                "points": [as_plain(asdict(point)) for point in points],
            }
            for name, points in self.curves.items()
        ]
        return facts | {"curves": curves}


def build_report(
    settings: SketchSettings,
    points: Mapping[str, Mapping[int, Sequence[Measured]]],
    counts: tuple[int, int],
    components: Sequence[Component],
    total_parameters: int,
) -> SketchReport:
    """Return the errors of every sketch, averaged over seeds.

    Args:
        settings: What was requested.
        points: What was measured, by family and size.
        counts: Of references and tests.
        components: Whose gradients are compressed.
        total_parameters: Of the whole model.
    """
    # A reference has no error against itself; the one that was projected again shows how far rounding goes.
    left_out = settings.reference_size if settings.reference_mode == "rank" else None
    curves = {
        family: tuple(SketchPoint.of(family, size, of_size[size]) for size in sorted(of_size) if size != left_out)
        for family, of_size in points.items()
    }
    names = ("sketch.json", *(f"{name}.{kind}" for name in _FIGURES for kind in ("pdf", "png")))
    parameters = sum(component.size for component in components)
    files = tuple(str(settings.out / name) for name in names)
    return SketchReport(curves, settings.reference, *counts, sum(counts), parameters, total_parameters, files)


def write_report(report: SketchReport, folder: Path) -> None:
    """Write `sketch.json` and three figures, each as PDF and PNG."""
    write_durably(folder / "sketch.json", [(json.dumps(report.to_json(), indent=1) + "\n").encode()])
    curves = {name: points for name, points in report.curves.items() if points}
    for name in _FIGURES:
        figure, (axes,) = make_figure(7.2, 4.2)
        _draw(axes, name, curves, report.reference)
        for file, content in render_figure(figure, name).items():
            write_durably(folder / file, [content])


def _draw(axes: Axes, kind: str, curves: Mapping[str, Sequence[SketchPoint]], reference: str) -> None:
    sizes = sorted({point.size for points in curves.values() for point in points})
    for number, (name, points) in enumerate(curves.items()):
        style: dict[str, Any] = {
            "label": name,
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": MARKERS[number % len(_COLOURS)],
            "linestyle": ("-", "--")[number // len(_COLOURS) % 2],
            "markersize": 5,
            "linewidth": 1.4,
        }
        errors = [(point.relative_error_percent, point.relative_error_percent_std) for point in points]
        if kind == "rmse":
            errors = [(point.rmse, point.rmse_std) for point in points]
        heights, spreads = zip(*errors, strict=True)
        own = [point.size for point in points]
        if kind == "loglog":
            axes.plot(own, heights, **style)
        else:
            axes.errorbar(own, heights, spreads, capsize=2, elinewidth=0.8, **style)
    spread = {"rmse": "; bars: spread over reference examples", "relative": "; bars: spread over seeds", "loglog": ""}
    axes.set_title(f"Error against {reference}{spread[kind]}", fontsize="medium", loc="left")
    if kind == "loglog":
        _draw_slope(axes, curves, sizes)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    label = "RMSE of inner products" if kind == "rmse" else "relative error in %"
    finish_axes(axes, "K, numbers per component", label, legend=bool(curves))


def _draw_slope(axes: Axes, curves: Mapping[str, Sequence[SketchPoint]], sizes: Sequence[int]) -> None:
    """Draw logarithmic heights, and the slope that the error of a random sketch falls with."""
    best = [(points[0].relative_error_percent, points[0].size) for points in curves.values()]
    best = [pair for pair in best if pair[0] > 0]
    if len(sizes) > 1 and best:
        error, first = min(best)
        line = [error * (first / size) ** 0.5 for size in sizes]
        axes.plot(sizes, line, color="#999999", linestyle=":", linewidth=1.2, zorder=0, label="slope of 1/√K")
    if best:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


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
