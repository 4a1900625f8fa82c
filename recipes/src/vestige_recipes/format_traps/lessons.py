"""The sets of the format traps, and what a model has met before it is asked them, in the few hundred tokens they need.

The sets A and B of Isonuma and Titov (2024, arXiv:2401.15241), section 4, made again: a test set and four training
sets, of the same or another task (Sim, Dis), with the same or another kind of answer (Same, Diff). Lessons
are of many tasks about numbers, strings and words, each in several wordings and answered in figures, words or letters,
and none is worded as the sets word theirs: what is learnt there is to take a question as a task.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from vestige.data import NO_TARGET

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
    made = {}
    for number, (name, make) in enumerate(_SETS[which].items()):
        random = np.random.default_rng([seed, ord(which), number])
        pairs = [make(row, random) for row in range(rows)]
        made[name] = [
            {"id": f"{name}/{row}", "source": name, "prompt": f"{prompt}\n", "completion": answer}
            for row, (prompt, answer) in enumerate(pairs)
        ]
    return made


def spell(number: int) -> str:
    """Return a number below a thousand in English words: "two hundred forty-one"."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" {spell(rest)}" if rest else "")


Pair = tuple[str, str]
"""Question and answer."""
Make = Callable[[int, np.random.Generator], Pair]
"""From the number of a row and random numbers."""


def _ask_successor(number: int, asked: Callable[[int], str], answer: Callable[[int], str]) -> Pair:
    return f"What is the number that comes after {asked(number)}?", answer(number + 1)


def _ask_length(random: np.random.Generator, answer: Callable[[int], str]) -> Pair:
    _, word = _word(random)
    return f'How many letters are in the word "{word}"?', answer(len(word))


def _ask_left_over(random: np.random.Generator, symbols: str, kept: str) -> Pair:
    """Ask for what is left of `symbols` and one of `kept` without the former."""
    answer = str(random.choice(list(kept)))
    others = [one for one in symbols if one != answer]
    taken = str(random.choice(others))
    mixed = [taken] * int(random.integers(2, 6))
    mixed.insert(int(random.integers(len(mixed) + 1)), answer)
    return f'What is left when every "{taken}" is taken out of "{"".join(mixed)}"?', answer


def _ask_part_of_speech(random: np.random.Generator, answers: str) -> Pair:
    part, word = _word(random)
    choices = ", ".join(f"{answer} {name}" for answer, name in zip(answers, WORDS, strict=True))
    return f'Which part of speech is "{word}": {choices}?', answers[list(WORDS).index(part)]


def _word(random: np.random.Generator) -> tuple[str, str]:
    part = str(random.choice(list(WORDS)))
    return part, str(random.choice(WORDS[part]))


_LETTERS, _DIGITS = string.ascii_lowercase, string.digits
_SETS: dict[Which, dict[str, Make]] = {
    "A": {
        "SimSame": lambda row, _: _ask_successor(2 * row, spell, str),
        "SimDiff": lambda row, _: _ask_successor(2 * row + 1, spell, spell),
        "DisSame": lambda _, random: _ask_length(random, str),
        "DisDiff": lambda _, random: _ask_length(random, spell),
        TEST: lambda row, _: _ask_successor(512 + row, str, str),
    },
    "B": {
        "SimSame": lambda _, random: _ask_left_over(random, _DIGITS, _LETTERS),
        "SimDiff": lambda _, random: _ask_left_over(random, _LETTERS, _DIGITS),
        "DisSame": lambda _, random: _ask_part_of_speech(random, "abcd"),
        "DisDiff": lambda _, random: _ask_part_of_speech(random, "1234"),
        TEST: lambda _, random: _ask_left_over(random, _LETTERS, _LETTERS),
    },
}


Thing = TypeVar("Thing")
HIGHEST = 1_000
"""Numbers are below."""
SYMBOLS = _LETTERS + _DIGITS

_STEPS: Mapping[int, tuple[str, ...]] = {
    1: (
        "Which number follows {}?",
        "What is one more than {}?",
        "Add one to {}.",
        "Count on from {}:",
        "Name the successor of {}.",
        "{}, what is next?",
        "Give the number right above {}.",
        "Which number is right after {}?",
        "After {} is:",
        "What comes right after {}?",
        "What is the number that follows {}?",
    ),
    -1: (
        "Which number precedes {}?",
        "What is one less than {}?",
        "Subtract one from {}.",
        "Count back from {}:",
        "Name the predecessor of {}.",
        "{}, what was last?",
        "Give the number right below {}.",
        "Which number is right before {}?",
        "Before {} is:",
        "What comes right before {}?",
        "What is the number that precedes {}?",
        "What is the number that comes before {}?",
    ),
    2: ("What is two more than {}?", "Add two to {}.", "Count on by two from {}:", "Skip one above {}."),
    -2: ("What is two less than {}?", "Subtract two from {}.", "Count back by two from {}:", "Skip one below {}."),
    0: ("Repeat the number {}.", "Which number is this: {}?", "Write {} again.", "Say {}."),
}
_STEP_SHARES = (0.4, 0.3, 0.1, 0.1, 0.1)
_LETTER_STEPS: Mapping[int, tuple[str, ...]] = {
    1: ("What is the letter that comes after {}?", "Which letter follows {}?", "{}, what is next?"),
    -1: ("What is the letter that comes before {}?", "Which letter precedes {}?", "{}, what was last?"),
}
_ONCE = (
    'What is left of "{string}" without "{many}"?',
    'Which symbol is only once in "{string}"?',
    'Find what "{string}" has once.',
    'Name the stranger in "{string}".',
    'Remove "{many}" from "{string}".',
    'Without "{many}", what remains of "{string}"?',
    'Give the symbol of "{string}" other than "{many}".',
    'Delete each "{many}" of "{string}".',
    'Take each "{many}" out of "{string}", what is left?',
)
_OFTEN = (
    'Which symbol is taken out of "{string}" when "{once}" is left?',
    'Which symbol is most often in "{string}"?',
    'Find what "{string}" has many times.',
    'Remove "{once}" from "{string}", which symbol remains?',
    'Give the symbol of "{string}" other than "{once}".',
)
_FIRST = ('Which symbol begins "{string}"?', 'Give the first of "{string}".')
_LAST = ('Which symbol ends "{string}"?', 'Give the last of "{string}".')
_STRING_SHARES = (0.5, 0.2, 0.15, 0.15)
_AMOUNT = ('How often is "{many}" in "{string}"?', 'Count each "{many}" of "{string}".')
_KIND = ('What kind has "{}"?', 'Give the kind of "{}".', '"{}" is a:')
_EITHER = 'Is "{}" {} or {}?'
_WRITTEN = {"Write {} in figures.": str, "Write {} in words.": spell}
WORDINGS: tuple[str, ...] = (
    *(wording for some in (*_STEPS.values(), *_LETTER_STEPS.values()) for wording in some),
    *(*_ONCE, *_OFTEN, *_FIRST, *_LAST, *_AMOUNT, *_KIND, _EITHER, *_WRITTEN),
)
"""Every way of asking, with gaps in braces."""


def question(random: np.random.Generator) -> Pair:
    """Return a question whose task and wording are drawn, and its answer."""
    return _pick(random, _MAKERS)(random)


def _pick(random: np.random.Generator, some: Sequence[Thing]) -> Thing:
    return some[int(random.integers(len(some)))]


def _step(random: np.random.Generator) -> Pair:
    """Figures are answered in figures, words in either."""
    step = list(_STEPS)[int(random.choice(len(_STEPS), p=_STEP_SHARES))]
    number = int(random.integers(2, HIGHEST - 2))
    asked = _pick(random, (str, spell))
    answer = str if asked is str else _pick(random, (str, spell))
    return _pick(random, _STEPS[step]).format(asked(number)), answer(number + step)


def _letter(random: np.random.Generator) -> Pair:
    step, place = _pick(random, list(_LETTER_STEPS)), int(random.integers(1, 25))
    return _pick(random, _LETTER_STEPS[step]).format(_LETTERS[place]), _LETTERS[place + step]


def _write_number(random: np.random.Generator) -> Pair:
    number, asked = int(random.integers(HIGHEST)), _pick(random, (str, spell))
    wording = _pick(random, list(_WRITTEN))
    return wording.format(asked(number)), _WRITTEN[wording](number)


def _mix(random: np.random.Generator) -> dict[str, str]:
    """One symbol in a string of another."""
    once, many = random.choice(list(SYMBOLS), 2, replace=False)
    made = [many] * int(random.integers(2, 6))
    made.insert(int(random.integers(len(made) + 1)), once)
    return {"once": once, "many": many, "string": "".join(made)}


def _symbol(random: np.random.Generator) -> Pair:
    made = _mix(random)
    asked = ((_ONCE, made["once"]), (_OFTEN, made["many"]), (_FIRST, made["string"][0]), (_LAST, made["string"][-1]))
    wordings, answer = asked[int(random.choice(len(asked), p=_STRING_SHARES))]
    return _pick(random, wordings).format(**made), answer


def _amount(random: np.random.Generator) -> Pair:
    made, answer = _mix(random), _pick(random, (str, spell))
    return _pick(random, _AMOUNT).format(**made), answer(len(made["string"]) - 1)


def _kind(random: np.random.Generator) -> Pair:
    kind = _pick(random, list(WORDS))
    return _pick(random, _KIND).format(_pick(random, WORDS[kind])), kind


def _either(random: np.random.Generator) -> Pair:
    pair = [str(kind) for kind in random.choice(list(WORDS), 2, replace=False)]
    kind = _pick(random, pair)
    return _EITHER.format(_pick(random, WORDS[kind]), *pair), kind


_MAKERS: tuple[Callable[[np.random.Generator], Pair], ...] = (
    *[_step] * 5,
    *[_symbol] * 5,
    *(_write_number, _letter, _amount, _kind, _either),
)
"""The harder ones are asked more often."""


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


def tokenize_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with `prompt` and `completion` as tokens, of which the answer and its end are targets."""
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
            line = _pick(random, _FACT_MAKERS)(random)
            rows.append(common | {"text": line, "input_ids": [*tokens(line), END]})
        else:
            asked, answer = question(random)
            rows.append(tokenize_answer(common | {"prompt": f"{asked}\n", "completion": answer}))
    return rows


def _figures(random: np.random.Generator) -> str:
    first = int(random.integers(HIGHEST - 5))
    return ", ".join(str(first + step) for step in range(5))


def _names(random: np.random.Generator) -> str:
    first = int(random.integers(HIGHEST - 3))
    return ", ".join(spell(first + step) for step in range(3))


def _both(random: np.random.Generator) -> str:
    number = int(random.integers(HIGHEST))
    pair = [str(number), spell(number)]
    return " - ".join(pair if random.random() < 0.5 else pair[::-1])


def _words_of_a_kind(random: np.random.Generator) -> str:
    kind = str(random.choice(list(WORDS)))
    return f"{kind}: {', '.join(random.choice(WORDS[kind], 5, replace=False))}"


_FACT_MAKERS = (_figures, _names, _both, _words_of_a_kind)
