"""`vestige status --verify`: every file of a result, read whole and compared with its sha256."""

from collections.abc import Iterator
from pathlib import Path

from vestige.errors import CorruptFile, UserError

NO_DIGEST = "no sha256 is kept of it"


def verify(folder: Path) -> Iterator[str]:
    """Yield a line for each file of an index, a run or an audit.

    Raises:
        UserError: The folder is none of these.
        CorruptFile: After the last line, if a file is not what was written.
    """
    checked = _checked_files(folder)
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


def _checked_files(folder: Path) -> dict[str, str | None]:
    """Return the fault of each file that has a digest, None where there is none."""
    from vestige.indexes import Index, read_manifest
    from vestige.runs import file_faults, is_audit, is_run, read_audit_record, read_record

    if is_audit(folder):
        return file_faults(folder, read_audit_record(folder, checked=False).files)
    if is_run(folder):
        return file_faults(folder, read_record(folder, checked=False).files)
    if read_manifest(folder) is None:
        raise UserError(f"{folder} is neither an index nor a run nor an audit: there is nothing to verify in it.")
    index = Index.open(folder, allow_missing=True)
    faults = {fault.number: fault.reason for fault in index.verify()}
    return {f"shards/{number:05d}.safetensors": faults.get(number) for number in range(len(index.manifest.shard_rows))}
