"""The kinds of result that commands of this package leave: how each is found, summed up and described."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from vestige import banks, fixes, indexes, runs, selection, training
from vestige.errors import CorruptFile
from vestige.parsing import parse_object
from vestige.progress import format_bytes, format_memory, format_seconds
from vestige.terminal import lines_of_facts, shorten
from vestige.workspace._kinds import Kind, Summary

Found = TypeVar("Found")
SHOWN_IDS = 20
"""Ids of examples that were left out; all of them are in `run.json`."""
POINTS = 300
"""Points of a curve that is shown, at most."""


class _Outline(BaseModel):
    """The fields of a run or an audit that a list shows; all of the record is checked when it is opened."""

    config: dict[str, Any]
    created: str
    model: runs.ModelRecord | None
    data: runs.DataRecord
    queries: runs.DataRecord | None = None
    method: str = ""
    measures: dict[str, Any] = Field(default_factory=dict)
    checkpoints: list[Any] = Field(default_factory=list)
    seconds: float
    peak_memory_bytes: int
    missing: list[str] = Field(default_factory=list)


def _require(found: Found | None) -> Found:
    assert found is not None, "only called on a folder of the kind"
    return found


def _written(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")


def _count(number: int, what: str) -> str:
    """Return a number of things in words, which end in "s" or "ies" where there are several."""
    several = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number:,} {what if number == 1 else several}"


def _costs(run: "runs.RunRecord | runs.AuditRecord") -> str:
    memory = format_memory(run.peak_memory_bytes, run.peak_gpu_memory_bytes)
    return f"{format_seconds(run.seconds)}, {memory}"


def _left_out(ids: Sequence[str]) -> str | None:
    """Return how many examples were left out, and which; None for none."""
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    return f"{len(ids)}, not finite: {', '.join(ids[:SHOWN_IDS])}{more}" if ids else None


def _summarise_run(folder: Path) -> Summary:
    outline = runs.read_known(_Outline, folder / runs.RECORD_FILE, runs.RUN_FORMAT, whole=False)
    asked = outline.config.get("queries")
    asked = asked[0] if isinstance(asked, list) and len(asked) == 1 else asked
    count = _count(outline.queries.examples if outline.queries else 0, "query")
    about = f"{asked} · {count}" if isinstance(asked, str) else count
    return _summarise(outline, about, outline.method)


def _summarise_audit(folder: Path) -> Summary:
    outline = runs.read_known(_Outline, folder / runs.RECORD_FILE, runs.AUDIT_FORMAT, whole=False)
    about = f"{_count(outline.data.examples, 'example')}, {_count(len(outline.checkpoints), 'checkpoint')}"
    return _summarise(outline, about, _count(len(outline.measures), "measure"))


def _summarise(outline: _Outline, about: str, method: str) -> Summary:
    return Summary(
        about=about,
        model=outline.model.name if outline.model else "",
        data=outline.data.name,
        method=method,
        created=outline.created,
        seconds=outline.seconds,
        memory=outline.peak_memory_bytes,
        lacking=", ".join(runs.PARTS.get(part, part) for part in outline.missing),
        page=True,
    )


def _describe_run(folder: Path) -> str:
    """Describe what a run holds, what its scores mean, and how it was made."""
    run = runs.read_record(folder)
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


run = Kind(
    name="run",
    matches=lambda folder: runs.kind_of(folder) not in (None, "audit", "training"),
    summarise=_summarise_run,
    describe=_describe_run,
    nests=True,
    has_rows=True,
)


def _describe_audit(folder: Path) -> str:
    """Describe what an audit measured, and what it could not compute."""
    run = runs.read_audit_record(folder)
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


audit = Kind("audit", lambda folder: runs.kind_of(folder) == "audit", _summarise_audit, _describe_audit)


def _model_of(run: "training.TrainingRun") -> str:
    return run.record["names"]["model"] if "names" in run.record else run.record["model"]["name"]


def _count_checkpoints(run: "training.TrainingRun") -> str:
    # A record of a Trainer of one's own does not know how long that will be.
    wanted, done = run.record.get("identity", {}).get("checkpoints"), list(run.checkpoints)
    return f"{len(done)} of {len(wanted)}" if wanted else str(len(done))


def _summarise_training(folder: Path) -> Summary:
    run = training.TrainingRun.open(folder)
    rank, now = run.record.get("config", {}).get("lora_rank"), run.current_step
    step = f"step {now.step:,} of {now.of:,}, loss {now.loss:.3f}" if now else ""
    return Summary(
        about=f"{_count_checkpoints(run)} checkpoints",
        model=_model_of(run),
        data=run.record.get("names", {}).get("data", ""),
        method="full" if rank is None else f"LoRA, rank {rank}",
        created=_written(folder / runs.RECORD_FILE),
        seconds=run.record.get("seconds"),
        memory=run.record.get("peak_memory_bytes"),
        lacking="" if "seconds" in run.record else step or "its last checkpoints",
    )


def _describe_training(folder: Path) -> str:
    """Describe the progress of a training run and the findings of its alarm."""
    run = training.TrainingRun.open(folder)
    done, found = list(run.checkpoints), run.at_risk
    flagged = "" if found is None else f"{sum(found['flagged'].to_pylist()):,} of {len(found):,} examples, "
    interrupted = "a training: the same command goes on with one that was interrupted"
    state = "complete" if "seconds" in run.record else interrupted
    risk = "has not rung" if found is None else f"{flagged}after step {found['step'][0].as_py():,}: {found['rule'][0]}"
    now = run.current_step
    facts: dict[str, str | None] = {
        "step": f"{now.step:,} of {now.of:,}, loss {now.loss:.3f}, {now.rate:.2f} steps/s" if now else _last_step(run),
        "model": _model_of(run),
        "checkpoints": f"{_count_checkpoints(run)}, the last after step {done[-1]:,}" if done else "none yet",
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


def _draw_losses(folder: Path) -> dict[str, Any]:
    """Return the mean loss of the examples of each step, of at most `POINTS` steps in even distances."""
    import pyarrow.compute as compute

    steps = training.TrainingRun.open(folder).steps
    finite = steps.filter(compute.call_function("is_finite", [steps["loss"]]))
    means = finite.group_by("step").aggregate([("loss", "mean")]).sort_by("step")
    means = means.take(list(range(0, len(means), max(1, -(-len(means) // POINTS)))))
    return {"curve": list(zip(means["step"].to_pylist(), means["loss_mean"].to_pylist(), strict=True))}


trained = Kind(
    name="training",
    matches=lambda folder: runs.kind_of(folder) == "training",
    summarise=_summarise_training,
    describe=_describe_training,
    show=_draw_losses,
    nests=True,
)


def _summarise_index(folder: Path) -> Summary:
    manifest, progress = _require(indexes.read_manifest(folder)), indexes.index_status(folder)
    return Summary(
        about=f"{manifest.data.examples:,} examples, {len(manifest.components)} components",
        model=manifest.model.name,
        data=manifest.data.name,
        method=manifest.compression.spec,
        created=_written(folder / "manifest.json"),
        lacking="" if progress.done == progress.total else f"{progress.done} of {progress.total} shards are there",
    )


def describe_index(folder: Path) -> str:
    """Describe what an index holds and how much of it is complete."""
    manifest, progress = _require(indexes.read_manifest(folder)), indexes.index_status(folder)
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


index = Kind(
    name="index",
    matches=lambda folder: (folder / "manifest.json").is_file(),
    summarise=_summarise_index,
    describe=describe_index,
    has_rows=True,
    answers=True,
)


def _read_bank(folder: Path) -> "tuple[banks.BankManifest, int]":
    """Return the manifest of a bank, and how many of its models are there."""
    manifest = _require(banks.read_manifest(folder))
    files = banks.open_members(folder, manifest)
    return manifest, sum(map(files.is_done, manifest.members))


def _summarise_bank(folder: Path) -> Summary:
    manifest, done = _read_bank(folder)
    wanted = len(manifest.members)
    return Summary(
        about=f"{len(manifest.subsets)} subsets, {wanted} models",
        model=manifest.names.get("model", ""),
        data=manifest.names.get("data", ""),
        created=_written(folder / "bank.json"),
        lacking="" if done == wanted else f"{done} of {wanted} models are there",
    )


def _describe_bank(folder: Path) -> str:
    """Describe what a bank was made of, and how many of its models are there."""
    manifest, done = _read_bank(folder)
    state = "complete" if done == len(manifest.members) else "incomplete: the same command continues it"
    facts = {
        "models": f"{done} of {len(manifest.members)}",
        "subsets": f"{len(manifest.subsets)}, trained {manifest.seeds} times each",
        **manifest.names,
    }
    return "\n".join([f"{folder}: a bank with id {manifest.id}, {state}", *lines_of_facts(facts)])


bank = Kind("bank", lambda folder: (folder / "bank.json").is_file(), _summarise_bank, _describe_bank)


def _find_evaluation(folder: Path) -> Path | None:
    """Return the result of an evaluation in a folder: a file that is named after the kind which it begins with."""
    for path in sorted(filter(Path.is_file, folder.glob("*.json"))):
        with path.open("rb") as file:
            if file.read(200).startswith(f'{{\n "kind": "{path.stem}",\n "title"'.encode()):
                return path
    return None


def _read_evaluation(folder: Path) -> dict[str, Any]:
    """Read the result of an evaluation.

    Raises:
        CorruptFile: It does not read.
    """
    path = _require(_find_evaluation(folder))
    try:
        content = parse_object(path.read_bytes())
        checked = {"title": str(content["title"]), "notes": list(content["notes"])}
        return content | checked | {"rows": [dict(row) for row in content["rows"]]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CorruptFile(f"{path} does not read ({error}). Run the command that made it again.") from error


def _summarise_evaluation(folder: Path) -> Summary:
    content = _read_evaluation(folder)
    seconds = [row["seconds"] for row in content["rows"] if row.get("seconds") is not None]
    return Summary(
        about=content["title"],
        method=content["kind"],
        created=_written(folder / f"{content['kind']}.json"),
        seconds=sum(seconds) if seconds else None,
        page=content["kind"] == "components",
    )


def _describe_evaluation(folder: Path) -> str:
    content = _read_evaluation(folder)
    return "\n".join([f"{folder}: {content['title']}", *(f"  note  {note}" for note in content["notes"])])


def _show_table(folder: Path) -> dict[str, Any]:
    """Return the rows of an evaluation as text, the methods in the first column."""
    rows = _read_evaluation(folder)["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("opponent", "memory_bytes")))
    return {"table": {"columns": names, "rows": [[_format(row.get(name)) for name in names] for row in rows]}}


def _format(value: Any) -> str:
    """Return a value of an evaluation for reading, an estimate with the ends of its interval."""
    if isinstance(value, dict) and "interval" in value:
        low, high = value["interval"]
        interval = "" if low is None or high is None else f" [{_format(low)}, {_format(high)}]"
        return _format(value["value"]) + interval
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


evaluation = Kind(
    name="evaluation",
    matches=lambda folder: _find_evaluation(folder) is not None,
    summarise=_summarise_evaluation,
    describe=_describe_evaluation,
    show=_show_table,
    nests=True,
)


def _summarise_fix(folder: Path) -> Summary:
    record = fixes.Fix.open(folder).record
    return Summary(
        about=f"without {', '.join(shorten(one.id) for one in record.removed[:3])} of {record.run}",
        data=record.data,
        created=record.created,
        seconds=record.seconds or None,
        memory=record.peak_memory_bytes or None,
        lacking="" if record.outcomes else "answers of its models",
        page=bool(record.outcomes),
    )


fixed = Kind("fix", lambda folder: (folder / "fix.json").is_file(), _summarise_fix, fixes.describe_fix)


def _summarise_selection(folder: Path) -> Summary:
    record = _require(selection.read_record(folder))
    lacking = "" if "files" in record else "its files"
    return Summary(record.get("title", ""), created=_written(folder / "selection.json"), lacking=lacking)


def _describe_selection(folder: Path) -> str:
    record = _require(selection.read_record(folder))
    notes = [f"  note  {note}" for note in record.get("notes", ())]
    return "\n".join([f"{folder}: {record.get('title', 'a selection that is not finished')}", *notes])


selected = Kind(
    "selection", lambda folder: (folder / "selection.json").is_file(), _summarise_selection, _describe_selection
)
