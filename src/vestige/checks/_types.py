"""The types of the package `doctor`: a check and its verdict, what is covered, what a compression costs, the report."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vestige.checks._render import render

Verdict = Literal["good", "warn", "bad"]


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
        return render(self)
