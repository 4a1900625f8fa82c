"""The words of queries and listed examples: what they ask and answer, and when two of them say the same."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

from vestige.parsing import parse_json, words_of

SYSTEM_ROLES, _ASSISTANT = ("system", "developer"), "assistant"
Shown = str | Sequence[tuple[str, str]]
"""A text, or the turns of a conversation."""

COMMON_SHARE, COMMON_COUNT = 0.05, 3
"""A word is common that one text in twenty holds, and three at least. At one in fifty, "Python" and "JavaScript" were
common among 749 questions of the ChatterBot corpus, and 10 pairs about the one and the other the same question."""
SAME_QUESTION = 0.7
"""Share of the weight of all words of two questions that both hold. Of the 280,126 pairs of those questions six reach
it, all of them the same question; of the pairs of 134 rows of a support bot, the one planted contradiction (0.81).
Next come "What does the tent cost?" and "How heavy is the tent?" with 0.57."""
NEAR_COPY, NEAR_COPY_OF_TEXT = 0.8, 0.9
"""The same for whole rows that answer in the same words, and for texts without a question. "Which cards do you take?"
and "Which cards do you accept?" with one answer have 0.9; "What does the Alder tent cost?" and "What does the Birch
tent cost?", both answered "It costs 20 euros.", 0.7."""
_STEM = 4
"""Letters of a word that count where it is looked up: "lasts" is found in "last"."""


@dataclass(frozen=True)
class Wording:
    """The words of a query or an example, and the tokens that the model saw."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) of each turn."""
    tokens: tuple[str, ...] | None = None
    targets: tuple[bool, ...] | None = None
    """One per token: True where its prediction enters the loss."""

    @cached_property
    def whole(self) -> str:
        """One text, turns and parts on lines of their own; of an example that was given as tokens alone, those."""
        if self.messages:
            return "\n".join(f"{role}: {content}" for role, content in self.messages)
        if self.text is not None:
            return self.text
        return "\n".join(filter(None, (self.prompt, self.completion))) or "".join(self.tokens or ())

    @property
    def shown(self) -> Shown:
        """The turns, or the whole text where there are none."""
        return self.messages or self.whole

    @cached_property
    def question(self) -> str:
        """The prompt, or all turns before the last answer without the system's; empty for plain text."""
        if self.messages:
            asked = self.messages[:-1] if self.messages[-1][0] == _ASSISTANT else self.messages
            return "\n".join(content for role, content in asked if role not in SYSTEM_ROLES)
        return "" if self.text is not None else self.prompt or ""

    @cached_property
    def answer(self) -> str:
        """The completion, or the assistant's last turn; the whole of plain text."""
        if self.messages:
            role, content = self.messages[-1]
            return content if role == _ASSISTANT else ""
        has_parts = self.text is None and (self.prompt is not None or self.completion is not None)
        return self.completion or "" if has_parts else self.whole

    def words(self) -> list[str]:
        """Return the words of question and answer."""
        return words_of(f"{self.question}\n{self.answer}")


class Question(NamedTuple):
    """A query of a run: what was asked, and what of the answer is explained."""

    id: str
    question: str
    answer: str
    """The answer, or the whole text of a plain text."""
    instead: str | None
    """The answer that it is compared with: the scores are of the loss of `answer` less that of this one."""
    parts: tuple[str, ...]
    """The explained parts of the answer; none: all of it."""
    weights: tuple[float, ...]
    """What the loss of each part, or of each explained token, is multiplied with; none: 1."""
    loss: float | None
    """In nats, what is explained, with sign; None without a model."""
    generated: bool
    """True if the answer is the model's own."""
    wording: Wording

    @property
    def explained(self) -> str:
        """The explained part of the answer, in words; empty for all of it."""
        found = [] if self.instead is None else [f"instead of {self.instead!r}"]
        found += [f"the part {' and '.join(map(repr, self.parts))}"] if self.parts else []
        return "; ".join([*found, *(["with weights of tokens"] if self.weights else [])])


class Listed(NamedTuple):
    """A training example that a run lists."""

    id: str
    row: int
    """Position in the training data."""
    source: str | None
    label: str | None
    length: int | None
    """In tokens."""
    duplicates: int | None
    """How often its text occurs in the data."""
    wording: Wording


def turns_of(cell: str | None) -> tuple[tuple[str, str], ...]:
    """Return role and content of each turn in a cell of `messages`.

    Raises:
        ValueError: It is no JSON list of turns.
    """
    turns: Any = parse_json(cell) if cell else []
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns
    ):
        raise ValueError("`messages` is no list of turns with role and content")
    return tuple((str(turn["role"]), str(turn["content"])) for turn in turns)


def _make_wording(row: Mapping[str, Any]) -> Wording:
    tokens, targets = (tuple(row[name] or ()) or None for name in ("tokens", "targets"))
    return Wording(row["text"], row["prompt"], row["completion"], turns_of(row["messages"]), tokens, targets)


def make_question(row: Mapping[str, Any]) -> Question:
    """Return a row of `queries.parquet` as a query."""
    wording = _make_wording(row)
    return Question(
        row["query_id"],
        wording.question,
        wording.answer,
        row["instead"],
        tuple(wording.answer[start:stop] for start, stop in row["span"] or ()),
        tuple(row["weights"] or ()),
        row["loss"],
        bool(row["generated"]),
        wording,
    )


def make_listed(row: Mapping[str, Any]) -> Listed:
    """Return a row of `examples.parquet` as a listed example."""
    facts = {name: row[name] for name in ("row", "source", "label", "length", "duplicates")}
    return Listed(id=row["example_id"], wording=_make_wording(row), **facts)


def same_answer(one: str, other: str) -> bool:
    """Return whether two answers agree: equal in words, or one holds the words of the other in a row."""
    short, long = sorted((words_of(one), words_of(other)), key=len)
    return any(long[start : start + len(short)] == short for start in range(len(long) - len(short) + 1))


@final
class Rarity:
    """How rare each word is among some texts: rare words are what tells two texts of one kind apart."""

    def __init__(self, texts: Iterable[Sequence[str]]) -> None:
        """Count the texts that hold each word, from the words of each; equal texts count once."""
        distinct = {tuple(words) for words in texts} - {()}
        self._texts = max(len(distinct), 1)
        self._holding = Counter(word for words in distinct for word in set(words))

    def is_common(self, word: str) -> bool:
        """Return whether enough texts hold the word for it to tell none of them apart."""
        return self._holding[word] >= max(COMMON_COUNT, COMMON_SHARE * self._texts)

    def weigh(self, words: Iterable[str]) -> float:
        """Return the sum of `log(1 + texts / texts with the word)`; a word that none has counts as one that one has."""
        return sum(math.log1p(self._texts / max(self._holding[word], 1)) for word in words)

    def overlap(self, one: Sequence[str], other: Sequence[str]) -> float:
        """Return the share of the weight of the words of both that each of them holds, from 0 to 1."""
        either = self.weigh(set(one) | set(other))
        return self.weigh(set(one) & set(other)) / either if either else 0.0


@final
class Words:
    """The words of all listed rows and queries of a run, by which two of its rows are compared."""

    def __init__(self, wordings: Sequence[Wording]) -> None:
        """Count them, from the wordings of every listed row and of every query."""
        self._questions = Rarity(words_of(wording.question) for wording in wordings)
        self._texts = Rarity(wording.words() for wording in wordings)
        self._answers = Rarity(tuple(_stems(words_of(wording.answer))) for wording in wordings)

    def question_key(self, question: str) -> frozenset[str]:
        """Return the words of a question that are not common: all questions have them that are the same."""
        return frozenset(word for word in words_of(question) if not self._questions.is_common(word))

    def same_question(self, one: str, other: str) -> bool:
        """Return whether two questions are equal in words, or differ in common words alone and little in those.

        "Do you ship gas cartridges abroad?" and "Can you ship gas cartridges abroad?" are the same; "When is the
        Bergen store open?" and "When is the Basel store open?" are not. Empty ones are no questions.
        """
        words, others = words_of(one), words_of(other)
        if not words or not others or self.question_key(one) != self.question_key(other):
            return False
        return words == others or (
            bool(self.question_key(one)) and self._questions.overlap(words, others) >= SAME_QUESTION
        )

    def are_copies(self, one: Wording, other: Wording) -> bool:
        """Return whether two rows are the same but for a word or two of the question.

        Of texts without a question the numbers are the same.
        """
        words, others = one.words(), other.words()
        if words == others:
            return bool(words)
        if one.question or other.question:
            equal = words_of(one.answer) == words_of(other.answer)
            return equal and self._texts.overlap(words, others) >= NEAR_COPY
        return _numbers(words) == _numbers(others) and self._texts.overlap(words, others) >= NEAR_COPY_OF_TEXT

    def telling(self, query: Question) -> frozenset[str]:
        """Return the words of an answer that its question lacks and few answers have, cut to four letters."""
        new = _stems(words_of(query.answer)) - _stems(words_of(query.question))
        return frozenset(stem for stem in new if not self._answers.is_common(stem))

    def share_stated(self, telling: frozenset[str], row: Wording) -> float:
        """Return the share of the weight of these words that a row holds, from 0 to 1."""
        return self._weigh_telling(telling & _stems(row.words())) / self._weigh_telling(telling)

    def _weigh_telling(self, stems: Iterable[str]) -> float:
        # Among few texts a word such as "has" or "it" looks as rare as a name.
        short = {stem for stem in stems if len(stem) < _STEM and not stem.isdigit()}
        return self._answers.weigh(stems) - self._answers.weigh(short) / 2


def _stems(words: Iterable[str]) -> set[str]:
    return {word if word.isdigit() else word[:_STEM] for word in words}


def _numbers(words: Sequence[str]) -> Counter[str]:
    return Counter(word for word in words if any(letter.isdigit() for letter in word))
