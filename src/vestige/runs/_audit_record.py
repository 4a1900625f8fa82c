"""`run.json` of an audit: the measured checkpoints, the meaning of each measure, and how well the measures judge."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from vestige.errors import UserError
from vestige.runs._folder import kind_of, read_known, require_unaltered
from vestige.runs._groups import student_half_width
from vestige.runs._record import RECORD_FILE, DataRecord, ModelRecord, Part

AUDIT_FORMAT = 1
CHANCE_BITS = 1.4427
"""Mean exposure of secrets that were never planted, 1 / log 2: compare measured exposures with it."""

Truth = Literal["membership", "flag", "memorized"]
Span = tuple[float | None, float | None, float | None]
"""A value with the ends of its 95 % interval; None where there is none."""


class SubjectRecord(Part):
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


def format_span(span: Sequence[float | None], unknown: str = "–") -> str:
    """Return a value and the ends of its interval as a reader takes them: 0.612 [0.550, 0.671]."""
    value, low, high = span
    if value is None or not math.isfinite(value):
        return unknown
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def low_stands_out(high: str) -> bool:
    """Return whether low values of a measure stand out, from what a high one says."""
    return high.startswith("not ") or "low ones" in high


class MeasureRecord(Part):
    """One measure of the evidence."""

    meaning: str
    high: str
    """What a high value suggests; a hint about an example, never a verdict."""
    layered: bool = False
    missing: int = 0
    """Examples without a value under the model."""
    reason: str | None = None


class LayerRecord(Part):
    """One layer under the model."""

    layer: int
    directions: int | None
    converged: bool | None
    """Whether the automatic number of directions sufficed."""
    smi: Span | None
    """Mutual information with the labels, nats: mean and 1 % and 99 % quantiles over directions."""


class RateRecord(Part):
    """A rate, with the threshold at which it was taken."""

    level: float
    rate: Span
    threshold: float | None
    resolved: bool


class JudgementRecord(Part):
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


class BankRecord(Part):
    """The bank that the model was compared with."""

    name: str
    id: str
    models: int
    value: str
    subset: int | None
    memorized_at: float
    memorized: int
    """Examples at or above it under the model."""


class CanaryRecord(Part):
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
    worst_rank: int | None = None
    """The last of its positions where several are as likely."""


class EpsilonRecord(Part):
    """A lower bound on the privacy loss of the training under one checkpoint, from secrets planted equally often."""

    checkpoint: int
    copies: int | None
    secrets: int
    references: int
    epsilon: float
    """For all copies of a secret together, delta 0, a secret exchanged for another; 0 where nothing is shown."""
    confidence: float


class UsageRecord(Part):
    """Whether the data as a whole were trained on."""

    measures: list[str]
    """Those whose weighted sum was tested."""
    effect: Span
    """Chance that an example of the data scores above a held-out one, or above its own twin; 0.5 by chance."""
    p_value: float
    data: int
    holdout: int
    paired: bool


class InflationRecord(Part):
    """One measure on the items of a benchmark that stand in the training data, and on the others."""

    measure: str
    inside: float
    """Mean over the items found."""
    clean: float
    difference: Span
    """inside - clean, with Welch's interval."""
    whole: float
    """Mean over all items: the figure that is usually given."""
    items_inside: int
    items_clean: int


class ContaminationRecord(Part):
    """The items of a benchmark that stand in the training data."""

    name: str
    fingerprint: str
    items: int
    verbatim: int
    near_copies: int
    too_short: int
    """Items of so few words that they stand anywhere by chance."""
    leading: Span | None
    """Share of the items found whose row is among those with the highest scores; None without scores."""
    inflation: list[InflationRecord]


class NextRecord(Part):
    """A command that may follow, and what it is for."""

    purpose: str
    command: str


class FindingRecord(Part):
    """A finding of an audit in sentences, plain text that is not escaped."""

    title: str
    sentences: list[str]
    commands: list[NextRecord] = Field(default_factory=list)


class AuditRecord(Part):
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
    epsilon: list[EpsilonRecord] = Field(default_factory=list)
    """From the canaries, by checkpoint and number of copies."""
    usage: UsageRecord | None = None
    """None without a holdout."""
    contamination: ContaminationRecord | None = None
    """None without a benchmark."""
    tokens_against: str | None = None
    """Name of the weights that `tokens.parquet` compares with; None where there were none, or there is no such file."""
    findings: list[FindingRecord] = Field(default_factory=list)
    """What all of it says; empty in an audit of an earlier version."""
    notes: list[str]
    seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int = 0
    """Most bytes of tensors on one CUDA device; 0 where none was used."""
    files: dict[str, str] = Field(default_factory=dict)
    """sha256 of every file beside `run.json`, as it was written; empty in an audit of an earlier version."""


def is_audit(folder: Path) -> bool:
    """Return whether `folder` holds the run of an audit."""
    return kind_of(folder) == "audit"


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
    record = read_known(AuditRecord, folder / RECORD_FILE, AUDIT_FORMAT)
    if checked:
        require_unaltered(folder, record.files, *record.files)
    return record


OTHERS = {"membership": "holdout", "flag": "others", "memorized": "others"}
NAMES = {"membership": "members", "flag": "flagged", "memorized": "memorized at the end"}


def group_of(
    known: Sequence[tuple[str, Bool[np.ndarray, "example"], Bool[np.ndarray, "example"]]],
    own: Bool[np.ndarray, "example"],
) -> dict[str, Bool[np.ndarray, "example"]]:
    """Return the rows of each line by name: the sides of the last truth that is known, else the data.

    Args:
        known: (name, what is to be found, where that is known).
        own: The data's own examples.
    """
    for name, found, judged in reversed(known):
        sides = {NAMES[name]: found & judged, OTHERS[name]: ~found & judged}
        if all(side.any() for side in sides.values()):
            return sides
    return {"examples": own}


def roc_curve(
    scores: Float[np.ndarray, "example"], found: Bool[np.ndarray, "example"]
) -> tuple[Float[np.ndarray, "point"], Float[np.ndarray, "point"]]:
    """Return false and true positive rates from the highest score down; equal scores are flagged together."""
    # By hand: sklearn takes longer to import than a page to draw.
    known = ~np.isnan(scores)
    scores, found = scores[known], found[known]
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    right, wrong = np.cumsum(found[order])[ends], np.cumsum(~found[order])[ends]
    return np.append(0.0, wrong / max((~found).sum(), 1)), np.append(0.0, right / max(found.sum(), 1))


def agreement(columns: Mapping[str, Float[np.ndarray, "example"]]) -> tuple[list[str], Float[np.ndarray, "one other"]]:
    """Return the measures that vary, and Spearman's correlation of each two over the examples that have both."""
    from scipy.stats import rankdata

    varying = {name: values for name, values in columns.items() if len(np.unique(values[~np.isnan(values)])) > 1}
    names = list(varying)
    table = np.full((len(names), len(names)), np.nan)
    for one, other in combinations_with_replacement(range(len(names)), 2):
        first, second = varying[names[one]], varying[names[other]]
        both = ~np.isnan(first) & ~np.isnan(second)
        if both.sum() < 3:
            continue
        ranks = rankdata(first[both]), rankdata(second[both])
        if all(each.std() > 0 for each in ranks):
            table[one, other] = table[other, one] = np.corrcoef(*ranks)[0, 1]
    return names, table


class Exposed(NamedTuple):
    """Planted secrets that stand equally often in the training data, under one checkpoint."""

    copies: int | None
    """None where the canaries do not state it."""
    checkpoint: int
    secrets: int
    mean: float
    """Of their exposures, bits."""
    low: float
    high: float
    """95 % interval of the mean by Student's t, within what exposure can be; NaN for a single secret."""


def mean_exposures(canaries: Sequence[CanaryRecord]) -> list[Exposed]:
    """Return mean exposure by number of copies and then by checkpoint; secrets without a finite loss do not count."""
    groups: dict[tuple[int, int], list[CanaryRecord]] = {}
    for each in canaries:
        if each.exposure is not None:
            key = (-1 if each.copies is None else each.copies, each.checkpoint)
            groups.setdefault(key, []).append(each)
    found = []
    for (copies, checkpoint), group in sorted(groups.items()):
        values, most = np.array([each.exposure for each in group]), max(each.most for each in group)
        count, mean = len(values), float(values.mean())
        reach = student_half_width(count) * values.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
        ends = np.clip([mean - reach, mean + reach], 0.0, most).tolist()
        found.append(Exposed(None if copies < 0 else copies, checkpoint, count, mean, *ends))
    return found
