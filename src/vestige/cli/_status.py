"""`vestige status`."""

from pathlib import Path

from vestige.cli._command import command
from vestige.errors import UserError
from vestige.progress import format_bytes, format_seconds
from vestige.settings import StatusSettings


@command(StatusSettings)
def status(settings: StatusSettings) -> None:
    """Say how far an index is, or what is in a run."""
    from vestige.index import read_manifest
    from vestige.runs import is_run

    if is_run(settings.path):
        print(describe_run(settings.path))
    elif read_manifest(settings.path) is not None:
        print(describe_index(settings.path))
    else:
        raise UserError(
            f"{settings.path} is neither an index nor a run. Give the folder that `vestige index` or "
            "`vestige attribute` got as --out."
        )


def describe_index(folder: Path) -> str:
    """What an index holds and how much of it is there."""
    from vestige.index import index_status, read_manifest

    manifest, progress = read_manifest(folder), index_status(folder)
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
        ]
    )


def describe_run(folder: Path) -> str:
    """What a run holds, what its scores mean, and how it was made."""
    from vestige.runs import read_record

    run = read_record(folder)
    return "\n".join(
        [
            f"{folder}: {run.queries.examples:,} queries against {run.data.examples:,} examples by {run.method}",
            f"  data     {run.data.name}",
            f"  model    {run.model.name if run.model else 'none: the method reads text alone'}",
            f"  sign     {run.meaning.sign}",
            f"  unit     {run.meaning.unit}",
            f"  took     {format_seconds(run.seconds)}, {format_bytes(run.peak_memory_bytes)} of memory",
            f"  made by  {run.command} (Vestige {run.vestige}, {run.created})",
        ]
    )
