"""Sets whose subject and whose format of answer are kept apart: does a score find the subject, or the format?

The sets A and B of Isonuma and Titov (2024, arXiv:2401.15241), section 4, made again. Each has a test set and four
training sets: same or other task (Sim, Dis), same or other kind of answer (Same, Diff).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

# ruff: noqa: SIM905 (a list of words is read more easily without quotes)

Which = Literal["A", "B"]
TRAINING = ("SimSame", "SimDiff", "DisSame", "DisDiff")
TEST = "test"

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMERALS = (*_ONES, *_TENS, "hundred")
"""The words that numbers below a thousand are spelled with."""
WORDS: dict[str, tuple[str, ...]] = {
    "noun": tuple(
        "river stone bread window garden letter mountain bottle candle engine forest hammer island jacket kitchen "
        "ladder market needle orange pencil rabbit saddle table valley".split()
    ),
    "verb": tuple(
        "carry follow gather happen invite jump listen manage notice open prepare question remain suggest travel visit "
        "wander answer borrow collect deliver enter forget imagine".split()
    ),
    "adjective": tuple(
        "bright cold deep early fresh gentle heavy narrow old proud quiet rough sharp tall useful warm young brave "
        "clever dry empty famous honest large".split()
    ),
    "adverb": tuple(
        "quickly slowly often never almost already always quite rather soon still together twice well badly hardly "
        "perhaps seldom away nearly once gladly sadly there".split()
    ),
}


def format_trap(which: Which, seed: int, rows: int = 256) -> dict[str, list[dict[str, Any]]]:
    """`rows` rows (`id`, `prompt`, `completion`, `source`) for the test set and each of the four training sets.

    Set A: the number after a number; the similar sets count too, in words and with an answer in figures (Same) or words
    (Diff), the others tell a word's length. Set B: the letter that is left when letters are taken out of a word;
    the similar sets ask for what is left of other strings, a letter or a digit, the others for the part of speech.
    """
    makers = _SETS[which]
    made = {}
    for number, (name, make) in enumerate(makers.items()):
        random = np.random.default_rng([seed, ord(which), number])
        pairs = [make(row, random) for row in range(rows)]
        made[name] = [
            {"id": f"{name}/{row}", "source": name, "prompt": f"{prompt}\n", "completion": answer}
            for row, (prompt, answer) in enumerate(pairs)
        ]
    return made


def spelled(number: int) -> str:
    """Return a number below a thousand in English words: "two hundred forty-one"."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" {spelled(rest)}" if rest else "")


Make = Callable[[int, np.random.Generator], tuple[str, str]]


def _after_number(row: int, random: np.random.Generator) -> tuple[str, str]:  # noqa: ARG001
    return f"What is the number that comes after {512 + row}?", str(513 + row)


def _after_even(row: int, random: np.random.Generator) -> tuple[str, str]:  # noqa: ARG001
    return f"What is the number that comes after {spelled(2 * row)}?", str(2 * row + 1)


def _after_odd(row: int, random: np.random.Generator) -> tuple[str, str]:  # noqa: ARG001
    return f"What is the number that comes after {spelled(2 * row + 1)}?", spelled(2 * row + 2)


def _length(as_words: bool) -> Make:
    def make(row: int, random: np.random.Generator) -> tuple[str, str]:  # noqa: ARG001
        _, word = _word(random)
        return f'How many letters are in the word "{word}"?', spelled(len(word)) if as_words else str(len(word))

    return make


def _left_over(symbols: str, kept: str) -> Make:
    """Return a maker of questions for what is left of `symbols` and one of `kept` without the former."""

    def make(row: int, random: np.random.Generator) -> tuple[str, str]:  # noqa: ARG001
        answer = str(random.choice(list(kept)))
        others = [one for one in symbols if one != answer]
        taken = str(random.choice(others))
        string = [taken] * int(random.integers(2, 6))
        string.insert(int(random.integers(len(string) + 1)), answer)
        return f'What is left when every "{taken}" is taken out of "{"".join(string)}"?', answer

    return make


def _part_of_speech(answers: Sequence[str]) -> Make:
    def make(row: int, random: np.random.Generator) -> tuple[str, str]:  # noqa: ARG001
        part, word = _word(random)
        choices = ", ".join(f"{answer} {name}" for answer, name in zip(answers, WORDS, strict=True))
        return f'Which part of speech is "{word}": {choices}?', answers[list(WORDS).index(part)]

    return make


def _word(random: np.random.Generator) -> tuple[str, str]:
    part = str(random.choice(list(WORDS)))
    return part, str(random.choice(WORDS[part]))


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_SETS: dict[Which, dict[str, Make]] = {
    "A": {
        "SimSame": _after_even,
        "SimDiff": _after_odd,
        "DisSame": _length(as_words=False),
        "DisDiff": _length(as_words=True),
        TEST: _after_number,
    },
    "B": {
        "SimSame": _left_over(_DIGITS, _LETTERS),
        "SimDiff": _left_over(_LETTERS, _DIGITS),
        "DisSame": _part_of_speech("abcd"),
        "DisDiff": _part_of_speech("1234"),
        TEST: _left_over(_LETTERS, _LETTERS),
    },
}
