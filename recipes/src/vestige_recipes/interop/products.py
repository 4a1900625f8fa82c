"""Products by parameter in the published layout: the component search on them, and a component search written so."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vestige.errors import DataError, IndexMismatch
from vestige.evaluate import (
    Candidates,
    ComponentInputs,
    ComponentProducts,
    Evaluation,
    OnePassResult,
    reopen_components,
    write_components,
)
from vestige.models import Component, LoadedModel
from vestige.settings import ComponentsSettings, with_settings
from vestige.storage import require_no_others
from vestige_recipes.commands import ProductsSettings
from vestige_recipes.interop.published import check_number, read_json, stand_ins, without_tokens, write_json
from vestige_recipes.interop.similarities import DOTS, EXAMPLE_DOTS, QUERY_DOTS, published_products

_WORDS = "given"
"""The candidates are those of the files."""
_INDENT = 4
"""Of the published files."""


@with_settings(ProductsSettings, "evaluate products")
def products(settings: ProductsSettings) -> Evaluation:
    """Make the table, the figures and the chosen sets of `vestige evaluate components` from published products.

    Raises:
        DataError: A file is missing, torn or not of this layout, or the files do not belong together.
        IndexMismatch: The folder holds the result of another command.
    """
    command = settings.command_line("evaluate products")
    _require_own(settings.out, command)
    counts = None if settings.parameters is None else _read_counts(settings.parameters)
    found = published_products(settings.source, counts)
    listed, right, names = found.products, found.right, found.products.names
    same = {name: getattr(settings, name) for name in ("out", "enough", "folds", "longest", "figures", "draws", "seed")}
    source = str(settings.source)
    asked = ComponentsSettings(model=source, data=source, queries=source, candidates=(_WORDS,), **same)
    unknown = np.zeros(len(right), dtype=np.int64)
    candidates = Candidates(listed.rows, right, unknown, unknown > 0)
    train, queries = (without_tokens(stand_ins(ids), source) for ids in (found.examples, found.queries))
    inputs = ComponentInputs(
        settings=asked,
        loaded=LoadedModel(nn.Module(), None, source, "", None),
        components=tuple(
            Component(name, (int(size), 1), ()) for name, size in zip(names, listed.parameters, strict=True)
        ),
        total_parameters=int(listed.parameters.sum()),
        train=train,
        queries=queries,
        candidates={_WORDS: candidates},
        groups=np.arange(len(queries)),
        data=train,
        query_place=np.arange(len(queries)),
        example_place=np.arange(len(train)),
        projections=(),
    )
    none, output = _without_values(listed, ()), _without_values(listed, ("none",))
    result = OnePassResult(
        inputs, {_WORDS: listed}, {_WORDS: output}, {_WORDS: none}, {_WORDS: none}, computed=0, seconds={}, is_read=True
    )
    return write_components(asked, result, command)


def _require_own(out: Path, command: str) -> None:
    """Raise unless the folder is new, empty, or holds what the same command has left."""
    path = out / "components.json"
    if not path.exists():
        require_no_others(out, ())
    elif (before := read_json(path).get("command")) != command:
        raise IndexMismatch(f"{out} holds the result of another command, {before}. Give another --out.")


def _without_values(of: ComponentProducts, names: tuple[str, ...]) -> ComponentProducts:
    """Return products of nothing for the same queries and candidates."""
    count = len(names)
    query, example = (np.zeros((count, side.shape[1])) for side in (of.query, of.example))
    values = np.zeros((count, *of.rows.shape))
    return ComponentProducts(names, np.zeros(count, dtype=np.int64), values, query, example, of.rows)


def _read_counts(path: Path) -> dict[str, int]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object. Expected {{parameter: how many numbers it has}}.")
    return {name: check_number(value, f"`{name}`", path) for name, value in content.items()}


def write_component_similarities(folder: Path, out: Path) -> list[Path]:
    """Write `similarities.json` {query: {example: cosine}}; of projections the same by dimension, as published."""
    result = reopen_components(folder)
    words, listed = next(iter(result.gradients.items()))
    cosines = {"similarities": _by_pair(result, words, listed.cosine())}
    if result.inputs.projections:
        found = result.published[words]
        sizes = found.parameters.tolist()
        cosines["random_projection"] = {
            str(size): _by_pair(result, words, found.cosine([number])) for number, size in enumerate(sizes)
        }
    return [write_json(out / f"{name}.json", content, indent=_INDENT) for name, content in cosines.items()]


def write_dot_products(folder: Path, out: Path) -> list[Path]:
    """Write `dot_products` {query: {example: {parameter: product}}}, both kinds of self-products, and `parameters`."""
    result = reopen_components(folder)
    words, listed = next(iter(result.gradients.items()))
    queries, examples, rows = *_names(result, words), result.inputs.candidates[words].rows
    parts = np.moveaxis(listed.values, 0, -1)
    content: dict[str, Any] = {
        DOTS: _by_pair(result, words, parts, listed.names),
        QUERY_DOTS: {name: _named(listed.names, listed.query[:, row]) for row, name in enumerate(queries)},
        EXAMPLE_DOTS: {
            examples[row]: _named(listed.names, listed.example[:, place])
            for row, place in zip(rows[rows >= 0].tolist(), listed.rows[rows >= 0].tolist(), strict=True)
        },
        "parameters": _named(listed.names, listed.parameters),
    }
    return [write_json(out / f"{name}.json", each, indent=_INDENT) for name, each in content.items()]


def _by_pair(
    result: OnePassResult, words: str, values: np.ndarray, parts: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return values [query, candidate], or these by part, under the names of both."""
    queries, examples = _names(result, words)
    rows = result.inputs.candidates[words].rows
    return {
        name: {
            examples[row]: _named(parts, found) if parts else float(found)
            for row, found in zip(rows[number].tolist(), values[number], strict=True)
            if row >= 0
        }
        for number, name in enumerate(queries)
    }


def _names(result: OnePassResult, words: str) -> tuple[list[str], list[str]]:
    """Return the names of queries and examples.

    In the published files a query is called as its original, by which that is found; so it is where that is one alone.
    """
    inputs, candidates = result.inputs, result.inputs.candidates[words]
    queries, examples = ([one.id for one in side.examples] for side in (inputs.queries, inputs.train))
    pairs = zip(candidates.rows, candidates.right, strict=True)
    originals = [[examples[row] for row in rows[right].tolist()] for rows, right in pairs]
    names = [own[0] if len(own) == 1 else name for own, name in zip(originals, queries, strict=True)]
    return (names if len(set(names)) == len(names) else queries), examples


def _named(names: Sequence[str], values: np.ndarray) -> Mapping[str, Any]:
    return dict(zip(names, values.tolist(), strict=True))
