"""What the page's script is given: one JSON value per run, small enough to stand inside the file; and another run's."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel

from vestige.errors import UserError
from vestige.reports._read import Query, RankedScore, RunFiles, TrainingExample, shorten_name
from vestige.reports._texts import Pieces, Word, cut, find_overlap, find_rare_words, find_system, split_words
from vestige.runs import NO_SOURCE, Scores, conclude, find_source_lift, relative_strength

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


def make_payload(run: RunFiles, other: Json | None = None) -> Json:
    """Return the data of the page, without NaN and with numbers cut to the digits that a reader can use.

    Args:
        run: What the page shows.
        other: What `make_comparison` says of the run beside it.
    """
    pieces = {row: cut(example.wording) for row, example in run.examples.items()}
    words = {row: split_words(piece) for row, piece in pieces.items()}
    rare = find_rare_words(words.values())
    grid = _make_run_grid(run)
    hubs = count_hubs(run)
    scores = Scores.open(run.folder)
    queries = [_describe_query(run, query, words, rare, grid, pieces) for query in run.queries]
    return {
        "run": run.folder.resolve().name,
        "grid": grid and grid._asdict(),
        "hasTokens": run.tokens is not None,
        "missing": run.record.missing,
        "causal": run.record.meaning.causal,
        "noSource": NO_SOURCE,
        "system": {
            "queries": find_system(query.wording for query in run.queries),
            "examples": find_system(example.wording for example in run.examples.values()),
        },
        "examples": {
            str(row): describe_example(example, pieces[row], hubs.get(row)) for row, example in run.examples.items()
        },
        "queries": [query | _describe_findings(scores, query["id"]) for query in queries],
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


def count_hubs(run: RunFiles) -> dict[int, float]:
    """Return, by row, the share of queries that have the example among their first `HUB_DEPTH` proponents."""
    hits = Counter(
        entry.row
        for ranked in run.ranked.values()
        for entry in ranked
        if entry.end == "proponent" and entry.rank <= HUB_DEPTH
    )
    return {row: count / len(run.queries) for row, count in hits.items()}


def round_number(value: Any, digits: int = 7) -> float | None:
    """Return `value` with `digits` significant digits, or None where it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def find_highest(ranked: Sequence[RankedScore]) -> float:
    """Return the score of a query's first proponent, to which the strength of the others is relative."""
    return next((entry.score for entry in ranked if entry.end == "proponent" and entry.rank == 1), 0.0)


def _make_run_grid(run: RunFiles) -> Grid | None:
    """Return the grid of all components in the run, in the model's order; None without a component table."""
    if run.components is None:
        return None
    known = (component for parts in run.components.values() for component in parts)
    return make_grid([*run.record.components, *known])


def describe_text(pieces: Pieces) -> Json:
    """Return a text in pieces, with the role of each and the turns they make up."""
    targets = "".join("1" if target else "0" for target in pieces.targets)
    return {
        "pieces": pieces.texts,
        "roles": pieces.roles,
        "turns": pieces.turns,
        "targets": targets,
        "tokens": pieces.from_tokens,
    }


def describe_example(example: TrainingExample, pieces: Pieces, hub: float | None = None) -> Json:
    """Return an example as the page lists it; `hub` is the share of queries that it leads for."""
    return {
        "id": example.id,
        "row": example.row,
        "source": example.source,
        "label": example.label,
        "length": example.length,
        "duplicates": example.duplicates,
        "hub": round_number(hub, 3),
        "text": describe_text(pieces),
    }


def _describe_entry(entry: RankedScore, highest: float) -> Json:
    score, strength = round_number(entry.score), round_number(relative_strength(entry.score, highest), 4)
    return {"end": entry.end, "rank": entry.rank, "row": entry.row, "score": score, "strength": strength}


def _describe_query(
    run: RunFiles,
    query: Query,
    words: Mapping[int, list[Word]],
    rare: frozenset[str],
    grid: Grid | None,
    pieces: Mapping[int, Pieces],
) -> Json:
    query_pieces = cut(query.wording)
    query_words = split_words(query_pieces)
    ranked = []
    highest = find_highest(run.ranked[query.id])
    for entry in run.ranked[query.id]:
        shared = find_overlap(query_words, words[entry.row], rare)
        ranked.append(
            {
                **_describe_entry(entry, highest),
                "percentile": round_number(entry.percentile),
                "overlap": round_number(shared.share, 3),
                "match": shared.example,
                "answerMatch": shared.query,
                "cells": _sum_cells(run, query.id, entry.example, grid),
                "tokens": _list_token_scores(run, query.id, entry.example, pieces[entry.row]),
            }
        )
    return {
        "id": query.id,
        "generated": query.generated,
        "loss": round_number(query.loss),
        "explained": query.explained,
        "text": describe_text(query_pieces),
        "ranked": ranked,
        "distribution": _drop_nonfinite(run.record.distribution.get(query.id)),
        "groups": _drop_nonfinite(run.record.groups.get(query.id, [])),
    }


def _sum_cells(run: RunFiles, query: str, example: str, grid: Grid | None) -> list[float | None] | None:
    """Return the score of each cell of the grid for one example, or None where it was not taken apart."""
    parts = (run.components or {}).get((query, example))
    if grid is None or parts is None:
        return None
    sums = grid.sums(parts)
    largest = max(map(abs, sums), default=0.0)
    if not 0 < largest < math.inf:
        return [round_number(value) for value in sums]
    # Digits below a ten-thousandth of the largest cell would be half of the file.
    decimals = CELL_DIGITS - 1 - math.floor(math.log10(largest))
    return [round(value, decimals) for value in sums]


def _list_token_scores(run: RunFiles, query: str, example: str, pieces: Pieces) -> list[float | None] | None:
    """Return the score of each token of one example, or None where it was not taken apart."""
    scores = (run.tokens or {}).get((query, example))
    if scores is None:
        return None
    if not pieces.from_tokens or max(scores, default=0) >= len(pieces.texts):
        raise UserError(
            f"tokens.parquet of {run.folder} scores positions of example {example!r} that examples.parquet does not "
            "have: the two files come from different runs.\nAttribute again with --tokens."
        )
    return [round_number(scores.get(position, 0.0), 5) for position in range(len(pieces.texts))]


def _drop_nonfinite(value: Any) -> Any:
    """Return a part of run.json as JSON can carry it: every NaN and infinity replaced by None."""
    if isinstance(value, BaseModel):
        return _drop_nonfinite(value.model_dump())
    if isinstance(value, float):
        return round_number(value)
    if isinstance(value, list | tuple):
        return [_drop_nonfinite(item) for item in value]
    if isinstance(value, dict):
        return {key: _drop_nonfinite(item) for key, item in value.items()}
    return value


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
        "ranked": [_describe_entry(entry, highest) for entry in ranked],
    }
