"""Select or Project on verses: a small model learns one wording, and is asked about another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.evaluate import Evaluation, OnePassResult, components, one_pass_result
from vestige.models import Recipe
from vestige.settings import ComponentsSettings
from vestige_recipes.common.registry import Gate, StudySettings
from vestige_recipes.common.steps import launched
from vestige_recipes.common.texts import byte_llama, write_rows
from vestige_recipes.common.training import Training, trained
from vestige_recipes.select_or_project.parts import Part, ahead_of, component_rows, gates_of_sets
from vestige_recipes.select_or_project.protocol import direct_gradients, projection_errors
from vestige_recipes.select_or_project.texts import verse_pairs

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
    asked = _asked(settings, plan, out)
    found = components(**asked)
    result = one_pass_result(ComponentsSettings(**asked))
    direct = direct_gradients(result, plan.candidates[0], plan.checked)
    errors = projection_errors(result, plan.candidates[-2])
    passes = found.details["passes"]
    words = plan.candidates[0]
    expected = [
        Gate(
            f"verses, {words}: full gradient minus BM25",
            ahead_of(found, words, "full gradient", "bm25 of the prompts"),
            ">=",
            0.0,
        ),
        *gates_of_sets("verses", found, words, 0.01),
        Gate("verses: sum of components minus direct cosine, largest", direct.largest_difference, "<=", 1e-6),
        Gate("verses: gradients computed, of each distinct example", _passes_each(result), "<=", 1.0),
    ]
    if all(share in errors for share in SHARES):
        low, high = (errors[share] for share in SHARES)
        expected += [
            Gate("verses: error of the projection, 1 % over 5 %", low.to_full / high.to_full, ">=", 1.9),
            Gate("verses: as published, from the weighted cosine, 1 % over 5 %", low.apart / high.apart, ">=", 1.9),
            Gate("verses: as published, 5 %: from the full over from the weighted", high.off / high.apart, ">=", 1.0),
        ]
    details = {
        "passes": passes,
        "seconds": found.details["seconds_of"],
        "direct": direct._asdict(),
        "projections": {name: one._asdict() for name, one in errors.items()},
        "cost": _cost(found, direct.seconds),
    }
    return Part(component_rows("verses", found), expected, details)


def _asked(settings: StudySettings, plan: VersesPlan, out: Path) -> dict[str, Any]:
    """Return the settings of `vestige evaluate components`, once its texts and its model are there."""
    chosen = verse_pairs(plan.verses, plan.shortest, plan.longest, settings.seed)
    learnt = [_verse(str(one.number), one.text) for one in chosen]
    reworded = [_verse(f"reworded-{one.number}", one.other, str(one.number)) for one in chosen[: plan.queries]]
    data, queries = write_rows(out / "train.jsonl", learnt), write_rows(out / "queries.jsonl", reworded)
    model = trained(
        byte_llama(plan.longest, plan.width, plan.layers),
        data,
        out / "model",
        Training(Recipe(plan.learning_rate), plan.steps, plan.batch_size),
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
        **launched(settings),
    }


def _verse(name: str, text: str, original: str | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"id": name, "text": text, "input_ids": list(text.encode())}
    return row if original is None else row | {"original_id": original}


def _passes_each(result: OnePassResult) -> float:
    return result.computed / len(result.inputs.compared.data)


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
