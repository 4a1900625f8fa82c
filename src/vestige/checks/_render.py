"""A doctor's report as text for a terminal."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vestige.progress import format_bytes, format_seconds

if TYPE_CHECKING:
    from vestige.checks._types import Check, Cost, DoctorReport

_WIDEST = 120
_NUMERALS = frozenset("0123456789,.%")


def render(report: "DoctorReport") -> str:
    """Render checks, coverage and costs, one block each, and a last line with the verdict."""
    columns = min(shutil.get_terminal_size((100, 24)).columns, _WIDEST)
    blocks = [
        [f"{report.model} on {report.examples:,} examples of {report.data}"],
        _checks(report.checks, max(columns, 60)),
        ["Parameters covered", *_coverage(report)],
    ]
    if report.costs:
        free = format_bytes(report.free_disk_bytes)
        blocks.append([f"What an index would cost ({free} of disk are free here)", *_costs(report.costs)])
    blocks.append([_last_line(report.checks)])
    return "\n\n".join("\n".join(block) for block in blocks)


def _checks(checks: Sequence["Check"], columns: int) -> list[str]:
    name_width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        verdict = check.verdict if check.verdict == "good" else check.verdict.upper()
        lead = f"{verdict:<4}  {check.name:<{name_width}}  "
        text = f"{check.value}. {check.advice}"
        lines += textwrap.wrap(
            text, columns, initial_indent=lead, subsequent_indent=" " * len(lead), break_on_hyphens=False
        )
    return lines


def _coverage(report: "DoctorReport") -> list[str]:
    rows = [["kind", "parameters", "selected", "no rule", "why not all"]]
    rows += [
        [row.kind, f"{row.parameters:,}", f"{row.selected:,}", f"{row.without_rule:,}", row.reason]
        for row in report.coverage
    ]
    return _aligned(rows)


def _costs(costs: Sequence["Cost"]) -> list[str]:
    dtypes = list(costs[0].disk_bytes)
    rows = [["compress", "numbers", "time", "memory", *dtypes]]
    for cost in costs:
        seconds = "not tried" if cost.seconds is None else format_seconds(cost.seconds)
        disk = [format_bytes(cost.disk_bytes[dtype]) for dtype in dtypes]
        rows.append([cost.compress, f"{cost.numbers:,}", seconds, format_bytes(cost.memory_bytes), *disk])
    return _aligned(rows, right=range(1, len(rows[0])))


def _aligned(rows: list[list[str]], right: Sequence[int] | None = None) -> list[str]:
    """Align rows in columns; by default those that hold only numerals are set flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if right is None:
        right = [c for c in range(len(widths)) if all(set(row[c]) <= _NUMERALS and row[c] for row in rows[1:])]
    return [
        "  " + "  ".join(f"{cell:{'>' if c in right else '<'}{widths[c]}}" for c, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def _last_line(checks: Sequence["Check"]) -> str:
    names = {verdict: [check.name for check in checks if check.verdict == verdict] for verdict in ("bad", "warn")}
    if names["bad"]:
        return f"Bad: {', '.join(names['bad'])}. Fix this before you trust a score."
    if names["warn"]:
        return f"Nothing is bad. Read these warnings before the scores: {', '.join(names['warn'])}."
    return "Everything is good."
