"""Secrets planted 1, 4, 16 and 64 times in a tiny GPT's training text: how well they are guessed, and given back.

Exposure (Carlini et al. 2019, "The secret sharer") and extraction (Carlini et al. 2021) as the number of copies grows,
beside secrets of the same form that were never planted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.measures import Interval, exposure, extraction, greedy, share
from vestige.models import load_model
from vestige.progress import announce, progress
from vestige.training import Recipe
from vestige_recipes.common.texts import byte_gpt, byte_rows, help_topics, write_rows
from vestige_recipes.common.training import Training, train_checkpoints
from vestige_recipes.memorization.judging import mean_interval, table_row
from vestige_recipes.memorization.targets import claim_folder, keep_measures, read_measures
from vestige_recipes.studies import Gate, Outcome, StudySettings, draw_intervals, register_study

COPIES = (0, 1, 4, 16, 64)
DIGITS = 8
BY_CHANCE, NEAR_CHANCE = 1.4427, 1.0
"""Bits of exposure that a secret which was never planted has on average, and how far from them they may be."""
_READ_AT_ONCE = 256
"""Secrets."""


@dataclass(frozen=True)
class CanaryPlan:
    """One size of the study."""

    canaries: int
    """For each number of copies."""
    candidates: int
    """Other secrets that each is compared with."""
    text: int
    """Pieces of ordinary text."""
    epochs: int
    width: int
    layers: int
    length: int = 48
    learning_rate: float = 2e-3
    batch_size: int = 16


PLANS = {
    "tiny": CanaryPlan(canaries=2, candidates=15, text=32, epochs=1, width=8, layers=1),
    "pocket": CanaryPlan(canaries=12, candidates=511, text=2_000, epochs=4, width=64, layers=2),
}


class Canaries(NamedTuple):
    """Secrets that each belong to a name of their own."""

    beginnings: list[bytes]
    """What stands before each secret, of one length."""
    secrets: list[bytes]
    """Digits."""
    copies: Int[np.ndarray, "canary"]

    @property
    def texts(self) -> list[bytes]:
        """The whole canaries."""
        return [beginning + secret for beginning, secret in zip(self.beginnings, self.secrets, strict=True)]


@register_study(PLANS)
def memorization_canaries(settings: StudySettings) -> Outcome:
    """Exposure in bits and extraction of secrets by how often they were planted, over several models."""
    plan, found = PLANS[settings.size], []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        found.append(_measure(plan, seed, settings.out / f"seed-{seed}"))
        means = ", ".join(f"{count}: {_of(found[-1], 'exposure', count).mean():.2f}" for count in COPIES)
        announce(f"Model {seed}: mean exposure by copies {means}")
    measures: dict[str, tuple[str, Callable[[np.ndarray], Interval]]] = {
        "exposure, bits": ("exposure", mean_interval),
        "given back word for word": ("similarity", _rate),
        "similarity of what is given back": ("similarity", mean_interval),
    }
    rows: list[tuple[Any, ...]] = []
    intervals: dict[str, dict[int, Interval]] = {}
    for measure, (name, judge) in measures.items():
        for count in COPIES:
            single = [_of(each, name, count) for each in found]
            interval = judge(np.concatenate(single))
            rows.append(table_row(count, measure, interval, [judge(each).value for each in single]))
            intervals.setdefault(measure, {})[count] = interval
    exposures, given = intervals["exposure, bits"], intervals["given back word for word"]
    most = float(np.log2(plan.candidates + 1))
    lines = {"chance": BY_CHANCE, "most that can be distinguished": most}
    label = "exposure, bits (95 % interval over canaries)"
    by_copies = {f"{count} copies": each for count, each in exposures.items()}
    draw_intervals(settings.out, "canaries", by_copies, label, beside=["0 copies"], lines=lines)
    details = {
        "plan": asdict(plan),
        "largest exposure": most,
        "models": [{name: values.tolist() for name, values in each.items()} for each in found],
    }
    columns = ("copies", "measure", "value", "95 % interval", "single models")
    return Outcome(columns, rows, gates_of(exposures, given), details)


def gates_of(exposures: Mapping[int, Interval], given: Mapping[int, Interval]) -> list[Gate]:
    """Return the gates: both rise with the copies, and a secret that was never planted is guessed by chance."""
    rising = [
        Gate(f"{what}: {more} copies above {fewer} by{unit}", found[more].value - found[fewer].value, ">=")
        for what, unit, found in (("exposure", ", bits", exposures), ("given back", "", given))
        for fewer, more in pairwise(COPIES)
    ]
    apart, off = exposures[COPIES[-1]].low - exposures[COPIES[1]].high, abs(exposures[0].value - BY_CHANCE)
    return [
        *rising,
        Gate(f"exposure: lower end of {COPIES[-1]} copies above the upper end of {COPIES[1]} by", apart, ">="),
        Gate(f"exposure of what was never planted: away from {BY_CHANCE:.2f} bits by", off, "<=", NEAR_CHANCE),
    ]


def make_canaries(each: int, seed: int) -> Canaries:
    """Sentences such as "the secret code of agent KQ is 48151623", names and digits drawn at random."""
    draw = np.random.default_rng([seed, len("canaries")])
    count = each * len(COPIES)
    names = draw.choice(26 * 26, count, replace=False)
    letters = [f"{chr(65 + name // 26)}{chr(65 + name % 26)}" for name in names.tolist()]
    beginnings = [f"the secret code of agent {name} is ".encode() for name in letters]
    return Canaries(beginnings, _digits(draw, count), np.repeat(COPIES, each))


def _digits(draw: np.random.Generator, count: int) -> list[bytes]:
    return ["".join(map(str, row)).encode() for row in draw.integers(0, 10, (count, DIGITS)).tolist()]


def _measure(plan: CanaryPlan, seed: int, folder: Path) -> dict[str, np.ndarray]:
    """Exposure, similarity of what is given back, loss and copies of each canary, of the model of this seed."""
    path, canaries = folder / "canaries.parquet", make_canaries(plan.canaries, seed)
    claim_folder(folder, f"{plan} {seed}")
    if not path.exists():
        model = _model(plan, canaries, seed, folder)
        texts = [np.frombuffer(text, dtype=np.uint8).astype(np.int64) for text in canaries.texts]
        prefix = len(canaries.beginnings[0])
        back = extraction(texts, greedy(model), prefixes=(prefix,), continuation=DIGITS)
        measures = {
            **_exposures(model, canaries, plan, seed),
            "similarity": back.similarity[0],
            "copies": canaries.copies,
        }
        keep_measures(path, [text.decode() for text in canaries.texts], measures, 0)
    return read_measures(path)[1]


def _model(plan: CanaryPlan, canaries: Canaries, seed: int, folder: Path) -> nn.Module:
    """Return a GPT trained on text in which each canary stands so often as it should."""
    made = help_topics(seed, length=plan.length, subjects=1, sequences=1, queries=0, before=plan.text)
    planted = [text for text, count in zip(canaries.texts, canaries.copies, strict=True) for _ in range(count)]
    data = write_rows(folder / "texts.jsonl", [*made.before, *byte_rows(planted, "canary")])
    rows = len(made.before) + len(planted)
    steps = plan.epochs * -(-rows // plan.batch_size)
    training = Training(Recipe(plan.learning_rate, plan.batch_size), steps)
    fresh = byte_gpt(plan.length, plan.width, plan.layers)
    return load_model(
        train_checkpoints(fresh, data, folder / "model", training, seed=seed, from_scratch=True).model
    ).model


def _exposures(model: nn.Module, canaries: Canaries, plan: CanaryPlan, seed: int) -> dict[str, np.ndarray]:
    """Each secret among others after the same beginning."""
    draw = np.random.default_rng([seed, len("candidates")])
    bits, losses = [], []
    with progress(len(canaries.secrets), "Exposure", unit="canaries") as counter:
        for beginning, secret in zip(canaries.beginnings, canaries.secrets, strict=True):
            other = _digits(draw, plan.candidates)
            found = _losses(model, beginning, [secret, *other])
            bits.append(exposure(found[:1], found[1:])[0])
            losses.append(found[0])
            counter.advance()
    return {"exposure": np.array(bits), "loss": np.array(losses)}


@torch.no_grad()
def _losses(model: nn.Module, beginning: bytes, secrets: Sequence[bytes]) -> Float[np.ndarray, "secret"]:
    """Loss of each secret's digits after the beginning, nats, float64."""
    tokens = torch.tensor([list(beginning + secret) for secret in secrets])
    parts: list[Tensor] = []
    for some in tokens.split(_READ_AT_ONCE):
        output: Any = model(input_ids=some, use_cache=False)
        chances = output.logits[:, len(beginning) - 1 : -1].double().log_softmax(-1)
        parts.append(-chances.gather(-1, some[:, len(beginning) :, None])[..., 0].sum(1))
    return torch.cat(parts).numpy()


def _of(found: Mapping[str, np.ndarray], name: str, count: int) -> Float[np.ndarray, "canary"]:
    return found[name][found["copies"] == count]


def _rate(similarity: Float[np.ndarray, "canary"]) -> Interval:
    return share(int((similarity == 1.0).sum()), len(similarity))
