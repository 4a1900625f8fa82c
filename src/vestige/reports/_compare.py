"""Two runs of the same training data and queries side by side: what one ranks, as the page of the other shows it."""

from typing import Any

from vestige.errors import UserError
from vestige.reports._header import shorten_name
from vestige.reports._payload import describe_example, describe_text, find_highest, round_number
from vestige.reports._read import Query, RunFiles, Wording
from vestige.reports._texts import cut
from vestige.runs import relative_strength

Json = dict[str, Any]


def make_comparison(run: RunFiles, other: RunFiles) -> Json:
    """Return the rankings of `other` for the queries that both runs have, and the examples that `run` does not list.

    Methods, checkpoints, models and answers may differ; training data and questions may not.

    Raises:
        UserError: The training data differ, or no query is in both.
    """
    _require_same_data(run, other)
    asked = {query.id: query for query in run.queries}
    common = [query for query in other.queries if query.id in asked and _is_same(query, asked[query.id])]
    if not common:
        raise UserError(
            f"{run.folder} and {other.folder} have no query in common: ids and questions must be the same.\n"
            "Type: vestige attribute with the same --queries for both, then compare again."
        )
    names = _tell_apart(run, other)
    return {
        "run": other.folder.resolve().name,
        "names": names,
        "left": len(run.queries) - len(common),
        "queries": {query.id: _describe_ranking(other, query, asked[query.id]) for query in common},
        "examples": {
            str(row): describe_example(example, cut(example.wording))
            for row, example in other.examples.items()
            if row not in run.examples
        },
    }


def _require_same_data(run: RunFiles, other: RunFiles) -> None:
    """Raise unless the rows of both runs are the same examples; fingerprints also differ where tokenizers do."""
    mine, theirs = run.record.data, other.record.data
    common = run.examples.keys() & other.examples.keys()
    same = all(_words_of(run.examples[row].wording) == _words_of(other.examples[row].wording) for row in common)
    if mine.examples != theirs.examples or not same:
        raise UserError(
            f"{run.folder} scores {mine.examples:,} examples of {mine.name}, {other.folder} scores "
            f"{theirs.examples:,} of {theirs.name}: their rows are not the same examples, so ranks cannot be compared."
        )


def _words_of(wording: Wording) -> tuple[Any, ...]:
    return wording.text, wording.prompt, wording.completion, wording.messages


def _is_same(query: Query, other: Query) -> bool:
    """Return whether two queries put the same question; their answers may differ."""
    return _question_of(query.wording) == _question_of(other.wording)


def _question_of(wording: Wording) -> tuple[Any, ...]:
    turns = wording.messages
    if turns:
        return turns[:-1] if turns[-1][0] == "assistant" else turns
    return (wording.text, wording.prompt)


def _tell_apart(run: RunFiles, other: RunFiles) -> tuple[str, str]:
    """Return a name for each run: its method, model or folder, the first that differs."""
    for left, right in (
        (run.record.method, other.record.method),
        (shorten_name(run.record.model.name if run.record.model else ""), shorten_name(_model_name(other))),
    ):
        if left != right:
            return left, right
    return run.folder.resolve().name, other.folder.resolve().name


def _model_name(run: RunFiles) -> str:
    return run.record.model.name if run.record.model else ""


def _describe_ranking(other: RunFiles, query: Query, mine: Query) -> Json:
    ranked = other.ranked[query.id]
    highest = find_highest(ranked)
    answers = _words_of(query.wording) != _words_of(mine.wording)
    return {
        "text": describe_text(cut(query.wording)) if answers else None,
        "ranked": [
            {
                "end": entry.end,
                "rank": entry.rank,
                "row": entry.row,
                "score": round_number(entry.score),
                "strength": round_number(relative_strength(entry.score, highest), 4),
            }
            for entry in ranked
        ],
    }
