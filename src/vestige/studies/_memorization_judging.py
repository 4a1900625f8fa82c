"""What the studies of memorization share: intervals over targets, what is kept of a target, and rows of tables."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from vestige import audit
from vestige.audit import Interval
from vestige.errors import CorruptFile
from vestige.evaluate import Estimate
from vestige.files import make_folder

MEMORIZED = 4.0
"""Likelihood ratio, in nats, from which an example counts as memorized."""
MOST = 0.9
"""Quantile of a target's likelihood ratios above which an example is among its most memorized."""
DRAWS = 2_000
TRIGGER = 0.05
"""The alarm goes off when the median training loss is below this share of its start."""


def mean_interval(values: Float[np.ndarray, "target"], seed: int = 0) -> Interval:
    """Mean of the known values with the percentiles of bootstrap draws of them; NaN where none is known."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Interval(np.nan, np.nan, np.nan)
    draws = np.random.default_rng(seed).choice(known, (DRAWS, len(known))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(known.mean()), float(low), float(high))


def shown(interval: Interval) -> str:
    """The ends of an interval in a table."""
    return f"{interval.low:.3f} … {interval.high:.3f}" if np.isfinite(interval.low) else ""


def estimate(interval: Interval) -> Estimate:
    """The same for a figure."""
    return Estimate(*interval)


def auc(scores: Float[np.ndarray, "example"], wanted: Bool[np.ndarray, "example"]) -> float:
    """Chance that a wanted example is above another; NaN where a side is empty."""
    return audit.attack(scores, wanted).auc.value


def members_auc(
    scores: Float[np.ndarray, "target example"], membership: Bool[np.ndarray, "target example"]
) -> Float[np.ndarray, "target"]:
    """AUC of membership within each target."""
    return np.array([auc(row, own) for row, own in zip(scores, membership, strict=True)])


def memorized(score: Float[np.ndarray, "example"]) -> dict[str, Bool[np.ndarray, "example"]]:
    """What of its own examples a target has memorized, by its likelihood ratios."""
    return {"top 10 % LiRA": score >= np.nanquantile(score, MOST), f"LiRA >= {MEMORIZED:g}": score >= MEMORIZED}


def target_file(folder: Path, rows: np.ndarray) -> Path:
    """Where the measures of the target that was trained on these rows are."""
    return folder / f"{hashlib.sha256(np.asarray(rows, dtype=np.int64).tobytes()).hexdigest()[:16]}.parquet"


def keep_measures(path: Path, ids: Sequence[str], measures: Mapping[str, np.ndarray], step: int) -> None:
    """One target's measures of some examples at one step are on disk."""
    make_folder(path.parent)
    audit.write_evidence(path, [audit.evidence_table(ids, measures, checkpoint=step)])


def kept_measures(path: Path) -> tuple[list[str], dict[str, Float[np.ndarray, "example"]], int]:
    """Ids, measures by name and the step, as `keep_measures` left them.

    Raises:
        CorruptFile: The file is not there although the model's numbers are.
    """
    if not path.exists():
        raise CorruptFile(
            f"{path} is missing, though its model is finished. Delete the study's folder and run it again."
        )
    table: pa.Table = audit.read_evidence(path)
    names = [name for name in table.column_names if name not in ("checkpoint", "layer", "example_id")]
    found = {name: table[name].to_numpy() for name in names}
    return table["example_id"].to_pylist(), found, int(table["checkpoint"][0].as_py())


def interval_json(interval: Interval) -> dict[str, Any]:
    """In JSON terms."""
    return dict(interval._asdict())
