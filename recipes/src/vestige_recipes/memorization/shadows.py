"""Tiny GPTs trained on random halves of generated prompts: a bank, and what each of them showed at the trigger."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import nn

from vestige.audit import extraction, greedy, mahalanobis, perplexity_ratio, psmi, zlib_ratio
from vestige.bank import Bank, bank_of
from vestige.models import LoadedModel, Recipe, Step, load_model, shuffled_batches, train, trainable_copy
from vestige_recipes.common.texts import byte_gpt
from vestige_recipes.memorization.judging import TRIGGER, keep_measures, kept_measures, target_file
from vestige_recipes.memorization.lora import alarm
from vestige_recipes.memorization.prompts import Prompts, read
from vestige_recipes.memorization.words import NAMED, Facts, make_facts

_READ_AT_ONCE = 8_192
"""Tokens."""
_WRITTEN_AT_ONCE = 512
"""Prompts."""
_OTHER_DRAW = 1_000
"""From the seed of the prompts to that of the reference model's."""
Early = Callable[[nn.Module, int], None]
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


class Shadows(NamedTuple):
    """A bank of tiny GPTs; each is a target once."""

    facts: Facts
    bank: Bank
    early: list[dict[str, Float[np.ndarray, "own"]]]
    """Of each member, of the prompts that it is trained on in ascending order: measures at the trigger."""
    late: list[dict[str, Float[np.ndarray, "example"]]]
    """Of each member, of all prompts: measures at the end."""
    steps: Int[np.ndarray, "member"]
    """After which the trigger went off."""


def cast_shadows(plan: FactsPlan, seed: int, out: Path) -> Shadows:
    """The bank in `out/bank` and its members' measures in `out/early` and `out/late`, made now or found there."""
    facts = make_facts(plan.rule, plan.flips, plan.facts, seed)
    prompts, repeats = facts.prompts, facts.repeats
    start = load_model(byte_gpt(int(prompts.data.lengths.max()), plan.width, plan.layers))
    ids = [example.id for example in prompts.data.examples]
    reference = _reference(facts, start, plan, seed, out)

    def run(rows: np.ndarray, run_seed: int) -> dict[str, np.ndarray]:
        def early(model: nn.Module, step: int) -> None:
            measures = _measured(model, prompts.at(rows), reference[rows], plan.directions)
            keep_measures(target_file(out / "early", rows), [ids[row] for row in rows], measures, step)

        model, steps = trained_gpt(start, prompts.at(rows), repeats[rows], plan, run_seed, early)
        late = _measured(model, prompts, reference, plan.directions)
        keep_measures(target_file(out / "late", rows), ids, late, steps)
        return {"query_loss": np.zeros(1), "example_gap": late["logit_gap"], "example_loss": late["answer_loss"]}

    bank = bank_of(
        run,
        examples=ids,
        queries=1,
        out=out / "bank",
        settings={"plan": asdict(plan), "prompts": prompts.data.fingerprint, "trigger": TRIGGER},
        subsets=plan.models,
        seeds=1,
        seed=seed,
    )
    rows = [np.flatnonzero(own) for own in bank.membership]
    early = [kept_measures(target_file(out / "early", own)) for own in rows]
    late = [kept_measures(target_file(out / "late", own))[1] for own in rows]
    steps = np.array([step for *_, step in early])
    return Shadows(facts, bank, [each for _, each, _ in early], late, steps)


def trained_gpt(
    start: LoadedModel, prompts: Prompts, repeats: Int[np.ndarray, "example"], plan: FactsPlan, seed: int, early: Early
) -> tuple[nn.Module, int]:
    """A GPT from scratch on prompts as often as they are repeated, and its steps.

    After the pass with which the median training loss falls below 5 % of its start, or after the last one, the model
    is handed to `early` with the step.
    """
    rows = np.repeat(np.arange(len(repeats)), repeats)
    model, seen = trainable_copy(start, from_scratch=True, seed=seed), False
    each = -(-len(rows) // plan.batch_size)
    batches = shuffled_batches(prompts.data, rows, plan.batch_size, plan.epochs * each, seed)
    first = read(model, prompts, token_budget=_READ_AT_ONCE).measures["answer_loss"][rows]

    def after(step: Step) -> None:
        nonlocal seen
        if seen or step.number % each:
            return
        losses = read(model, prompts, token_budget=_READ_AT_ONCE).measures["answer_loss"][rows]
        if alarm(losses, first) or step.number == len(batches):
            early(model, step.number)
            seen = True

    train(model, prompts.data, batches, Recipe(plan.learning_rate), after)
    return model.requires_grad_(False), len(batches)


def _measured(model: nn.Module, prompts: Prompts, reference: np.ndarray, directions: int) -> dict[str, np.ndarray]:
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
        model, steps = trained_gpt(start, other.prompts, other.repeats, plan, seed + _OTHER_DRAW, lambda *_: None)
        ids = [example.id for example in facts.prompts.data.examples]
        keep_measures(path, ids, read(model, facts.prompts, token_budget=_READ_AT_ONCE).measures, steps)
    return kept_measures(path)[1]["loss"]
