"""What a listed row asks and answers, and when two rows ask the same or are copies: words alone, no model."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, final

from vestige.parsing import words_of
from vestige.runs._tables import turns_of

_ASSISTANT = "assistant"
_SYSTEM = ("system", "developer")

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


class Wording(NamedTuple):
    """A row of the training data, or a query with its answer, as a question and an answer."""

    question: str
    """The prompt, or all turns before the last answer without the system's; empty for plain text."""
    answer: str
    """The completion, or the assistant's last turn; the whole text of plain text."""


def wording_of(row: Mapping[str, Any]) -> Wording:
    """Return question and answer of a row of `examples.parquet` or `queries.parquet`."""
    turns = turns_of(row["messages"])
    if turns:
        last = turns[-1][0] == _ASSISTANT
        asked = [content for role, content in turns[: -1 if last else None] if role not in _SYSTEM]
        return Wording("\n".join(asked), turns[-1][1] if last else "")
    if row["text"] is not None:
        return Wording("", row["text"])
    if row["prompt"] is not None or row["completion"] is not None:
        return Wording(row["prompt"] or "", row["completion"] or "")
    return Wording("", "".join(row["tokens"] or ()))


def same_answer(one: str, other: str) -> bool:
    """Return whether two answers agree: equal in words, or one holds the words of the other in a row."""
    short, long = sorted((words_of(one), words_of(other)), key=len)
    return any(long[start : start + len(short)] == short for start in range(len(long) - len(short) + 1))


@final
class Rarity:
    """How rare each word is among some texts: rare words are what tells two texts of one kind apart."""

    def __init__(self, texts: Iterable[Sequence[str]]) -> None:
        """Count the texts that hold each word.

        Args:
            texts: The words of each; equal ones count once.
        """
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
        """Count them.

        Args:
            wordings: Of every listed row and of every query.
        """
        self._questions = Rarity(words_of(wording.question) for wording in wordings)
        self._texts = Rarity(words_of("\n".join(wording)) for wording in wordings)
        self._answers = Rarity(tuple(_stems(wording.answer)) for wording in wordings)

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
        words, others = words_of("\n".join(one)), words_of("\n".join(other))
        if words == others:
            return True
        if one.question or other.question:
            equal = words_of(one.answer) == words_of(other.answer)
            return equal and self._texts.overlap(words, others) >= NEAR_COPY
        return _numbers(words) == _numbers(others) and self._texts.overlap(words, others) >= NEAR_COPY_OF_TEXT

    def telling(self, query: Wording) -> frozenset[str]:
        """Return the words of an answer that its question lacks and few answers have, cut to four letters."""
        new = _stems(query.answer) - _stems(query.question)
        return frozenset(stem for stem in new if not self._answers.is_common(stem))

    def share_stated(self, telling: frozenset[str], row: Wording) -> float:
        """Return the share of the weight of these words that a row holds, from 0 to 1."""
        return self._answers.weigh(telling & _stems("\n".join(row))) / self._answers.weigh(telling)


def _stems(text: str) -> set[str]:
    return {word if word.isdigit() else word[:_STEM] for word in words_of(text)}


def _numbers(words: Sequence[str]) -> Counter[str]:
    return Counter(word for word in words if any(letter.isdigit() for letter in word))
