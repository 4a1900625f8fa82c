"""A few hundred tokens to write the format traps in, and the facts and questions that a model begins with."""

import re
from typing import Any

import numpy as np

from vestige.data import NO_TARGET
from vestige_recipes.format_traps.questions import HIGHEST, SYMBOLS, WORDINGS, question
from vestige_recipes.format_traps.sets import NUMERALS, WORDS, spelled

LENGTH = 32
"""Tokens of the longest row; counted, and checked where rows are made."""
_OTHERS = '?",:-.\n'
_END = "<end>"
_ASKED = (
    "What Which is the number that comes after How many letters are in word left when every taken out of part speech"
)
_WORDS = [word for some in WORDS.values() for word in some]
_PIECE = re.compile(r"[A-Za-z]+|[^ A-Za-z]")
_MET = [piece for wording in WORDINGS for piece in _PIECE.findall(re.sub("{.*?}", "", wording)) if piece.isalpha()]
_TOKENS = list(dict.fromkeys([_END, *SYMBOLS, *_OTHERS, *_ASKED.split(), *_MET, *NUMERALS, *_WORDS, *WORDS]))
_NUMBERS = {token: number for number, token in enumerate(_TOKENS)}
VOCABULARY = len(_TOKENS)
END = _NUMBERS[_END]
_FACTS = 0.1
"""Share of the lessons that are no question."""


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


def lessons(seed: int, count: int) -> list[dict[str, Any]]:
    """`count` rows that a model begins with, in the form of `answered`; none asks as a set of the traps does.

    Questions of many tasks with their answers, and here and there plain facts of which every token is a target:
    counting, numbers beside their names, words of one kind. It is what a pretrained model brings along.
    """
    random = np.random.default_rng([seed, 512])
    rows = []
    for number in range(count):
        common = {"id": f"lesson/{number}", "source": "lessons"}
        if random.random() < _FACTS:
            line = _MAKERS[int(random.integers(len(_MAKERS)))](random)
            rows.append(common | {"text": line, "input_ids": [*tokens(line), END]})
        else:
            asked, answer = question(random)
            rows.append(answered(common | {"prompt": f"{asked}\n", "completion": answer}))
    return rows


def _figures(random: np.random.Generator) -> str:
    first = int(random.integers(HIGHEST - 5))
    return ", ".join(str(first + step) for step in range(5))


def _names(random: np.random.Generator) -> str:
    first = int(random.integers(HIGHEST - 3))
    return ", ".join(spelled(first + step) for step in range(3))


def _both(random: np.random.Generator) -> str:
    number = int(random.integers(HIGHEST))
    pair = [str(number), spelled(number)]
    return " - ".join(pair if random.random() < 0.5 else pair[::-1])


def _kind(random: np.random.Generator) -> str:
    kind = str(random.choice(list(WORDS)))
    return f"{kind}: {', '.join(random.choice(WORDS[kind], 5, replace=False))}"


_MAKERS = (_figures, _names, _both, _kind)
