"""What the page's script is given: one JSON value per run, small enough to stand inside the file."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from vestige.errors import UserError
from vestige.reports._components import Grid, cell_sums, make_grid
from vestige.reports._pieces import Pieces, cut
from vestige.reports._read import Query, RankedScore, RunFiles, TrainingExample
from vestige.reports._verbatim import Word, overlap, rare_words, words_of

HUB_DEPTH = 10
"""An example counts as a hit of a query when it stands among the query's first ten proponents."""

Json = dict[str, Any]


def payload_of(run: RunFiles) -> Json:
    """Return the data of the page, without NaN and with numbers cut to the digits that a reader can use."""
    pieces = {row: cut(example.wording) for row, example in run.examples.items()}
    words = {row: words_of(piece) for row, piece in pieces.items()}
    rare = rare_words(words.values())
    grid = _grid(run)
    hubs = hub_shares(run)
    return {
        "run": run.folder.resolve().name,
        "grid": _grid_json(grid),
        "hasTokens": run.tokens is not None,
        "examples": {
            str(row): _example_json(example, pieces[row], hubs.get(row)) for row, example in run.examples.items()
        },
        "queries": [_query_json(run, query, words, rare, grid, pieces) for query in run.queries],
    }


def hub_shares(run: RunFiles) -> dict[int, float]:
    """Return, by row, the share of queries that have the example among their first `HUB_DEPTH` proponents."""
    hits = Counter(
        entry.row
        for ranked in run.ranked.values()
        for entry in ranked
        if entry.end == "proponent" and entry.rank <= HUB_DEPTH
    )
    return {row: count / len(run.queries) for row, count in hits.items()}


def number(value: Any, digits: int = 7) -> float | None:
    """Return `value` with `digits` significant digits, or None where it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def _grid(run: RunFiles) -> Grid | None:
    """Return the grid of all components in the run, in the model's order; None without a component table."""
    if run.components is None:
        return None
    scored = (component for parts in run.components.values() for component in parts)
    return make_grid([*run.record.components, *scored])


def _grid_json(grid: Grid | None) -> Json | None:
    if grid is None:
        return None
    return {
        "layers": grid.layers,
        "modules": grid.modules,
        "others": grid.others,
        "cells": [[place.layer, place.module] for place in grid.cells],
    }


def _text_json(pieces: Pieces) -> Json:
    targets = "".join("1" if target else "0" for target in pieces.targets)
    return {
        "pieces": pieces.texts,
        "roles": pieces.roles,
        "turns": pieces.turns,
        "targets": targets,
        "tokens": pieces.from_tokens,
    }


def _example_json(example: TrainingExample, pieces: Pieces, hub: float | None) -> Json:
    return {
        "id": example.id,
        "row": example.row,
        "source": example.source,
        "label": example.label,
        "length": example.length,
        "duplicates": example.duplicates,
        "hub": number(hub, 3),
        "text": _text_json(pieces),
    }


def _query_json(
    run: RunFiles,
    query: Query,
    words: Mapping[int, list[Word]],
    rare: frozenset[str],
    grid: Grid | None,
    pieces: Mapping[int, Pieces],
) -> Json:
    query_pieces = cut(query.wording)
    query_words = words_of(query_pieces)
    ranked = []
    for entry in run.ranked[query.id]:
        shared = overlap(query_words, words[entry.row], rare)
        ranked.append(
            {
                **_entry_json(entry),
                "overlap": number(shared.share, 3),
                "match": shared.example,
                "answerMatch": shared.query,
                "cells": _cells(run, query.id, entry.example, grid),
                "tokens": _token_scores(run, query.id, entry.example, pieces[entry.row]),
            }
        )
    return {
        "id": query.id,
        "generated": query.generated,
        "loss": number(query.loss),
        "text": _text_json(query_pieces),
        "ranked": ranked,
        "distribution": _record_json(run.record.distribution.get(query.id)),
        "groups": [_record_json(group) for group in run.record.groups.get(query.id, [])],
    }


def _entry_json(entry: RankedScore) -> Json:
    return {
        "end": entry.end,
        "rank": entry.rank,
        "row": entry.row,
        "score": number(entry.score),
        "percentile": number(entry.percentile),
    }


def _cells(run: RunFiles, query: str, example: str, grid: Grid | None) -> list[float | None] | None:
    """Return the score of each cell of the grid for one example, or None where it was not taken apart."""
    parts = (run.components or {}).get((query, example))
    if grid is None or parts is None:
        return None
    return [number(value, 6) for value in cell_sums(grid, parts)]


def _token_scores(run: RunFiles, query: str, example: str, pieces: Pieces) -> list[float | None] | None:
    """Return the score of each token of one example, or None where it was not taken apart."""
    scores = (run.tokens or {}).get((query, example))
    if scores is None:
        return None
    if not pieces.from_tokens or max(scores, default=0) >= len(pieces.texts):
        raise UserError(
            f"tokens.parquet of {run.folder} scores positions of example {example!r} that examples.parquet does not "
            "have: the two files come from different runs.\nAttribute again with --tokens."
        )
    return [number(scores.get(position, 0.0), 5) for position in range(len(pieces.texts))]


def _record_json(record: BaseModel | None) -> Json | None:
    """Return a part of run.json as it stands there, NaN and infinity replaced by None; None for a missing part."""
    return None if record is None else _finite(record.model_dump())


def _finite(value: Any) -> Any:
    """Return `value` with every NaN and infinity in it replaced by None, which JSON can carry."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value
