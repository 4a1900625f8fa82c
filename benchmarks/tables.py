"""The benchmark's table: medians over rounds, and ratios of runs that were made in the same round."""

from collections.abc import Mapping, Sequence
from statistics import median

from measure import Measurement

Rounds = Mapping[str, Sequence[Measurement]]


def rate(measurement: Measurement, examples: int) -> float:
    """Examples per CPU second."""
    return examples / measurement.cpu_seconds


def ratio(rounds: Rounds, name: str, base: str, fixed: float = 0.0) -> float:
    """How many times faster `name` is than `base`, median of the ratios within each round.

    `fixed` are CPU seconds of `name` that do not grow with the data; they are left out.
    """
    pairs = zip(rounds[base], rounds[name], strict=True)
    return median(reference.cpu_seconds / (one.cpu_seconds - fixed) for reference, one in pairs)


def table(rounds: Rounds, examples: int, bases: Mapping[str, str], fixed: Mapping[str, float], floor: str) -> str:
    """Markdown; `bases` maps a column's heading to the engine that the column divides by.

    The column "in the long run" is the ratio to `floor` without an engine's `fixed` seconds per call.
    """
    headings = ["", "ex. / CPU-s", "ex. / s", *bases, "of floor in the long run", "peak MB", "kB / ex."]
    lines = [headings, [":--", *["--:"] * (len(headings) - 1)]]
    for name, runs in rounds.items():
        cpu = median(rate(run, examples) for run in runs)
        wall = median(examples / run.wall_seconds for run in runs)
        ratios = [f"{ratio(rounds, name, base):.2f}" for base in bases.values()]
        ratios.append(f"{ratio(rounds, name, floor, fixed[name]):.2f}" if name in fixed else "")
        peak = max(run.peak_bytes for run in runs) / 1e6
        disk = median(run.disk_bytes for run in runs) / examples / 1e3
        lines.append([name, f"{cpu:.1f}", f"{wall:.1f}", *ratios, f"{peak:.0f}", f"{disk:.1f}" if disk else ""])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    lines = [[line[0].replace("|", "\\|"), *line[1:]] for line in lines]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    rows = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
