"""Three figures of error against dimension: RMSE, relative error, and relative error on logarithmic axes."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, ScalarFormatter

# Okabe and Ito's colours, which colour-blind readers can distinguish; the marker shows it a second time.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8A5A2B",
    "#7A4FBF",
    "#777777",
)
_MARKERS = "osD^vP*X<>"
_SIZE = (7.2, 4.2)
_DOTS = 160


class Curve(NamedTuple):
    """One compressor's errors by size."""

    name: str
    sizes: Sequence[int]
    rmse: Sequence[float]
    rmse_std: Sequence[float]
    relative: Sequence[float]
    """In percent."""
    relative_std: Sequence[float]


def figures(curves: Sequence[Curve], reference: str) -> Iterator[tuple[str, bytes]]:
    """Yield file names with their contents: three figures, each as PDF and PNG, the same bytes for the same curves."""
    for name, draw in (("rmse", _rmse), ("relative", _relative), ("loglog", _loglog)):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes, curves, reference)
        _finish(axes, curves)
        yield f"{name}.pdf", _written(figure, "pdf")
        yield f"{name}.png", _written(figure, "png")


def _rmse(axes: Axes, curves: Sequence[Curve], reference: str) -> None:
    for number, curve in enumerate(curves):
        axes.errorbar(curve.sizes, curve.rmse, curve.rmse_std, capsize=2, elinewidth=0.8, **_style(number, curve))
    axes.set_ylabel("RMSE of inner products")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Error against {reference}; bars: spread over reference examples", fontsize="medium", loc="left")


def _relative(axes: Axes, curves: Sequence[Curve], reference: str) -> None:
    for number, curve in enumerate(curves):
        axes.errorbar(
            curve.sizes, curve.relative, curve.relative_std, capsize=2, elinewidth=0.8, **_style(number, curve)
        )
    axes.set_ylabel("relative error in %")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Error against {reference}; bars: spread over seeds", fontsize="medium", loc="left")


def _loglog(axes: Axes, curves: Sequence[Curve], reference: str) -> None:
    for number, curve in enumerate(curves):
        axes.plot(curve.sizes, curve.relative, **_style(number, curve))
    sizes = sorted({size for curve in curves for size in curve.sizes})
    best = [(curve.relative[0], curve.sizes[0]) for curve in curves if curve.relative[0] > 0]
    if len(sizes) > 1 and best:
        error, first = min(best)
        line = [error * (first / size) ** 0.5 for size in sizes]
        axes.plot(sizes, line, color="#999999", linestyle=":", linewidth=1.2, zorder=0, label="slope of 1/√K")
    if best:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("relative error in %")
    axes.set_title(f"Error against {reference}", fontsize="medium", loc="left")


def _style(number: int, curve: Curve) -> dict[str, Any]:
    return {
        "label": curve.name,
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": ("-", "--")[number // len(_COLOURS) % 2],
        "markersize": 5,
        "linewidth": 1.4,
    }


def _finish(axes: Axes, curves: Sequence[Curve]) -> None:
    sizes = sorted({size for curve in curves for size in curve.sizes})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("K, numbers per component")
    axes.grid(visible=True, color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")


def _written(figure: Figure, kind: str) -> bytes:
    content = BytesIO()
    # A date would make two equal figures differ.
    metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
    figure.savefig(content, format=kind, dpi=_DOTS, metadata=metadata)  # type: ignore[arg-type]
    return content.getvalue()
