"""What the doctor reports: checks and their verdicts, what is covered, what a compression costs; and its text."""

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vestige.progress import format_bytes, format_seconds

Verdict = Literal["good", "warn", "bad"]
_WIDEST = 120
_NUMERALS = frozenset("0123456789,.%")


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    verdict: Verdict
    """`bad`: scores would be wrong, or the work would fail; `warn`: read this before the scores."""
    value: str
    """What was found, for reading."""
    advice: str
    """A sentence that says what it means and what to do."""
    number: float | None = None
    """What was found as a number, where it is one."""


class Coverage(NamedTuple):
    """How much of one kind of parameter is attributed to."""

    kind: str
    """lora, adapter, attention, mlp, embedding, head, norm or other."""
    parameters: int
    selected: int
    without_rule: int
    """Parameters that no setting can select."""
    reason: str
    """Why some of them are not selected; empty where all are."""


class Cost(NamedTuple):
    """What an index of all the data would cost under one compression."""

    compress: str
    numbers: int
    """Numbers per example."""
    seconds: float | None
    """Measured on a few examples and scaled by padded tokens; None where even one row is too large to try."""
    memory_bytes: int
    """Estimate of the most memory held at once, on the device that the model runs on."""
    row_bytes: dict[str, int]
    """Bytes per example on disk, by number format."""
    disk_bytes: dict[str, int]
    """Bytes of the whole index on disk, by number format."""
    curvature_bytes: int = 0
    """What the first question of `influence` adds to them."""


@dataclass(frozen=True)
class DoctorReport:
    """Everything the doctor found; `print` shows it for reading, `to_dict` gives it as JSON types."""

    model: str
    data: str
    examples: int
    dtype: str
    """Number format on disk that was requested."""
    checks: tuple[Check, ...]
    coverage: tuple[Coverage, ...]
    costs: tuple[Cost, ...]
    """The compression that was requested first, then alternatives; empty when the model could not run."""
    free_disk_bytes: int
    """On the disk of the current folder."""

    @property
    def ok(self) -> bool:
        """True if nothing is bad."""
        return all(check.verdict != "bad" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report in JSON types."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return plain | {
            "ok": self.ok,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "coverage": [row._asdict() for row in self.coverage],
            "costs": [row._asdict() for row in self.costs],
        }

    def __str__(self) -> str:
        columns = min(shutil.get_terminal_size((100, 24)).columns, _WIDEST)
        blocks = [
            [f"{self.model} on {self.examples:,} examples of {self.data}"],
            _checks(self.checks, max(columns, 60)),
            ["Parameters covered", *_coverage(self.coverage)],
        ]
        if self.costs:
            free = format_bytes(self.free_disk_bytes)
            blocks.append([f"What an index would cost ({free} of disk are free here)", *_costs(self.costs)])
        return "\n\n".join("\n".join(block) for block in [*blocks, [_last_line(self.checks)]])


def _checks(checks: Sequence[Check], columns: int) -> list[str]:
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


def _coverage(coverage: Sequence[Coverage]) -> list[str]:
    rows = [["kind", "parameters", "selected", "no rule", "why not all"]]
    for row in coverage:
        rows.append([row.kind, f"{row.parameters:,}", f"{row.selected:,}", f"{row.without_rule:,}", row.reason])
    return _align(rows)


def _costs(costs: Sequence[Cost]) -> list[str]:
    dtypes = list(costs[0].disk_bytes)
    rows = [["compress", "numbers", "time", "memory", *dtypes]]
    for cost in costs:
        seconds = "not tried" if cost.seconds is None else format_seconds(cost.seconds)
        disk = [format_bytes(cost.disk_bytes[dtype]) for dtype in dtypes]
        rows.append([cost.compress, f"{cost.numbers:,}", seconds, format_bytes(cost.memory_bytes), *disk])
    return _align(rows, right=range(1, len(rows[0])))


def _align(rows: list[list[str]], right: Sequence[int] | None = None) -> list[str]:
    """Align rows in columns; by default those that hold only numerals are set flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if right is None:
        right = [c for c in range(len(widths)) if all(set(row[c]) <= _NUMERALS and row[c] for row in rows[1:])]
    return [
        "  " + "  ".join(f"{cell:{'>' if c in right else '<'}{widths[c]}}" for c, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def _last_line(checks: Sequence[Check]) -> str:
    names = {verdict: [check.name for check in checks if check.verdict == verdict] for verdict in ("bad", "warn")}
    if names["bad"]:
        return f"Bad: {', '.join(names['bad'])}. Fix this before you trust a score."
    if names["warn"]:
        return f"Nothing is bad. Read these warnings before the scores: {', '.join(names['warn'])}."
    return "Everything is good."
