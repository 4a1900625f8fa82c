"""What the numbers of one query say, in words: from the run folder alone, without a model."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, final

from vestige import runs
from vestige.runs._listed import ScoreRow
from vestige.runs._words import Wording, same_answer
from vestige.terminal import shorten

Kind = Literal["one", "several", "hubs", "none"]

STANDS_OUT = 2.0
"""Times the next. Of 40 questions that a support bot's data do not touch, 2 had one to five rows that reached it, and 8
with 1.5; of 15 answers taken from one row that came first, 10, and 9 with 2.5. Scores without a causal sign, of which
zero may mean nothing, are counted from the mean of all."""
OUTLYING = 3.0
"""Standard deviations above the mean of all scores, and no less: of ten rows none can be, however they score. The rows
that stood out by the first rule had 4.5 and more."""
MOST_ROWS = 5
"""More rows than this are no few."""
CONFLICTING = 0.25
"""Share of the strongest score at its end that each row of a conflict has: weaker ones have little to do with the
query. Of the support bot's contradiction the one row was the first, the other had half of the strongest opponent's."""
HUB_FIRST, HUB_SHARE, HUB_NEEDS = 3, 0.5, 4
"""A row among the first three of half of all queries, of four at least, leads whatever the question. Of 80 queries of
the support bot no row was among the first three of more than 9."""
STATED = 0.5
"""Share of the weight of an answer's telling words that one listed row has to hold. Of 40 answers that are not in the
data 38 stay below, at most at 0.47; of 17 that are stated none, the lowest at 0.59."""
_NUMBERS = ("No", "One", "Two", "Three", "Four", "Five")
_EXCERPT = 160
_NAMED = 3
_REPEATED = ("--option",)
"""Flags that a command takes several times."""


class Conflict(NamedTuple):
    """Two rows that answer the same question differently: ids of examples."""

    proponent: str
    """Pulls towards the query's answer."""
    opponent: str
    """Pulls away from it."""


@dataclass(frozen=True)
class Conclusion:
    """What the numbers of one query say, in words."""

    query: str
    """Id of the query."""
    kind: Kind
    """One row stands out; a few do; rows that lead for most queries lead here too; nothing stands out."""
    sentences: tuple[str, ...]
    """Plain text, not escaped; the first is the headline."""
    rows: tuple[str, ...]
    """Ids of the training rows that stand out, best first."""
    lead: float | None
    """Score of the first over that of the next distinct text (copies count once); None where it is not known."""
    conflicts: tuple[Conflict, ...]
    """Listed rows that answer the same question differently."""

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def conclude(scores: "runs.Scores", query: int | str) -> Conclusion:
    """Return what the listed scores and texts of a query say, in words.

    Args:
        scores: An opened run.
        query: Position or id of the query.

    Raises:
        UserError: There is no such query.
    """
    return _Reading(scores, scores.query_id(query)).conclude()


class _Text(NamedTuple):
    """A distinct text among the proponents: its best row, and its copies."""

    rows: tuple[ScoreRow, ...]

    @property
    def score(self) -> float:
        return self.rows[0].score

    @property
    def name(self) -> str:
        return shorten(self.rows[0].example_id)


@final
class _Reading:
    """The listed rows of one query."""

    def __init__(self, scores: "runs.Scores", query: str) -> None:
        self._scores, self._query, self._asked = scores, query, scores.query(query)
        self._proponents, self._opponents = scores.ends(query).values()
        distribution = scores.run.distribution.get(query)
        self._mean, self._std = (0.0, 0.0) if distribution is None else (distribution.mean, distribution.std)
        # Of sources, a run shows an excerpt for each and no texts.
        scored = scores.run.data.examples - len(scores.run.left_out)
        is_part = scores.run.ladder is not None
        self._sources = distribution is not None and distribution.count < scored and not is_part
        self._noun = "source" if self._sources else "row"
        self._listed = {row.row for row in (*self._proponents, *self._opponents)}

    def conclude(self) -> Conclusion:
        standing = self._count_standing()
        hubs = self._find_hubs()
        kind: Kind = "hubs" if hubs else ("none", "one", "several")[min(standing, 2)]
        rows = tuple(row.example_id for text in self._texts[:standing] for row in text.rows)
        conflicts = self._find_conflicts()
        sentences = [*self._describe_first(kind, standing, hubs), *self._describe_answer(kind)]
        sentences += [*self._describe_opponent(), *self._describe_conflicts(conflicts), *self._describe_sign()]
        return Conclusion(self._query, kind, tuple(sentences), rows, self._lead, conflicts)

    @cached_property
    def _texts(self) -> list[_Text]:
        """The first distinct texts among the proponents, best first, and all their copies."""
        found: list[list[ScoreRow]] = []
        copies = self._scores.words.are_copies
        for row in self._proponents:
            wording = self._wording(row)
            same = (rows for rows in found if not self._sources and copies(self._wording(rows[0]), wording))
            if (rows := next(same, None)) is not None:
                rows.append(row)
            elif len(found) <= MOST_ROWS:
                found.append([row])
        return [_Text(tuple(rows)) for rows in found]

    def _wording(self, row: ScoreRow) -> Wording:
        return self._scores.wording(row.row)

    @property
    def _lead(self) -> float | None:
        if len(self._texts) < 2 or self._texts[1].score <= 0:
            return None
        return self._texts[0].score / self._texts[1].score

    def _count_standing(self) -> int:
        """Return the number of texts that stand out: those before the first wide gap."""
        scores = [text.score for text in self._texts]
        gaps = (count for count in range(1, len(scores)) if self._is_gap(scores[count - 1], scores[count], 1))
        return next(gaps, 0)

    def _is_gap(self, score: float, after: float, sign: int) -> bool:
        """Return whether a score stands out from the next on its side of the mean, +1 for proponents."""
        from_mean = sign * (score - self._mean)
        zero = 0.0 if self._scores.meaning.causal else self._mean
        here, there = sign * (score - zero), sign * (after - zero)
        is_far = from_mean > OUTLYING * self._std * (1 + 1e-9) and self._std > 0
        return sign * score > 0 and is_far and here >= STANDS_OUT * max(there, 0.0)

    def _find_hubs(self) -> list[str]:
        """Return the ids of first proponents that are among the first for most queries."""
        scores, examples = self._scores, self._scores.run.data.examples
        queries = len(scores.queries)
        if queries < HUB_NEEDS or self._sources or examples < 4 * HUB_FIRST:
            return []
        leading = scores.count_leading(HUB_FIRST)
        first = self._proponents[:1]
        return [row.example_id for row in first if row.score > 0 and leading[row.row] >= HUB_SHARE * queries]

    def _find_conflicts(self) -> tuple[Conflict, ...]:
        """Return pairs that answer the same question differently, one for and one against the query's answer."""
        if self._sources or not self._scores.meaning.causal:
            return ()
        words = self._scores.words
        against: dict[frozenset[str], list[ScoreRow]] = {}
        for row in self._strong(self._opponents, -1):
            against.setdefault(words.question_key(self._wording(row).question), []).append(row)
        return tuple(
            Conflict(row.example_id, other.example_id)
            for row in self._strong(self._proponents, 1)
            for other in against.get(words.question_key(self._wording(row).question), ())
            if self._differ(self._wording(row), self._wording(other))
        )

    def _strong(self, rows: Sequence[ScoreRow], sign: int) -> list[ScoreRow]:
        """Return the rows of an end that have a share of its strongest score, or answer the query's own question."""
        same = self._scores.words.same_question
        least = CONFLICTING * sign * rows[0].score if rows else 0.0
        return [
            row
            for row in rows
            if sign * row.score > 0
            and (sign * row.score >= least or same(self._wording(row).question, self._asked.question))
        ]

    def _differ(self, one: Wording, other: Wording) -> bool:
        """Return whether two rows answer the same question, or both the query's own, and not in the same way."""
        same, asked = self._scores.words.same_question, self._asked.question
        both = same(one.question, other.question) or (same(one.question, asked) and same(other.question, asked))
        return both and bool(one.answer) and bool(other.answer) and not same_answer(one.answer, other.answer)

    def _describe_first(self, kind: Kind, standing: int, hubs: Sequence[str]) -> list[str]:
        """Return the headline, and what the first row says."""
        if not self._proponents:
            return ["The run lists no rows for this query."]
        first = self._texts[0]
        if first.score <= 0:
            return [f"No {self._noun} scores above zero."]
        if kind == "hubs":
            return [*self._describe_hubs(hubs[0]), *self._quote(first)]
        if kind == "one":
            return [f"One {self._noun} stands out{self._describe_gap(1)}: {self._name(first)}.", *self._quote(first)]
        if kind == "several":
            names = [self._name(text) for text in self._texts[:standing]]
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
            headline = f"{_NUMBERS[standing]} {self._noun}s stand out{self._describe_gap(standing)}: {listed}."
            return [headline, *self._quote(first, "The first says")]
        return [self._describe_none(first), *self._quote(first)]

    def _describe_none(self, first: _Text) -> str:
        if len(self._texts) == 1:
            return f"The run lists one {self._noun}, so there is nothing to compare it with: {self._name(first)}."
        if self._texts[1].score <= 0:
            return f"No {self._noun} stands out: {self._name(first)} alone scores above zero, and not by much."
        stated = "" if self._is_stated else ", and nothing listed states this answer"
        times = _format_times(first.score / self._texts[1].score)
        return f"No {self._noun} stands out{stated}: the first, {self._name(first)}, is {times} the next."

    def _describe_gap(self, standing: int) -> str:
        """Return how far the last of the rows that stand out is from the next."""
        last, after = self._texts[standing - 1].score, self._texts[standing].score
        if after <= 0:
            return ", alone with a score above zero" if standing == 1 else ", alone with scores above zero"
        each = "" if standing == 1 else "each at least "
        return f", {each}{_format_times(last / after)} the next"

    def _name(self, text: _Text) -> str:
        copies = [shorten(row.example_id) for row in text.rows[1:]]
        if not copies:
            return text.name
        more = f" and {len(copies) - _NAMED} more" if len(copies) > _NAMED else ""
        return f"{text.name} (the same text: {', '.join(copies[:_NAMED])}{more})"

    def _quote(self, text: _Text, it_says: str = "It says") -> list[str]:
        says = self._say(text.rows[0])
        return [f"{it_says}: {says}"] if says else []

    def _say(self, row: ScoreRow) -> str:
        """Return the answer of a row on one line, its end cut off; empty where the run has none."""
        line = " ".join(("" if self._sources else self._wording(row).answer).split())
        return line if len(line) <= _EXCERPT else line[: _EXCERPT - 1].rstrip() + "…"

    def _describe_hubs(self, hub: str) -> list[str]:
        """Return which row leads for most queries, and what to type for a ranking in which such rows count less."""
        run = self._scores.run
        count = self._scores.count_leading(HUB_FIRST)[self._proponents[0].row]
        queries = len(self._scores.queries)
        headline = f"{shorten(hub)} comes first, but is among the first {HUB_FIRST} for {count} of {queries} queries."
        if not run.against_hubs:
            return [headline, "It may lead whatever the question."]
        return [headline, f"It may lead whatever the question. Type: {_replace_options(run.command, run.against_hubs)}"]

    @cached_property
    def _is_stated(self) -> bool:
        """True if a listed row holds enough of the answer's telling words, or it has none."""
        words, telling = self._scores.words, self._scores.words.telling(self._asked)
        if self._sources or not self._asked.question or not telling:
            return True
        return any(words.share_stated(telling, self._scores.wording(row)) >= STATED for row in self._listed)

    def _describe_answer(self, kind: Kind) -> list[str]:
        """Return that no listed row states the answer, unless the headline does."""
        if self._is_stated or kind == "none":
            return []
        return [f"Nothing listed states this answer: no row of {len(self._listed)} has half of its rare words."]

    def _describe_opponent(self) -> list[str]:
        """Return what pulls the other way most; methods without a causal sign have nothing that does."""
        scores = [row.score for row in self._opponents[:2]]
        if not self._scores.meaning.causal or len(scores) < 2:
            return []
        if not self._is_gap(scores[0], scores[1], -1):
            return [f"No {self._noun} clearly pulls the other way."]
        row = self._opponents[0]
        named, says = shorten(row.example_id), self._say(row)
        return [f"The {self._noun} that pulls the other way most is {named}{f': {says}' if says else '.'}"]

    def _describe_conflicts(self, conflicts: Sequence[Conflict]) -> list[str]:
        if not conflicts:
            return []
        shown = [" and ".join(map(shorten, pair)) for pair in conflicts[:_NAMED]]
        more = f", and {len(conflicts) - _NAMED} more pairs" if len(conflicts) > _NAMED else ""
        return [f"These answer the same question differently: {'; '.join(shown)}{more}."]

    def _describe_sign(self) -> list[str]:
        """Return the caveat of scores that only say how alike two texts are."""
        sign = self._scores.meaning.sign
        return [] if self._scores.meaning.causal else [f"{sign[:1].upper()}{sign[1:]}."]


def _format_times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:,.0f} times"


def _replace_options(command: str, options: str) -> str:
    """Return a command with other options and another folder for its result."""
    words, new = shlex.split(command), shlex.split(options)
    taken = {word for word in new if word.startswith("--") and word not in _REPEATED}
    kept: list[str] = []
    for at, word in enumerate(words):
        before = words[at - 1] if at else ""
        if word in taken or before in taken or word == "--overwrite":
            continue
        kept.append(f"{word}-2" if before == "--out" else f"{word}-2" if word.startswith("--out=") else word)
    return shlex.join([*kept, *new])
