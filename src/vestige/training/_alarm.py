"""The early alarm: when losses have fallen, the list of examples that are about to be memorized."""

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float
from torch import nn

from vestige.errors import DataError, SpecError
from vestige.measures import MEASURES, choose_layer, psmi
from vestige.storage import write_durably
from vestige.tables import write_table
from vestige.training._examples import Context, Watched
from vestige.training._store import AT_RISK

Measure = Literal["psmi", "loss", "gap"]
_MEASURES: dict[str, str] = {"psmi": "psmi", "loss": "loss", "gap": "logit_gap"}
"""The measure of an audit that points the same way."""


@dataclass(frozen=True)
class Alarm:
    """When to ring, what to compute then, and whom to flag.

    Without a threshold and a quantile the rule needs no tuning: PSMI at most 0 (Dentan et al. 2024), a gap at most 0
    (another token is likelier than the answer), or a loss no lower than the median was at the start.
    """

    measure: Measure = "psmi"
    layer: int | Literal["last", "smi"] = "last"
    """psmi: whose states; `smi` takes the layer that predicts the training labels best, and uses nothing else."""
    below: float = 0.05
    """Ring when the running median of training losses is below this share of the first one."""
    window: int = 500
    """Losses in a median; never more than one pass over the data has."""
    threshold: float | None = None
    """Flag values at least as much at risk as this one: at most it for psmi and gap, at least it for loss."""
    quantile: float | None = None
    """Flag this share of the examples."""
    seed: int = 0
    """Of the directions of PSMI."""

    def __post_init__(self) -> None:
        if self.measure not in _MEASURES:
            raise SpecError(f"measure={self.measure!r}: choose one of {', '.join(_MEASURES)}.")
        if not 0 < self.below < 1 or self.window < 1:
            raise SpecError(f"below={self.below}, window={self.window}: give a share between 0 and 1, and 1 or more.")
        if self.threshold is not None and self.quantile is not None:
            raise SpecError("threshold and quantile both say whom to flag. Give one of them.")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise SpecError(f"quantile={self.quantile}: give a share between 0 and 1.")
        if self.layer not in ("last", "smi") and not isinstance(self.layer, int):
            raise SpecError(f"layer={self.layer!r}: give last, smi or the number of a layer.")


class Trigger:
    """Triggers once, when the median of the last losses is below a share of the median of the first losses."""

    def __init__(self, below: float, window: int) -> None:
        self._below = below
        self._last: deque[float] = deque(maxlen=window)
        self.first: float | None = None
        """Median of the first `window` losses, None until there are as many."""
        self.rung = False

    def update(self, losses: Iterable[float]) -> bool:
        """Add the losses of one step, but for those that are not finite; return whether the alarm is triggered now."""
        self._last.extend(float(loss) for loss in losses if np.isfinite(loss))
        if self.rung or len(self._last) < (self._last.maxlen or 0):
            return False
        now = float(np.median(self._last))
        if self.first is None:
            self.first = now
        self.rung = now < self._below * self.first
        return self.rung


class AtRisk(NamedTuple):
    """What the alarm found."""

    value: Float[np.ndarray, "example"]
    """NaN where the measure cannot be computed."""
    flagged: Bool[np.ndarray, "example"]
    rank: np.ndarray
    """1 for the example most at risk; those without a value come last."""
    measure: str
    layer: int | None
    rule: str


def find_at_risk(alarm: Alarm, watched: Watched, model: nn.Module, first: float, context: Context) -> AtRisk:
    """Compute the measure of every watched example at the present weights, and flag those that its rule selects.

    `first` is the median loss at the start; `context` is entered around forward passes.
    """
    if alarm.measure == "psmi":
        layer, value = _compute_psmi(alarm, watched, model, context)
    else:
        layer, value = None, getattr(watched.losses(model, context), alarm.measure)
    # 1 where high values are at risk, -1 where low ones are.
    sign = MEASURES.find(_MEASURES[alarm.measure]).sign_for("flag")
    risk = sign * value
    # Stable, so that equals stay in the order of the data; NaN sorts last.
    rank = np.argsort(np.argsort(-risk, kind="stable")) + 1
    flagged, rule = _flag(alarm, risk, rank, sign, first)
    return AtRisk(value, flagged, rank, alarm.measure, layer, rule)


def answer_codes(answers: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return each answer as a number, equal ones alike; an example without one has a number of its own.

    Raises:
        DataError: No two examples share an answer, so that PSMI has no classes.
    """
    numbers: dict[Any, int] = {}
    alone = count(-1, -1)
    codes = np.array([numbers.setdefault(answer, len(numbers)) if answer else next(alone) for answer in answers])
    if not len(codes) or np.unique(codes[codes >= 0], return_counts=True)[1].max(initial=0) < 2:
        raise DataError(
            "No two examples share an answer, and PSMI compares examples of the same answer. For free text choose the "
            "measure loss: --alarm-measure loss, or Alarm(measure='loss')."
        )
    return codes


def write_at_risk(folder: Path, ids: Sequence[str], found: AtRisk, step: int) -> None:
    """Write `at_risk.parquet` and `at_risk.jsonl` into the folder, the examples most at risk first."""
    order = np.argsort(found.rank)
    table = pa.table(
        {
            "example_id": pa.array([ids[row] for row in order], pa.string()),
            "value": pa.array(np.asarray(found.value, dtype=np.float64)[order], from_pandas=True),
            "rank": pa.array(found.rank[order]),
            "flagged": pa.array(found.flagged[order]),
            "rule": pa.array([found.rule] * len(order), pa.string()),
            "measure": pa.array([found.measure] * len(order), pa.string()),
            "layer": pa.array([found.layer] * len(order), pa.int32()),
            "step": pa.array([step] * len(order), pa.int64()),
        }
    )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
    write_durably(folder / f"{AT_RISK}.jsonl", [lines.encode()])
    write_table(folder / f"{AT_RISK}.parquet", table, compression="zstd")


def _compute_psmi(alarm: Alarm, watched: Watched, model: nn.Module, context: Context) -> tuple[int, np.ndarray]:
    codes = answer_codes(watched.answers(model))
    wanted = [-1] if alarm.layer == "last" else None if alarm.layer == "smi" else [int(alarm.layer)]
    states = watched.states(model, context, wanted)
    by = "smi" if alarm.layer == "smi" else "last"
    known = codes >= 0
    layer = choose_layer({number: rows[known] for number, rows in states.items()}, codes[known], by=by, seed=alarm.seed)
    value = np.full(len(codes), np.nan)
    value[known] = psmi(states[layer][known], codes[known], seed=alarm.seed).mean
    return layer, value


def _flag(alarm: Alarm, risk: np.ndarray, rank: np.ndarray, sign: int, first: float) -> tuple[np.ndarray, str]:
    """Return the flagged examples, and the rule in words; NaN is never flagged."""
    if alarm.quantile is not None:
        finite = np.isfinite(risk)
        flagged = finite & (rank <= np.ceil(alarm.quantile * finite.sum()))
        return flagged, f"the {alarm.quantile:.4g} of the examples most at risk by {alarm.measure}"
    untuned = {"psmi": 0.0, "gap": 0.0, "loss": first}[alarm.measure]
    limit, note = (untuned, " (untuned)") if alarm.threshold is None else (alarm.threshold, "")
    return risk >= sign * limit, f"{alarm.measure} {'>=' if sign > 0 else '<='} {limit:.6g}{note}"
