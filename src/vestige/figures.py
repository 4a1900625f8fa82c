"""What all figures share: colours, empty figures, axes, and files with equal bytes for equal numbers."""

from io import BytesIO
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A5A2B", "#7A4FBF")
SMALL, BROAD = (4.8, 2.9), (15.0, 3.2)
"""Sizes of figures on a page, in inches of 72 pixels: one of several in a row, and one that needs the whole width."""
TIP = "tip:"
"""What `set_gid` of a part begins with whose text a page shows at the pointer; files do without."""
_DOTS = 160


def choose_colours(count: int) -> tuple[str, ...]:
    """Return that many different colours: those of `COLOURS`, and where these end a circle of hues in two shades."""
    more = count - len(COLOURS)
    hues = [hsv_to_rgb((number / max(more, 1), 0.75, (0.45, 0.8)[number % 2])) for number in range(max(more, 0))]
    return (*COLOURS[:count], *(to_hex(tuple(hue.tolist())) for hue in hues))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that belongs to no window."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def make_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty figure, sizes in inches, and its panels row by row."""
    figure = new_figure(width, height)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(rows * columns)]


def finish_axes(axes: Axes, x: str, y: str, grid: Literal["x", "y", "both"] = "both", *, legend: bool = False) -> None:
    """Label the axes, draw the grid, and put the legend beside them."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, axis=grid, color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")


def write_plainly(axis: Axis, form: str) -> None:
    """Write the numbers of a logarithmic axis without powers."""
    axis.set_major_formatter(form)
    axis.set_minor_formatter(LogFormatter())


def render_figure(figure: Figure, name: str) -> dict[str, bytes]:
    """Return the figure's files by name; a date would make two equal figures differ."""
    files = {}
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        content = BytesIO()
        figure.savefig(content, format=kind, dpi=_DOTS, metadata=metadata)  # type: ignore[arg-type]
        files[f"{name}.{kind}"] = content.getvalue()
    return files
