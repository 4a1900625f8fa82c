"""The outcome of a sketch evaluation: errors of inner products, as points on curves, a table, JSON and figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.console import Group
from rich.table import Table
from torch import Tensor

from vestige.evaluate._result import MARKERS, TEXT_WIDTH, as_plain, mean_of_known, pearson, spearman
from vestige.figures import COLOURS, finish_axes, make_figure, render_figure
from vestige.progress import format_bytes
from vestige.storage import write_durably
from vestige.terminal import as_text

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
    errors, known = estimate - exact, lengths > 0
    rmse = errors.square().mean(1).sqrt()
    by_reference = estimate.T.numpy(), exact.T.numpy()
    return Quality(
        float(rmse.mean()),
        float(rmse.std(correction=0)),
        float(rmse.mean() / exact.square().mean().sqrt()),
        float((errors[known] / lengths[known]).square().mean().sqrt()),
        mean_of_known(spearman(*by_reference)),
        mean_of_known(pearson(*by_reference)),
    )


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


def average_seeds(points: Sequence[SketchPoint]) -> SketchPoint:
    """Return the mean of what was measured of one compressor at one size, with one seed each."""
    names = ("rmse", "rmse_std", "relative_error_percent", "nrmse", "spearman", "pearson")
    relative = [one.relative_error_percent for one in points]
    times = [one.microseconds_per_token for one in points if one.microseconds_per_token is not None]
    return replace(
        points[0],
        seeds=tuple(seed for one in points for seed in one.seeds),
        microseconds_per_token=fmean(times) if times else None,
        relative_error_percent_std=stdev(relative) if len(points) > 1 else 0.0,
        **{name: fmean(getattr(one, name) for one in points) for name in names},
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


def write_report(report: SketchReport, folder: Path) -> SketchReport:
    """Write `sketch.json` and three figures, each as PDF and PNG; return the report with the names of the files."""
    files = {"sketch.json": (json.dumps(report.to_json(), indent=1) + "\n").encode()}
    for name in ("rmse", "relative", "loglog"):
        figure, (axes,) = make_figure(7.2, 4.2)
        _draw(axes, name, report.curves, report.reference)
        files |= render_figure(figure, name)
    for name, content in files.items():
        write_durably(folder / name, [content])
    return replace(report, files=tuple(str(folder / name) for name in files))


def _draw(axes: Axes, kind: str, curves: Mapping[str, Sequence[SketchPoint]], reference: str) -> None:
    sizes = sorted({point.size for points in curves.values() for point in points})
    axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * cycler(color=_COLOURS, marker=[*MARKERS]))
    for name, points in curves.items():
        style: dict[str, Any] = {"label": name, "markersize": 5, "linewidth": 1.4}
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
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    label = "RMSE of inner products" if kind == "rmse" else "relative error in %"
    finish_axes(axes, "K, numbers per component", label, legend=bool(curves))


def _draw_slope(axes: Axes, curves: Mapping[str, Sequence[SketchPoint]], sizes: Sequence[int]) -> None:
    """Draw logarithmic heights, and the slope that the error of a random sketch falls with."""
    best = [(points[0].relative_error_percent, points[0].size) for points in curves.values()]
    best = [pair for pair in best if pair[0] > 0]
    if len(sizes) > 1 and best:
        error, first = min(best)
        line = [error * (first / size) ** 0.5 for size in sizes]
        axes.plot(sizes, line, ":", color="#999999", linewidth=1.2, zorder=0, label="slope of 1/√K")
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
