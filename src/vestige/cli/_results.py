"""The commands on what is there: demo, status, cancel, report, view, export, and the lists of methods and measures."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from vestige import fixes, indexes, jobs, runs, training
from vestige.errors import CorruptFile, UserError
from vestige.parsing import parse_json
from vestige.progress import format_bytes, format_memory, format_seconds
from vestige.registry import COMMANDS, EXPORT_FORMATS, command, import_object
from vestige.settings import (
    CancelSettings,
    CompletionSettings,
    DemoSettings,
    ExportSettings,
    MeasuresSettings,
    MethodsSettings,
    ReportSettings,
    StatusSettings,
    ViewSettings,
)
from vestige.storage import find_replaced_result, partial_folder
from vestige.terminal import lines_of_facts, say, show

SECONDS_BETWEEN_LOOKS = 2.0
SHOWN_IDS = 20
"""Ids of examples that were left out; all of them are in `run.json`."""
NO_DIGEST = "no sha256 is kept of it"
_FILE_WIDTH = 160
"""Columns of a table that is printed into a file."""


@command("demo", DemoSettings, function="vestige.fixes:demo", order=5)
def demo(settings: DemoSettings) -> None:
    """Show an example that comes with Vestige: a wrong answer, the rows behind it, and the fix; without a model."""
    say(fixes.describe_demo(demo.call(settings)))


_RUN = "vestige attribute --data train.jsonl --queries train.jsonl --method bm25 --out run"
"""Of examples: the quickest run, of a word search."""


@command(
    "report",
    ReportSettings,
    function="vestige.reports:report",
    order=140,
    examples=(_RUN, "vestige report run", "vestige report run --out page.html"),
    next_command="vestige view {run}",
)
def report(settings: ReportSettings) -> None:
    """Write a run as one HTML file that opens offline."""
    say(report.call(settings))


@command("view", ViewSettings, function="vestige.reports:view", order=150)
def view(settings: ViewSettings) -> None:
    """Serve the report of a run to the browser on this computer, until Ctrl-C."""
    view.call(settings)


@command(
    "cancel",
    CancelSettings,
    order=170,
    examples=(
        "vestige index --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --out idx",
        "vestige cancel idx",
    ),
    next_command="vestige status {path}",
)
def cancel(settings: CancelSettings) -> None:
    """End the work on an index or a run, in processes of this host and on SLURM; what is finished stays.

    The command that began it continues it later.
    """
    say("\n".join(jobs.cancel_jobs(settings.path)) or f"Nothing is at work on {settings.path}.")


@command(
    "export",
    ExportSettings,
    function="vestige.indexes:export",
    order=180,
    more="vestige.cli:list_formats",
    examples=(_RUN, "vestige export run --to csv --out tables", "vestige export run --to json --out lines"),
)
def export(settings: ExportSettings) -> None:
    """Copy an index or a run into formats that other programs read."""
    for path in export.call(settings):
        say(path)


def list_formats() -> str:
    """Return the names of the installed formats, a line for each kind of thing that has them."""
    names = [name.split() for name in EXPORT_FORMATS.names()]
    kinds = sorted({kind for kind, _ in names})
    lines = [f"- {kind}: {', '.join(to for of, to in names if of == kind)}" for kind in kinds]
    return "\n".join(["Formats by what is exported:\n", *lines])


@command("methods", MethodsSettings, order=200, examples=("vestige methods", "vestige methods influence"))
def methods(settings: MethodsSettings) -> None:
    """List the attribution methods, or print what one estimates, costs and takes.

    Those of installed packages stand among the built-in ones.
    """
    from vestige.methods import describe_method, method_table

    _show_table_or_one(settings.name, method_table, describe_method)


@command("measures", MeasuresSettings, order=210, examples=("vestige measures", "vestige measures psmi"))
def measures(settings: MeasuresSettings) -> None:
    """List the memorization measures of an audit, or print what one means, needs and costs.

    Those of installed packages stand among the built-in ones.
    """
    from vestige.measures import describe_measure, measure_table

    _show_table_or_one(settings.name, measure_table, describe_measure)


@command(
    "completion",
    CompletionSettings,
    order=220,
    examples=("vestige completion bash", "vestige completion zsh", "vestige completion fish"),
)
def completion(settings: CompletionSettings) -> None:
    """Print what a shell needs to complete commands, flags, names and files: bash, zsh or fish.

    For bash, add `source <(vestige completion bash)` to ~/.bashrc. For zsh, write it as `_vestige` into a folder of
    $fpath. For fish, write it to ~/.config/fish/completions/vestige.fish.
    """
    from vestige.cli._parser import build_app

    say(build_app(completing=True).generate_completion(prog_name="vestige", shell=settings.shell))


def _show_table_or_one(name: str | None, table: Callable[[], object], describe_one: Callable[[str], str]) -> None:
    if name is None:
        show(table(), file_width=_FILE_WIDTH)
    else:
        say(describe_one(name))


@command("status", StatusSettings, order=160, examples=(_RUN, "vestige status run", "vestige status run --verify"))
def status(settings: StatusSettings) -> None:
    """Say how far an index, a run or a sweep is, and what is in it.

    While it is in the making: pieces done, at work and failed with their error, rate, time left and cost.
    """
    if settings.verify:
        for line in _verify(settings.path):
            say(line)
        return
    say(describe(settings.path))
    while settings.watch and any(job.state == "running" for job in _jobs(settings.path)):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        say(describe(settings.path))


def describe(folder: Path) -> str:
    """Describe what is in the folder, and the state of its jobs.

    Raises:
        UserError: Neither an index, nor a run, nor a sweep, nor the beginning of one.
    """
    registered = (import_object(one.status)(folder) for one in COMMANDS if one.status)
    parts = [text for text in registered if text is not None] or _describe_own(folder)
    parts += ["\n".join(job.lines()) for job in _jobs(folder)]
    if (aside := find_replaced_result(folder)) is not None:
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


def _jobs(folder: Path) -> "list[jobs.JobStatus]":
    return [job for place in (folder, partial_folder(folder)) for job in jobs.job_statuses(place)]


def _describe_own(folder: Path) -> list[str]:
    """Return what is in a folder of a training, an audit, a run or an index; nothing for any other."""
    if _is_training(folder):
        return [_describe_training(folder)]
    if runs.is_audit(folder):
        return [_describe_audit(folder, runs.read_audit_record(folder))]
    if runs.is_run(folder):
        return [_describe_run(folder, runs.read_record(folder))]
    return [] if indexes.read_manifest(folder) is None else [describe_index(folder)]


def _describe_audit(folder: Path, run: "runs.AuditRecord") -> str:
    """Describe what an audit measured, and what it could not compute."""
    held = f", {run.holdout.examples:,} held out" if run.holdout else ""
    return "\n".join(
        [
            f"{folder}: audit of {run.data.examples:,} examples{held} under {len(run.checkpoints)} checkpoints",
            f"  data      {run.data.name}",
            f"  model     {run.model.name}",
            f"  measures  {', '.join(run.measures)}",
            *[f"  not all   {name}: {each.reason}" for name, each in run.measures.items() if each.reason],
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


def _describe_training(folder: Path) -> str:
    """Describe the progress of a training run and the findings of its alarm."""
    run = training.TrainingRun.open(folder)
    # A record of a Trainer of one's own does not know how long that will be.
    wanted, done = run.record.get("identity", {}).get("checkpoints"), list(run.checkpoints)
    count = f"{len(done)} of {len(wanted)}" if wanted else str(len(done))
    found = run.at_risk
    flagged = "" if found is None else f"{sum(found['flagged'].to_pylist()):,} of {len(found):,} examples, "
    interrupted = "a training: the same command goes on with one that was interrupted"
    state = "complete" if "seconds" in run.record else interrupted
    risk = "has not rung" if found is None else f"{flagged}after step {found['step'][0].as_py():,}: {found['rule'][0]}"
    now = run.current_step
    facts: dict[str, str | None] = {
        "step": f"{now.step:,} of {now.of:,}, loss {now.loss:.3f}, {now.rate:.2f} steps/s" if now else _last_step(run),
        "model": run.record["names"]["model"] if "names" in run.record else run.record["model"]["name"],
        "checkpoints": f"{count}, the last after step {done[-1]:,}" if done else "none yet",
        "alarm": risk,
    }
    return "\n".join([f"{folder}: {state}", *lines_of_facts(facts)])


def _last_step(run: "training.TrainingRun") -> str | None:
    """Return the last step that was logged, and its loss."""
    log = run.steps
    if not len(log):
        return None
    last = log["step"][-1].as_py()
    losses = [row["loss"] for row in log.slice(max(0, len(log) - SHOWN_IDS)).to_pylist() if row["step"] == last]
    return f"{last:,}, loss {sum(losses) / len(losses):.3f}"


def describe_index(folder: Path) -> str:
    """Describe what an index holds and how much of it is complete."""
    manifest, progress = indexes.read_manifest(folder), indexes.index_status(folder)
    assert manifest is not None, "only called on an index"
    state = "complete" if progress.done == progress.total else "incomplete: the command that began it continues it"
    facts = {
        "shards": f"{progress.done} of {progress.total}, {format_bytes(progress.bytes)}",
        "examples": f"{progress.rows:,} of {manifest.data.examples:,} of {manifest.data.name}",
        "model": f"{manifest.model.name}, {len(manifest.components)} components",
        "compressed": f"{manifest.compression.spec} per {manifest.compression.scope}, {manifest.width:,} numbers in "
        f"{manifest.dtype}, {format_bytes(manifest.row_bytes)} per example",
        "left out": _left_out(indexes.Index.open(folder, allow_missing=True).left_out),
    }
    return "\n".join([f"{folder}: {state}", *lines_of_facts(facts)])


def _describe_run(folder: Path, run: "runs.RunRecord") -> str:
    """Describe what a run holds, what its scores mean, and how it was made."""
    left_out = _left_out(run.left_out)
    return "\n".join(
        [
            f"{folder}: {run.queries.examples:,} queries against {run.data.examples:,} examples by {run.method}",
            f"  data     {run.data.name}",
            f"  model    {run.model.name if run.model else 'none: the method reads text alone'}",
            f"  sign     {run.meaning.sign}",
            f"  unit     {run.meaning.unit}",
            f"  took     {_costs(run)}",
            *([f"  left out    {left_out}"] if left_out else []),
            *([f"  missing  {run.describe_missing()}"] if run.missing else []),
            f"  made by  {run.command} (Vestige {run.vestige}, {run.created})",
        ]
    )


def _costs(run: "runs.RunRecord | runs.AuditRecord") -> str:
    memory = format_memory(run.peak_memory_bytes, run.peak_gpu_memory_bytes)
    return f"{format_seconds(run.seconds)}, {memory}"


def _left_out(ids: Sequence[str]) -> str | None:
    """Return how many examples were left out, and which; None for none."""
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    return f"{len(ids)}, not finite: {', '.join(ids[:SHOWN_IDS])}{more}" if ids else None


def _verify(folder: Path) -> Iterator[str]:
    """Yield a line for each file of an index, a run or an audit, after comparing it with its sha256.

    Raises:
        UserError: The folder is none of these.
        CorruptFile: After the last line, if a file is not what was written.
    """
    checked = _check_files(folder)
    faults = [name for name, fault in checked.items() if fault is not None]
    yield from (f"  {name}: {'as written' if fault is None else fault}" for name, fault in checked.items())
    others = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    yield from (f"  {name}: {NO_DIGEST}" for name in others if name not in checked)
    if faults:
        raise CorruptFile(
            f"{len(faults)} of {len(checked)} files of {folder} are not what was written: {', '.join(faults[:10])}. "
            "Put them back from a copy, or run the command that made them again: of an index it makes only the "
            "damaged shards again; a run needs --overwrite."
        )
    yield f"{folder}: all {len(checked)} files that have a sha256 are as they were written."


def _check_files(folder: Path) -> Mapping[str, str | None]:
    """Return the fault of each file that has a digest, None where there is none."""
    if runs.is_audit(folder):
        return runs.file_faults(folder, runs.read_audit_record(folder, checked=False).files)
    if runs.is_run(folder):
        return runs.file_faults(folder, runs.read_record(folder, checked=False).files)
    if indexes.read_manifest(folder) is None:
        raise UserError(f"{folder} is neither an index nor a run nor an audit: there is nothing to verify in it.")
    index = indexes.Index.open(folder, allow_missing=True)
    faults = {fault.number: fault.reason for fault in index.verify()}
    return {f"shards/{number:05d}.safetensors": faults.get(number) for number in range(len(index.manifest.shard_rows))}
