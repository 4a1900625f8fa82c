"""What the page's script is given: one JSON value per run, small enough to stand inside the file; and another run's."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel

from vestige.errors import UserError
from vestige.reports._read import shorten_name
from vestige.reports._texts import Pieces, Word, cut, find_overlap, find_rare_words, find_system, split_words
from vestige.runs import NO_SOURCE, Listed, Question, ScoreRow, Scores, conclude, find_source_lift

COMPARED = 10
"""First proponents of two runs that are counted where they agree."""
HUB_DEPTH = 10
"""An example counts as a hit of a query when it stands among the query's first ten proponents."""

_ENDINGS = ("weight", "bias", "default", "base_layer")
"""Last parts of a name that say nothing about where it stands; `default` is PEFT's adapter name."""
_FACTORS = "lora_"
"""Beginning of the names of an adapter's factors: only their product acts, so they share the cell of their module."""
CELL_DIGITS = 5
"""Digits of the largest cell of an example; the others have as many decimals."""
_LONGEST_NUMBER = 10
"""Digits of a layer's number; more of them are a part of a name."""

Json = dict[str, Any]


class Place(NamedTuple):
    """Where a component stands: its layer (None outside the layers) and its module within it."""

    layer: int | None
    module: str


@cache
def find_place(component: str) -> Place:
    """Return layer and module of a parameter name.

    The first number in the name is its layer, what follows is the module; weight and bias share a cell, and so do the
    factors of an adapter.

    >>> find_place("model.layers.3.self_attn.q_proj.weight")
    Place(layer=3, module='self_attn.q_proj')
    >>> find_place("transformer.wte.weight")
    Place(layer=None, module='wte')
    """
    parts = component.split(".")
    while len(parts) > 1 and (parts[-1] in _ENDINGS or parts[-1].startswith(_FACTORS)):
        parts.pop()
    for number, part in enumerate(parts[:-1]):
        if part.isdecimal() and len(part) < _LONGEST_NUMBER:
            return Place(int(part), ".".join(parts[number + 1 :]))
    return Place(None, parts[-1])


class Grid(NamedTuple):
    """The cells of the heatmap. A cell is (layer number or None, module); order is the model's."""

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    others: tuple[str, ...]
    """Modules outside the layers: embeddings, final norm, output head."""
    cells: tuple[Place, ...]

    def sums(self, scores: Mapping[str, float]) -> list[float]:
        """Return the score of each cell: the sum over the components that stand in it."""
        sums = dict.fromkeys(self.cells, 0.0)
        for component, score in scores.items():
            sums[find_place(component)] += score
        return list(sums.values())


def make_grid(components: Iterable[str]) -> Grid:
    """Return the grid that has a cell for each of `components`."""
    cells = tuple(dict.fromkeys(find_place(component) for component in components))
    return Grid(
        layers=tuple(sorted({cell.layer for cell in cells if cell.layer is not None})),
        modules=tuple(dict.fromkeys(cell.module for cell in cells if cell.layer is not None)),
        others=tuple(cell.module for cell in cells if cell.layer is None),
        cells=cells,
    )


def make_payload(scores: Scores, other: Json | None = None) -> Json:
    """Return the data of the page, without NaN and with numbers cut to the digits that a reader can use.

    Args:
        scores: What the page shows, as `read_run` opens it.
        other: What `make_comparison` says of the run beside it.
    """
    queries, examples = scores.tables.queries, scores.tables.examples
    pieces = {row: cut(each.wording) for row, each in examples.items()}
    words = {row: split_words(piece) for row, piece in pieces.items()}
    rare = find_rare_words(words.values())
    grid = _make_run_grid(scores)
    hubs = {row: count / len(queries) for row, count in scores.count_leading(HUB_DEPTH).items()}
    return {
        "run": scores.folder.resolve().name,
        "grid": grid and grid._asdict(),
        "hasTokens": scores.tables.parts("tokens") is not None,
        "missing": scores.run.missing,
        "causal": scores.meaning.causal,
        "noSource": NO_SOURCE,
        "system": {
            "queries": find_system(query.wording for query in queries.values()),
            "examples": find_system(each.wording for each in examples.values()),
        },
        "examples": {str(row): describe_example(each, pieces[row], hubs.get(row)) for row, each in examples.items()},
        "queries": [
            _describe_query(scores, query, words, rare, grid, pieces) | _describe_findings(scores, query.id)
            for query in queries.values()
        ],
        "other": other,
    }


def _describe_findings(scores: Scores, query: str) -> Json:
    """Return the conclusion of a query in words, and the lift of every source."""
    found = conclude(scores, query)
    return {
        "conclusion": {
            "kind": found.kind,
            "sentences": found.sentences,
            "rows": found.rows,
            "lead": round_number(found.lead, 3),
            "conflicts": found.conflicts,
        },
        "lift": [
            {
                "source": each.source,
                "examples": each.examples,
                "rows": round_number(each.row_share, 5),
                "influence": round_number(each.influence_share, 5),
                "half": None if each.high is None else round_number(each.high - each.lift, 4),
                "thin": each.thin,
            }
            for each in find_source_lift(scores, [query])
        ],
        "proofs": _describe_proofs(scores, query) if scores.has_verbatim else None,
    }


def _describe_proofs(scores: Scores, query: str) -> Json:
    """Return the three proofs of an answer in words, and its parts that stand word for word in training rows."""
    spans = [
        span._asdict() | {"listed": [(row.example_id, row.before, row.after) for row in span.listed]}
        for span in scores.verbatim(query)
    ]
    sentences = scores.proofs(query)._asdict().items()
    return {"sentences": [(name.replace("_", " ").capitalize(), words) for name, words in sentences], "spans": spans}


def round_number(value: Any, digits: int = 7) -> float | None:
    """Return `value` with `digits` significant digits, or None where it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def _make_run_grid(scores: Scores) -> Grid | None:
    """Return the grid of all components in the run, in the model's order; None without a component table."""
    parts = scores.tables.parts("components")
    if parts is None:
        return None
    return make_grid([*scores.run.components, *(part.component for each in parts.values() for part in each)])


def describe_text(pieces: Pieces) -> Json:
    """Return a text in pieces, with the role of each and the turns they make up."""
    targets = "".join("1" if target else "0" for target in pieces.targets)
    shown = {"pieces": pieces.texts, "roles": pieces.roles, "turns": pieces.turns}
    return shown | {"targets": targets, "tokens": pieces.from_tokens}


def describe_example(example: Listed, pieces: Pieces, hub: float | None = None) -> Json:
    """Return an example as the page lists it; `hub` is the share of queries that it leads for."""
    shown = {name: value for name, value in example._asdict().items() if name != "wording"}
    return shown | {"hub": round_number(hub, 3), "text": describe_text(pieces)}


def _describe_row(end: str, row: ScoreRow) -> Json:
    score, strength = round_number(row.score), round_number(row.strength, 4)
    return {"end": end, "rank": row.rank, "row": row.row, "score": score, "strength": strength}


def _describe_query(
    scores: Scores,
    query: Question,
    words: Mapping[int, list[Word]],
    rare: frozenset[str],
    grid: Grid | None,
    pieces_of: Mapping[int, Pieces],
) -> Json:
    name, pieces, ranked = query.id, cut(query.wording), []
    query_words = split_words(pieces)
    for end, row in _list_ends(scores, name):
        shared = find_overlap(query_words, words[row.row], rare)
        ranked.append(
            {
                **_describe_row(end, row),
                "percentile": round_number(row.percentile),
                "overlap": round_number(shared.share, 3),
                "match": shared.example,
                "answerMatch": shared.query,
                "cells": _sum_cells(scores, name, row.example_id, grid),
                "tokens": _list_token_scores(scores, name, row.example_id, pieces_of[row.row]),
            }
        )
    return {
        "id": name,
        "generated": query.generated,
        "loss": round_number(query.loss),
        "explained": query.explained,
        "text": describe_text(pieces),
        "ranked": ranked,
        "distribution": _round_all(scores.run.distribution.get(name)),
        "groups": _round_all(scores.run.groups.get(name, [])),
    }


def _list_ends(scores: Scores, query: str) -> list[tuple[str, ScoreRow]]:
    return [(end, row) for end, rows in scores.ends(query).items() for row in rows]


def _sum_cells(scores: Scores, query: str, example: str, grid: Grid | None) -> list[float | None] | None:
    """Return the score of each cell of the grid for one example, or None where it was not taken apart."""
    parts = (scores.tables.parts("components") or {}).get((query, example))
    if grid is None or parts is None:
        return None
    sums = grid.sums(dict(parts))
    largest = max(map(abs, sums), default=0.0)
    if not 0 < largest < math.inf:
        return [round_number(value) for value in sums]
    # Digits below a ten-thousandth of the largest cell would be half of the file.
    decimals = CELL_DIGITS - 1 - math.floor(math.log10(largest))
    return [round(value, decimals) for value in sums]


def _list_token_scores(scores: Scores, query: str, example: str, pieces: Pieces) -> list[float | None] | None:
    """Return the score of each token of one example, or None where it was not taken apart."""
    parts = (scores.tables.parts("tokens") or {}).get((query, example))
    if parts is None:
        return None
    known = {part.position: part.score for part in parts}
    if not pieces.from_tokens or max(known) >= len(pieces.texts):
        raise UserError(
            f"tokens.parquet of {scores.folder} scores positions of example {example!r} that examples.parquet does not "
            "have: the two files come from different runs.\nAttribute again with --tokens."
        )
    return [round_number(known.get(position, 0.0), 5) for position in range(len(pieces.texts))]


def _round_all(value: Any) -> Any:
    """Return a part of run.json with numbers cut to the digits that a reader can use."""
    if isinstance(value, BaseModel):
        return _round_all(value.model_dump())
    if isinstance(value, float):
        return round_number(value)
    if isinstance(value, list | tuple):
        return [_round_all(item) for item in value]
    if isinstance(value, dict):
        return {key: _round_all(item) for key, item in value.items()}
    return value


def make_comparison(mine: Scores, theirs: Scores) -> Json:
    """Return the rankings of `theirs` for the queries that both runs have, and the examples that `mine` does not list.

    Methods, checkpoints, models and answers may differ; training data and questions may not.

    Raises:
        UserError: The training data or the questions differ, or no query is in both.
    """
    common = [query for query in theirs.queries if query in mine.tables.queries]
    if not common:
        raise UserError(
            f"{mine.folder} and {theirs.folder} have no query in common.\n"
            "Type: vestige attribute with the same --queries for both, then compare again."
        )
    return {
        "names": _tell_apart(mine, theirs),
        "compared": COMPARED,
        "queries": {query: _describe_ranking(mine, theirs, query) for query in common},
        "examples": {
            str(row): describe_example(each, cut(each.wording))
            for row, each in theirs.tables.examples.items()
            if row not in mine.tables.examples
        },
    }


def _tell_apart(*both: Scores) -> Sequence[str]:
    """Return a name for each run: its method, model or folder, the first that differs."""
    pairs = [(each.run.method, shorten_name(each.run.model.name if each.run.model else "")) for each in both]
    names = tuple(each.folder.resolve().name for each in both)
    return next((pair for pair in zip(*pairs, strict=True) if pair[0] != pair[1]), names)


def _describe_ranking(mine: Scores, theirs: Scores, query: str) -> Json:
    """Return the ranking of `theirs`, what both share, and its answer where that is another one."""
    found = mine.compare(theirs, query, COMPARED)
    wording, own = theirs.query(query).wording, mine.query(query).wording
    return {
        "text": describe_text(cut(wording)) if wording != own else None,
        "ranked": [_describe_row(end, row) for end, row in _list_ends(theirs, query)],
        "shared": found.shared,
        "correlation": round_number(found.correlation, 3),
    }
