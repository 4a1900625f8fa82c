"""A fix on disk: what was removed, what the models answered with and without it, and what that says."""

import html
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

from pydantic import Field
from rich.console import Group
from rich.table import Table

from vestige.errors import MissingExtra, UserError
from vestige.progress import format_seconds
from vestige.runs import Part, read_known
from vestige.storage import write_durably
from vestige.terminal import as_text, lines_of_facts, shorten

if TYPE_CHECKING:
    import pandas

FORMAT = 1
RECORD = "fix.json"
Arm = Literal["before", "after", "control"]
ARMS: dict[Arm, str] = {
    "before": "all rows",
    "after": "without the rows",
    "control": "without random rows",
}
"""What the models that are compared were trained on."""
_SHOWN, _WIDTH = 12, 100


class Row(Part):
    """A removed row."""

    id: str
    row: int
    reasons: list[str]
    source: str | None
    text: str


class Asked(Part):
    """A query of the run."""

    id: str
    question: str
    answer: str | None
    """What the run explains."""
    expected: str | None
    """The right answer, where it was given."""
    explained: str = ""
    """What of the answer the run explains, such as that it is not another one; empty for the whole."""


class Outcome(Part):
    """What one model says to one query."""

    arm: Arm
    seed: int
    query: str
    answer: str | None
    """None for a text, to which there is no answer."""
    old_loss: float
    """Of the answer that the run explains, in nats."""
    expected_loss: float | None
    """Of the right answer, in nats."""


class FixRecord(Part):
    """Everything in `fix.json`."""

    format: int = FORMAT
    kind: Literal["fix"] = "fix"
    vestige: str
    created: str
    command: str
    config: dict[str, Any]
    versions: dict[str, str]
    identity: dict[str, Any]
    """What the result follows from, but for the number of seeds."""
    run: str
    training: str | None
    """Folder of the recorded training; None where its settings were typed."""
    data: str
    cleaned: str | None
    """File of the data without the removed rows, in the folder; None of a plan."""
    removed: list[Row]
    control: dict[int, list[str]]
    """Ids of the random rows by number of the training."""
    asked: list[Asked]
    price: str
    models: int
    outcomes: list[Outcome] = Field(default_factory=list)
    """Empty until all models have answered."""
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    peak_gpu_memory_bytes: int = 0


class Answers(NamedTuple):
    """What the models of one kind say to one query."""

    arm: Arm
    seeds: list[int]
    answers: list[str | None]
    old: list[float]
    """Losses of the old answer by seed."""
    expected: list[float]
    """Losses of the right answer by seed; empty where none was given."""
    repeated: int
    """Models that give the old answer, but for white space."""
    right: int | None
    """Models whose answer contains the right one, but for case and white space; None where none was given."""


@final
class Fix:
    """What removing rows does to a model: before and after, with a control.

    fix = vestige.fix(run="run", drop=["row-7"])
    print(fix)
    fix.to_pandas()
    """

    def __init__(self, folder: Path | None, record: FixRecord) -> None:
        self.folder = folder
        """None of a plan, of which nothing was written."""
        self.record = record
        """Everything in `fix.json`."""

    @classmethod
    def open(cls, folder: str | Path) -> "Fix":
        """Open the fix in a folder.

        Raises:
            UserError: There is none, or a newer Vestige wrote it.
            CorruptFile: Its record is damaged.
        """
        record = read_fix(Path(folder))
        if record is None:
            raise UserError(f"{folder} is no fix: it has no {RECORD}. Make one with `vestige fix RUN`.")
        return cls(Path(folder), record)

    @property
    def is_complete(self) -> bool:
        """True once all models have answered."""
        return bool(self.record.outcomes)

    @property
    def data(self) -> Path | None:
        """The data without the removed rows; None of a plan."""
        name = self.record.cleaned
        return None if self.folder is None or name is None else self.folder / name

    def answers(self, query: str) -> list[Answers]:
        """Return what the models of each kind say to a query."""
        asked = next(one for one in self.record.asked if one.id == query)
        return [
            _collect(asked, arm, [one for one in self.record.outcomes if (one.query, one.arm) == (query, arm)])
            for arm in ARMS
            if any(one.arm == arm for one in self.record.outcomes)
        ]

    def conclude(self, query: str) -> str:
        """Return in words what the numbers say of a query."""
        return _conclude(self.answers(query), len(self.record.removed))

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a row for every model and query: arm, seed, query, answer, old_loss and expected_loss (nats).

        Raises:
            MissingExtra: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtra("Data frames need pandas.\nType: pip install pandas") from error
        return pandas.DataFrame([one.model_dump() for one in self.record.outcomes], columns=list(Outcome.model_fields))

    def __str__(self) -> str:
        return as_text(self, 120)

    __repr__ = __str__

    def __rich__(self) -> Group:
        record = self.record
        parts: list[Any] = [_removed_table(record)]
        for one in record.asked if self.is_complete else ():
            parts += [f"\n{one.id}: {one.question}", f"  old answer: {one.answer or 'none: it is a text'}"]
            parts += [f"  explained by the run: {one.explained}"] if one.explained else []
            parts += [f"  expected: {one.expected}"] if one.expected is not None else []
            parts += [f"  {self.conclude(one.id)}", _answer_table(self.answers(one.id))]
        if not self.is_complete:
            parts.append(f"\nTo be trained: {record.price}.")
        return Group(*parts, *(f"\n{note}" if place == 0 else note for place, note in enumerate(record.notes)))

    def _repr_html_(self) -> str:
        head = ("query", "trained on", "answers", "loss of the old answer", "old answer again", "expected", "its loss")
        lines = [(one.id, *_cells(each)) for one in self.record.asked for each in self.answers(one.id)]
        top = "".join(f"<th>{name}</th>" for name in head)
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{html.escape(cell)}</td>' for cell in line) + "</tr>"
            for line in lines
        )
        count = len(self.record.removed)
        caption = html.escape(f"{count} rows removed: {', '.join(one.id for one in self.record.removed[:_SHOWN])}")
        return f"<table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def read_fix(folder: Path) -> FixRecord | None:
    """Read the record of a fix, None if there is none.

    Raises:
        UserError: A newer Vestige wrote it.
        CorruptFile: It does not read.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    return read_known(FixRecord, path, FORMAT)


def write_fix(folder: Path, record: FixRecord) -> None:
    """Write the record of a fix into its folder."""
    content = json.dumps(record.model_dump(), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_durably(folder / RECORD, [content.encode()])


def describe_fix(folder: Path) -> str:
    """Return how far a fix is and what it removes, for `vestige status`."""
    record = Fix.open(folder).record
    done = len(list((folder / "models").glob("*.json")))
    state = "complete" if record.outcomes else "incomplete: the same command continues it"
    facts = {
        "models": f"{done} of {record.models}",
        "removed": f"{len(record.removed)} rows: {', '.join(shorten(one.id) for one in record.removed[:_SHOWN])}",
        "data": f"{record.data}, without them {folder / record.cleaned}" if record.cleaned else None,
        "took": format_seconds(record.seconds) if record.outcomes else None,
        "made by": f"{record.command} (Vestige {record.vestige}, {record.created})",
    }
    return "\n".join([f"{folder}: a fix of {record.run}, {state}", *lines_of_facts(facts)])


def _collect(asked: Asked, arm: Arm, outcomes: Sequence[Outcome]) -> Answers:
    answers = [one.answer for one in outcomes]
    plain = [_plain(answer or "") for answer in answers]
    return Answers(
        arm,
        [one.seed for one in outcomes],
        answers,
        [one.old_loss for one in outcomes],
        [one.expected_loss for one in outcomes if one.expected_loss is not None],
        sum(answer == _plain(asked.answer) for answer in plain) if asked.answer is not None else 0,
        None if asked.expected is None else sum(_plain(asked.expected) in answer for answer in plain),
    )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _conclude(kinds: Sequence[Answers], removed: int) -> str:
    """Return whether removing the rows raised the loss of the old answer more than removing random ones."""
    found = {one.arm: one for one in kinds}
    before, after, control = found["before"], found["after"], found.get("control")
    rises = [new - old for new, old in zip(after.old, before.old, strict=True)]
    count = f"the {removed} rows" if removed > 1 else "the row"
    words = f"Without {count} the loss of the old answer changes by {format_span(rises, signed=True)} nats"
    if control is None:
        verdict = "There is no control of random rows to compare it with."
    else:
        chance = [new - old for new, old in zip(control.old, before.old, strict=True)]
        words += f", without random ones by {format_span(chance, signed=True)}"
        if min(rises) > max(0.0, *chance) and len(rises) == 1:
            verdict = "Removed: more than random rows, with the one seed that was trained."
        elif min(rises) > max(0.0, *chance):
            verdict = "Removed: the rows led to this answer, with every seed more than any random rows."
        elif sum(rises) > sum(chance):
            verdict = "More than random rows, but not with every seed: not certain."
        else:
            verdict = "No more than random rows: these rows did not lead to this answer."
    few = " One seed shows little; raise --seeds." if len(rises) == 1 else ""
    return f"{words}. {verdict}{few}"


def format_span(values: Sequence[float], *, signed: bool = False) -> str:
    """Return the mean, with the range over the seeds."""
    if not values:
        return ""
    sign = "+" if signed else ""
    mean = format(sum(values) / len(values), f"{sign}.2f")
    return mean if len(values) == 1 else f"{mean} ({min(values):{sign}.2f} to {max(values):{sign}.2f})"


def _join(answers: Sequence[str | None]) -> str:
    """Return different answers, the most frequent first, with how many models give each."""
    counts = Counter(" ".join((answer or "").split()) for answer in answers)
    return "\n".join(f"{count} × {shorten(answer, _WIDTH) or '(nothing)'}" for answer, count in counts.most_common())


def _cells(one: Answers) -> tuple[str, ...]:
    """Return a line of the table of answers."""
    right = "" if one.right is None else f"{one.right} of {len(one.answers)}"
    again = f"{one.repeated} of {len(one.answers)}"
    return ARMS[one.arm], _join(one.answers), format_span(one.old), again, right, format_span(one.expected)


def _removed_table(record: FixRecord) -> Table:
    table = Table(title=f"{len(record.removed)} rows removed from {record.data}", title_justify="left")
    for name in ("row", "source", "why", "text"):
        table.add_column(name)
    for one in record.removed[:_SHOWN]:
        table.add_row(shorten(one.id), shorten(one.source or ""), "; ".join(one.reasons), shorten(one.text, _WIDTH))
    if (more := len(record.removed) - _SHOWN) > 0:
        table.caption = f"and {more} more, in {RECORD}"
    return table


def _answer_table(kinds: Sequence[Answers]) -> Table:
    table = Table()
    judged = any(one.right is not None for one in kinds)
    for name in ("trained on", "answers", "loss of old", "old again", *(("expected", "its loss") if judged else ())):
        table.add_column(name, ratio=1 if name == "answers" else None)
    for one in kinds:
        table.add_row(*_cells(one)[: None if judged else 4])
    return table
