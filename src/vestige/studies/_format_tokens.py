"""A few hundred tokens to write the format traps in, and plain facts about numbers and words to begin with."""

import re
from typing import Any

import numpy as np

from vestige.data import NO_TARGET
from vestige.studies._format_trap import NUMERALS, WORDS, spelled

LENGTH = 32
"""Tokens of the longest row; counted, and checked where rows are made."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_OTHERS = '?",:-\n'
_END = "<end>"
_ASKED = (
    "What Which is the number that comes after How many letters are in word left when every taken out of part speech"
)
_WORDS = [word for some in WORDS.values() for word in some]
_TOKENS = list(dict.fromkeys([_END, *_LETTERS, *_DIGITS, *_OTHERS, *_ASKED.split(), *NUMERALS, *_WORDS, *WORDS]))
_NUMBERS = {token: number for number, token in enumerate(_TOKENS)}
VOCABULARY = len(_TOKENS)
END = _NUMBERS[_END]
_PIECE = re.compile(r"[A-Za-z]+|[^ A-Za-z]")
_HIGHEST = 1_000
_COUNTED = 5


def tokens(text: str) -> list[int]:
    """Words of the vocabulary as one token each, everything else letter by letter; spaces are not written."""
    pieces = (match.group() for match in _PIECE.finditer(text))
    return [_NUMBERS[token] for piece in pieces for token in ([piece] if piece in _NUMBERS else piece)]


def answered(row: dict[str, Any]) -> dict[str, Any]:
    """A row with `prompt` and `completion` as tokens, of which the answer and its end are targets."""
    asked, answer = tokens(row["prompt"]), [*tokens(row["completion"]), END]
    text = row["prompt"] + row["completion"]
    common = {"id": row["id"], "source": row["source"], "text": text}
    return common | {"input_ids": asked + answer, "labels": [NO_TARGET] * len(asked) + answer}


def plain_facts(seed: int, count: int) -> list[dict[str, Any]]:
    """`count` lines that a model of numbers and words begins with, none of them a question.

    Counting and successors in figures and in words, numbers beside their names, words of one kind, strings said twice
    and with a symbol taken out: what a pretrained model brings along, of which the sets only ask.
    """
    random, makers = np.random.default_rng([seed, 512]), (_figures, _names, _both, _kind, _twice, _after, _left)
    lines = [makers[number % len(makers)](random) for number in range(count)]
    return [
        {"id": f"fact/{number}", "source": "facts", "text": line, "input_ids": [*tokens(line), END][:LENGTH]}
        for number, line in enumerate(lines)
    ]


def _figures(random: np.random.Generator) -> str:
    first = int(random.integers(_HIGHEST - _COUNTED))
    return ", ".join(str(first + step) for step in range(_COUNTED))


def _names(random: np.random.Generator) -> str:
    first = int(random.integers(_HIGHEST - _COUNTED))
    return ", ".join(spelled(first + step) for step in range(_COUNTED))


def _both(random: np.random.Generator) -> str:
    number = int(random.integers(_HIGHEST))
    pair = [str(number), spelled(number)]
    return " - ".join(pair if random.random() < 0.5 else pair[::-1])


def _kind(random: np.random.Generator) -> str:
    kind = str(random.choice(list(WORDS)))
    return f"{kind}: {', '.join(random.choice(WORDS[kind], 5, replace=False))}"


def _twice(random: np.random.Generator) -> str:
    string = "".join(random.choice(list(_LETTERS + _DIGITS), int(random.integers(2, 7))))
    return f'"{string}" "{string}"'


def _after(random: np.random.Generator) -> str:
    write, number = (str, spelled)[int(random.integers(2))], int(random.integers(_HIGHEST - 1))
    return f"the number after {write(number)} is {write(number + 1)}"


def _left(random: np.random.Generator) -> str:
    kept, taken = random.choice(list(_LETTERS + _DIGITS), 2, replace=False)
    string = [taken] * int(random.integers(2, 6))
    string.insert(int(random.integers(len(string) + 1)), kept)
    return f'"{"".join(string)}" "{taken}" taken out is {kept}'
