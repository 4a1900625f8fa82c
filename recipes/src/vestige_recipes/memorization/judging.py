"""What the studies of memorization share: intervals over targets, what is kept of a target, and rows of tables."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from vestige.audit import Interval, attack, evidence_table, lira, read_evidence, write_evidence
from vestige.bank import Bank
from vestige.errors import CorruptFile, IndexMismatch
from vestige.evaluate import Estimate, Mark, interval_figure
from vestige.files import make_folder, write_durably
from vestige.progress import announce
from vestige_recipes.common.registry import StudySettings

MEMORIZED = 4.0
"""Likelihood ratio, in nats, from which an example counts as memorized."""
MOST = 0.9
"""Quantile of a target's likelihood ratios above which an example is among its most memorized."""
DRAWS = 2_000
TRIGGER = 0.05
"""The alarm goes off when the median training loss is below this share of its start."""


Made = TypeVar("Made")
Judged = TypeVar("Judged")
COLUMNS = ("of", "measure", "value", "95 % interval", "single seeds")
"""Of the tables."""


class Draws(NamedTuple, Generic[Judged]):
    """What several draws of examples and their banks say."""

    judged: list[Judged]
    triggers: list[list[int]]
    """For each draw, when the trigger went off for each of its targets."""


def each_draw(
    settings: StudySettings,
    make: Callable[[int, Path], Made],
    judge: Callable[[Made, int], Judged],
    triggers: Callable[[Made], np.ndarray],
    moment: str,
) -> Draws[Judged]:
    """The draws of all seeds are made, each in a folder of its own, and judged.

    Args:
        settings: First seed, their number, and where the folders are.
        make: From a seed and its folder.
        judge: From what was made, and the seed.
        triggers: When the trigger went off for each target.
        moment: What that is counted in.
    """
    found: Draws[Judged] = Draws([], [])
    for seed in range(settings.seed, settings.seed + settings.seeds):
        made = make(seed, settings.out / f"seed-{seed}")
        found.judged.append(judge(made, seed))
        found.triggers.append(triggers(made).tolist())
        announce(f"Seed {seed}: the trigger went off after {moment} {np.median(found.triggers[-1]):g} (median).")
    return found


def draw_intervals(
    settings: StudySettings,
    name: str,
    intervals: Mapping[str, Interval],
    label: str,
    *,
    beside: Collection[str] = (),
    lines: Mapping[str, float] | None = None,
) -> None:
    """A figure of intervals is in the study's folder, as PNG and PDF; those `beside` stand back."""
    marks = [Mark(kind, Estimate(*each), kind in beside) for kind, each in intervals.items()]
    for file, content in interval_figure(name, marks, label, lines=dict(lines or {})).items():
        write_durably(settings.out / file, [content])


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


def auc(scores: Float[np.ndarray, "example"], wanted: Bool[np.ndarray, "example"]) -> float:
    """Chance that a wanted example is above another; NaN where a side is empty."""
    return attack(scores, wanted).auc.value


def members_auc(
    scores: Float[np.ndarray, "target example"], membership: Bool[np.ndarray, "target example"]
) -> Float[np.ndarray, "target"]:
    """AUC of membership within each target."""
    return np.array([auc(row, own) for row, own in zip(scores, membership, strict=True)])


def memorized(score: Float[np.ndarray, "example"]) -> dict[str, Bool[np.ndarray, "example"]]:
    """What of its own examples a target has memorized, by its likelihood ratios."""
    return {"top 10 % LiRA": score >= np.nanquantile(score, MOST), f"LiRA >= {MEMORIZED:g}": score >= MEMORIZED}


Areas = dict[str, dict[str, Float[np.ndarray, "target"]]]
"""AUC of each predictor for each thing to be found, one per target."""


def early_ratios(bank: Bank, early: Sequence[Mapping[str, np.ndarray]]) -> list[Float[np.ndarray, "own"]]:
    """Likelihood ratios of each target as it was early on, for its own examples, judged by the finished others."""
    gaps, found = bank.values("example_gap"), []
    for number, (own, measures) in enumerate(zip(bank.membership, early, strict=True)):
        target = np.full(len(own), np.nan)
        target[own] = measures["logit_gap"]
        found.append(lira(target, gaps, bank.membership, left_out=np.arange(len(bank)) == number).score[own])
    return found


def early_areas(
    bank: Bank,
    early: Sequence[Mapping[str, Float[np.ndarray, "own"]]],
    scores: Float[np.ndarray, "target example"],
    kinds: Mapping[str, Bool[np.ndarray, "example"]],
    signs: Mapping[str, int],
) -> Areas:
    """How well measures of each target's own examples at the trigger find examples of some kinds, and the memorized.

    Args:
        bank: Whose members are the targets.
        early: Measures of each target at the trigger.
        scores: Likelihood ratios at the end.
        kinds: Of all examples.
        signs: Which way each measure points.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for own, score, measures in zip(bank.membership, scores, early, strict=True):
        wanted = {**{what: rows[own] for what, rows in kinds.items()}, **memorized(score[own])}
        for name, sign in signs.items():
            for what, positives in wanted.items():
                found.setdefault(what, {}).setdefault(name, []).append(auc(sign * measures[name], positives))
    return {what: {name: np.array(each) for name, each in row.items()} for what, row in found.items()}


def over_targets(areas: Sequence[Areas]) -> dict[str, dict[str, Interval]]:
    """Means over the targets of all seeds."""
    return {
        what: {name: mean_interval(np.concatenate([each[what][name] for each in areas])) for name in row}
        for what, row in areas[0].items()
    }


def area_rows(
    found: Mapping[str, Mapping[str, Interval]], areas: Sequence[Areas], moment: str = "at the trigger"
) -> list[tuple[Any, ...]]:
    """Rows of a table: of what, measure, value, interval, and the means of single seeds."""
    rows: list[tuple[Any, ...]] = []
    for what, row in found.items():
        for name, interval in row.items():
            single = [mean_interval(each[what][name]).value for each in areas]
            rows.append((f"AUC of {what}, {moment}", name, interval.value, shown(interval), each_seed(single)))
    return rows


def areas_json(areas: Areas) -> dict[str, dict[str, list[float]]]:
    """In JSON terms."""
    return {what: {name: values.tolist() for name, values in row.items()} for what, row in areas.items()}


def each_seed(values: Sequence[float]) -> str:
    """The values of single seeds in a table."""
    return " ".join(f"{value:.3f}" for value in values)


def claim_folder(folder: Path, made_of: str) -> None:
    """The folder is for trainings that are made of this and nothing else.

    Raises:
        IndexMismatch: It holds trainings of something else.
    """
    make_folder(folder)
    path, digest = folder / "made-of.txt", hashlib.sha256(made_of.encode()).hexdigest() + "\n"
    if path.exists() and path.read_text() != digest:
        raise IndexMismatch(f"{folder} holds a training of another model, plan or data. Choose another --out.")
    write_durably(path, [digest.encode()])


def target_file(folder: Path, rows: np.ndarray) -> Path:
    """Where the measures of the target that was trained on these rows are."""
    return folder / f"{hashlib.sha256(np.asarray(rows, dtype=np.int64).tobytes()).hexdigest()[:16]}.parquet"


def keep_measures(path: Path, ids: Sequence[str], measures: Mapping[str, np.ndarray], step: int) -> None:
    """One target's measures of some examples at one step are on disk."""
    make_folder(path.parent)
    write_evidence(path, [evidence_table(ids, measures, checkpoint=step)])


def kept_measures(path: Path) -> tuple[list[str], dict[str, Float[np.ndarray, "example"]], int]:
    """Ids, measures by name and the step, as `keep_measures` left them.

    Raises:
        CorruptFile: The file is not there although the model's numbers are.
    """
    if not path.exists():
        raise CorruptFile(
            f"{path} is missing, though its model is finished. Delete the study's folder and run it again."
        )
    table: pa.Table = read_evidence(path)
    names = [name for name in table.column_names if name not in ("checkpoint", "layer", "example_id")]
    found = {name: table[name].to_numpy() for name in names}
    return table["example_id"].to_pylist(), found, int(table["checkpoint"][0].as_py())


def interval_json(interval: Interval) -> dict[str, Any]:
    """In JSON terms."""
    return dict(interval._asdict())
