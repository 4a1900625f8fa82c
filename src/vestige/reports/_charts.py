"""Figures of matplotlib inside a page: scalable, in the page's own colours and letters, with titles at the pointer."""

import math
import re
from collections.abc import Mapping
from io import StringIO
from typing import Any, NamedTuple

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from vestige.figures import COLOURS, SMALL, TIP, new_figure
from vestige.runs import format_span

_INKS = {
    **{colour.lower(): f"var(--tone-{number})" for number, colour in enumerate(COLOURS)},
    "#000000": "var(--line-strong)",
    "#555555": "var(--soft)",
    "#777777": "var(--muted)",
    "#aaaaaa": "var(--bar)",
    "#bbbbbb": "var(--bar)",
    "#ffffff": "var(--paper)",
}
"""Colours of figures as those of the page, which has a light and a dark theme; others stay as they are."""


class Key(NamedTuple):
    """A line of a legend."""

    name: str
    colour: str
    dashed: bool = False


class Panel(NamedTuple):
    """A drawing with its title, what it says and its legend."""

    title: str
    note: str
    svg: Markup
    legend: tuple[Key, ...] = ()
    broad: bool = False
    """Whether it needs the whole width."""


def new_axes(size: tuple[float, float] = SMALL) -> Axes:
    """Return the axes of an empty figure of a size in inches."""
    return new_figure(*size).add_subplot()


def make_panel(
    title: str, note: str, axes: Axes, *, names: Mapping[str, str] | None = None, broad: bool = False
) -> Panel:
    """Return the figure of these axes as a part of the page; `names` are other words for labels of its legend."""
    keys, legend = [], axes.get_legend_handles_labels()
    handles: list[Any] = legend[0]
    for handle, label in zip(handles, map(str, legend[1]), strict=True):
        part = handle if hasattr(handle, "get_color") else handle.patches[0]
        colour = part.get_color() if part is handle else to_hex(part.get_facecolor())
        dashed = part is handle and part.get_linestyle() not in ("-", "None")
        keys.append(Key((names or {}).get(label, label), _INKS.get(colour.lower(), colour), dashed))
    label = f"{title}: {', '.join(key.name for key in keys)}" if keys else title
    return Panel(title, note, _inline_svg(axes.figure, label, broad), tuple(keys), broad)


def place_interval(span: tuple[float, float, float], ends: tuple[float, float], full: float) -> dict[str, Any]:
    """Return positions across a drawing of 150 units: value, ends and the full gradient; `beyond` the ends: -1 or 1."""
    value, *interval = span

    def place(number: float) -> float:
        inside = min(max(number, ends[0]), ends[1])
        return round(4 + 142 * ((inside - ends[0]) / (ends[1] - ends[0]) if ends[1] > ends[0] else 0.5), 1)

    low, high = (None if not math.isfinite(end) else place(end) for end in interval)
    beyond = -1 if value < ends[0] else int(value > ends[1])
    found = {"at": place(value), "low": low, "high": high, "full": place(full), "beyond": beyond}
    return found | {"label": format_span(span)}


def _inline_svg(figure: Any, label: str, broad: bool) -> Markup:
    """Return a figure as SVG that may stand in a page; the same bytes for the same figure.

    Nothing in it is loaded, no name in it is that of another figure, and its texts are texts.
    """
    content, nothing = StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(content, format="svg", metadata=nothing, transparent=True)
    text = content.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="([^"]*)"', _open_group, body)
    body = re.sub(r'style="[^"]*"', _restyle, body)
    box = head.split('viewBox="')[1].split('"')[0]
    width = float(box.split()[2])
    # A broad one is not made smaller than letters can be read: it is moved to the side on a narrow screen.
    size = f"max-width:{width:g}px" + (f";min-width:{min(width, 720):g}px" if broad else "")
    start = f'<svg viewBox="{box}" style="{size}" role="img" aria-label="{escape(label)}">'
    return Markup(start + re.sub(r"\s*\n\s*", "\n", body).strip())


def _open_group(match: re.Match[str]) -> str:
    """Leave out the name of a group, which other figures have too; a tip becomes what the pointer shows."""
    return f"<g><title>{match[1].removeprefix(TIP)}</title" if match[1].startswith(TIP) else "<g"


def _restyle(match: re.Match[str]) -> str:
    """Take letters and colours from the page."""
    style = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", match[0])
    style = re.sub(r"; font-family: [^;\"]*", "", style)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: _INKS.get(colour[0], colour[0]), style)
