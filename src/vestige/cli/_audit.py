"""`vestige audit`."""

from typing import TYPE_CHECKING, get_args

from vestige.registry import command
from vestige.settings import AuditSettings
from vestige.terminal import say

if TYPE_CHECKING:
    from vestige.runs import Audit, JudgementRecord

SHOWN = 8
"""What fits on a screen; the run holds everything."""


@command("audit", AuditSettings, function="vestige.measures:audit", order=70, sweepable=True, writes_once=True)
def audit(settings: AuditSettings) -> None:
    """Say for every example how well the model has memorized it, and how far that can be trusted.

    What it prints and stores is evidence about examples, no verdict on any of them. Measures that need classes, a bank
    or another model are null without them, and the run says why.
    """
    from vestige.measures import audit as run

    say(describe(run(**settings.arguments())))
    say(f"See it with: vestige report {settings.out}")


def describe(found: "Audit") -> str:
    """Return the highest list, what could not be computed, and how well the measures predict what is known."""
    from vestige.errors import UserError
    from vestige.runs import Truth

    try:
        parts = [str(found.top(SHOWN))]
    except UserError as error:
        parts = [str(error)]
    total = found.run.data.examples + (found.run.holdout.examples if found.run.holdout else 0)
    lines = [
        f"  {name}: {'none' if each.missing >= total else f'{total - each.missing:,} of {total:,}'} ({each.reason})"
        for name, each in found.run.measures.items()
        if each.reason
    ]
    parts += ["\n".join(["Not computed for every example:", *lines])] if lines else []
    last = found.checkpoints[-1]
    for truth in get_args(Truth):
        rows = [each for each in found.judgement(truth, checkpoint=last) if each.layer in (None, found.run.main_layer)]
        parts += ["\n".join([_title(truth, rows), *map(_line, rows)])] if rows else []
    parts += _exposures(found)
    return "\n\n".join([*parts, *found.run.notes])


def _exposures(found: "Audit") -> list[str]:
    """Return the planted secrets that are guessed soonest, if any were given."""
    from vestige.runs import CHANCE_BITS

    known = [
        (each.exposure, each)
        for each in found.run.canaries
        if each.checkpoint == found.checkpoints[-1] and each.exposure is not None
    ]
    known.sort(key=lambda pair: -pair[0])
    lines = [
        f"  {bits:5.2f} of {each.most:.2f} bits   rank {each.rank:,.4g} of {each.references + 1:,}   {each.id}"
        for bits, each in known[:SHOWN]
    ]
    title = f"Exposure of {len(known):,} planted secrets ({CHANCE_BITS:.2f} bits on average by chance)"
    return ["\n".join([title, *lines])] if known else []


def _title(truth: str, rows: "list[JudgementRecord]") -> str:
    what = {
        "membership": "members",
        "flag": "flagged examples",
        "memorized": "examples memorized by the bank's measure",
    }
    counts = f"{rows[0].found:,} {what[truth]} among {rows[0].others:,} others"
    return f"{counts}\n  {'measure':<18}{'AUC [95 %]':<24}{'TPR at 1 % FPR':<24}{'FPR at 75 % TPR'}"


def _line(row: "JudgementRecord") -> str:
    low = next((rate for rate in row.tpr_at if rate.level == 0.01), None)
    high = next(iter(row.fpr_at), None)
    cells = [_span(row.auc), _span(low.rate) if low else "", _span(high.rate) if high else ""]
    unresolved = "" if low is None or low.resolved else "  (too few others for 1 %)"
    return f"  {row.measure:<18}{cells[0]:<24}{cells[1]:<24}{cells[2]}{unresolved}"


def _span(span: tuple[float | None, float | None, float | None]) -> str:
    value, low, high = span
    if value is None:
        return "undefined"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
