"""`vestige status`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vestige.cli._verify import verify
from vestige.errors import UserError
from vestige.parsing import parse_json
from vestige.progress import format_bytes, format_memory, format_seconds
from vestige.registry import COMMANDS, command, import_object
from vestige.settings import StatusSettings
from vestige.storage import partial_folder, replaced_result
from vestige.terminal import say

if TYPE_CHECKING:
    from vestige.runs import AuditRecord, RunRecord

SECONDS_BETWEEN_LOOKS = 2.0
SHOWN_IDS = 20
"""Ids of examples that were left out; all of them are in `run.json`."""


@command("status", StatusSettings, order=160)
def status(settings: StatusSettings) -> None:
    """Say how far an index, a run or a sweep is, and what is in it.

    While it is in the making: pieces done, at work and failed with their error, rate, time left and cost.
    """
    if settings.verify:
        for line in verify(settings.path):
            say(line)
        return
    say(describe(settings.path))
    while settings.watch and _is_at_work(settings.path):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        say(describe(settings.path))


def describe(folder: Path) -> str:
    """Describe what is in the folder, and the state of its jobs.

    Raises:
        UserError: Neither an index, nor a run, nor a sweep, nor the beginning of one.
    """
    from vestige.launch import job_statuses

    registered = (import_object(one.status)(folder) for one in COMMANDS if one.status)
    parts = [text for text in registered if text is not None] or _describe_own(folder)
    parts += ["\n".join(job.lines()) for place in (folder, partial_folder(folder)) for job in job_statuses(place)]
    if (aside := replaced_result(folder)) is not None:
        parts.append(
            f"{folder} was being replaced when the command was stopped. The earlier result lies in {aside}: the next "
            "command with this --out puts it back."
        )
    if not parts:
        raise UserError(
            f"{folder} is neither an index nor a run. Give the folder that `vestige index` or "
            "`vestige attribute` got as --out, or that of a sweep."
        )
    return "\n".join(parts)


def _describe_own(folder: Path) -> list[str]:
    """Return what is in a folder of a training, an audit, a run or an index; nothing for any other."""
    from vestige.indexes import read_manifest
    from vestige.runs import is_audit, is_run

    if _is_training(folder):
        return [describe_training(folder)]
    if is_audit(folder):
        return [describe_audit(folder)]
    if is_run(folder):
        return [describe_run(folder)]
    return [] if read_manifest(folder) is None else [describe_index(folder)]


def _is_at_work(folder: Path) -> bool:
    from vestige.launch import job_statuses

    return any(job.state == "running" for place in (folder, partial_folder(folder)) for job in job_statuses(place))


def describe_audit(folder: Path) -> str:
    """Describe what an audit measured, and what it could not compute."""
    from vestige.runs import read_audit_record

    run = read_audit_record(folder)
    held = f", {run.holdout.examples:,} held out" if run.holdout else ""
    missing = [f"  not all   {name}: {each.reason}" for name, each in run.measures.items() if each.reason]
    return "\n".join(
        [
            f"{folder}: audit of {run.data.examples:,} examples{held} under {len(run.checkpoints)} checkpoints",
            f"  data      {run.data.name}",
            f"  model     {run.model.name}",
            f"  measures  {', '.join(run.measures)}",
            *missing,
            f"  took      {_costs(run)}",
            f"  made by   {run.command} (Vestige {run.vestige}, {run.created})",
        ]
    )


def _is_training(folder: Path) -> bool:
    try:
        content = parse_json((folder / "run.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == "training"


def describe_training(folder: Path) -> str:
    """Describe the progress of a training run and the findings of its alarm."""
    from vestige.training import TrainingRun

    run = TrainingRun.open(folder)
    # A record of a Trainer of one's own does not know how long that will be.
    wanted, done = run.record.get("identity", {}).get("checkpoints"), list(run.checkpoints)
    count = f"{len(done)} of {len(wanted)}" if wanted else str(len(done))
    name = run.record["names"]["model"] if "names" in run.record else run.record["model"]["name"]
    found = run.at_risk
    flagged = "" if found is None else f"{sum(found['flagged'].to_pylist()):,} of {len(found):,} examples, "
    risk = "has not rung" if found is None else f"{flagged}after step {found['step'][0].as_py():,}: {found['rule'][0]}"
    finished = "seconds" in run.record
    state = "complete" if finished else "a training: the same command goes on with one that was interrupted"
    return "\n".join(
        [
            f"{folder}: {state}",
            f"  model        {name}",
            f"  checkpoints  {count}, the last after step {done[-1]:,}" if done else "  checkpoints  none yet",
            f"  alarm        {risk}",
        ]
    )


def describe_index(folder: Path) -> str:
    """Describe what an index holds and how much of it is complete."""
    from vestige.indexes import Index, index_status, read_manifest

    manifest, progress = read_manifest(folder), index_status(folder)
    left_out = Index.open(folder, allow_missing=True).left_out
    assert manifest is not None, "only called on an index"
    state = "complete" if progress.done == progress.total else "incomplete: the command that began it continues it"
    return "\n".join(
        [
            f"{folder}: {state}",
            f"  shards      {progress.done} of {progress.total}, {format_bytes(progress.bytes)}",
            f"  examples    {progress.rows:,} of {manifest.data.examples:,} of {manifest.data.name}",
            f"  model       {manifest.model.name}, {len(manifest.components)} components",
            f"  compressed  {manifest.compression.spec} per {manifest.compression.scope}, {manifest.width:,} numbers "
            f"in {manifest.dtype}, {format_bytes(manifest.row_bytes)} per example",
            *_left_out(left_out),
        ]
    )


def _costs(run: "RunRecord | AuditRecord") -> str:
    memory = format_memory(run.peak_memory_bytes, run.peak_gpu_memory_bytes)
    return f"{format_seconds(run.seconds)}, {memory}"


def _left_out(ids: Sequence[str]) -> list[str]:
    """Return a line about examples that were left out, if any."""
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    return [f"  left out    {len(ids)}, not finite: {', '.join(ids[:SHOWN_IDS])}{more}"] if ids else []


def describe_run(folder: Path) -> str:
    """Describe what a run holds, what its scores mean, and how it was made."""
    from vestige.runs import read_record

    run = read_record(folder)
    return "\n".join(
        [
            f"{folder}: {run.queries.examples:,} queries against {run.data.examples:,} examples by {run.method}",
            f"  data     {run.data.name}",
            f"  model    {run.model.name if run.model else 'none: the method reads text alone'}",
            f"  sign     {run.meaning.sign}",
            f"  unit     {run.meaning.unit}",
            f"  took     {_costs(run)}",
            *_left_out(run.left_out),
            f"  made by  {run.command} (Vestige {run.vestige}, {run.created})",
        ]
    )
