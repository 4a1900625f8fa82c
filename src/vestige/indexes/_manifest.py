"""The manifest of an index, what it was made from and how: one deterministic JSON file, compared before any reuse."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vestige.errors import CorruptFile, Difference, IndexMismatch, UserError, mismatch_message
from vestige.parsing import parse_json
from vestige.settings import Scope
from vestige.storage import write_durably

if TYPE_CHECKING:
    from vestige.compress import CompressionSpec
    from vestige.models import Component

FORMAT = 1
"""Version of the folder's layout; a reader refuses a later one."""

StoredType = Literal["float16", "bfloat16", "float32", "int8"]
BYTES_PER_NUMBER: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}
SCALED_TYPES = ("float16", "int8")
"""Types whose range is too small for gradients: each row is divided by a scale of its own."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelIdentity(_Frozen):
    """Identity of the model; `name` is for reading, `fingerprint` decides."""

    name: str
    fingerprint: str


class DataIdentity(_Frozen):
    """Identity of the examples; `name` is for reading, `fingerprint` decides."""

    name: str
    fingerprint: str
    examples: int


class CompressionIdentity(_Frozen):
    """The compression spec in canonical spelling, and whether it acts per component or on the whole model."""

    spec: str
    scope: Literal["component", "model"] = "component"


class ImportRecord(_Frozen):
    """Origin of an index that Vestige did not compute, and what is therefore not known of it."""

    layout: str
    digest: str
    """sha256 over the files that were read."""
    notes: tuple[str, ...]
    recomputable: bool = False
    """Whether model, data and projection are known, so that gradients of queries can be computed to match."""


class IndexedComponent(_Frozen):
    """One parameter tensor and the columns `start:stop` that hold its compressed gradient."""

    name: str
    kind: str
    shape: tuple[int, int]
    start: int
    stop: int


WHOLE_MODEL = "all components"
PRECONDITIONED = "preconditioned.json"
"""File that marks a folder of preconditioned gradients as complete."""


class Span(NamedTuple):
    """Columns of an index that hold one compressed gradient: a component's, or that of `WHOLE_MODEL`."""

    name: str
    columns: slice


class PlanStage(_Frozen):
    """Rows `start:stop` of the data, added at once; appending data adds a stage and leaves earlier ones alone."""

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
    quantize: int | None = None
    """Bits in which the maps of the model were kept, None if all weights were in `precision`."""
    device: str = "cpu"
    """`cpu`, or the name of the card, with TF32 where products of float32 may be rounded to it."""
    max_length: int | None
    chat: bool
    token_budget: int
    components: tuple[IndexedComponent, ...]
    plan: PlanRecord = PlanRecord()
    imported: ImportRecord | None = None

    @model_serializer(mode="wrap")
    def _without_the_usual(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # An index computed on a CPU keeps the bytes, and the fingerprints, that it had before there were these fields.
        usual = {"imported": None, "quantize": None, "device": "cpu"}
        return {name: value for name, value in serialise(self).items() if name not in usual or value != usual[name]}

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

    @model_validator(mode="after")
    def _stages_cover_the_data(self) -> "Manifest":
        stages = self.plan.stages
        bounds = [0, *(stage.stop for stage in stages)]
        whole = all(
            stage.start == start
            and stage.stop > start
            and min(stage.shard_rows, default=0) > 0
            and sum(stage.shard_rows) == stage.stop - stage.start
            for start, stage in zip(bounds, stages, strict=False)
        )
        if self.data.examples < 0 or not whole or (stages and bounds[-1] != self.data.examples):
            raise ValueError(f"the shards of the plan must hold each of {self.data.examples} examples once")
        return self

    @property
    def width(self) -> int:
        """Numbers per example."""
        return max(part.stop for part in self.components)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The runs of columns that belong together: each component's, or all where they were added up."""
        if self.compression.scope == "model":
            return (Span(WHOLE_MODEL, slice(0, self.width)),)
        return tuple(Span(part.name, slice(part.start, part.stop)) for part in self.components)

    @property
    def row_bytes(self) -> int:
        """Bytes per example on disk: the numbers, loss, norm, the example's row and, where needed, the scale."""
        return self.width * BYTES_PER_NUMBER[self.dtype] + 16 + (4 if self.dtype in SCALED_TYPES else 0)

    @property
    def curvature_bytes(self) -> int:
        """Bytes that the curvature takes beside the index from the first use of `influence` on, in float32."""
        return sum(4 * (span.columns.stop - span.columns.start) ** 2 for span in self.spans)

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of every shard, by shard number."""
        return tuple(rows for stage in self.plan.stages for rows in stage.shard_rows)

    def to_json(self) -> bytes:
        """Return the bytes of `manifest.json`."""
        return to_json(self.model_dump(mode="json"))


IMPORTED_SPEC = "imported"
"""Stands for the compression of an index whose projection is not known; it parses as no spec."""


class Expectation(NamedTuple):
    """The record of one shard in the manifest."""

    rows: int
    input: str
    """sha256 over everything that decides the shard's content, and nothing that appending data changes."""


def expect_shards(manifest: Manifest) -> tuple[Expectation, ...]:
    """Return what every shard must be, by shard number."""
    settings = hashlib.sha256(to_json(settings_of(manifest)))
    found = []
    for stage in manifest.plan.stages:
        of_stage = settings.copy()
        of_stage.update(to_json(stage.model_dump(mode="json")))
        for rows in stage.shard_rows:
            of_shard = of_stage.copy()
            of_shard.update(str(len(found)).encode())
            found.append(Expectation(rows, of_shard.hexdigest()))
    return tuple(found)


def manifest_path(folder: Path) -> Path:
    """Return the path of an index's manifest."""
    return folder / "manifest.json"


def require_index(folder: Any) -> None:
    """Raise if a folder holds no index; what is no path is taken as it is.

    Raises:
        UserError: It has no manifest.
    """
    if isinstance(folder, str | Path) and not manifest_path(Path(folder)).is_file():
        found = "has no manifest.json" if Path(folder).is_dir() else "does not exist"
        raise UserError(
            f"There is no index in {folder}: it {found}. Make one with: vestige index --model M --data D --out {folder}"
        )


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest in `folder`; return None if there is none.

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
        raw = parse_json(content)
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
            "Give another --out, or --overwrite to build the index again."
        ) from error


def settings_of(manifest: Manifest) -> dict[str, Any]:
    """Return the settings that decide a row's bytes, without the data, the stages, or names that are for reading."""
    fields = manifest.model_dump(mode="json", exclude={"data", "plan"})
    fields["model"] = manifest.model.fingerprint
    return fields | manifest.plan.model_dump(mode="json", exclude={"stages"})


def to_json(value: Any) -> bytes:
    """Return JSON of which equal values have equal bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def difference(old: Manifest, new: Manifest) -> list[Difference]:
    """Return the settings in which `new` would give another index than `old`; names and paths alone do not count."""
    before, after = (
        settings_of(manifest) | {"data": (manifest.data.fingerprint, manifest.data.examples)} for manifest in (old, new)
    )
    found = [
        Difference(
            name.replace("_", "-"),
            *(_describe(name, *side) for side in ((before.get(name), old), (after.get(name), new))),
        )
        for name in dict.fromkeys(["format", "model", "data", *before, *after])
        if before.get(name) != after.get(name)
    ]
    # The plan follows from the data and the token budget: on its own it is informative, beside them it is not.
    if not found and old.plan != new.plan:
        texts = [tuple((stage.stop, stage.fingerprint) for stage in side.plan.stages) for side in (old, new)]
        if texts[0] != texts[1]:
            found.append(Difference("texts, sources or labels", _digest(texts[0]), _digest(texts[1])))
        else:
            found.append(Difference("shard plan", _describe_plan(old.plan.stages), _describe_plan(new.plan.stages)))
    return found


def extends(old: Manifest, new: Manifest) -> bool:
    """Return whether `new` is `old` with stages added behind; old shards stay as they are."""
    before, after = old.plan.stages, new.plan.stages
    return len(after) > len(before) and after[: len(before)] == before and settings_of(old) == settings_of(new)


def require_same(folder: Path, old: Manifest, new: Manifest) -> None:
    """Raise unless both manifests give the same index, but for stages that `new` adds behind."""
    if not extends(old, new) and (differences := difference(old, new)):
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
    require_same(folder, old, manifest)
    if extends(old, manifest):
        write_durably(manifest_path(folder), [manifest.to_json()])


def _describe(field: str, value: Any, manifest: Manifest) -> str:
    if field == "model":
        return f"{manifest.model.name} ({value[:8]})"
    if field == "data":
        return f"{manifest.data.name} ({manifest.data.examples:,} examples, {value[0][:8]})"
    if field == "compression":
        return value["spec"] + (" (whole model)" if value["scope"] == "model" else "")
    if field == "components":
        return f"{len(value)} components, {manifest.width:,} columns ({_digest(value)})"
    if field == "device":
        return value or "cpu, or not recorded"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def _describe_plan(stages: Sequence[PlanStage]) -> str:
    """Return the stages of a plan as the user reads them in a refusal."""
    shards = sum(len(stage.shard_rows) for stage in stages)
    return f"{shards} shards ({_digest([stage.plan_hash for stage in stages])})"


def _digest(value: Any) -> str:
    return hashlib.sha256(to_json(value)).hexdigest()[:8]


def lay_out(
    components: "Sequence[Component]", spec: "CompressionSpec", scope: Scope = "component"
) -> tuple[IndexedComponent, ...]:
    """Return the columns of every component: one after another, or the same for all, to be added up there.

    Raises:
        SpecError: Components cannot share the columns of this compression.
    """
    columns, start = [], 0
    for component in components:
        stop = start + spec.size_for(component.shape, shared=scope == "model")
        columns.append(
            IndexedComponent(
                name=component.name, kind=component.uses[0].kind, shape=component.shape, start=start, stop=stop
            )
        )
        start = 0 if scope == "model" else stop
    return tuple(columns)
