"""What of an index, a run or an audit goes to the hub: its own files, with the texts in them or without."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.errors import SpecError, UserError
from vestige.indexes._store import Index
from vestige.progress import announce, format_bytes
from vestige.runs import RECORD_FILE, is_audit, is_run, read_audit_record, read_record
from vestige.settings import ExportSettings
from vestige.storage import HUB, push_result

_NAMES = (
    *("query_id", "example_id", "item_id", "most_similar", "component", "source", "label"),
    *("end", "part", "class", "kind"),
)
"""Columns of strings that stay without the texts: ids, sources, labels and words of ours. Any other one holds texts."""
_OF_TEXTS = (".jsonl", ".html")
_OF_INDEX = ("manifest.json", "shards/*", "examples/*", "curvature/*")
_LEFT_OUT = "(left out with the texts)"
_CARD = """\
---
tags:
- vestige
---
# {name}

{article} {kind} that [Vestige](https://pypi.org/project/vestige/) made. {texts}

    vestige status {address}
"""


def push(settings: ExportSettings) -> str:
    """Upload the index, run or audit at `path` and return its address; what of it holds texts is announced before.

    Raises:
        SpecError: An index was to be pushed without texts.
        UserError: There is nothing to push, the repository is not to be changed, or the hub refuses.
    """
    folder, name = settings.path, settings.push_to_hub
    assert name is not None
    kind = "index" if not is_run(folder) else "audit" if is_audit(folder) else "run"
    if kind == "index":
        if not settings.texts:
            raise SpecError("--no-texts is for runs and audits: the rows of an index are named by their texts.")
        inside = Index.open(folder).folder
        files = {path.relative_to(inside).as_posix(): path for form in _OF_INDEX for path in sorted(inside.glob(form))}
    else:
        named = (read_audit_record(folder) if kind == "audit" else read_record(folder)).files
        if not named:
            raise UserError(f"{folder} was made by an earlier version, which listed no files. Make it again.")
        files = {each: folder / each for each in (*named, RECORD_FILE)}
    content: Mapping[str, Path | bytes] = files if settings.texts else _without_texts(files)
    holds = "texts of the data and of queries" if settings.texts else "no texts, but ids, sources and numbers"
    size = format_bytes(sum(each.stat().st_size for each in files.values()))
    seen = "its owner alone sees it" if settings.private else "everyone sees it"
    announce(f"Pushing {folder} ({len(content)} files, {size}) to {name}; {seen}. It holds {holds}.")
    card = _CARD.format(
        name=name,
        article="An" if kind != "run" else "A",
        kind=kind,
        texts=f"It holds {holds}.",
        address=f"{HUB}{name}",
    )
    return push_result(content, name, kind=kind, private=settings.private, card=card)


def _without_texts(files: Mapping[str, Path]) -> dict[str, Path | bytes]:
    """Return the files without what data and queries say; records name the digests of what is left."""
    kept = {name: path for name, path in files.items() if not name.endswith(_OF_TEXTS)}
    content: dict[str, Path | bytes] = {
        name: _empty_columns(path) if path.suffix == ".parquet" else path for name, path in kept.items()
    }
    # Those of runs inside of a run first, because its own names their digests.
    for name in sorted((one for one in kept if one.endswith(RECORD_FILE)), key=len, reverse=True):
        content[name] = _empty_record(kept[name], name.removesuffix(RECORD_FILE), content)
    return content


def _empty_columns(path: Path) -> bytes:
    """Return a table whose columns of texts are empty: lists, and alternatives to an answer, are null."""
    table = parquet.read_table(path, memory_map=False)
    for place, field in enumerate(table.schema):
        if "string" in str(field.type) and field.name not in _NAMES:
            empty = "" if pa.types.is_string(field.type) and field.name != "instead" else None
            table = table.set_column(place, field, pa.array([empty] * len(table), field.type))
    stream = io.BytesIO()
    parquet.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def _empty_record(path: Path, prefix: str, content: Mapping[str, Path | bytes]) -> bytes:
    record: dict[str, Any] = json.loads(path.read_bytes())
    record["command"] = _LEFT_OUT
    record["config"] |= {name: _LEFT_OUT for name in ("queries", "canaries") if record["config"].get(name)}
    for each in record.get("canaries", ()):
        each |= {"prompt": "", "secret": ""}
    files = {name: content[f"{prefix}{name}"] for name in record["files"] if f"{prefix}{name}" in content}
    record["files"] |= {
        name: hashlib.sha256(each).hexdigest() for name, each in files.items() if isinstance(each, bytes)
    }
    record["files"] = {name: digest for name, digest in record["files"].items() if name in files}
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
