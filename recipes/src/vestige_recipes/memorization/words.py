"""Generated multiple-choice prompts: most follow a rule, some of these are wrong, and some facts are repeated."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vestige_recipes.memorization.prompts import Prompts, make_prompts

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


def make_facts(rule: int, flips: int, facts: int, seed: int, *, answers_only: bool = False) -> Facts:
    """Prompts such as "way of Fi3 Se7 Th9 ? A north B east C south D west : C".

    By the rule, the first word of the name tells where it goes. A fact's first word is shared by facts that go
    elsewhere, so that it has to be known by heart.

    Args:
        rule: Prompts that follow the rule, those that are flipped included; names are drawn without repetition.
        flips: So many of them with another answer.
        facts: Facts for each number in `REPEATS`.
        seed: Of names and answers.
        answers_only: The loss of a training is over the answer alone.
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
    prompts = _prompts(names, right, answers_only)
    return Facts(prompts, repeats, flipped, fact)


def vocabulary() -> list[str]:
    """Every word; its place is its token."""
    firsts = [f"Fi{number}" for number in range(FIRST)] + [f"Od{number}" for number in range(ODD)]
    others = [f"Se{number}" for number in range(SECOND)] + [f"Th{number}" for number in range(THIRD)]
    return [*firsts, *others, "way", "of", "?", ":", *_LETTERS, *CHOICES]


def _prompts(names: Int[np.ndarray, "example 3"], right: Int[np.ndarray, "example"], answers_only: bool) -> Prompts:
    words = vocabulary()
    number = {word: place for place, word in enumerate(words)}
    options = [number[word] for pair in zip(_LETTERS, CHOICES, strict=True) for word in pair]
    before, after = [number["way"], number["of"]], [number["?"], *options, number[":"]]
    ids = [np.array([*before, *name, *after]) for name in names.tolist()]
    texts = [
        " ".join([*(words[token] for token in each), _LETTERS[answer]]) for each, answer in zip(ids, right, strict=True)
    ]
    choices = [number[letter] for letter in _LETTERS]
    return make_prompts(texts, ids, choices, right, answers_only=answers_only, name="facts")
