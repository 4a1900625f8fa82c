"""`vestige study`: which experiments there are, what they take, and what each of them reports."""

import json
import operator
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt

from vestige.errors import SpecError
from vestige.registry import Registry, command
from vestige.settings import LaunchSettings, OnlyWith, Options, with_settings
from vestige.storage import make_folder, require_no_others, write_durably
from vestige.terminal import show

if TYPE_CHECKING:
    from rich.table import Table

    from vestige.runs import Scores


StudySize = Literal["tiny", "pocket", "paper"]


class StudySettings(LaunchSettings):
    """What `vestige study` takes."""

    positional: ClassVar[tuple[str, ...]] = ("name",)
    only_with: ClassVar[OnlyWith] = {**LaunchSettings.only_with, "peer": ("name", ("leaderboard",))}
    name: str = Field(
        description="Which experiment: untrac-miniature, untrac-toxicity, format-traps, digits, grass-resnet9, "
        "grass-music, text-lds, leaderboard, leaderboard-planted, domains, selection-domains, memorization-planted, "
        "memorization-facts, memorization-canaries, memorization-early, select-or-project, or one part of it: "
        "select-or-project-verses or select-or-project-answers."
    )
    out: Path = Field(
        description="Folder for models, runs, study.json and the table; an interrupted study goes on there."
    )
    size: StudySize = Field(
        "pocket",
        description="pocket runs in minutes on a laptop; paper is the published size; tiny shows that it runs.",
    )
    seeds: PositiveInt = Field(2, description="Repetitions, which differ in data, start and order.")
    seed: NonNegativeInt = Field(0, description="The first seed.")
    peer: Options = Field(
        {},
        description="leaderboard: another package that scores, too, and the python of its environment, such as "
        "kronfluence=PEER/bin/python; or a script of your own, PATH.py=PYTHON.",
    )

    @property
    def own_seed(self) -> int:
        """Of the first model that scores are computed on."""
        return OWN_SEED + self.seed

    @property
    def launch_arguments(self) -> dict[str, Any]:
        """Where the work runs, as arguments of another command."""
        return {name: getattr(self, name) for name in LaunchSettings.model_fields}


@dataclass(frozen=True)
class Gate:
    """What was expected, stated before, and what was seen."""

    name: str
    seen: float
    expected: Literal[">=", "<="]
    bound: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it was as expected; never for what is not a number."""
        compare = {">=": operator.ge, "<=": operator.le}[self.expected]
        return bool(compare(self.seen, self.bound))


class Outcome(NamedTuple):
    """What a study found."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    gates: Sequence[Gate]
    details: Mapping[str, Any]
    """Everything that a reader may want to compute again, in JSON terms."""


@dataclass(frozen=True)
class StudyReport:
    """A study's outcome with what it was asked."""

    name: str
    settings: dict[str, Any]
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    gates: tuple[Gate, ...]
    details: dict[str, Any]
    seconds: float
    """Of this call: what was found finished on disk took none."""

    @property
    def passed(self) -> bool:
        """Whether every gate was."""
        return all(gate.passed for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """In JSON terms."""
        gates = [asdict(gate) | {"passed": gate.passed} for gate in self.gates]
        return asdict(self) | {"gates": gates, "passed": self.passed}

    def __rich__(self) -> "Table":
        """Return the table, and the gates below it."""
        from rich.table import Table

        lines = [
            f"[{'pass' if gate.passed else 'FAIL'}] {gate.name}: {gate.seen:.3f} "
            f"(expected {gate.expected} {gate.bound:g})"
            for gate in self.gates
        ]
        # Square brackets are markup to rich, but for a backslash before them.
        caption = "\n".join(line.replace("[", "\\[", 1) for line in lines)
        table = Table(title=f"{self.name}, {self.settings['size']}", caption=caption, caption_justify="left")
        for column in self.columns:
            table.add_column(column)
        for row in self.rows:
            table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
        return table


@dataclass(frozen=True)
class Study:
    """A study: what is computed, and for which sizes."""

    sizes: tuple[str, ...]
    run: Callable[[StudySettings], Outcome]


def register_study(sizes: Iterable[str]) -> Callable[[Callable[[StudySettings], Outcome]], Study]:
    """Turn a function into a study of these sizes; `pyproject.toml` gives its name and its address."""
    return lambda run: Study(tuple(sizes), run)


STUDIES: Registry[Study] = Registry("vestige.studies", "study", Study)


_RECORD = "study.json"
OWN_SEED = 1_000
"""Of the first model that scores are computed on; those of a bank are drawn from hashes."""
Ends = tuple[float, float, float]
"""A value and the ends of its interval: an `Estimate` or an `Interval`."""


def keep_run(command: Callable[..., "Scores"], out: Path, **arguments: Any) -> "Scores":
    """Return the run in `out`, which the command computes unless it is there."""
    from vestige.runs import Scores, is_complete

    return Scores.open(out) if is_complete(out) else command(**arguments, out=out)


def show_interval(interval: Ends, digits: int = 3) -> str:
    """Return the ends of an interval as they stand in a table."""
    _, low, high = interval
    return f"{low:.{digits}f} … {high:.{digits}f}"


def draw_intervals(
    folder: Path,
    name: str,
    intervals: Mapping[str, Ends],
    label: str,
    *,
    beside: Collection[str] = (),
    lines: Mapping[str, float] | None = None,
) -> None:
    """Write a figure of intervals into the study's folder, as PNG and PDF; those `beside` stand back."""
    from vestige.evaluate import Estimate, Mark, interval_figure

    marks = [Mark(kind, Estimate(*each), kind in beside) for kind, each in intervals.items()]
    for file, content in interval_figure(name, marks, label, lines=dict(lines or {})).items():
        write_durably(folder / file, [content])


@with_settings(StudySettings)
def study(settings: StudySettings) -> StudyReport:
    """Replay an experiment; return its outcome beside what was expected, which is also written to `study.json`.

    Parts that are finished are kept.

    Raises:
        SpecError: There is no such study, or not in this size.
        UserError: The folder holds something else.
    """
    from vestige.jobs import is_worker

    found = STUDIES.find(settings.name)
    if settings.size not in found.sizes:
        raise SpecError(f"The study {settings.name} has no size {settings.size}, but: {', '.join(found.sizes)}.")
    if not is_worker() and not (settings.out / _RECORD).exists():
        require_no_others(settings.out, ())
        make_folder(settings.out)
        _write_record(settings, {"study": settings.name})
    started = time.perf_counter()
    outcome = found.run(settings)
    report = StudyReport(
        settings.name,
        settings.record(),
        tuple(outcome.columns),
        tuple(map(tuple, outcome.rows)),
        # A handful of steps shows that everything runs, and nothing else.
        () if settings.size == "tiny" else tuple(outcome.gates),
        dict(outcome.details),
        time.perf_counter() - started,
    )
    _write_record(settings, report.to_dict())
    return report


def _write_record(settings: StudySettings, content: dict[str, Any]) -> None:
    write_durably(settings.out / _RECORD, [(json.dumps(content, indent=1) + "\n").encode()])


@command("study", StudySettings, function="vestige_recipes.studies:study", order=110, sweepable=True)
def study_command(settings: StudySettings) -> None:
    """Replay a published experiment.

    From made or public data to a table, beside what was expected of it; parts that are finished are not done again.
    """
    show(study_command.call(settings))
