"""The commands on what is there: demo, status, cancel, report, view, export, and the lists of methods and measures."""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from vestige import fixes, indexes, jobs, runs, settings, workspace
from vestige.errors import CorruptFile, UserError
from vestige.registry import EXPORT_FORMATS, command
from vestige.terminal import WIDE, say, show

SECONDS_BETWEEN_LOOKS = 2.0
NO_DIGEST = "no sha256 is kept of it"


@command("demo", settings.DemoSettings, function="vestige.fixes:demo", order=5)
def demo(given: settings.DemoSettings) -> None:
    """Show an example that comes with Vestige: a wrong answer, the rows behind it, and the fix; without a model."""
    say(fixes.describe_demo(demo.call(given)))


_RUN = "vestige attribute --data train.jsonl --queries train.jsonl --method bm25 --out run"
"""Of examples: the quickest run, of a word search."""


@command(
    "report",
    settings.ReportSettings,
    function="vestige.reports:report",
    order=140,
    examples=(_RUN, "vestige report run", "vestige report run --out page.html"),
    next_command="vestige view {run}",
)
def report(given: settings.ReportSettings) -> None:
    """Write a run as one HTML file that opens offline."""
    say(report.call(given))


@command("view", settings.ViewSettings, function="vestige.workspace:view", order=150)
def view(given: settings.ViewSettings) -> None:
    """Show all results below a folder in the browser on this computer, until Ctrl-C.

    Runs, indexes, trainings, audits and the others: open, compare and search them, follow what is running, and ask.
    A single run is served as its report, which follows the run's files.
    """
    view.call(given)


@command(
    "cancel",
    settings.CancelSettings,
    order=170,
    examples=(
        "vestige index --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --out idx",
        "vestige cancel idx",
    ),
    next_command="vestige status {path}",
)
def cancel(given: settings.CancelSettings) -> None:
    """End the work on an index or a run, in processes of this host and on SLURM; what is finished stays.

    The command that began it continues it later.
    """
    say("\n".join(jobs.cancel_jobs(given.path)) or f"Nothing is at work on {given.path}.")


@command(
    "export",
    settings.ExportSettings,
    function="vestige.indexes:export",
    order=180,
    more="vestige.cli:list_formats",
    examples=(_RUN, "vestige export run --to csv --out tables", "vestige export run --to json --out lines"),
)
def export(given: settings.ExportSettings) -> None:
    """Copy an index or a run into formats that other programs read."""
    for path in export.call(given):
        say(path)


def list_formats() -> str:
    """Return the names of the installed formats, a line for each kind of thing that has them."""
    names = [name.split() for name in EXPORT_FORMATS.names()]
    kinds = sorted({kind for kind, _ in names})
    lines = [f"- {kind}: {', '.join(to for of, to in names if of == kind)}" for kind in kinds]
    return "\n".join(["Formats by what is exported:\n", *lines])


@command("methods", settings.MethodsSettings, order=200, examples=("vestige methods", "vestige methods influence"))
def methods(given: settings.MethodsSettings) -> None:
    """List the attribution methods, or print what one estimates, costs and takes.

    Those of installed packages stand among the built-in ones.
    """
    from vestige.methods import describe_method, method_table

    if given.name is None:
        show(method_table(), file_width=WIDE)
    else:
        say(describe_method(given.name))


@command("measures", settings.MeasuresSettings, order=210, examples=("vestige measures", "vestige measures psmi"))
def measures(given: settings.MeasuresSettings) -> None:
    """List the memorization measures of an audit, or print what one means, needs and costs.

    Those of installed packages stand among the built-in ones.
    """
    from vestige.measures import describe_measure, measure_table

    if given.name is None:
        show(measure_table(), file_width=WIDE)
    else:
        say(describe_measure(given.name))


@command(
    "completion",
    settings.CompletionSettings,
    order=220,
    examples=("vestige completion bash", "vestige completion zsh", "vestige completion fish"),
)
def completion(given: settings.CompletionSettings) -> None:
    """Print what a shell needs to complete commands, flags, names and files: bash, zsh or fish.

    For bash, add `source <(vestige completion bash)` to ~/.bashrc. For zsh, write it as `_vestige` into a folder of
    $fpath. For fish, write it to ~/.config/fish/completions/vestige.fish.
    """
    from vestige.cli._parser import build_app

    say(build_app(completing=True).generate_completion(prog_name="vestige", shell=given.shell))


@command(
    "status", settings.StatusSettings, order=160, examples=(_RUN, "vestige status run", "vestige status run --verify")
)
def status(given: settings.StatusSettings) -> None:
    """Say how far an index, a run or a sweep is, and what is in it.

    While it is in the making: pieces done, at work and failed with their error, rate, time left and cost.
    """
    if given.verify:
        for line in _verify(given.path):
            say(line)
        return
    say(workspace.describe(given.path))
    while given.watch and any(job.state == "running" for job in workspace.find_jobs(given.path)):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        say(workspace.describe(given.path))


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
