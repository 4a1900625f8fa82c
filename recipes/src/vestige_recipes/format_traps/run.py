"""Does a score find the task that a test set asks for, or the form of its answers? Truth by leaving sets out.

The synthetic sets A and B of Isonuma and Titov (2024, arXiv:2401.15241), section 4: a model that has met other
questions is fine-tuned on four sets, with and without each, for the same number of steps.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vestige.banks import EVERYTHING, Bank
from vestige.data import load_examples, tokenize
from vestige.models import load_model
from vestige.training import Recipe, measure
from vestige_recipes.common.sources import (
    AS_PUBLISHED,
    UNLEARNT,
    Agreement,
    Measured,
    Table,
    attribute_sources,
    first_order_scores,
    measure_sources,
    truth_agreement,
    unlearn,
)
from vestige_recipes.common.texts import gpt, write_rows
from vestige_recipes.common.training import Checkpoints, Training, train_checkpoints
from vestige_recipes.format_traps.lessons import (
    END,
    LENGTH,
    TEST,
    TRAINING,
    VOCABULARY,
    Which,
    format_trap,
    lessons,
    tokenize_answer,
)
from vestige_recipes.studies import Gate, Outcome, StudySettings, register_study, show_interval

SETS: tuple[Which, ...] = ("A", "B")
SOURCES = tuple(sorted(TRAINING))
SUMMED = {"BM25": "bm25", "random": "random"}
ORDERED, PEARSON, ABOVE_DOT = 0.75, 0.87, 0.2
"""Expected from what was published: share of models in which both similar sets are above both others, correlation of
UnTrac and UnTrac-Inv with the truth, and how far UnTrac's is above that of inner products."""
FEWEST_SEEDS = 4
_TOKENS_AT_ONCE = 4_096


@dataclass(frozen=True)
class TrapPlan:
    """One size of the study."""

    rows: int
    lessons: int
    lesson_steps: int
    steps: int
    seeds: int
    width: int = 96
    layers: int = 3
    lesson_rate: float = 2e-3
    warmup: int = 200
    learning_rate: float = 1e-4
    batch_size: int = 16
    checkpoints: int = 4
    draws: int = 1_000


PLANS = {
    "tiny": TrapPlan(6, 20, 3, 3, 1, width=8, layers=1, checkpoints=2, draws=20),
    "pocket": TrapPlan(256, 100_000, 7_000, 64, FEWEST_SEEDS),
}


@register_study(PLANS)
def format_traps(settings: StudySettings) -> Outcome:
    """Correlation over the four sets of each method's scores with retraining, and whether tasks are above formats.

    Truth and estimate never share a model: the models that are asked are trained apart from the bank's.
    """
    plan = PLANS[settings.size]
    base = _base(settings, plan)
    rows: list[tuple[Any, ...]] = []
    gates: list[Gate] = []
    details: dict[str, Any] = {"plan": asdict(plan), "sources": SOURCES}
    for which in SETS:
        measured, answers = _measure(settings, plan, base, which)
        truths, found = measured.truths, measured.agreements(plan.draws, settings.seed)
        by_method = {name: [each[name] for each in measured.scores] for name in found}
        ordered = {name: task_above_format(tables) for name, tables in by_method.items()}
        in_truth = task_above_format(truths)
        share = float(np.mean(answers["after"]))
        rows += [(which, "truth (other seed)", truth_agreement(truths), "", in_truth, _show_means(truths), share)]
        rows += sorted(
            (
                (which, name, one.value, show_interval(one, 2), ordered[name], _show_means(by_method[name]), "")
                for name, (one, *_) in found.items()
            ),
            key=lambda row: -row[2],
        )
        gates += _gates(which, found, ordered, in_truth)
        details[which] = {
            "test set": answers,
            **measured.to_json(),
            "agreement": {name: each._asdict() for name, each in found.items()},
            "tasks above formats": ordered | {"truth": in_truth},
        }
    means = f"mean of {', '.join(SOURCES)}"
    columns = ("set", "method", "Pearson", "95 % interval", "tasks above formats", means, "test answered")
    return Outcome(columns, rows, gates, details)


def task_above_format(tables: list[Table]) -> float:
    """Share of the tables in which both sets of the same task (Sim) are above both of another (Dis)."""
    similar = [place for place, name in enumerate(SOURCES) if name.startswith("Sim")]
    others = [place for place in range(len(SOURCES)) if place not in similar]
    return float(np.mean([table[0, similar].min() > table[0, others].max() for table in tables]))


def _base(settings: StudySettings, plan: TrapPlan) -> str:
    """Return the folder of a model that has met numbers, words and questions, none of which the sets ask."""
    texts = write_rows(settings.out / "texts" / "lessons.jsonl", lessons(settings.seed, plan.lessons))
    training = Training(Recipe(plan.lesson_rate, warmup=plan.warmup, batch_size=2 * plan.batch_size), plan.lesson_steps)
    fresh = gpt(VOCABULARY, LENGTH, plan.width, plan.layers, begin=END, end=END)
    return train_checkpoints(fresh, texts, settings.out / "base", training, seed=settings.seed, from_scratch=True).model


def _measure(settings: StudySettings, plan: TrapPlan, base: str, which: Which) -> tuple[Measured, dict[str, Any]]:
    """Return truth and scores, and what models make of the test set."""
    made, folder = format_trap(which, settings.seed, plan.rows), settings.out / which
    sets = {name: [tokenize_answer(row) for row in rows] for name, rows in made.items()}
    data = write_rows(folder / "train.jsonl", [row for name in SOURCES for row in sets[name]])
    queries = write_rows(folder / "queries.jsonl", sets[TEST])

    def score(_: int, out: Path, asked: Checkpoints, truth: Bank) -> dict[str, Table]:
        common = {"model": asked.model, "data": str(data), "queries": str(queries), "seed": settings.seed}
        own = common | settings.launch_arguments
        found = {name: unlearn(out / way, **own, direction=way) for name, way in UNLEARNT.items()}
        found |= first_order_scores(asked.folders, data, queries, seed=settings.seed, inverses=AS_PUBLISHED)
        for name, method in SUMMED.items():
            found[name] = attribute_sources(out / method, truth, **common, method=method)
        return found

    training, seeds = Training(Recipe(plan.learning_rate, plan.batch_size), plan.steps), max(settings.seeds, plan.seeds)
    measured = measure_sources(
        settings,
        base,
        (data, queries),
        folder,
        training,
        score,
        seed=settings.seed,
        seeds=seeds,
        checkpoints=plan.checkpoints,
    )
    return measured, _answers(base, queries, measured.bank)


def _answers(base: str, queries: Path, truth: Bank) -> dict[str, Any]:
    """Share of the questions answered with every token right, before fine-tuning and by the bank's models of all sets.

    Of the latter each run's share and loss, in nats per token.
    """
    loaded, whole = load_model(base), truth.subset_names.index(EVERYTHING)
    asked = tokenize(load_examples(str(queries)), loaded.tokenizer, max_length=LENGTH, name=queries.name)
    before = measure(loaded.model, asked, _TOKENS_AT_ONCE, mean=True)["accuracy"]
    after, losses = (
        truth.by_subset(values)[whole].mean(-1).tolist()
        for values in (truth.values("query_accuracy") == 1, truth.query_token_losses)
    )
    return {"before": float(np.mean(before == 1)), "after": after, "losses": losses}


def _show_means(tables: list[Table]) -> str:
    return " ".join(f"{value:.3g}" for value in np.mean(tables, axis=0)[0])


def _gates(which: Which, found: dict[str, Agreement], ordered: dict[str, float], in_truth: float) -> list[Gate]:
    gates = [Gate(f"{which}: truth has tasks above formats, share of runs", in_truth, ">=", ORDERED)]
    for name in UNLEARNT:
        gates += [
            Gate(f"{which}: {name} has tasks above formats, share of models", ordered[name], ">=", ORDERED),
            Gate(f"{which}: {name}'s Pearson with the truth", found[name].pearson.value, ">=", PEARSON),
        ]
    above = found["UnTrac"].pearson.value - found["GradDot"].pearson.value
    return [*gates, Gate(f"{which}: UnTrac's Pearson above GradDot's by", above, ">=", ABOVE_DOT)]
