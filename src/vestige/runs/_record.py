"""`run.json`: everything about a run that is not a table, checked when it is read."""

import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes


@dataclass(frozen=True)
class Meaning:
    """Sign, unit, target and normalisation of a score: carried by every run, printed in every report."""

    sign: str
    """Such as "positive: training on the example lowers the query's loss". It begins with `positive` where a score says
    what training on the example does, and otherwise does not: "no causal reading: higher = more alike"."""
    unit: str
    """Such as "nats per unit of learning rate", "cosine", "BM25"."""
    target: str
    """"this model" or "the average run", or "text alone" for lexical retrieval."""
    normalisation: str
    """What the score was divided by, or "none"."""
    estimates: str
    """One sentence: what the number estimates."""
    cost: str
    """One sentence: passes, memory, disk."""
    limits: str
    """One sentence: when not to believe it."""

    @property
    def causal(self) -> bool:
        """True if a score says what training on the example does, and not only how alike it is to the query."""
        return self.sign.startswith("positive")

    def to_dict(self) -> dict[str, str]:
        """Return a plain dictionary for `run.json`."""
        return asdict(self)


PACKAGES = ("vestige", "torch", "transformers", "peft", "datasets", "numpy", "safetensors", "pyarrow")


def environment() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that scores depend on; import none of them."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


RUN_FORMAT = 1
RECORD_FILE = "run.json"
DENSE_FILE = "scores.safetensors"
FIRST_RUNG = "first-rung"
"""Folder, in a run that scored a few rows exactly, of the run that ranked all of them."""

Verdict = Literal["good", "warn", "unknown"]


PARTS = {
    "verbatim": "verbatim spans",
    "components": "scores of components",
    "tokens": "scores of tokens",
    "self_influence": "self-influence",
    "checks": "trust checks",
}
"""What is added to a run once its ranking is on disk, in words; all but the checks are tables of these names."""


class Part(BaseModel):
    """Frozen; fields added by a later version of the same format are kept, not refused."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class ModelRecord(Part):
    """The model that was explained."""

    name: str
    fingerprint: str
    parameters: int


class CheckpointRecord(Part):
    """One of several sets of weights that the scores were added up over."""

    name: str
    weight: float
    """Learning rate, or what was given; before any division by the sum."""
    index: str | None = None


class DataRecord(Part):
    """A data set: the training data or the queries."""

    name: str
    fingerprint: str
    examples: int


class SkippedRecord(Part):
    """A parameter that the scores do not cover."""

    name: str
    parameters: int
    reason: str


class CoverageRecord(Part):
    """Counts of the model's parameters that the scores cover."""

    selected: int
    total: int
    fraction: float
    skipped: list[SkippedRecord] = Field(default_factory=list)


class Check(Part):
    """One free check of a run, with its reading in plain words."""

    name: str
    value: float | None
    """None where the check could not be made; the reading has the reason."""
    reading: str
    verdict: Verdict


class TrustRecord(Part):
    """The evidence on how far the scores can be trusted."""

    validated: bool = False
    """True only after a comparison with retraining; the free checks alone validate nothing."""
    checks: list[Check] = Field(default_factory=list)


class DistributionRecord(Part):
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


class GroupRecord(Part):
    """The scores of one source, for one query."""

    source: str
    examples: int
    sum: float
    mean: float
    low: float | None
    """Lower end of the 95% interval of the mean; None for a single example."""
    high: float | None
    positive: float | None = None
    """Sum of the positive scores alone; None in a run of an earlier version."""
    positive_squares: float | None = None
    """Sum of their squares."""


class RungRecord(Part):
    """One way of ranking on a ladder."""

    name: str
    """Of the method."""
    seconds: float
    rows: int
    """Training examples that it scored."""
    lds: tuple[float, float, float] | None = None
    """Of its scores of the candidates, against a bank, with the ends of its 95 % interval; None where not measured."""
    lds_of_all: tuple[float, float, float] | None = None
    """The same by all rows that it scored, of the first rung."""


class LadderRecord(Part):
    """The rungs of a ranking whose first rows were scored exactly."""

    first: int
    """Rows of each rung that were taken for every query."""
    rungs: list[RungRecord]
    """In the order in which they ran; the last one is the run's method."""
    candidates: list[int]
    """Training examples that the last rung scored, ascending; all others have no score in this run."""
    stood: dict[str, dict[str, list[int | None]]]
    """By query and example that the run lists: its rank at each rung, None where it was not among the first."""


class RunRecord(Part):
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
    explained: str = ""
    """What of how many queries is explained, in words; empty where it is the whole answer of every one."""
    left_out: list[str] = Field(default_factory=list)
    """Ids of training examples that were not scored, because their loss or gradient is not finite."""
    checkpoints: list[CheckpointRecord] = Field(default_factory=list)
    """Empty for methods that work on one model."""
    method: str
    meaning: Meaning
    against_hubs: str = ""
    """What to type beside the command for a ranking in which rows that lead most lists count less; empty for nothing.
    Such as `--method grad-cos`."""
    ladder: LadderRecord | None = None
    """Where a few rows were scored exactly, and a cheaper ranking chose them."""
    coverage: CoverageRecord | None
    components: list[str]
    seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int = 0
    """Most bytes of tensors on one CUDA device; 0 where none was used."""
    trust: TrustRecord
    distribution: dict[str, DistributionRecord]
    groups: dict[str, list[GroupRecord]]
    missing: list[str] = Field(default_factory=list)
    """Parts, of `PARTS`, that were requested and are not there yet, in the order in which they are added."""
    inputs: str = ""
    """Digest of what scores are made from: a part is added later only where it is the same."""
    files: dict[str, str] = Field(default_factory=dict)
    """sha256 of every file beside `run.json`, as it was written; empty in a run of an earlier version."""

    def describe_missing(self) -> str:
        """Return in a sentence which parts the run lacks, and how to add them; nothing for a complete run."""
        if not self.missing:
            return ""
        names = [PARTS.get(part, part) for part in self.missing]
        return f"Not there yet: {', '.join(names)}. The same command adds what is missing: {self.command}"


def describe_process() -> dict[str, Any]:
    """Return the fields of a record that are facts about this process: versions, the time, and the peak memory."""
    return {
        "vestige": version("vestige"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": environment(),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
    }
