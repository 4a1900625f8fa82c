"""What an index was made from and how: one deterministic JSON file, compared before anything is reused."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from vestige.errors import CorruptFile, IndexMismatch, UserError
from vestige.index._files import write_durably

FORMAT = 1
"""Version of the folder's layout; a reader refuses a later one."""

StoredType = Literal["float16", "bfloat16", "float32", "int8"]
BYTES_PER_NUMBER: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}
SCALED_TYPES = ("float16", "int8")
"""Types whose range is too small for gradients: each row is divided by a scale of its own."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelIdentity(_Frozen):
    """Which model; `name` is for reading, `fingerprint` decides."""

    name: str
    fingerprint: str


class DataIdentity(_Frozen):
    """Which examples; `name` is for reading, `fingerprint` decides."""

    name: str
    fingerprint: str
    examples: int


class CompressionIdentity(_Frozen):
    """The compression spec in canonical spelling, and whether it acts per component or on the whole model."""

    spec: str
    scope: Literal["component", "model"] = "component"


class IndexedComponent(_Frozen):
    """One parameter tensor and the columns `start:stop` that hold its compressed gradient."""

    name: str
    kind: str
    shape: tuple[int, int]
    start: int
    stop: int


class PlanStage(_Frozen):
    """Rows `start:stop` of the data, added together; appending data adds a stage and leaves earlier ones alone."""

    start: int
    stop: int
    fingerprint: str
    """sha256 over these rows' tokens, targets and texts."""
    shard_rows: tuple[int, ...]
    """Rows per shard, in shard order."""
    plan_hash: str
    """sha256 over the batches of every shard, so that a plan made again from the lengths can be checked."""


class PlanRecord(_Frozen):
    """The settings that shards are cut by, and the stages cut so far."""

    shard_bytes: int = 256 * 2**20
    """Most bytes of gradients in a shard, unless one batch alone is larger."""
    fewest_shards: int = 24
    """Smaller jobs are cut finer, into about this many shards where they have as many batches."""
    max_examples: int | None = None
    """Most examples in a batch."""
    stages: tuple[PlanStage, ...] = ()


class Manifest(_Frozen):
    """Everything that decides an index's bytes. No time, host or path is in it: two builds are byte-identical."""

    format: int = FORMAT
    model: ModelIdentity
    data: DataIdentity
    compression: CompressionIdentity
    seed: int
    dtype: StoredType = "float16"
    loss: Literal["sum", "mean"]
    precision: str
    max_length: int | None
    chat: bool
    token_budget: int
    components: tuple[IndexedComponent, ...]
    plan: PlanRecord = PlanRecord()

    @model_validator(mode="after")
    def _columns_are_covered(self) -> "Manifest":
        if not self.components:
            raise ValueError("expected at least one component, found none")
        spans = [(part.start, part.stop) for part in self.components]
        if self.compression.scope == "model":
            covered = all(span == (0, self.width) for span in spans)
        else:
            covered = [start for start, _ in spans] == [0] + [stop for _, stop in spans[:-1]]
        if not covered or any(stop <= start for start, stop in spans):
            raise ValueError(f"columns of the components must follow one another from 0, found {spans[:8]}")
        return self

    @property
    def width(self) -> int:
        """Numbers per example."""
        return max(part.stop for part in self.components)

    @property
    def row_bytes(self) -> int:
        """Bytes per example on disk: the numbers, loss, norm, the example's row and, where needed, the scale."""
        return self.width * BYTES_PER_NUMBER[self.dtype] + 16 + (4 if self.dtype in SCALED_TYPES else 0)

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of every shard, by shard number."""
        return tuple(rows for stage in self.plan.stages for rows in stage.shard_rows)

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`."""
        return _to_json(self.model_dump(mode="json"))


class Expectation(NamedTuple):
    """What the manifest says about one shard."""

    rows: int
    input: str
    """sha256 over everything that decides the shard's content, and nothing that appending data changes."""


def expected_shards(manifest: Manifest) -> tuple[Expectation, ...]:
    """What every shard must be, by shard number."""
    settings = hashlib.sha256(_to_json(_settings(manifest)))
    found = []
    for stage in manifest.plan.stages:
        of_stage = settings.copy()
        of_stage.update(_to_json(stage.model_dump(mode="json")))
        for rows in stage.shard_rows:
            of_shard = of_stage.copy()
            of_shard.update(str(len(found)).encode())
            found.append(Expectation(rows, of_shard.hexdigest()))
    return tuple(found)


class Difference(NamedTuple):
    """One setting that differs between two manifests, both sides as shown to a person."""

    field: str
    old: str
    new: str


def difference(old: Manifest, new: Manifest) -> list[Difference]:
    """The settings in which `new` would give another index than `old`; names and paths alone do not count."""
    found = []
    for label, (before, after) in _compared(old, new).items():
        if before != after:
            shown = _shown(label, before, old), _shown(label, after, new)
            found.append(Difference(label.replace("_", "-"), *shown))
    # The plan follows from the data and the token budget: on its own it says something, beside them nothing.
    if not found and old.plan != new.plan:
        texts = [tuple((stage.stop, stage.fingerprint) for stage in side.plan.stages) for side in (old, new)]
        if texts[0] != texts[1]:
            found.append(Difference("texts, sources or labels", _digest(texts[0]), _digest(texts[1])))
        else:
            found.append(Difference("shard plan", plan_shown(old.plan.stages), plan_shown(new.plan.stages)))
    return found


def extends(old: Manifest, new: Manifest) -> bool:
    """Whether `new` is `old` with stages added behind: the old shards stay as they are."""
    before, after = old.plan.stages, new.plan.stages
    return len(after) > len(before) and after[: len(before)] == before and _settings(old) == _settings(new)


def require_same(folder: Path, old: Manifest, new: Manifest) -> None:
    """Nothing happens if both manifests give the same index.

    Raises:
        IndexMismatch: They do not; the message shows each difference and says what to type.
    """
    if differences := difference(old, new):
        raise IndexMismatch(mismatch_message(folder, differences))


def mismatch_message(folder: Path, differences: list[Difference]) -> str:
    """The refusal as a person reads it: a small table, then what to do."""
    table = [Difference("setting", "on disk", "asked for"), *differences]
    widths = [max(len(row[column]) for row in table) for column in range(2)]
    lines = [f"  {row.field:{widths[0]}}  {row.old:{widths[1]}}  {row.new}" for row in table]
    return "\n".join(
        [
            f"The index in {folder} was made with other settings; nothing was changed.",
            *lines,
            "Give another --out to keep both, or --overwrite to replace it.",
        ]
    )


def manifest_path(folder: Path) -> Path:
    """Where an index keeps its manifest."""
    return folder / "manifest.json"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`, None if there is none.

    Raises:
        UserError: It was written by a later version of Vestige.
        CorruptFile: It does not read as a manifest.
    """
    path = manifest_path(folder)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        raw = json.loads(content)
        version = raw["format"]
        if isinstance(version, int) and version > FORMAT:
            raise UserError(
                f"{path} has format {version}, and this Vestige reads up to {FORMAT}. "
                "Update with: pip install --upgrade vestige"
            )
        return Manifest.model_validate_json(content)
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        raise CorruptFile(
            f"{path} does not read as an index manifest ({str(error).splitlines()[0]}). "
            "Give another --out, or --overwrite to build the index anew."
        ) from error


def publish_manifest(folder: Path, manifest: Manifest) -> None:
    """`folder` holds `manifest`, or one that was there and is the same; an extended one replaces the old.

    Raises:
        IndexMismatch: Another process has meanwhile put a different one there.
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


def _settings(manifest: Manifest) -> dict[str, Any]:
    """The settings that decide a row's bytes, without the data, the stages, or names that are for reading."""
    fields = manifest.model_dump(mode="json", exclude={"data", "plan"})
    fields["model"] = manifest.model.fingerprint
    return fields | manifest.plan.model_dump(mode="json", exclude={"stages"})


def _compared(old: Manifest, new: Manifest) -> dict[str, tuple[Any, Any]]:
    before, after = (
        _settings(manifest) | {"data": (manifest.data.fingerprint, manifest.data.examples)} for manifest in (old, new)
    )
    order = ["format", "model", "data", *(name for name in before if name not in ("format", "model", "data"))]
    return {name: (before[name], after[name]) for name in order}


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
    """Stages of a plan as a person reads them in a refusal."""
    shards = sum(len(stage.shard_rows) for stage in stages)
    return f"{shards} shards ({_digest([stage.plan_hash for stage in stages])})"


def _digest(value: Any) -> str:
    return hashlib.sha256(_to_json(value)).hexdigest()[:8]


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
