"""Facts that a tiny GPT reads once, 4 or 16 times, and wrong answers, among multiple-choice prompts of a rule.

What measures at the trigger say of what will be memorized, what every measure says of membership at the end, and how
the likelihood ratio rises with repetition: the set-up of Dentan et al. 2024 (arXiv:2409.18858) on generated prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import nn

from vestige.measures import Interval, blind, extraction, greedy, mahalanobis, perplexity_ratio, psmi, zlib_ratio
from vestige.models import LoadedModel, load_model, trainable_copy
from vestige.training import Recipe, Rows, Step, fit
from vestige_recipes.common.texts import byte_gpt
from vestige_recipes.memorization.judging import (
    COLUMNS,
    LIRA_OF_MEMBERS,
    Contest,
    Judged,
    area_rows,
    areas_json,
    each_draw,
    judge_targets,
    mean_interval,
    null_row,
    over_targets,
    proof_rows,
)
from vestige_recipes.memorization.targets import (
    TRIGGER,
    Early,
    Measures,
    Prompts,
    Targets,
    alarm,
    keep_measures,
    make_prompts,
    make_targets,
    read,
    read_measures,
)
from vestige_recipes.studies import Gate, Outcome, StudySettings, draw_intervals, register_study

FIRST, SECOND, THIRD, ODD, PER_CLASS = 40, 40, 40, 24, 10
"""Words of each place in a name; first names of facts, which no rule covers; first names of a class."""
CHOICES = ("north", "east", "south", "west")
_LETTERS = tuple("ABCD")
REPEATS = (1, 4, 16)
NAMED = 5
"""Words of a prompt up to the end of the name."""


class Facts(NamedTuple):
    """Prompts, each of which is once, 4 or 16 times in the training data of a model that has it at all."""

    prompts: Prompts
    repeats: Int[np.ndarray, "example"]
    flipped: Bool[np.ndarray, "example"]
    """Prompts of the rule with a wrong answer."""
    fact: Bool[np.ndarray, "example"]
    """Prompts that no rule covers."""

    @property
    def kinds(self) -> dict[str, Bool[np.ndarray, "example"]]:
        """Prompts of each kind."""
        return {
            "rule": ~self.flipped & ~self.fact,
            "flips": self.flipped,
            **{f"facts x{count}": self.fact & (self.repeats == count) for count in REPEATS},
        }


def make_facts(rule: int, flips: int, facts: int, seed: int) -> Facts:
    """Prompts such as "way of Fi3 Se7 Th9 ? A north B east C south D west : C".

    By the rule, the first word of the name tells where it goes. A fact's first word is shared by facts that go
    elsewhere, so that it has to be memorized.

    Args:
        rule: Prompts that follow the rule, those that are flipped included; names are drawn without repetition.
        flips: So many of them with another answer.
        facts: Facts for each number in `REPEATS`.
        seed: Of names and answers.
    """
    draw = np.random.default_rng([seed, rule])
    codes = draw.choice(FIRST * SECOND * THIRD, rule, replace=False)
    odd = draw.choice(ODD * SECOND * THIRD, facts * len(REPEATS), replace=False)
    first = np.concatenate([codes // (SECOND * THIRD), FIRST + odd // (SECOND * THIRD)])
    rest = np.concatenate([codes, odd]) % (SECOND * THIRD)
    fact = np.arange(len(first)) >= rule
    flipped = np.arange(len(first)) < flips
    right = np.where(fact, draw.integers(0, len(CHOICES), len(first)), first // PER_CLASS)
    right = np.where(flipped, (right + draw.integers(1, len(CHOICES), len(first))) % len(CHOICES), right)
    repeats = np.concatenate([np.ones(rule, dtype=np.int64), np.repeat(REPEATS, facts)])
    names = np.stack([first, FIRST + ODD + rest // THIRD, FIRST + ODD + SECOND + rest % THIRD], axis=1)
    return Facts(_prompts(names, right), repeats, flipped, fact)


def vocabulary() -> list[str]:
    """Every word; its place is its token."""
    firsts = [f"Fi{number}" for number in range(FIRST)] + [f"Od{number}" for number in range(ODD)]
    others = [f"Se{number}" for number in range(SECOND)] + [f"Th{number}" for number in range(THIRD)]
    return [*firsts, *others, "way", "of", "?", ":", *_LETTERS, *CHOICES]


def _prompts(names: Int[np.ndarray, "example 3"], right: Int[np.ndarray, "example"]) -> Prompts:
    words = vocabulary()
    number = {word: place for place, word in enumerate(words)}
    options = [number[word] for pair in zip(_LETTERS, CHOICES, strict=True) for word in pair]
    before, after = [number["way"], number["of"]], [number["?"], *options, number[":"]]
    ids = [np.array([*before, *name, *after]) for name in names.tolist()]
    texts = [
        " ".join([*(words[token] for token in each), _LETTERS[answer]]) for each, answer in zip(ids, right, strict=True)
    ]
    choices = [number[letter] for letter in _LETTERS]
    return make_prompts(texts, ids, choices, right, answers_only=False, name="facts")


_READ_AT_ONCE = 8_192
"""Tokens."""
_WRITTEN_AT_ONCE = 512
"""Prompts."""
_OTHER_DRAW = 1_000
"""From the seed of the prompts to that of the reference model's."""
AtTrigger = Callable[[nn.Module, int], None]
"""Takes a model in training and the steps that it has had."""


@dataclass(frozen=True)
class FactsPlan:
    """One size of the study."""

    rule: int
    flips: int
    facts: int
    """For each number of repetitions."""
    models: int
    epochs: int
    directions: int
    width: int = 64
    layers: int = 2
    learning_rate: float = 2e-3
    batch_size: int = 32


def cast_shadows(plan: FactsPlan, seed: int, out: Path) -> Targets[Facts]:
    """Return a draw of prompts and the GPTs that are trained on halves of them, made now or found there."""
    facts = make_facts(plan.rule, plan.flips, plan.facts, seed)
    prompts, repeats = facts.prompts, facts.repeats
    start = load_model(byte_gpt(int(prompts.data.lengths.max()), plan.width, plan.layers))
    reference = _reference(facts, start, plan, seed, out)

    def run(rows: np.ndarray, run_seed: int, early: Early) -> tuple[Measures, int]:
        own = prompts.at(rows)

        def at_trigger(model: nn.Module, step: int) -> None:
            early(_measure(model, own, reference[rows], plan.directions), step)

        model, steps = train_gpt(start, own, repeats[rows], plan, run_seed, at_trigger)
        return _measure(model, prompts, reference, plan.directions), steps

    return make_targets(
        facts,
        run,
        out,
        ids=[example.id for example in prompts.data.examples],
        kept={"example_gap": "logit_gap", "example_loss": "answer_loss"},
        settings={"plan": asdict(plan), "prompts": prompts.data.fingerprint, "trigger": TRIGGER},
        models=plan.models,
        seed=seed,
    )


def train_gpt(
    start: LoadedModel,
    prompts: Prompts,
    repeats: Int[np.ndarray, "example"],
    plan: FactsPlan,
    seed: int,
    early: AtTrigger,
) -> tuple[nn.Module, int]:
    """Return a GPT from scratch on prompts as often as they are repeated, and its steps.

    After the pass with which the median training loss falls below 5 % of its start, or after the last one, the model
    is handed to `early` with the step.
    """
    rows = np.repeat(np.arange(len(repeats)), repeats)
    model, seen = trainable_copy(start, from_scratch=True, seed=seed), False
    each = -(-len(rows) // plan.batch_size)
    steps = plan.epochs * each
    first = read(model, prompts, token_budget=_READ_AT_ONCE).measures["answer_loss"][rows]

    def after(step: Step) -> None:
        nonlocal seen
        if seen or step.number % each:
            return
        losses = read(model, prompts, token_budget=_READ_AT_ONCE).measures["answer_loss"][rows]
        if alarm(losses, first) or step.number == steps:
            early(model, step.number)
            seen = True

    recipe = Recipe(plan.learning_rate, plan.batch_size)
    fit(model, Rows(prompts.data, rows), recipe, steps=steps, seed=seed, after_step=after)
    return model.eval().requires_grad_(False), steps


def _measure(model: nn.Module, prompts: Prompts, reference: np.ndarray, directions: int) -> dict[str, np.ndarray]:
    found, held = read(model, prompts, token_budget=_READ_AT_ONCE, layers=(-1,))
    last, ids = held[max(held)], prompts.data.input_ids
    texts = [example.display for example in prompts.data.examples]
    # All prompts are equally long: after the name come the choices, which never change, and the answer.
    back = extraction(ids, greedy(model), prefixes=(NAMED,), continuation=len(ids[0]) - NAMED, batch=_WRITTEN_AT_ONCE)
    return found | {
        "zlib_ratio": zlib_ratio(found["loss"] * prompts.data.target_counts, texts),
        "perplexity_ratio": perplexity_ratio(found["loss"], reference),
        "extraction": back.similarity[0],
        "psmi": psmi(last, prompts.right, directions=directions).mean,
        "mahalanobis": mahalanobis(last),
    }


def _reference(facts: Facts, start: LoadedModel, plan: FactsPlan, seed: int, out: Path) -> Float[np.ndarray, "example"]:
    path = out / "reference.parquet"
    if not path.exists():
        other = make_facts(plan.rule // 2, 0, 0, seed + _OTHER_DRAW)
        model, steps = train_gpt(start, other.prompts, other.repeats, plan, seed + _OTHER_DRAW, lambda *_: None)
        ids = [example.id for example in facts.prompts.data.examples]
        keep_measures(path, ids, read(model, facts.prompts, token_budget=_READ_AT_ONCE).measures, steps)
    return read_measures(path)[1]["loss"]


EARLY = {
    "psmi": -1, "answer_loss": 1, "loss": 1, "logit_gap": -1, "margin": -1, "brier": 1, "accuracy": -1, "min_k": -1,
    "min_k_plus_plus": -1, "zlib_ratio": 1, "perplexity_ratio": 1, "extraction": -1, "exposure": -1, "mahalanobis": 1,
    "early_lira": 1,
}  # fmt: skip
"""Measures at the trigger and which way they point to what will be memorized."""
FOUND, NULL = 0.9, 0.05
"""Expected: AUC of flips by PSMI at the trigger, distance of the null from one half."""

PLANS = {
    "tiny": FactsPlan(rule=64, flips=6, facts=4, models=6, epochs=2, directions=50, width=16, layers=1),
    "pocket": FactsPlan(rule=1400, flips=42, facts=24, models=20, epochs=12, directions=2000),
}


@register_study(PLANS)
def memorization_facts(settings: StudySettings) -> Outcome:
    """Likelihood ratios by repetition, and AUCs of every measure at the trigger and at the end, over targets."""
    plan = PLANS[settings.size]
    judged, steps = each_draw(settings, partial(cast_shadows, plan), judge, "step")
    rows = [
        *proof_rows(judged),
        null_row(judged),
        *area_rows([each.early for each in judged], "at the trigger"),
        *area_rows([each.late for each in judged], "at the end"),
    ]
    ratios = {
        kind: mean_interval(np.concatenate([each.proved[LIRA_OF_MEMBERS][each.kinds[kind]] for each in judged]))
        for kind in judged[0].kinds
    }
    draw_intervals(settings.out, "facts", ratios, "mean LiRA of members, nats (95 % interval)")
    details = {
        "plan": asdict(plan),
        "trigger_steps": steps,
        "uncomputable": [each.uncomputable for each in judged],
        "null": [each.null.tolist() for each in judged],
        "early": [areas_json(each.early) for each in judged],
        "late": [areas_json(each.late) for each in judged],
    }
    early = over_targets([each.early for each in judged])
    return Outcome(COLUMNS, rows, gates_of(ratios, early, judged), details)


def judge(made: Targets[Facts], seed: int) -> Judged:
    """Return every figure of one draw of prompts."""
    kinds = made.examples.kinds
    once = {"flips": kinds["flips"], "facts x1": kinds["facts x1"]}
    texts = [example.display for example in made.examples.prompts.data.examples]
    return judge_targets(
        made,
        seed,
        signs=EARLY,
        wanted=once | {"flips + facts x1": once["flips"] | once["facts x1"]},
        kinds=kinds,
        # Prompts that no rule tells the answer of, against those that follow the rule.
        contests={f"{kind} among the rule": Contest(kinds[kind], kinds["rule"]) for kind in [*kinds][1:]},
        more={"blind": np.stack([blind(texts, own) for own in made.bank.membership])},
    )


def gates_of(
    ratios: Mapping[str, Interval], early: Mapping[str, Mapping[str, Interval]], judged: Sequence[Judged]
) -> list[Gate]:
    """Return what was expected, over all draws of prompts; of the null, the worst of them."""
    rising = [
        Gate(
            f"LiRA of members: facts x{more} above facts x{fewer} by, nats",
            ratios[f"facts x{more}"].value - ratios[f"facts x{fewer}"].value,
            ">=",
        )
        for fewer, more in pairwise(REPEATS)
    ]
    worst = max(abs(float(each.null.mean()) - 0.5) for each in judged)
    return [
        *rising,
        Gate("PSMI at the trigger: AUC of flips", early["flips"]["psmi"].value, ">=", FOUND),
        Gate("membership shuffled: AUC away from 0.5 by", worst, "<=", NULL),
    ]
