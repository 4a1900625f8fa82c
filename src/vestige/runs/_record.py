"""`run.json`: everything about a run that is not a table, checked when it is read."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator

from vestige.errors import CorruptFile, UserError
from vestige.parsing import first_problem, parse_finite_json
from vestige.runs._digests import require_unaltered
from vestige.runs._environment import environment
from vestige.runs._types import Meaning
from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes

if TYPE_CHECKING:
    from vestige.data import TokenizedData
    from vestige.models import LoadedModel
    from vestige.runs._summary import ScoreSummary

Record = TypeVar("Record", bound=BaseModel)

RUN_FORMAT = 1
RECORD_FILE = "run.json"
DENSE_FILE = "scores.safetensors"

Verdict = Literal["good", "warn", "unknown"]


class _Part(BaseModel):
    """Frozen; fields added by a later version of the same format are kept, not refused."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class ModelRecord(_Part):
    """The model that was explained."""

    name: str
    fingerprint: str
    parameters: int


class CheckpointRecord(_Part):
    """One of several sets of weights that the scores were added up over."""

    name: str
    weight: float
    """Learning rate, or what was given; before any division by the sum."""
    index: str | None = None


class DataRecord(_Part):
    """A data set: the training data or the queries."""

    name: str
    fingerprint: str
    examples: int


class SkippedRecord(_Part):
    """A parameter that the scores do not cover."""

    name: str
    parameters: int
    reason: str


class CoverageRecord(_Part):
    """Counts of the model's parameters that the scores cover."""

    selected: int
    total: int
    fraction: float
    skipped: list[SkippedRecord] = Field(default_factory=list)


class Check(_Part):
    """One free check of a run, with its reading in plain words."""

    name: str
    value: float | None
    """None where the check could not be made; the reading has the reason."""
    reading: str
    verdict: Verdict


class TrustRecord(_Part):
    """The evidence on how far the scores can be trusted."""

    validated: bool = False
    """True only after a comparison with retraining; the free checks alone validate nothing."""
    checks: list[Check] = Field(default_factory=list)


class DistributionRecord(_Part):
    """All scores of one query: exact moments, a histogram, and the share of the influence that few examples carry."""

    count: int
    mean: float
    std: float
    """Population standard deviation."""
    min: float
    max: float
    edges: list[float]
    counts: list[int]
    """Examples per bin, one fewer than `edges`; they add up to `sampled`."""
    sampled: int
    """Examples in the histogram: `count`, or fewer where only a sample of rows fitted into memory."""
    cumulative_share: list[tuple[int, float]]
    """(k, share of the sum of all positive scores that the k highest hold)."""


class GroupRecord(_Part):
    """The scores of one source, for one query."""

    source: str
    examples: int
    sum: float
    mean: float
    low: float | None
    """Lower end of the 95% interval of the mean; None for a single example."""
    high: float | None


class RunRecord(_Part):
    """Everything in `run.json`: the request, the versions, what the scores mean, and how far to trust them."""

    format: int = RUN_FORMAT
    vestige: str
    created: str
    """ISO 8601, with time zone."""
    command: str
    config: dict[str, Any]
    versions: dict[str, str]
    model: ModelRecord | None
    """None for methods that read text alone."""
    data: DataRecord
    queries: DataRecord
    asked: str = ""
    """How questions were put, in words; empty where they were put as they were typed."""
    left_out: list[str] = Field(default_factory=list)
    """Ids of training examples that were not scored, because their loss or gradient is not finite."""
    checkpoints: list[CheckpointRecord] = Field(default_factory=list)
    """Empty for methods that work on one model."""
    method: str
    meaning: Meaning
    coverage: CoverageRecord | None
    components: list[str]
    seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int = 0
    """Most bytes of tensors on one CUDA device; 0 where none was used."""
    trust: TrustRecord
    distribution: dict[str, DistributionRecord]
    groups: dict[str, list[GroupRecord]]
    files: dict[str, str] = Field(default_factory=dict)
    """sha256 of every file beside `run.json`, as it was written; empty in a run of an earlier version."""

    @field_validator("meaning", mode="before")
    @classmethod
    def _meaning_from_dict(cls, value: Any) -> Any:
        # A later version may record more about a score than this one knows; what it knows must be there.
        if isinstance(value, dict):
            return {name: text for name, text in value.items() if name in Meaning.__dataclass_fields__}
        return value

    @field_serializer("meaning")
    def _meaning_to_dict(self, meaning: Meaning) -> dict[str, str]:
        return meaning.to_dict()


def describe_process() -> dict[str, Any]:
    """Return the fields of a record that are facts about this process: versions, the time, and the peak memory."""
    return {
        "vestige": version("vestige"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": environment(),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
    }


def describe_data(data: "TokenizedData") -> DataRecord:
    """Return name, fingerprint and size of a data set."""
    return DataRecord(name=data.name, fingerprint=data.fingerprint, examples=len(data))


def describe_model(loaded: "LoadedModel") -> ModelRecord:
    """Return name, fingerprint and size of a model."""
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return ModelRecord(name=loaded.name, fingerprint=loaded.fingerprint, parameters=parameters)


def make_run_record(
    *,
    command: str,
    config: dict[str, Any],
    method: str,
    meaning: Meaning,
    data: "TokenizedData",
    queries: "TokenizedData",
    summary: "ScoreSummary",
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
        **others: `asked`, `left_out`, `checkpoints`: fields of `RunRecord`.
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


def is_run(folder: Path) -> bool:
    """Return whether `folder` holds a run."""
    return (folder / RECORD_FILE).is_file()


def read_record(folder: str | Path, *, checked: bool = True) -> RunRecord:
    """Read and check the `run.json` of a run directory.

    Args:
        folder: The run.
        checked: Compare the run's tables with their digests; `open_dense` does so with the scores of all examples.

    Raises:
        UserError: there is no run, or a newer Vestige wrote it.
        CorruptFile: the file, or a table of the run, is not what Vestige wrote.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run: it has no {RECORD_FILE}.\n"
            "Give the folder that `vestige attribute ... --out RUN` wrote."
        )
    header = parse_record(_Header, path)
    if header.kind == "audit":
        raise UserError(f"{folder} is an audit and holds no scores. In Python: vestige.Audit.open({str(folder)!r})")
    if header.kind == "training":
        raise UserError(f"{folder} is a training and holds no scores. Type: vestige status {folder}")
    if header.format > RUN_FORMAT:
        raise UserError(
            f"{folder} was written by Vestige {header.vestige} in run format {header.format}; "
            f"this version reads up to format {RUN_FORMAT}.\nUpdate with `pip install --upgrade vestige`."
        )
    record = parse_record(RunRecord, path)
    if checked:
        require_unaltered(path.parent, record.files, *(name for name in record.files if name != DENSE_FILE))
    return record


def parse_record(kind: type[Record], path: Path) -> Record:
    """Return the record in a file of JSON.

    Raises:
        CorruptFile: It is missing, or not what Vestige writes: no number is NaN or infinite there, for example.
    """
    try:
        content = path.read_bytes()
        parse_finite_json(content)
        return kind.model_validate_json(content)
    except (OSError, ValueError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error
        raise CorruptFile(f"{path} is not a run record: {reason}. Run the command that made it again.") from error


class _Header(_Part):
    """The fields that must be readable in every format, past and future."""

    format: int
    kind: str = "scores"
    vestige: str = "of a later version"
