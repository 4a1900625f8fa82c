"""UnTrac against leaving sources out, in miniature: eight made corpora, a model of one layer, everything retrained.

The experiment of Isonuma and Titov (2024, arXiv:2401.15241), section 5, with corpora whose mixing is known. Truth is
the rise of each test set's loss in a model trained without a source, for the same number of steps. Eight points are
few, and how well anything predicts them depends on the corpora that were drawn, so they are drawn several times.
"""

import string
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import nn

from vestige.banks import Bank
from vestige.errors import NonFinite
from vestige.training import Recipe
from vestige_recipes.common.sources import (
    UNLEARNT,
    Measured,
    Table,
    attribute_sources,
    first_order_scores,
    list_sources,
    measure_sources,
    pool_agreement,
    truth_agreement,
    unlearn,
)
from vestige_recipes.common.texts import gpt, write_rows
from vestige_recipes.common.training import Checkpoints, Training
from vestige_recipes.studies import Gate, Outcome, StudySettings, register_study, show_interval

VOCABULARY, LENGTH = 24, 25
UNRELATED = "unrelated"


class MarkovCorpora(NamedTuple):
    """Training corpora, test sets, and the recipe of the former."""

    train: list[dict[str, Any]]
    """Rows with `id`, `input_ids`, `source`, and a `text` that has a word for each transition."""
    tests: list[dict[str, Any]]
    mixing: Float[np.ndarray, "corpus chain"]
    """Share of each corpus that comes from each test chain; the rest is its own."""
    names: list[str]
    """Of the corpora, in the order in which sources are sorted."""


def markov_corpora(
    seed: int, *, corpora: int = 8, sequences: int = 320, chains: int = 4, test_sequences: int = 64
) -> MarkovCorpora:
    """`corpora` sources that mix `chains` test chains with a chain of their own; the last has nothing of the tests.

    A chain is a table of transition probabilities with few likely successors. Which chain a sequence is from is hidden.
    """
    random = np.random.default_rng([seed, 24])
    tables = [_table(random) for _ in range(chains)]
    mixing = random.dirichlet(np.full(chains, 0.5), corpora) * random.uniform(0.3, 0.9, (corpora, 1))
    mixing[-1] = 0
    names = [*(f"corpus-{number}" for number in range(corpora - 1)), UNRELATED]
    train = []
    for name, shares in zip(names, mixing, strict=True):
        own = _table(random)
        picks = random.choice(chains + 1, sequences, p=[*shares, 1 - shares.sum()])
        train += [
            _row(f"{name}/{place}", name, _walk(random, [*tables, own][pick])) for place, pick in enumerate(picks)
        ]
    tests = [
        _row(f"chain-{number}/{place}", f"chain-{number}", _walk(random, table))
        for number, table in enumerate(tables)
        for place in range(test_sequences)
    ]
    return MarkovCorpora(train, tests, mixing, names)


def _row(name: str, source: str, walked: list[int]) -> dict[str, Any]:
    states = string.ascii_lowercase
    text = " ".join(states[one] + states[two] for one, two in pairwise(walked))
    return {"id": name, "source": source, "text": text, "input_ids": walked}


def _table(random: np.random.Generator) -> np.ndarray:
    return random.dirichlet(np.full(VOCABULARY, 0.1), VOCABULARY)


def _walk(random: np.random.Generator, table: np.ndarray) -> list[int]:
    steps = table.cumsum(1)
    state = int(random.integers(VOCABULARY))
    walked = [state]
    for draw in random.random(LENGTH - 1):
        state = min(int(np.searchsorted(steps[state], draw)), VOCABULARY - 1)
        walked.append(state)
    return walked


GRID = (5e-5, 1.6e-4, 5e-4, 1.6e-3, 5e-3)
RETAINING = {"UnTrac-Inv, retaining": False, "UnTrac-Inv, retaining, accelerated": True}
"""And whether steps have momentum."""
_RETAINING = {"direction": "inverse", "optimizer": "sgd", "retain": 128, "points": 1}
LEAST, OF_CEILING, WITHIN = 0.85, 0.9, 0.03
"""What a pilot of this miniature led to expect: correlation, share of the ceiling, distance from the best rate."""


@dataclass(frozen=True)
class MiniaturePlan:
    """One size of the study."""

    corpora: int
    """How often all sources are drawn, with seeds that follow each other."""
    sources: int = 8
    chains: int = 4
    sequences: int = 320
    tests: int = 64
    steps: int = 320
    batch_size: int = 16
    learning_rate: float = 3e-3
    checkpoints: int = 8
    grid: tuple[float, ...] = GRID
    """Rates beside the automatic one, on the first model that is asked of each draw."""
    retaining_steps: int = 40
    draws: int = 1_000
    """Of the bootstrap."""


PLANS = {
    "tiny": MiniaturePlan(1, 4, 2, 6, 3, 3, 8, checkpoints=2, grid=(1e-4,), retaining_steps=2, draws=20),
    "pocket": MiniaturePlan(3),
}


class Drawn(NamedTuple):
    """One draw of the corpora; the rates of the grid are scored on the first model alone."""

    corpora: MarkovCorpora
    measured: Measured


@register_study(PLANS)
def untrac_miniature(settings: StudySettings) -> Outcome:
    """UnTrac, UnTrac-Inv and opponents beside leave-source-out retraining: Pearson over corpora, mean over test sets.

    Truth and estimate never share a model: the models that are asked are trained apart from the bank's.
    """
    plan = PLANS[settings.size]
    found = [_draw(settings, plan, settings.seed + number) for number in range(plan.corpora)]
    ceilings = [truth_agreement(each.measured.truths) for each in found]
    ceiling = float(np.mean(ceilings))
    judged = {name: _judge(found, name, plan, settings.seed) for name in found[0].measured.scores[0]}
    rows: list[tuple[Any, ...]] = [("truth of another seed (ceiling)", ceiling, "", _each(ceilings))]
    known = [([each.corpora.mixing.T], each.measured.truths) for each in found]
    mixing, by_draw = pool_agreement(known, draws=0, seed=0)
    rows += [("known mixing", mixing.value, "", _each(by_draw))]
    rows += [(name, each.value, show_interval(each, 2), _each(by_draw)) for name, (each, by_draw) in judged.items()]
    details = {
        "plan": asdict(plan),
        "ceiling": ceilings,
        "agreement": {name: {"mean": each._asdict(), "by draw": own} for name, (each, own) in judged.items()},
        "draws": [{"mixing": each.corpora.mixing.tolist(), **each.measured.to_json()} for each in found],
    }
    gates = []
    if settings.size != "tiny":
        nulls = [_null_gate(found, name) for name in ("UnTrac-Inv, automatic", *RETAINING)]
        gates = [*_gates(found, judged, ceiling), *nulls]
    return Outcome(("method", "mean Pearson", "95 % interval", "by draw"), rows, gates, details)


def tiny_gpt() -> nn.Module:
    """Return a model of one layer of 48 units; the bank draws its weights."""
    return gpt(VOCABULARY, LENGTH, 48, 1, begin=0, end=1)


def _draw(settings: StudySettings, plan: MiniaturePlan, seed: int) -> Drawn:
    corpora = markov_corpora(
        seed, corpora=plan.sources, sequences=plan.sequences, chains=plan.chains, test_sequences=plan.tests
    )
    folder = settings.out / f"draw-{seed}"
    data = write_rows(folder / "train.jsonl", corpora.train)
    queries = write_rows(folder / "queries.jsonl", corpora.tests)

    def score(number: int, out: Path, asked: Checkpoints, truth: Bank) -> dict[str, Table]:
        common = {"model": asked.model, "data": str(data), "queries": str(queries), **settings.launch_arguments}
        found = {}
        for name, direction in UNLEARNT.items():
            found[f"{name}, automatic"] = unlearn(out / direction, **common, direction=direction)
            for rate in () if number else plan.grid:
                fixed = {**common, "direction": direction, "learning_rate": rate, "stop": "last", "points": 1}
                try:
                    found[f"{name}, {rate:g}"] = unlearn(out / f"{direction}-{rate:g}", **fixed)
                except NonFinite:
                    # A rate of the grid that destroys the model has no scores, which is what the grid is to show.
                    found[f"{name}, {rate:g}"] = np.full([len(each) for each in list_sources(truth)[::-1]], np.nan)
        for name, accelerate in RETAINING.items():
            asking = {**common, **_RETAINING, "steps": plan.retaining_steps, "accelerate": accelerate}
            found[name] = unlearn(out / f"inverse-{'accelerated' if accelerate else 'retaining'}", **asking)
        found |= first_order_scores(asked.folders, data, queries, seed=settings.seed)
        return found | {"BM25": attribute_sources(out / "bm25", truth, **common, method="bm25")}

    measured = measure_sources(
        settings,
        tiny_gpt(),
        (data, queries),
        folder,
        Training(Recipe(plan.learning_rate, plan.batch_size), plan.steps),
        score,
        seed=seed,
        seeds=max(settings.seeds, 2),
        checkpoints=plan.checkpoints,
        from_scratch=True,
    )
    return Drawn(corpora, measured)


def _judge(found: list[Drawn], name: str, plan: MiniaturePlan, seed: int) -> Any:
    groups = [([one[name] for one in each.scores if name in one], each.truths) for _, each in found]
    return pool_agreement(groups, draws=plan.draws, seed=seed)


def _each(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _gates(found: list[Drawn], judged: dict[str, Any], ceiling: float) -> list[Gate]:
    gates = []
    for name in UNLEARNT:
        value = judged[f"{name}, automatic"][0].value
        # The grid was run on the first model of each draw alone, so the automatic rate is compared on that one.
        groups = [([each.scores[0][f"{name}, automatic"]], each.truths) for _, each in found]
        on_first = pool_agreement(groups, draws=0, seed=0)[0].value
        best = float(np.nanmax([judged[f"{name}, {rate:g}"][0].value for rate in GRID]))
        gates += [
            Gate(f"{name}: correlation with retraining", value, ">=", LEAST),
            Gate(f"{name}: share of the ceiling", value / ceiling, ">=", OF_CEILING),
            Gate(f"{name}: automatic rate below the best of the grid by", best - on_first, "<=", WITHIN),
        ]
    return gates


def _null_gate(found: list[Drawn], name: str) -> Gate:
    """Scores, put on the scale of truth, of a corpus that has nothing of the tests: below the noise of retraining.

    Leaving it out means more steps on the others, so its truth is that of training longer on them; what counts is
    how far its score lies from there, in units of the difference between two seeds.
    """
    shares = []
    for corpora, each in found:
        place = corpora.names.index(UNRELATED)
        truth = np.mean(each.truths, axis=0)
        noise = float(np.std(np.stack(each.truths), axis=0, ddof=1).mean())
        for scores in each.scores:
            for one, right in zip(scores[name], truth, strict=True):
                slope, shift = np.polyfit(one, right, 1)
                shares.append(abs(slope * one[place] + shift - right[place]) / noise)
    return Gate(f"{name}: error for the unrelated corpus over retraining noise", float(np.mean(shares)), "<=", 1.0)
