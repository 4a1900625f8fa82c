"""Writing of a run directory, so that it is there whole or not at all."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from vestige.errors import IndexMismatch, UserError, VestigeError
from vestige.runs._audit import EVIDENCE_FILE, FIGURES, write_evidence
from vestige.runs._audit_record import AuditRecord
from vestige.runs._dense import names_of, write_dense
from vestige.runs._folder import digests_of, is_run, read_record
from vestige.runs._record import (
    DENSE_FILE,
    FIRST_RUNG,
    RECORD_FILE,
    Check,
    CoverageRecord,
    DataRecord,
    Meaning,
    ModelRecord,
    RunRecord,
    TrustRecord,
    describe_process,
)
from vestige.runs._summary import ScoreSummary
from vestige.runs._tables import RunTables, make_part_tables, make_tables
from vestige.storage import (
    remove_partial,
    remove_strays,
    require_no_links,
    require_no_others,
    stage_folder,
    write_durably,
)
from vestige.tables import write_table

if TYPE_CHECKING:
    from vestige import data, models

_LONG_TABLE = {"use_dictionary": False, "data_page_size": 2**16, "row_group_size": 2**16}
_TABLES = ("scores", "examples", "queries", "components")
_MORE_TABLES = ("tokens", "self_influence", "contamination", "verbatim", "evidence", "curves")
RUN_FILES = (
    *(RECORD_FILE, DENSE_FILE, "flagged.jsonl", "profile.json", "report.html", "figures/*.png", "figures/*.pdf"),
    *(f"{name}.parquet" for name in (*_TABLES, *_MORE_TABLES)),
    *(f"{folder}/{name}.parquet" for folder in ("damping-*", FIRST_RUNG) for name in _TABLES),
    *(f"{folder}/{name}" for folder in ("damping-*", FIRST_RUNG) for name in (RECORD_FILE, DENSE_FILE, "report.html")),
)
"""What a run may consist of; anything else in its folder is not ours, and keeps it from being replaced."""


def describe_data(data: "data.TokenizedData") -> DataRecord:
    """Return name, fingerprint and size of a data set."""
    return DataRecord(name=data.name, fingerprint=data.fingerprint, examples=len(data))


def describe_model(loaded: "models.LoadedModel") -> ModelRecord:
    """Return name, fingerprint and size of a model."""
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return ModelRecord(name=loaded.name, fingerprint=loaded.fingerprint, parameters=parameters)


def make_run_record(
    *,
    command: str,
    config: dict[str, Any],
    method: str,
    meaning: Meaning,
    data: "data.TokenizedData",
    queries: "data.TokenizedData",
    summary: ScoreSummary,
    seconds: float,
    query_ids: Sequence[str] | None = None,
    model: ModelRecord | None = None,
    coverage: CoverageRecord | None = None,
    components: Sequence[str] = (),
    checks: Sequence[Check] = (),
    **others: Any,
) -> RunRecord:
    """Return the record of scores that this process has just computed, for `write_run`.

    Args:
        command: The command line that makes the run again.
        config: The resolved settings.
        method: Name of the method.
        meaning: What its scores mean.
        data: The training data.
        queries: The queries.
        summary: Of the scores, as `ScoreCollector.finish` returns it.
        seconds: Wall time that the run took.
        query_ids: Ids of the rows of scores, where they are not those of `queries`.
        model: As `describe_model` returns it; None for methods that read text alone.
        coverage: Parameters that the scores cover.
        components: Names of the components that scores are split over.
        checks: How far the scores can be trusted.
        **others: `asked`, `explained`, `left_out`, `checkpoints`: fields of `RunRecord`.
    """
    ids = [example.id for example in queries.examples] if query_ids is None else query_ids
    return RunRecord(
        **describe_process(),
        command=command,
        config=config,
        model=model,
        data=describe_data(data),
        queries=describe_data(queries),
        method=method,
        meaning=meaning,
        coverage=coverage,
        components=list(components),
        seconds=seconds,
        trust=TrustRecord(checks=list(checks)),
        distribution=dict(zip(ids, summary.distribution, strict=True)),
        groups=dict(zip(ids, summary.groups, strict=True)),
        **others,
    )


def check_target(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise unless a run may be written to `folder`; call it before the work that leads there.

    Raises:
        IndexMismatch: a run is there already and `overwrite` is False.
        UserError: `folder` is a file, or holds something that is not a run or not of it: it is never replaced.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file. Give a folder for the run: --out {folder}.run")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not is_run(folder):
        raise UserError(
            f"{folder} holds files that are not a run, and is left alone.\nGive another folder: --out {folder}/run"
        )
    if not overwrite:
        # A command that was killed right behind its last rename left its pieces.
        remove_partial(folder, RECORD_FILE)
        raise IndexMismatch(
            f"{folder} holds a run already; nothing was changed.\n"
            "Give another folder with --out, or replace it with --overwrite."
        )
    require_no_others(folder, RUN_FILES)
    require_no_links(folder)


def find_unfinished(
    folder: str | Path, config: Mapping[str, Any], *, ignored: Collection[str] = ()
) -> RunRecord | None:
    """Return the record of a run that lacks parts, to which a command with these settings may add them.

    Args:
        folder: Of the run.
        config: The settings, as a run records them.
        ignored: Settings that may differ.

    Raises:
        IndexMismatch: The run lacks parts, and was begun with other settings.
        CorruptFile: The run lacks parts, and one of its tables is not what was written.
    """
    folder = Path(folder)
    try:
        record = read_record(folder, checked=False)
    except UserError:
        # No run of scores: `check_target` says what may become of it.
        return None
    if not record.missing:
        return None
    names = [name for name in {**record.config, **config} if name not in ignored]
    others = [name for name in names if record.config.get(name) != config.get(name)]
    if others:
        lines = [f"  {name}: {record.config.get(name)!r} then, {config.get(name)!r} now" for name in others]
        raise IndexMismatch(
            f"{folder} holds a run already, begun with other settings; nothing was changed.\n"
            + "\n".join(lines)
            + f"\n{record.describe_missing()}\nOr give another folder with --out, or replace it with --overwrite."
        )
    remove_strays(folder)
    return read_record(folder)


def write_run(
    folder: str | Path,
    record: RunRecord,
    content: RunTables,
    *,
    overwrite: bool = False,
    add: Callable[[Path], None] | None = None,
) -> Path:
    """Write a run directory and return its path.

    Everything is written to a new folder beside it, flushed to the disk, and renamed: a kill never
    leaves half a run. Replacing a run takes two renames; killed between them, the old run lies beside, its
    name ending in `.replaced`, until the next command for this folder.

    Args:
        folder: Of the run.
        record: Content of `run.json`.
        content: The tables.
        overwrite: Replace a run that is there.
        add: Writes what else belongs to the run into the new folder, before that is moved.

    Raises:
        IndexMismatch: a run is there already and `overwrite` is False.
        UserError: `folder` is a file or holds something that is not a run, or two queries share an id.
    """

    def fill(attempt: Path) -> None:
        for name, table in make_tables(content, record.components).items():
            pq.write_table(table, attempt / f"{name}.parquet", **_choose_options(name))
        if content.dense is not None:
            shape, expected = content.dense.shape, (len(content.queries), len(content.train))
            if shape != expected:
                raise VestigeError(f"Dense scores of shape {shape} for {expected[0]} queries x {expected[1]} examples.")
            write_dense(attempt / DENSE_FILE, content.dense, ids, names_of(content.train.examples))
        if add is not None:
            add(attempt)

    ids = [example.id for example in content.queries.examples]
    if len(set(ids)) != len(ids):
        check_target(folder, overwrite=overwrite)
        repeated = next(name for name in ids if ids.count(name) > 1)
        raise UserError(
            f"Two queries have the id {repeated!r}, so their answers could not be distinguished.\n"
            "Give every query its own `id`, or none: then they are numbered."
        )
    return _write_folder(Path(folder), record, fill, overwrite, indent=2)


def add_part(folder: Path, record: RunRecord, part: str, content: RunTables | None = None, **facts: Any) -> RunRecord:
    """Add to a run on disk a part that it lacks, and return its new record.

    The part's table is written first, then the record that counts it in. Killed between them, the run still says that
    it lacks the part.

    Args:
        folder: Of the run.
        record: As it is on disk.
        part: One of `record.missing`, or an empty text to change facts alone.
        content: Tables, of which the one of this name is written; None for a part that has none.
        **facts: Fields of the record that change.
    """
    files = dict(record.files)
    for name, table in ({} if content is None else make_part_tables(content, record.components)).items():
        path = folder / f"{name}.parquet"
        files[path.name] = write_table(path, table, **_choose_options(name)).sha256
    left = [each for each in record.missing if each != part]
    found = record.model_copy(update={"missing": left, "files": dict(sorted(files.items())), **facts})
    write_durably(folder / RECORD_FILE, [_spell_record(found, 2).encode()])
    return found


def write_audit(
    folder: str | Path,
    record: AuditRecord,
    evidence: Sequence[pa.Table],
    examples: pa.Table,
    figures: Mapping[str, bytes],
    *,
    overwrite: bool = False,
    more: Mapping[str, pa.Table | bytes] = MappingProxyType({}),
) -> Path:
    """Write the folder of an audit, whole or not at all, and return its path; `more` are tables and files by name.

    Raises:
        IndexMismatch: A run is there already and `overwrite` is False.
        UserError: `folder` is a file or holds something that is not a run.
    """

    def fill(attempt: Path) -> None:
        (attempt / FIGURES).mkdir()
        write_evidence(attempt / EVIDENCE_FILE, evidence)
        for name, content in {"examples": examples, **more}.items():
            if isinstance(content, bytes):
                (attempt / name).write_bytes(content)
            else:
                pq.write_table(content, attempt / f"{name}.parquet", compression="zstd")
        for name, content in figures.items():
            (attempt / FIGURES / name).write_bytes(content)

    return _write_folder(Path(folder), record, fill, overwrite, indent=1)


def _write_folder(
    folder: Path, record: RunRecord | AuditRecord, fill: Callable[[Path], None], overwrite: bool, indent: int
) -> Path:
    check_target(folder, overwrite=overwrite)
    with stage_folder(folder, replace=overwrite) as attempt:
        fill(attempt)
        record = record.model_copy(update={"files": digests_of(attempt)})
        # Last, so that a folder with a record is complete even where a rename is not atomic.
        (attempt / RECORD_FILE).write_text(_spell_record(record, indent), encoding="utf-8")
    return folder


def _spell_record(record: RunRecord | AuditRecord, indent: int) -> str:
    return record.model_dump_json(indent=indent) + "\n"


def _choose_options(name: str) -> dict[str, Any]:
    # Of self-influence hardly a value comes twice: dictionaries would make the file larger.
    return {"compression": "zstd", **(_LONG_TABLE if name == "self_influence" else {})}
