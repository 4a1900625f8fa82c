"""Two runs of the same training data and queries side by side: what one ranks, as the page of the other shows it."""

from typing import Any

from vestige.errors import UserError
from vestige.reports._header import shorten_name
from vestige.reports._payload import describe_example, describe_text, find_highest, round_number
from vestige.reports._read import Query, RunFiles
from vestige.reports._texts import cut
from vestige.runs import Scores, relative_strength

COMPARED = 10
"""First proponents of both that are counted where they agree."""

Json = dict[str, Any]


def make_comparison(run: RunFiles, other: RunFiles) -> Json:
    """Return the rankings of `other` for the queries that both runs have, and the examples that `run` does not list.

    Methods, checkpoints, models and answers may differ; training data and questions may not.

    Raises:
        UserError: The training data or the questions differ, or no query is in both.
    """
    mine, theirs = Scores.open(run.folder), Scores.open(other.folder)
    wordings = {query.id: query.wording for query in run.queries}
    common = [query for query in other.queries if query.id in wordings]
    if not common:
        raise UserError(
            f"{run.folder} and {other.folder} have no query in common.\n"
            "Type: vestige attribute with the same --queries for both, then compare again."
        )
    queries = {}
    for query in common:
        found = mine.compare(theirs, query.id, COMPARED)
        queries[query.id] = _describe_ranking(other, query, query.wording != wordings[query.id]) | {
            "shared": found.shared,
            "correlation": round_number(found.correlation, 3),
        }
    return {
        "names": _tell_apart(run, other),
        "compared": COMPARED,
        "queries": queries,
        "examples": {
            str(row): describe_example(example, cut(example.wording))
            for row, example in other.examples.items()
            if row not in run.examples
        },
    }


def _tell_apart(run: RunFiles, other: RunFiles) -> tuple[str, str]:
    """Return a name for each run: its method, model or folder, the first that differs."""
    pairs = [
        (one.record.method, shorten_name(one.record.model.name if one.record.model else "")) for one in (run, other)
    ]
    names = [one.folder.resolve().name for one in (run, other)]
    mine, theirs = next(((a, b) for a, b in zip(*pairs, strict=True) if a != b), names)
    return mine, theirs


def _describe_ranking(other: RunFiles, query: Query, answers_otherwise: bool) -> Json:
    ranked = other.ranked[query.id]
    highest = find_highest(ranked)
    return {
        "text": describe_text(cut(query.wording)) if answers_otherwise else None,
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
