"""What the terminal shows of a run: the answers, the ranking, proofs, ladder and checks, as far as they fit on it."""

from collections.abc import Sequence

from vestige import data, runs
from vestige.progress import format_seconds
from vestige.terminal import lines_of_facts, say, shorten

SHOWN_QUERIES, SHOWN_PROPONENTS, SHOWN, SHOWN_LETTERS = 10, 5, 8, 500
"""What fits on a screen; the run holds everything."""


class Answers:
    """Prints the first queries with their answers, the model's own in full and each as soon as it has ended."""

    def __init__(self) -> None:
        self._shown: set[int] = set()

    def show_one(self, queries: "Sequence[data.Example]", number: int) -> None:
        """Print an answer of the model. A query that chooses what is explained waits until that was found in it."""
        if number < SHOWN_QUERIES and queries[number].focus is None:
            self._show(queries, number, is_own=True)

    def show_all(self, queries: "data.TokenizedData", generated: Sequence[bool]) -> None:
        """Print the queries that were not printed before."""
        for number, is_own in enumerate(generated[:SHOWN_QUERIES]):
            if number not in self._shown:
                self._show(queries.examples, number, is_own=is_own)
        if len(queries) > SHOWN_QUERIES:
            say(f"... and {len(queries) - SHOWN_QUERIES} more queries.\n")

    def _show(self, queries: "Sequence[data.Example]", number: int, *, is_own: bool) -> None:
        """Print a query; before the first one, a system prompt that all share."""
        example, openings = queries[number], [_turns_of(query)[0] for query in queries]
        shared = len(openings) > 1 and len(set(openings)) == 1
        # A text without roles has one part, which is the answer.
        shared = shared and all(query.lacks_answer or len(_turns_of(query)) > 1 for query in queries)
        if shared and not self._shown:
            role, text = openings[0]
            say(f"{role}, of all queries: {_indent(text)}\n")
        self._shown.add(number)
        *turns, (role, answer) = _turns_of(example)[shared:]
        lines = [f"{example.id}, answered by the model" if is_own else example.id]
        lines += [f"  {role}: {_indent(_cut(text))}" for role, text in turns]
        lines.append(f"  {role}: {_indent(answer if is_own else _cut(answer))}")
        lines += [f"  {name}: {_indent(_cut(text))}" for name, text in _list_focus(example, answer)]
        say("\n".join(lines) + "\n")


def _turns_of(example: "data.Example") -> tuple[tuple[str, str], ...]:
    """Return the text of each role; for a query that is no conversation, the names of its columns stand for roles."""
    if example.messages:
        return tuple((turn.role, turn.content) for turn in example.messages)
    parts = {"prompt": example.prompt, "completion": example.completion, "text": example.text}
    return tuple((name, text) for name, text in parts.items() if text is not None) or (("tokens", example.display),)


def _list_focus(example: "data.Example", answer: str) -> list[tuple[str, str]]:
    """Return what of a query is explained: names of fields with their content."""
    focus = example.focus
    if focus is None:
        return []
    parts = [answer[slice(*span)] if isinstance(span, tuple) else span for span in focus.spans]
    weights = ", ".join(f"{weight:g}" for weight in focus.weights)
    found = {"instead of": focus.instead or "", "explained part": " … ".join(parts), "weights": weights}
    return [(name, text) for name, text in found.items() if text]


def _indent(text: str) -> str:
    return "\n    ".join(text.splitlines())


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}…"


def show_ranking(scores: "runs.Scores", k: int) -> None:
    """Print the first `k` proponents of the first queries, and what they say."""
    for query in scores.queries[:SHOWN_QUERIES]:
        say(f"{scores.top(query, k)}\n{runs.conclude(scores, query)}\n")
    if len(scores.queries) > SHOWN_QUERIES:
        say(f"... and {len(scores.queries) - SHOWN_QUERIES} more queries.\n")


def show_proofs(scores: "runs.Scores") -> None:
    """Print what moved the model to each answer, where the answer stands, and whether it is memorized."""
    for query in scores.queries[:SHOWN_QUERIES] if scores.has_verbatim else ():
        facts = {name.replace("_", " "): words for name, words in scores.proofs(query)._asdict().items()}
        say("\n".join([f"Three proofs of query {shorten(query)}:", *lines_of_facts(facts)]) + "\n")


def show_ladder(scores: "runs.Scores") -> None:
    """Print where the first rows of each query stood at every rung, what each took, and what it bought."""
    if scores.run.ladder is None:
        return
    for query in scores.queries[:SHOWN_QUERIES]:
        say(f"{scores.ladder(query, SHOWN_PROPONENTS)}\n")
    for rung in scores.run.ladder.rungs:
        bought = "" if rung.lds is None else f", LDS {rung.lds[0]:.3f} [{rung.lds[1]:.3f}, {rung.lds[2]:.3f}]"
        bought += "" if rung.lds_of_all is None else f" by these candidates, {rung.lds_of_all[0]:.3f} by all rows"
        say(f"{rung.name}: {rung.rows:,} examples in {format_seconds(rung.seconds)}{bought}")
    say("")


def show_checks(scores: "runs.Scores") -> None:
    """Print the checks, and what the sign means."""
    for check in scores.run.trust.checks:
        say(f"[{check.verdict}] {check.name}: {check.reading}")
    say(f"Sign: {scores.meaning.sign}")
