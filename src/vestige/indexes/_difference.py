"""Differences of two manifests, shown with what to type; a result of other settings is never overwritten."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vestige.errors import Difference, IndexMismatch, mismatch_message
from vestige.indexes._manifest import Manifest, PlanStage, manifest_path, read_manifest, settings_of, to_json
from vestige.storage import write_durably


def difference(old: Manifest, new: Manifest) -> list[Difference]:
    """Return the settings in which `new` would give another index than `old`; names and paths alone do not count."""
    found = []
    for label, (before, after) in _compared(old, new).items():
        if before != after:
            shown = _shown(label, before, old), _shown(label, after, new)
            found.append(Difference(label.replace("_", "-"), *shown))
    # The plan follows from the data and the token budget: on its own it is informative, beside them it is not.
    if not found and old.plan != new.plan:
        texts = [tuple((stage.stop, stage.fingerprint) for stage in side.plan.stages) for side in (old, new)]
        if texts[0] != texts[1]:
            found.append(Difference("texts, sources or labels", _digest(texts[0]), _digest(texts[1])))
        else:
            found.append(Difference("shard plan", plan_shown(old.plan.stages), plan_shown(new.plan.stages)))
    return found


def extends(old: Manifest, new: Manifest) -> bool:
    """Return whether `new` is `old` with stages added behind: the old shards stay as they are."""
    before, after = old.plan.stages, new.plan.stages
    return len(after) > len(before) and after[: len(before)] == before and settings_of(old) == settings_of(new)


def require_same(folder: Path, old: Manifest, new: Manifest) -> None:
    """Raise unless both manifests give the same index.

    Raises:
        IndexMismatch: They do not; the message shows each difference and what to type.
    """
    if differences := difference(old, new):
        raise IndexMismatch(mismatch_message(f"The index in {folder}", differences))


def publish_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` to `folder` unless the same one is there; an extended one replaces the old.

    Raises:
        IndexMismatch: Another process has written a different one there since.
    """
    old = read_manifest(folder)
    if old is None:
        try:
            write_durably(manifest_path(folder), [manifest.to_json()], exclusive=True)
            return
        except FileExistsError:
            old = read_manifest(folder)
    if old is None or old == manifest:
        return
    if extends(old, manifest):
        write_durably(manifest_path(folder), [manifest.to_json()])
    else:
        require_same(folder, old, manifest)


def _compared(old: Manifest, new: Manifest) -> dict[str, tuple[Any, Any]]:
    before, after = (
        settings_of(manifest) | {"data": (manifest.data.fingerprint, manifest.data.examples)} for manifest in (old, new)
    )
    order = ["format", "model", "data", *(name for name in before if name not in ("format", "model", "data"))]
    return {name: (before[name], after.get(name)) for name in order}


def _shown(field: str, value: Any, manifest: Manifest) -> str:
    if field == "model":
        return f"{manifest.model.name} ({value[:8]})"
    if field == "data":
        return f"{manifest.data.name} ({manifest.data.examples:,} examples, {value[0][:8]})"
    if field == "compression":
        return value["spec"] + (" (whole model)" if value["scope"] == "model" else "")
    if field == "components":
        return f"{len(value)} components, {manifest.width:,} columns ({_digest(value)})"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def plan_shown(stages: Sequence[PlanStage]) -> str:
    """Return the stages of a plan as the user reads them in a refusal."""
    shards = sum(len(stage.shard_rows) for stage in stages)
    return f"{shards} shards ({_digest([stage.plan_hash for stage in stages])})"


def _digest(value: Any) -> str:
    return hashlib.sha256(to_json(value)).hexdigest()[:8]
