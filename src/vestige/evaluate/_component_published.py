"""Published products by parameter (`dot_products`), as what the component search works on."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from vestige.errors import DataError
from vestige.evaluate._component_products import ComponentProducts
from vestige.index import read_partitions

PAIRS, QUERIES, EXAMPLES = "dot_products", "paraphrased_dot_products", "original_dot_products"


class PublishedProducts(NamedTuple):
    """Products as published, with what they are of."""

    products: ComponentProducts
    right: Bool[np.ndarray, "query candidate"]
    """Whether the candidate has the query's id, as there a paraphrase and its original have."""
    queries: tuple[str, ...]
    examples: tuple[str, ...]


def published_products(folder: Path | str, parameters: Mapping[str, int] | None = None) -> PublishedProducts:
    """Read the products of a folder in the published layout, candidates in the order of the file.

    Args:
        folder: Holds `dot_products` `{query: {example: {parameter: product}}}`, and `paraphrased_dot_products` and
            `original_dot_products` `{id: {parameter: product with itself}}`, each whole or in partitions.
        parameters: How many numbers each parameter has, which the files do not say; 1 each where not given.

    Raises:
        DataError: A file is missing, torn or not of this layout, or the files do not belong together.
    """
    pairs, of_queries, of_examples = (_joined(Path(folder), stem) for stem in (PAIRS, QUERIES, EXAMPLES))
    names = tuple(dict.fromkeys(name for found in of_queries.values() for name in found))
    queries = tuple(pairs)
    examples = tuple(dict.fromkeys(name for found in pairs.values() for name in found))
    for known, wanted, stem in ((of_queries, queries, QUERIES), (of_examples, examples, EXAMPLES)):
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


def _joined(folder: Path, stem: str) -> dict[str, Any]:
    """Return the content of the file of this name, or of all its partitions.

    Partitions of queries share examples, whose products with themselves are the same in all of them.
    """
    joined = read_partitions(folder, stem, shared=stem == EXAMPLES)
    if joined is None:
        raise DataError(f"{folder} holds no {stem}.json. Expected {PAIRS}, {QUERIES} and {EXAMPLES} beside each other.")
    return joined


def _number(dots: Any, name: str, folder: Path | str) -> float:
    value = dots.get(name) if isinstance(dots, dict) else None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{folder}: a product of the parameter {name!r} is missing or no number.")
    return float(value)
