"""`run.json` of an audit: the measured checkpoints, the meaning of each measure, and how well the measures judge."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vestige.errors import UserError
from vestige.parsing import parse_json
from vestige.runs._digests import require_unaltered
from vestige.runs._record import RECORD_FILE, DataRecord, ModelRecord, _Part, parse_record

AUDIT_FORMAT = 1
CHANCE_BITS = 1.4427
"""Mean exposure of secrets that were never planted, 1 / log 2: compare measured exposures with it."""

Truth = Literal["membership", "flag", "memorized"]
Span = tuple[float | None, float | None, float | None]
"""A value with the ends of its 95 % interval; None where there is none."""


class SubjectRecord(_Part):
    """One set of weights that was measured."""

    number: int
    """Its `checkpoint` in the evidence."""
    name: str
    steps: int | None
    fingerprint: str
    median_loss: float | None
    """Of the data's own examples: of their answers where they have any."""
    norms: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Of the weights, and of their `change` since the first checkpoint."""


def low_stands_out(high: str) -> bool:
    """Return whether low values of a measure stand out, from what a high one says."""
    return high.startswith("not ") or "low ones" in high


class MeasureRecord(_Part):
    """One measure of the evidence."""

    meaning: str
    high: str
    """What a high value suggests; a hint about an example, never a verdict."""
    layered: bool = False
    missing: int = 0
    """Examples without a value under the model."""
    reason: str | None = None


class LayerRecord(_Part):
    """One layer under the model."""

    layer: int
    directions: int | None
    converged: bool | None
    """Whether the automatic number of directions sufficed."""
    smi: Span | None
    """Mutual information with the labels, nats: mean and 1 % and 99 % quantiles over directions."""


class RateRecord(_Part):
    """A rate, with the threshold at which it was taken."""

    level: float
    rate: Span
    threshold: float | None
    resolved: bool


class JudgementRecord(_Part):
    """The quality of one measure at finding the examples that are to be found."""

    truth: Truth
    measure: str
    """`blind` is a classifier of the texts that never uses the model."""
    checkpoint: int | None
    layer: int | None
    sign: int
    """-1 where low values are flagged."""
    auc: Span
    tpr_at: list[RateRecord]
    fpr_at: list[RateRecord]
    found: int
    others: int
    unscored: int
    rule: str | None = None
    """A threshold that was fixed beforehand, and its rates."""
    rule_tpr: Span | None = None
    rule_fpr: Span | None = None


class BankRecord(_Part):
    """The bank that the model was compared with."""

    name: str
    id: str
    models: int
    value: str
    subset: int | None
    memorized_at: float
    memorized: int
    """Examples at or above it under the model."""


class CanaryRecord(_Part):
    """One planted secret under one checkpoint."""

    id: str
    checkpoint: int
    prompt: str
    secret: str
    copies: int | None = None
    """How often it occurs in the training data, where the canaries state it."""
    references: int
    """Other secrets of the same form that it was compared with."""
    rank: float | None
    """Its rank among them, 1 the likeliest; the mean of the ranks where several are as likely. None: not finite."""
    exposure: float | None
    """log2(references + 1) - log2(rank), bits; 1.44 on average where it was never planted."""
    most: float
    """Maximum exposure that this many references can show, in bits."""
    loss: float | None
    """Of the secret, nats."""


class AuditRecord(_Part):
    """Everything in the `run.json` of an audit."""

    kind: Literal["audit"] = "audit"
    format: int = AUDIT_FORMAT
    vestige: str
    created: str
    command: str
    config: dict[str, Any]
    versions: dict[str, str]
    model: ModelRecord
    data: DataRecord
    holdout: DataRecord | None
    reference: str | None
    bank: BankRecord | None
    checkpoints: list[SubjectRecord]
    """In order; the last is the model under audit."""
    trigger: int | None
    """The first checkpoint whose median loss is below 5 % of the first one's: where early measures are read."""
    layers: list[LayerRecord]
    main_layer: int | None
    classes: list[str]
    measures: dict[str, MeasureRecord]
    judgement: list[JudgementRecord]
    extraction: dict[int, Span]
    """Share of long enough texts that are reproduced word for word, by prefix length."""
    canaries: list[CanaryRecord] = Field(default_factory=list)
    """Of every checkpoint, in the order of the file."""
    notes: list[str]
    seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int = 0
    """Most bytes of tensors on one CUDA device; 0 where none was used."""
    files: dict[str, str] = Field(default_factory=dict)
    """sha256 of every file beside `run.json`, as it was written; empty in an audit of an earlier version."""


def is_audit(folder: Path) -> bool:
    """Return whether `folder` holds the run of an audit."""
    try:
        content = parse_json((folder / RECORD_FILE).read_bytes())
        return isinstance(content, dict) and content.get("kind") == "audit"
    except (OSError, ValueError):
        return False


def read_audit_record(folder: str | Path, *, checked: bool = True) -> AuditRecord:
    """Read and check the `run.json` of an audit.

    Args:
        folder: The audit.
        checked: Compare its files with their digests.

    Raises:
        UserError: There is no audit, or a newer Vestige wrote it.
        CorruptFile: The file, or another one of the audit, is not what Vestige wrote.
    """
    folder = Path(folder)
    if not is_audit(folder):
        raise UserError(f"{folder} is no audit. Give the folder that `vestige audit ... --out RUN` wrote.")
    written = parse_json((folder / RECORD_FILE).read_bytes()).get("format")
    if isinstance(written, int) and written > AUDIT_FORMAT:
        raise UserError(
            f"{folder} was written in audit format {written}; this version reads up to {AUDIT_FORMAT}.\n"
            "Update with `pip install --upgrade vestige`."
        )
    record = parse_record(AuditRecord, folder / RECORD_FILE)
    if checked:
        require_unaltered(folder, record.files, *record.files)
    return record
