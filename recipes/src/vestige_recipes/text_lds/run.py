"""Linear datamodeling scores of every gradient method on real text, from one bank of halves.

The evaluation of GraSS (Hu et al. 2025, arXiv:2505.18976) on GPT-2 and WikiText-2, and the same in small: a model of
bytes that knows the language of a manual is fine-tuned on halves of some of its chapters, and asked about other pieces
of them. Unlike there, the model that scores are computed on is not one of the bank's.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vestige.data import load_examples
from vestige.evaluate import Estimate, Evaluation, lds
from vestige.indexes import index
from vestige.methods import attribute
from vestige.models import load_model
from vestige.training import Recipe, bank
from vestige_recipes.common.texts import Row, byte_gpt, help_topics, write_rows
from vestige_recipes.common.training import Checkpoints, Training, train_checkpoints
from vestige_recipes.studies import Gate, Outcome, StudySettings, keep_run, register_study, show_interval

DATA = "Salesforce/wikitext:wikitext-2-raw-v1"
_ROWS = 1000
"""Rows that are joined before they are cut; what is left of them is dropped. Published counts follow from it."""


def wikitext(model: str, length: int) -> tuple[list[Row], list[Row]]:
    """Blocks of `length` tokens of the training and the validation split, as this model's tokenizer cuts them."""
    tokenizer = load_model(model).tokenizer
    assert tokenizer is not None, f"{model} has a tokenizer"

    def blocks(split: str) -> list[Row]:
        rows, examples = [], load_examples(DATA, split=split)
        for begin in range(0, len(examples), _ROWS):
            texts = [example.text or "" for example in examples[begin : begin + _ROWS]]
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            tokens = [token for each in encoded for token in each]
            for start in range(0, len(tokens) - length + 1, length):
                ids = tokens[start : start + length]
                row = {"id": f"{split}/{len(rows)}", "source": split, "text": tokenizer.decode(ids), "input_ids": ids}
                rows.append(row)
        return rows

    return blocks("train"), blocks("validation")


EXACT = "influence"
GRADIENTS = ("grad-dot", "grad-cos", "ekfac", "kfac", "datainf")
LIKE_LOGRA = 0.03
"""Within this of LoGra's score FactGraSS was expected."""


@dataclass(frozen=True)
class TextPlan:
    """One size of the study."""

    length: int
    """Tokens of a sequence."""
    subsets: int
    learning_rate: float
    batch_size: int
    epochs: int
    """Passes over its half that each model of the bank makes, and the model that is asked over everything."""
    checkpoints: int
    sketches: tuple[int, ...]
    """Numbers kept of each component's gradient, squares."""
    methods: tuple[str, ...] = (EXACT, *GRADIENTS)
    model: str | None = None
    """A hub id; None for a model of bytes, of the sizes below."""
    width: int = 64
    layers: int = 2
    subjects: int = 0
    sequences: int = 0
    queries: int = 0
    before: int = 0
    steps_before: int = 0


PLANS = {
    "tiny": TextPlan(16, 4, 1e-3, 8, 1, 2, (16,), width=8, layers=1, subjects=2, sequences=16, queries=4, before=64,
                     steps_before=4),
    "pocket": TextPlan(64, 50, 1e-3, 8, 6, 4, (64, 256), subjects=24, sequences=384, queries=48, before=2_000,
                       steps_before=1_000),
    # What exact influence would need at this size is the memory of a gradient of the model for every query.
    "paper": TextPlan(512, 50, 5e-5, 8, 3, 3, (256, 1024, 4096), methods=GRADIENTS, model="openai-community/gpt2"),
}  # fmt: skip


@register_study(PLANS)
def text_lds(settings: StudySettings) -> Outcome:
    """How well each method ranks halves of the data by what models trained on them lose, with intervals."""
    plan = PLANS[settings.size]
    start, data, queries = prepare_texts(settings, plan)
    truth = bank(
        model=start,
        data=str(data),
        queries=str(queries),
        out=settings.out / "bank",
        subsets=plan.subsets,
        seeds=settings.seeds,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        seed=settings.seed,
        **settings.launch_arguments,
    )
    steps = plan.epochs * -(-len(truth.example_ids) // plan.batch_size)
    training = Training(Recipe(plan.learning_rate, plan.batch_size), steps)
    own: dict[str, Any] = {"seed": settings.own_seed, "count": plan.checkpoints}
    asked = train_checkpoints(start, data, settings.out / "model", training, **own)
    runs = _runs(settings, plan, asked, data, queries)
    found = lds(
        bank=settings.out / "bank",
        run=tuple(str(run) for run in runs),
        model=asked.model,
        data=str(data),
        queries=str(queries),
        out=settings.out / "lds",
        seed=settings.seed,
    )
    names = [run.name for run in runs] + [row.method for row in found.rows[len(runs) :]]
    return _outcome(found, names, plan)


def prepare_texts(settings: StudySettings, plan: TextPlan) -> tuple[str, Path, Path]:
    """Return the model that every training begins with, the training data and the queries."""
    texts = settings.out / "texts"
    data, queries = texts / "train.jsonl", texts / "queries.jsonl"
    if plan.model is not None:
        if not queries.exists():
            train, asked = wikitext(plan.model, plan.length)
            write_rows(data, train)
            write_rows(queries, asked)
        return plan.model, data, queries
    made = help_topics(
        settings.seed,
        length=plan.length,
        subjects=plan.subjects,
        sequences=plan.sequences,
        queries=plan.queries,
        before=plan.before,
    )
    write_rows(data, made.train)
    write_rows(queries, made.queries)
    return train_start(settings, plan, write_rows(texts / "before.jsonl", made.before)), data, queries


def train_start(settings: StudySettings, plan: TextPlan, read: Path) -> str:
    """Return the model of bytes that every training begins with, trained on what it has read before."""
    before = Training(Recipe(3e-3, 16), plan.steps_before)
    fresh = byte_gpt(plan.length, plan.width, plan.layers)
    return train_checkpoints(fresh, read, settings.out / "start", before, seed=settings.seed).model


def _runs(settings: StudySettings, plan: TextPlan, asked: Checkpoints, data: Path, queries: Path) -> list[Path]:
    """Folders of the runs, named by what they are."""
    streamed: dict[str, Any] = {"data": str(data)}
    wanted: dict[str, dict[str, Any]] = {
        name: streamed | {"model": asked.model, "method": name} for name in plan.methods
    }
    weights = {"checkpoints": asked.folders, "checkpoint_weights": tuple(asked.rates)}
    wanted["tracin"] = streamed | weights | {"method": "tracin"}
    wanted["trak-1"] = streamed | {"checkpoints": [asked.model], "method": "trak"}
    for name, spec in sketches(plan.sketches).items():
        made = settings.out / "indexes" / name
        index(model=asked.model, data=str(data), out=made, compress=spec, dtype="float32", **settings.launch_arguments)
        wanted[f"influence {name}"] = {"index": str(made), "method": "influence"}
    folders = []
    for name, arguments in wanted.items():
        folders.append(settings.out / "runs" / name)
        common = {"queries": str(queries), "dense": True, "trust": False, "seed": settings.seed}
        keep_run(attribute, folders[-1], **arguments, **common)
    return folders


def sketches(sizes: tuple[int, ...]) -> dict[str, str]:
    """FactGraSS and LoGra at each size: masks twice as long as LoGra's sides, as published."""
    found = {}
    for size in sizes:
        side = round(size**0.5)
        found[f"FactGraSS {size}"] = f"mask:{2 * side}x{2 * side} | sjlt:{size}"
        found[f"LoGra {size}"] = f"logra:{side}x{side}"
    return found


def _outcome(found: Evaluation, names: list[str], plan: TextPlan) -> Outcome:
    scores: dict[str, Estimate] = {}
    rows = []
    for name, row in zip(names, found.rows, strict=True):
        estimate = row.values["LDS"]
        assert isinstance(estimate, Estimate)
        scores[name] = estimate
        rows.append((name, estimate.value, show_interval(estimate), row.values["single seeds"] or "", row.seconds))
    rows.sort(key=lambda row: -row[1])
    rows.insert(0, ("noise ceiling", found.details["noise_ceiling"], "", "", ""))
    gates = [
        Gate(f"{name}: LDS above grad-dot's by", scores[name].value - scores["grad-dot"].value, ">=")
        for name in (EXACT, "ekfac")
        if name in scores
    ]
    for size in plan.sketches:
        logra, fact = (scores[f"influence {name} {size}"].value for name in ("LoGra", "FactGraSS"))
        gates.append(Gate(f"FactGraSS {size}: LDS below LoGra's by", logra - fact, "<=", LIKE_LOGRA))
    details = {"plan": asdict(plan), "lds": found.to_json(), "files": list(found.files)}
    return Outcome(("method", "LDS", "95 % interval", "single seeds", "seconds"), rows, gates, details)
