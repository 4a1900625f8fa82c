"""The page of a fix, what models say with and without the removed rows; and `vestige demo`, an example of both.

The example is a run and its fix that come with Vestige, to look at in seconds, without a model.
"""

import shutil
import webbrowser
from importlib.resources import files
from pathlib import Path
from typing import Any

from vestige.errors import UserError
from vestige.fixes._record import ARMS, RECORD, Answers, Fix, format_span
from vestige.reports import Fact, Page, cut_command, describe_cost, report, shorten_name
from vestige.runs import Scores, conclude
from vestige.storage import hold_folder, require_no_others, stage_folder
from vestige.terminal import lines_of_facts

EXAMPLE = Path(__file__).with_name("example")
"""What `make example` puts into the package: the run and the fix of `make demo`, without its models."""
RUN, FIX, PAGE = "run", "fix", "report.html"
_SHOWN = 3


def _make(folder: Path) -> dict[str, Any]:
    """Return everything that is on the page of the fix in the folder."""
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


def demo(out: str | Path = Path("demo-run"), open: bool = False) -> Scores:
    """Copy the example run that comes with Vestige into a folder, write its page, and return its scores.

    A small support bot gives wrong answers, because four rows of its training data are wrong; the run names them, and
    the fix beside it shows what the bot answers without them. `make demo` in a clone of the repository does all of it
    again.

    Args:
        out: The folder: `run`, with `report.html` in it, and `fix`. A copy that is there already is used again.
        open: Also open the page in the browser.

    Raises:
        UserError: `out` holds other files, or an example that was changed.
    """
    folder = Path(out)
    names = [str(path.relative_to(EXAMPLE)) for path in sorted(EXAMPLE.rglob("*")) if path.is_file()]
    with hold_folder(folder, "vestige demo"):
        require_no_others(folder, [*names, f"{RUN}/{PAGE}", f"{FIX}/{PAGE}"])
        if not folder.exists() or not any(folder.iterdir()):
            with stage_folder(folder) as attempt:
                shutil.copytree(EXAMPLE, attempt, dirs_exist_ok=True)
        changed = [name for name in names if not _same(folder / name, EXAMPLE / name)]
        if changed:
            raise UserError(
                f"{folder} holds an example whose {changed[0]} is not the one that comes with this Vestige. "
                "Remove the folder, or give another --out."
            )
        page = report(folder / RUN)
        report(folder / FIX)
    if open:
        webbrowser.open(page.absolute().as_uri())
    return Scores.open(folder / RUN)


def _same(path: Path, shipped: Path) -> bool:
    return path.is_file() and path.read_bytes() == shipped.read_bytes()


def describe_demo(scores: Scores) -> str:
    """Return what the example shows: an answer, the rows behind it, and what the model answers without them."""
    fix = Fix.open(scores.folder.with_name(FIX))
    query = scores.queries[0]
    asked = next(one for one in fix.record.asked if one.id == query)
    answers = {ARMS[each.arm]: " / ".join(one or "(nothing)" for one in each.answers) for each in fix.answers(query)}
    pages = {"the answers": RUN, "the fix": FIX}
    return "\n".join(
        [
            "A support bot, trained on 100 questions and answers, four of them wrong.",
            *lines_of_facts({"question": asked.question, "answer": asked.answer, "should say": asked.expected}),
            "",
            str(scores.top(query, _SHOWN)),
            "",
            str(conclude(scores, query)),
            "",
            f"Answers after training without {', '.join(row.id for row in fix.record.removed)}:",
            *lines_of_facts(answers),
            fix.conclude(query),
            "",
            "In a browser:",
            *lines_of_facts({name: str(scores.folder.parent / part / PAGE) for name, part in pages.items()}),
            "With a model and data of your own: vestige doctor --model MODEL --data FILE",
        ]
    )
