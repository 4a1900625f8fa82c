"""Which of eight domains of real text made a model toxic, biased or truthful: scores against leaving each domain out.

The pretraining experiment of Isonuma and Titov (2024, arXiv:2401.15241), section 5: eight corpora of equal and of
unequal sizes, a model trained on them from scratch, and the truth from training it without each of them for the same
number of steps. In small on texts that ship inside packages; at full size on corpora that the user puts there.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vestige.banks import Bank
from vestige.errors import DataError
from vestige.methods import attribute, untrac
from vestige.models import Recipe
from vestige_recipes.common.registry import Gate, Outcome, StudySettings, registered
from vestige_recipes.common.sources import (
    UNLEARNT,
    Agreement,
    Table,
    asked_models,
    left_out_bank,
    left_out_truth,
    source_agreement,
    summed_by_source,
    truth_agreement,
)
from vestige_recipes.common.steps import draw_intervals, kept_run, shown_interval
from vestige_recipes.common.texts import byte_gpt, write_rows
from vestige_recipes.common.training import Checkpoints, Training
from vestige_recipes.domains.texts import domain_corpora

SUMMED = {"GradDot": "grad-dot", "GradCos": "grad-cos", "TracIn": "tracin", "BM25": "bm25", "random": "random"}
OPPONENTS = ("BM25", "random")


@dataclass(frozen=True)
class DomainPlan:
    """One size of the study."""

    length: int
    steps: int
    batch_size: int
    learning_rate: float
    checkpoints: int
    sequences: int = 0
    """Of a domain, on average."""
    tests: int = 0
    width: int = 64
    layers: int = 2
    draws: int = 1_000
    """Bootstrap draws behind each interval."""
    model: str | None = None
    """A hub id whose architecture is trained on corpora in the folder; None for a model of bytes."""


PLANS = {
    "tiny": DomainPlan(16, 4, 8, 1e-3, 2, sequences=8, tests=4, width=8, layers=1, draws=50),
    "pocket": DomainPlan(64, 500, 16, 3e-3, 5, sequences=320, tests=64),
    "paper": DomainPlan(1024, 40_000, 8, 5e-5, 4, model="facebook/opt-125m"),
}


@registered(PLANS)
def domains(settings: StudySettings) -> Outcome:
    """Correlation over domains of each method's scores with retraining, for equal and unequal domains.

    Truth and estimate never share a model: the models that are asked are trained apart from the bank's.
    """
    plan = PLANS[settings.size]
    rows: list[tuple[Any, ...]] = []
    gates: list[Gate] = []
    details: dict[str, Any] = {"plan": asdict(plan)}
    for part in ("equal", "unequal"):
        truths, scores, axes = _measured(settings, plan, part)
        found = {
            name: source_agreement([each[name] for each in scores], truths, draws=plan.draws, seed=settings.seed)
            for name in scores[0]
        }
        ceiling = truth_agreement(truths)
        rows += [(part, "truth of another seed", ceiling, "", "", "", "")]
        rows += sorted((_row(part, name, each) for name, each in found.items()), key=lambda row: -row[2])
        _draw(settings.out, part, found, ceiling)
        difference = found["UnTrac-Inv"].pearson.value - found["GradDot"].pearson.value
        gates.append(Gate(f"{part} sizes: UnTrac-Inv's Pearson above GradDot's by", difference, ">=", 0.0))
        details[part] = axes | {
            "ceiling": ceiling,
            "agreement": {name: each._asdict() for name, each in found.items()},
            "truth": [truth.tolist() for truth in truths],
            "scores": [{name: table.tolist() for name, table in each.items()} for each in scores],
        }
    columns = ("sizes", "method", "Pearson", "95 % interval", "Spearman", "95 % interval of it", "Pearson by test set")
    # A handful of steps shows that everything runs, and nothing else.
    return Outcome(columns, rows, [] if settings.size == "tiny" else gates, details)


def _row(part: str, name: str, found: Agreement) -> tuple[Any, ...]:
    both = [(each.value, shown_interval(each, 2)) for each in (found.pearson, found.spearman)]
    return part, name, *both[0], *both[1], " ".join(f"{value:.2f}" for value in found.by_test)


def _draw(out: Path, part: str, found: dict[str, Agreement], ceiling: float) -> None:
    intervals = {name: each.pearson for name, each in found.items()}
    label = f"Pearson correlation over domains of {part} sizes (95 % intervals)"
    draw_intervals(out, part, intervals, label, beside=OPPONENTS, lines={"seed against seed": ceiling})


def _measured(
    settings: StudySettings, plan: DomainPlan, part: str
) -> tuple[list[Table], list[dict[str, Table]], dict[str, Any]]:
    """Truth of each seed, scores of each model that was asked, and what their axes and sizes are."""
    folder = settings.out / part
    data, queries = _texts(settings, plan, part)
    training = Training(Recipe(plan.learning_rate), plan.steps, plan.batch_size)
    truth = left_out_bank(
        settings, _start(plan), (data, queries), folder, training, seed=settings.seed, seeds=settings.seeds,
        from_scratch=True,
    )  # fmt: skip
    sources, sizes = np.unique(np.array(truth.sources), return_counts=True)
    tests = list(dict.fromkeys(str(test) for test in truth.query_sources))
    names = [str(source) for source in sources]
    scores = []
    models = asked_models(_start(plan), data, folder, training, settings.seeds, plan.checkpoints, from_scratch=True)
    for number, asked in enumerate(models):
        scores.append(_scores(settings, folder / f"runs-{number}", asked, (data, queries), truth, (tests, names)))
    axes = {"domains": names, "sizes": sizes.tolist(), "tests": tests}
    return left_out_truth(truth, names, tests), scores, axes


def _texts(settings: StudySettings, plan: DomainPlan, part: str) -> tuple[Path, Path]:
    """Training data and test sets of one part.

    Raises:
        DataError: At full size, when the corpora are not there.
    """
    texts = settings.out / part / "texts"
    data, queries = texts / "train.jsonl", texts / "queries.jsonl"
    if plan.model is None:
        made = domain_corpora(
            settings.seed, length=plan.length, sequences=plan.sequences, tests=plan.tests, unequal=part == "unequal"
        )
        return write_rows(data, made.train), write_rows(queries, made.tests)
    absent = [str(path) for path in (data, queries) if not path.exists()]
    if absent:
        raise DataError(
            f"The published corpora cannot be shipped, and {' and '.join(absent)} is not there. Put JSON lines there: "
            f"`id`, `source` (the corpus, or the test set) and `input_ids` of at most {plan.length} tokens, or `text`. "
            "README.md beside the study (vestige_recipes/domains) names corpora, sizes and test sets."
        )
    return data, queries


def _start(plan: DomainPlan) -> Any:
    return plan.model or byte_gpt(plan.length, plan.width, plan.layers)


def _scores(
    settings: StudySettings,
    out: Path,
    asked: Checkpoints,
    files: tuple[Path, Path],
    truth: Bank,
    axes: tuple[list[str], list[str]],
) -> dict[str, Table]:
    """Scores of every domain for every test set, by method."""
    data, queries = (str(path) for path in files)
    tests, sources = axes
    found = {}
    common = {"data": data, "queries": queries, "seed": settings.seed}
    for name, direction in UNLEARNT.items():
        run = kept_run(untrac, out / direction, **common, model=asked.model, direction=direction)
        # Both list sources by name, and test sets as they come.
        found[name] = run.dense().astype(np.float64)
    sizes = np.array([truth.sources.count(name) for name in sources])
    found |= {f"{name} x size": found[name] * sizes for name in UNLEARNT if len(set(sizes)) > 1}
    for name, method in SUMMED.items():
        several = {"checkpoints": asked.folders, "checkpoint_weights": tuple(asked.rates)}
        models = several if method == "tracin" else {"model": asked.model}
        wanted: dict[str, Any] = {"method": method, "components": ("all",), "dense": True, "trust": False}
        run = kept_run(attribute, out / method, **common, **models, **wanted)
        found[name] = summed_by_source(run.dense(), truth.query_sources, truth.sources, tests, sources)
    return found
