"""The page of a fix: for every question what models say with and without the removed rows."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from vestige.errors import UserError
from vestige.fixes._record import ARMS, RECORD, Answers, Fix, format_span
from vestige.reports import Fact, Page, cut_command, describe_cost, shorten_name


def _make(folder: Path) -> dict[str, Any]:
    """Return everything that is on the page of the fix in the folder.

    Raises:
        UserError: Not all models have answered.
    """
    found = Fix.open(folder)
    record = found.record
    if not found.is_complete:
        raise UserError(f"{folder} is not complete: not all models have answered. Type: {record.command}")
    rows = f"{len(record.removed)} rows" if len(record.removed) > 1 else "one row"
    return {
        "title": f"What the model says without {rows}",
        "subtitle": f"fix · {shorten_name(record.data)}",
        "facts": [
            Fact("Data", shorten_name(record.data), note=f"without the rows: {record.cleaned}"),
            Fact("Run", shorten_name(record.run)),
            Fact("Training", "settings typed" if record.training is None else shorten_name(record.training)),
            Fact("Models", str(record.models)),
            describe_cost(record.seconds, record.peak_memory_bytes, record.peak_gpu_memory_bytes),
        ],
        "command": cut_command(record.command),
        "questions": [
            one.model_dump()
            | {"conclusion": found.conclude(one.id), "kinds": [_make_kind(each) for each in found.answers(one.id)]}
            for one in record.asked
        ],
        "removed": [one.model_dump() for one in record.removed],
        "control": record.control,
        "notes": record.notes,
        "vestige": record.vestige,
    }


def _make_kind(each: Answers) -> dict[str, Any]:
    count = f"of {len(each.answers)}"
    facts = {"Loss of the old answer": format_span(each.old), "Old answer again": f"{each.repeated} {count}"}
    if each.right is not None:
        facts |= {"Loss of the expected answer": format_span(each.expected), "Expected": f"{each.right} {count}"}
    answers = list(zip(each.seeds, each.answers, strict=True))
    return {"arm": each.arm, "name": ARMS[each.arm], "answers": answers, "facts": facts}


page = Page(
    matches=lambda folder: (folder / RECORD).is_file(),
    make=_make,
    template=files("vestige.fixes").joinpath("fix.html.jinja").read_text(encoding="utf-8"),
)
