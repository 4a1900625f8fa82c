"""Similarities as published in JSON: `{query: {example: score}}`, also by parameter or dimension.

Three shapes are read: cosines `{query: {example: cosine}}`; cosines of random projections `{dimension: {query:
{example: cosine}}}`; and a folder with `dot_products` `{query: {example: {parameter: dot}}}`, beside which the self-
products `paraphrased_dot_products` and `original_dot_products` `{id: {parameter: dot}}` turn products into cosines.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool

from vestige.data import Example, load_examples, load_queries
from vestige.errors import DataError, SpecError
from vestige.evaluate import ComponentProducts
from vestige.runs import (
    ComponentScores,
    Meaning,
    RankedScore,
    ScoreBlock,
    ScoreCollector,
    Scores,
    ScoreSummary,
    check_target,
)
from vestige_recipes.commands import ImportSettings
from vestige_recipes.interop.published import HELPS, read_json, stand_ins, write_imported, write_json

DOTS, QUERY_DOTS, EXAMPLE_DOTS = "dot_products", "paraphrased_dot_products", "original_dot_products"
_PRODUCTS = (DOTS, QUERY_DOTS, EXAMPLE_DOTS)
FROM_FILES = Meaning(
    sign=HELPS,
    target="this model",
    normalisation="none",
    unit="inner product of the gradients",
    estimates="How well the gradients of query and example agree, as the published files say.",
    cost="Reading the files.",
    limits="Only the candidates in the files were scored; those of random projections are as published.",
)
_READING = (
    "The scores were computed by other software and taken over as they are. Only the listed candidates of a "
    "query were scored, so percentiles are among them."
)


class _Similarities(NamedTuple):
    scores: dict[str, dict[str, float]]
    """Query -> example -> score, in the order of the file."""
    cosine: bool
    parts: dict[str, dict[str, dict[str, float]]] | None = None
    """The same split over parameters."""


def import_similarities(settings: ImportSettings) -> Scores:
    """Return similarities as a run in `out`; equal scores keep the order in which the file lists them."""
    started = time.perf_counter()
    check_target(settings.out, overwrite=settings.overwrite)
    if settings.against is not None:
        raise SpecError("--against takes gradients, and the files hold similarities. Drop --against.")
    found = _read(settings)
    if not found.scores or not all(found.scores.values()):
        raise DataError(f"{settings.source} holds no similarities, or a query without candidates.")
    ids = dict.fromkeys(example for candidates in found.scores.values() for example in candidates)
    bad_text = settings.on_bad_text
    train, queries = stand_ins(ids), stand_ins(found.scores)
    if settings.data is not None:
        train = load_examples(settings.data, on_bad_text=bad_text)
        _require_ids(ids, train, "--data")
    if settings.queries is not None:
        given = load_queries(settings.queries, may_be_prompts=False, on_bad_text=bad_text)
        _require_ids(found.scores, given, "--queries")
        by_id = {example.id: example for example in given}
        queries = [by_id[name] for name in found.scores]
    rows = {example.id: example.row for example in train}
    ranked, distribution = [], []
    for number, candidates in enumerate(found.scores.values()):
        places = [rows[name] for name in candidates]
        collector = ScoreCollector(1, len(places), k=settings.k)
        values = torch.tensor([list(candidates.values())], dtype=torch.float64)
        collector.add(ScoreBlock(torch.arange(len(places)), values))
        summary = collector.finish()
        distribution += summary.distribution
        ranked += [entry._replace(query=number, row=places[entry.row]) for entry in summary.ranked]
    summary = ScoreSummary(ranked, distribution, [[] for _ in queries], None)
    split = {} if found.parts is None else _split(found.parts, ranked, train)
    return write_imported(
        settings, train, queries, summary, FROM_FILES, _READING, cosine=found.cosine, started=started, **split
    )


def _read(settings: ImportSettings) -> _Similarities:
    source = settings.source
    if source.is_file():
        return _Similarities(_check_scores(_one_dimension(read_json(source), settings), source), True)
    paths = [path for path in sorted(source.glob("*_part_*.json")) if not path.name.startswith(_PRODUCTS)]
    if not paths:
        return _products(source)
    scores = _join_files(paths, lambda path: _check_scores(_one_dimension(read_json(path), settings), path))
    return _Similarities(scores, True)


def _join_files(paths: list[Path], read: Callable[[Path], dict[str, Any]], *, shared: bool = False) -> dict[str, Any]:
    """Return the union of partitions, which may hold the same keys only where they are `shared`."""
    joined: dict[str, Any] = {}
    for path in paths:
        found = read(path)
        if (twice := sorted(joined.keys() & found.keys())) and not shared:
            raise DataError(f"{path} holds queries that another partition has too: {', '.join(twice[:5])}.")
        joined |= found
    return joined


def _one_dimension(content: Any, settings: ImportSettings) -> Any:
    """Return `content` without its level of dimensions, where it has one."""
    levels, inner = 0, content
    while isinstance(inner, dict) and inner:
        levels, inner = levels + 1, next(iter(inner.values()))
    if levels != 3 or not isinstance(content, dict):
        if settings.dimension is not None:
            raise SpecError(f"--dimension {settings.dimension}: {settings.source} has no level of dimensions.")
        return content
    if not all(str(name).isdigit() for name in content):
        raise DataError(
            f"{settings.source} is split over parameters. Give the folder in which it lies, so that the self-products "
            "beside it are found."
        )
    wanted = str(settings.dimension) if settings.dimension is not None else None
    if wanted is None and len(content) == 1:
        wanted = next(iter(content))
    if wanted not in content:
        raise SpecError(
            f"{settings.source} has the dimensions {', '.join(content)}. Type --dimension {next(iter(content))}."
        )
    return content[wanted]


def _check_scores(content: Any, path: Path) -> dict[str, dict[str, float]]:
    """Return `content` if it is `{query: {example: number}}`."""
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object. Expected {{query: {{example: similarity}}}}.")
    for query, candidates in content.items():
        if not isinstance(candidates, dict) or not all(_is_number(value) for value in candidates.values()):
            raise DataError(f"{path}: `{query}` is not {{example: similarity}} with numbers.")
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _partitions(folder: Path, stem: str) -> dict[str, Any] | None:
    """Return the object in `STEM.json` or `STEM`, or the union of its partitions `STEM_part_*.json`; None without any.

    Partitions of queries share examples, whose products with themselves are the same in all of them.
    """
    paths = [path for path in (folder / f"{stem}.json", folder / stem) if path.is_file()]
    paths = paths[:1] or sorted(folder.glob(f"{stem}_part_*.json"))
    return _join_files(paths, _objects, shared=stem == EXAMPLE_DOTS) if paths else None


def _objects(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(one, dict) for one in content.values()):
        raise DataError(f"{path} is not {{id: {{...}}}} with numbers.")
    return content


def _products(folder: Path) -> _Similarities:
    """Return products by parameter, summed; cosines where both kinds of self-products are there."""
    parts = _partitions(folder, DOTS)
    if parts is None:
        raise DataError(f"{folder} holds no {DOTS}.json. Give a JSON file with similarities, or the folder of one.")
    for query, candidates in parts.items():
        for products in candidates.values():
            _check_scores({query: products}, folder / DOTS)
    of_queries, of_examples = _partitions(folder, QUERY_DOTS), _partitions(folder, EXAMPLE_DOTS)
    cosine = of_queries is not None and of_examples is not None
    if cosine:
        query_length = _length_reader(of_queries, folder / QUERY_DOTS)
        example_length = _length_reader(of_examples, folder / EXAMPLE_DOTS)
        for query, found in parts.items():
            for example, dots in found.items():
                length = query_length(query) * example_length(example)
                found[example] = {part: dot / length for part, dot in dots.items()}
    scores = {
        query: {example: math.fsum(dots.values()) for example, dots in found.items()} for query, found in parts.items()
    }
    return _Similarities(scores, cosine, parts)


def _length_reader(dots: Any, path: Path) -> Callable[[str], float]:
    """Return a function from ids to lengths of gradients, from their products with themselves in the file at `path`."""
    known = {name: math.sqrt(max(math.fsum(parts.values()), 0.0)) for name, parts in _check_scores(dots, path).items()}

    def length(name: str) -> float:
        if known.get(name, 0.0) <= 0:
            raise DataError(f"{path} has no self-product of {name} above 0, so no cosine can be formed.")
        return known[name]

    return length


def _require_ids(ids: Iterable[str], given: list[Example], flag: str) -> None:
    known = {example.id for example in given}
    if unknown := [name for name in ids if name not in known]:
        listed = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise DataError(f"{flag} has no `id` {listed}, which the similarities speak of. Give data with these ids.")


def _split(
    parts: dict[str, dict[str, dict[str, float]]], ranked: list[RankedScore], train: list[Example]
) -> dict[str, Any]:
    """Return the parameters, and the listed pairs split over them; one that a pair lacks adds nothing to it."""
    names = list(dict.fromkeys(name for found in parts.values() for dots in found.values() for name in dots))
    queries, ids = list(parts), {example.row: example.id for example in train}
    components = []
    for query, row in sorted({(entry.query, entry.row) for entry in ranked}):
        dots = parts[queries[query]][ids[row]]
        components.append(ComponentScores(query, row, np.array([dots.get(name, 0.0) for name in names])))
    return {"parameters": names, "components": components} if names else {}


def write_similarities(scores: Scores, out: Path) -> list[Path]:
    """Write `similarities.json`: the listed scores as `{query: {example: score}}`, highest first."""
    content: dict[str, dict[str, float]] = {}
    for query in scores.queries:
        listed: dict[int, tuple[str, float]] = {}
        # Opponents from the highest on: what is listed at both ends keeps its rank among the proponents.
        for row in (*scores.listed(query, "proponent"), *reversed(scores.listed(query, "opponent"))):
            listed.setdefault(row.row, (row.example_id, row.score))
        content[query] = dict(listed.values())
        if len(content[query]) < len(listed):
            raise SpecError(f"Query {query!r} lists two examples with one id. Type --to json, which keeps both.")
    # The published files are indented by four.
    return [write_json(out / "similarities.json", content, indent=4)]


class PublishedProducts(NamedTuple):
    """Products as published, with what they are of."""

    products: ComponentProducts
    right: Bool[np.ndarray, "query candidate"]
    """Whether the candidate has the query's id, as there a paraphrase and its original have."""
    queries: tuple[str, ...]
    examples: tuple[str, ...]


def published_products(folder: Path | str, parameters: Mapping[str, int] | None = None) -> PublishedProducts:
    """Return the products of a folder in the published layout, candidates in the order of the file.

    Args:
        folder: Holds `dot_products` `{query: {example: {parameter: product}}}`, and `paraphrased_dot_products` and
            `original_dot_products` `{id: {parameter: product with itself}}`, each whole or in partitions.
        parameters: How many numbers each parameter has, which the files do not say; 1 each where not given.

    Raises:
        DataError: A file is missing, torn or not of this layout, or the files do not belong together.
    """
    found = {stem: _partitions(Path(folder), stem) for stem in _PRODUCTS}
    for stem in (stem for stem in _PRODUCTS if found[stem] is None):
        raise DataError(
            f"{folder} holds no {stem}.json. Expected {DOTS}, {QUERY_DOTS} and {EXAMPLE_DOTS} beside each other."
        )
    pairs, of_queries, of_examples = (found[stem] or {} for stem in _PRODUCTS)
    names = tuple(dict.fromkeys(name for found in of_queries.values() for name in found))
    queries = tuple(pairs)
    examples = tuple(dict.fromkeys(name for found in pairs.values() for name in found))
    for known, wanted, stem in ((of_queries, queries, QUERY_DOTS), (of_examples, examples, EXAMPLE_DOTS)):
        if absent := [name for name in wanted if name not in known]:
            raise DataError(f"{folder}: {stem} has no products of {absent[0]!r} with itself.")
    place = {name: number for number, name in enumerate(examples)}
    width = max(map(len, pairs.values()), default=0)
    rows = np.full((len(queries), width), -1, dtype=np.int64)
    values = np.zeros((len(names), len(queries), width))
    right = np.zeros(rows.shape, dtype=bool)
    for number, query in enumerate(queries):
        for column, (example, dots) in enumerate(pairs[query].items()):
            rows[number, column] = place[example]
            right[number, column] = example == query
            values[:, number, column] = [_number(dots, name, folder) for name in names]
    sides = [
        np.array([[_number(known[each], name, folder) for each in wanted] for name in names])
        for known, wanted in ((of_queries, queries), (of_examples, examples))
    ]
    sizes = np.array([1 if parameters is None else parameters[name] for name in names], dtype=np.int64)
    return PublishedProducts(
        ComponentProducts(names, sizes, values, sides[0], sides[1], rows), right, queries, examples
    )


def _number(dots: Any, name: str, folder: Path | str) -> float:
    value = dots.get(name) if isinstance(dots, dict) else None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{folder}: a product of the parameter {name!r} is missing or no number.")
    return float(value)
