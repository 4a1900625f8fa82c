"""Listed rows of a ranking: how they print as a table, what they ask and answer, and when two of them are copies."""

import html
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, final, overload

from vestige.parsing import parse_json, words_of
from vestige.terminal import shorten

PLAIN_WIDTH = 120
"""Columns used where the width of the terminal is not known."""
NARROWEST_TEXT = 16
_NARROWEST_TURN = 10
_HTML_WIDTH = 200
_BETWEEN = " | "
_SYSTEM = ("system", "developer")
_ASSISTANT = "assistant"

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


class ScoreRow(NamedTuple):
    """One ranked training example."""

    rank: int
    """1-based, counted from the requested end of the ranking."""
    example_id: str
    score: float
    percentile: float | None
    """Share of all training examples with a smaller score, in percent; None where it is not known."""
    text: str
    """The whole text; it is shortened only where the table is printed."""
    source: str | None
    row: int
    """Position in the training data."""
    turns: tuple[tuple[str, str], ...] = ()
    """Role and content of each turn of a conversation."""
    strength: float | None = None
    """The score in percent of the query's highest (see `relative_strength`)."""


class ComponentScore(NamedTuple):
    """Contribution of one component to the score of one pair."""

    component: str
    score: float


class TokenScore(NamedTuple):
    """Contribution to a pair's score of learning to predict one token of the training example."""

    position: int
    token: str
    score: float


class SelfInfluence(NamedTuple):
    """The score of a training example for itself."""

    example_id: str
    row: int
    score: float


def relative_strength(score: float, highest: float) -> float | None:
    """Return a score in percent of the query's highest: 100 for the first row, negative for opponents.

    An opponent that is stronger than the first proponent is below -100. None where the highest is not positive.
    """
    return 100.0 * score / highest if highest > 0 else None


Row = TypeVar("Row")


class ScoreTable(Sequence[Row]):
    """Rows of a ranking: a sequence that prints as a table."""

    def __init__(
        self,
        rows: Sequence[Row],
        headings: Sequence[str],
        cells: Callable[[Row], tuple[Any, ...]],
        title: str,
        note: str = "",
    ) -> None:
        self._rows, self._headings, self._cells = tuple(rows), headings, cells
        self.title = title
        self.note = note
        """What the table leaves out; empty when nothing."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "ScoreTable[Row]": ...
    def __getitem__(self, index: int | slice) -> "Row | ScoreTable[Row]":
        if isinstance(index, slice):
            return ScoreTable(self._rows[index], self._headings, self._cells, self.title, self.note)
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        cells = [self._cells(row) for row in self._rows]
        width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
        return "\n".join(line for line in (self.title, *_align(self._headings, cells, width), self.note) if line)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        caption = " ".join(part for part in (self.title, self.note) if part)
        return render_html(caption, self._headings, map(self._cells, self._rows))


def render_html(caption: str, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as HTML; the last cell of each row is a text or the turns of a conversation."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headings)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + f'<td style="text-align:left">{html.escape(excerpt(words, _HTML_WIDTH))}</td></tr>'
        for *cells, words in rows
    )
    caption = f"<caption>{html.escape(caption)}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


HEADINGS = ("rank", "example", "strength", "score", "percentile", "text")
Shown = str | Sequence[tuple[str, str]]
"""A text, or the turns of a conversation."""


def cells_of(row: ScoreRow) -> tuple[Any, ...]:
    """Return what a table shows of a row, under `HEADINGS`."""
    percentile = "" if row.percentile is None else f"{row.percentile:.1f}"
    strength = "" if row.strength is None else f"{row.strength:.0f}"
    shown = row.turns or row.text
    score = "not scored" if math.isnan(row.score) else f"{row.score:+.4g}"
    return str(row.rank), shorten(row.example_id), strength, score, percentile, shown


def _align(headings: Sequence[str], rows: Sequence[Sequence[Any]], width: int) -> list[str]:
    """Align lines with numbers to the right, and cut the last column to what is left of `width`."""
    leading = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings) - 1)]
    left = max(NARROWEST_TEXT, width - sum(leading) - 2 * len(leading))
    return [
        "  ".join([*(cell.rjust(size) for cell, size in zip(row, leading, strict=False)), excerpt(row[-1], left)])
        for row in (headings, *rows)
    ]


def excerpt(words: Shown, width: int) -> str:
    """Return a text, or the turns of a conversation, on one line of about `width` characters.

    Each turn has its role before it and an equal share of the line, what one leaves going to those after it. A leading
    system turn, which many conversations share, and what stands between the first two turns and the last are left out.
    """
    if isinstance(words, str):
        lines = (" ".join(line.split()) for line in words.splitlines())
        return shorten(_BETWEEN.join(line for line in lines if line), width)
    turns = words[1:] if words[0][0] in _SYSTEM and len(words) > 1 else words
    parts = [f"{role}: {' '.join(content.split())}" for role, content in turns]
    parts = parts if len(parts) < 4 else [*parts[:2], "…", parts[-1]]
    left = max(width - len(_BETWEEN) * (len(parts) - 1), _NARROWEST_TURN * len(parts))
    shown: list[str] = []
    for place, part in enumerate(parts):
        share = left // (len(parts) - place)
        after = sum(min(len(each), share) for each in parts[place + 1 :])
        shown.append(shorten(part, left - after))
        left -= len(shown[-1])
    return _BETWEEN.join(shown)


class Wording(NamedTuple):
    """A row of the training data, or a query with its answer, as a question and an answer."""

    question: str
    """The prompt, or all turns before the last answer without the system's; empty for plain text."""
    answer: str
    """The completion, or the assistant's last turn; the whole text of plain text."""


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

    @property
    def explained(self) -> str:
        """The explained part of the answer, in words; empty for all of it."""
        found = [] if self.instead is None else [f"instead of {self.instead!r}"]
        found += [f"the part {' and '.join(map(repr, self.parts))}"] if self.parts else []
        return "; ".join([*found, *(["with weights of tokens"] if self.weights else [])])


class Listed(NamedTuple):
    """A row of `examples.parquet`."""

    text: str
    source: str | None
    turns: tuple[tuple[str, str], ...]
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


def question_of(row: Mapping[str, Any]) -> Question:
    """Return a row of `queries.parquet` as a query."""
    question, answer = wording_of(row)
    return Question(
        row["query_id"],
        question,
        answer,
        row.get("instead"),
        tuple(answer[start:stop] for start, stop in row.get("span") or ()),
        tuple(row.get("weights") or ()),
        row.get("loss"),
        bool(row.get("generated")),
    )


def turns_or_text(row: dict[str, Any]) -> Shown:
    """Return the turns of a row of `examples.parquet` or `queries.parquet`, or its text where it has none."""
    return turns_of(row["messages"]) or row_text(row)


def row_text(row: dict[str, Any]) -> str:
    """Return the text of a row of `examples.parquet` or `queries.parquet`, turns and parts on lines of their own."""
    if turns := turns_of(row["messages"]):
        return "\n".join(f"{role}: {content}" for role, content in turns)
    if row["text"] is not None:
        return row["text"]
    parts = [part for part in (row["prompt"], row["completion"]) if part]
    # Examples given as tokens alone are read from those.
    return "\n".join(parts) if parts else "".join(row["tokens"] or ())


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
            return bool(words)
        if one.question or other.question:
            equal = words_of(one.answer) == words_of(other.answer)
            return equal and self._texts.overlap(words, others) >= NEAR_COPY
        return _numbers(words) == _numbers(others) and self._texts.overlap(words, others) >= NEAR_COPY_OF_TEXT

    def telling(self, query: Question) -> frozenset[str]:
        """Return the words of an answer that its question lacks and few answers have, cut to four letters."""
        new = _stems(query.answer) - _stems(query.question)
        return frozenset(stem for stem in new if not self._answers.is_common(stem))

    def share_stated(self, telling: frozenset[str], row: Wording) -> float:
        """Return the share of the weight of these words that a row holds, from 0 to 1."""
        return self._weigh_telling(telling & _stems("\n".join(row))) / self._weigh_telling(telling)

    def _weigh_telling(self, stems: Iterable[str]) -> float:
        # Among few texts a word such as "has" or "it" looks as rare as a name.
        short = {stem for stem in stems if len(stem) < _STEM and not stem.isdigit()}
        return self._answers.weigh(stems) - self._answers.weigh(short) / 2


def _stems(text: str) -> set[str]:
    return {word if word.isdigit() else word[:_STEM] for word in words_of(text)}


def _numbers(words: Sequence[str]) -> Counter[str]:
    return Counter(word for word in words if any(letter.isdigit() for letter in word))
