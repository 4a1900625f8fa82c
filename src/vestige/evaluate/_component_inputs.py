"""What `vestige evaluate components` compares: queries, their candidates, and which of these are right."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vestige.data import Example, TokenizedData, ask, load_queries, tokenize
from vestige.errors import DataError
from vestige.evaluate._component_compared import Compared
from vestige.evaluate._component_projection import Projection, projection_plan
from vestige.evaluate._retrieval import right_examples
from vestige.indexes import batch_tokens, read_inputs, tokens_at_most
from vestige.methods import lexical_scores, prompt_words
from vestige.settings import ComponentsSettings

GIVEN_WORD = "given"
GIVEN = "candidates"
"""Column of the queries that may name their candidates."""


class Candidates(NamedTuple):
    """The candidates of every query, best first."""

    rows: Int[np.ndarray, "query candidate"]
    """Rows of the training data; -1 where a list is shorter."""
    right: Bool[np.ndarray, "query candidate"]
    """Whether it is the query's original."""
    rank: Int[np.ndarray, " query"]
    """Where BM25 puts the first original among all examples, from 1; 0 where given candidates do not say it."""
    forced: Bool[np.ndarray, " query"]
    """Whether the original was put there although BM25 did not list it."""


class ComponentInputs(NamedTuple):
    """Everything that is read before the work begins."""

    compared: Compared
    train: TokenizedData
    queries: TokenizedData
    candidates: dict[str, Candidates]
    """By what was requested, such as `5`."""
    query_place: Int[np.ndarray, " query"]
    """Number of each query among the distinct examples."""
    example_place: Int[np.ndarray, " example"]
    """The same of each training example; -1 for one that is no query's candidate."""
    groups: Int[np.ndarray, " query"]
    """Queries of the same originals have the same number."""
    total_parameters: int


def read_component_inputs(settings: ComponentsSettings) -> ComponentInputs:
    """Read the model and the examples, and find each query's candidates.

    Raises:
        DataError: A query has no answer, or names no original.
    """
    loaded, train, selection = read_inputs(settings, settings.model, settings.data, settings.components)
    given = load_queries(settings.queries, on_bad_text=settings.on_bad_text)
    asked = ask(given, train.examples, chat=settings.chat, tokenizer=loaded.tokenizer).queries
    queries = tokenize(
        asked,
        loaded.tokenizer,
        max_length=tokens_at_most(settings, loaded),
        name="the queries",
        chat=bool(settings.chat),
        vocabulary=loaded.vocabulary,
    )
    _require_answers(queries)
    examples = list(train.examples)
    originals = right_examples(asked, settings.truth, [one.id for one in asked], [one.id for one in examples])
    right = np.zeros((len(asked), len(examples)), dtype=bool)
    for query, rows in enumerate(originals):
        right[query, rows] = True
    candidates = find_candidates(settings, asked, examples, right)
    asked_for = np.unique(np.concatenate([one.rows.ravel() for one in candidates.values()]))
    distinct, query_place, example_place = _distinct(queries, train, asked_for[asked_for >= 0])
    wanted = np.zeros((int(query_place.max()) + 1, len(distinct)), dtype=bool)
    for one in candidates.values():
        query, place = np.nonzero(one.rows >= 0)
        wanted[query_place[query], example_place[one.rows[query, place]]] = True
    components = selection.components
    parameters = [component.size for component in components]
    device = next(loaded.model.parameters()).device
    projections = tuple(
        Projection(projection_plan(words, parameters), components, settings.projector, settings.seed, device)
        for words in settings.project
    )
    budget = batch_tokens(settings, loaded)
    compared = Compared(loaded, components, settings.loss, distinct, wanted, projections, budget, settings.out)
    _, groups = np.unique(right, axis=0, return_inverse=True)
    return ComponentInputs(
        compared, train, queries, candidates, query_place, example_place, groups.ravel(), selection.total_parameters
    )


def find_candidates(
    settings: ComponentsSettings,
    queries: Sequence[Example],
    examples: Sequence[Example],
    right: Bool[np.ndarray, "query example"],
) -> dict[str, Candidates]:
    """Find the candidates that the settings require; equal BM25 scores go in the order of the data.

    The original is where BM25 puts it. Where it is not listed, it is put last only if that is requested.

    Raises:
        DataError: candidates are to be given, and a query names none or one that there is not.
    """
    asked, documents = ([prompt_words(one) for one in side] for side in (queries, examples))
    order = np.argsort(-lexical_scores(asked, documents), axis=1, kind="stable")
    return {
        words: _given(queries, examples, right)
        if words == GIVEN_WORD
        else _first(order, right, len(examples) if words == "all" else int(words), force=settings.include_original)
        for words in settings.candidates
    }


def _first(
    order: Int[np.ndarray, "query example"], right: Bool[np.ndarray, "query example"], count: int, *, force: bool
) -> Candidates:
    found = np.take_along_axis(right, order, axis=1)
    rows, shown = order[:, :count].copy(), found[:, :count].copy()
    forced = np.asarray(~shown.any(1)) & force
    rows[forced, -1] = order[forced, found[forced].argmax(1)]
    shown[forced, -1] = True
    return Candidates(rows, shown, found.argmax(1) + 1, forced)


def _given(
    queries: Sequence[Example], examples: Sequence[Example], right: Bool[np.ndarray, "query example"]
) -> Candidates:
    place = {one.id: row for row, one in enumerate(examples)}
    lists = []
    for query in queries:
        names = query.extra.get(GIVEN)
        if not isinstance(names, list | tuple | np.ndarray) or not len(names):
            raise DataError(f"Query {query.id!r} has no list of ids in {GIVEN!r}. Give it, or type --candidates 5.")
        if unknown := [name for name in names if str(name) not in place]:
            raise DataError(f"Query {query.id!r}: the candidate {unknown[0]!r} is no id of the training data.")
        lists.append(list(dict.fromkeys(place[str(name)] for name in names)))
    rows = np.full((len(lists), max(map(len, lists))), -1, dtype=np.int64)
    for number, names in enumerate(lists):
        rows[number, : len(names)] = names
    shown = np.take_along_axis(right, np.maximum(rows, 0), axis=1) & (rows >= 0)
    # Candidates of `vestige data candidates` are reported here like candidates found here.
    rank = np.array([int(query.extra.get("original_rank") or 0) for query in queries], dtype=np.int64)
    return Candidates(rows, shown, rank, np.array([bool(query.extra.get("forced")) for query in queries]))


def _require_answers(queries: TokenizedData) -> None:
    empty = np.flatnonzero(queries.target_counts == 0)
    if len(empty):
        name = queries.examples[int(empty[0])].id
        raise DataError(
            f"{len(empty)} of {len(queries)} queries have no token to learn, such as {name!r}: a query needs an answer "
            "(`completion`, or an assistant's turn) that is not cut off. `vestige data generate` writes them."
        )


def _distinct(
    queries: TokenizedData, train: TokenizedData, rows: Int[np.ndarray, " row"]
) -> tuple[TokenizedData, Int[np.ndarray, " query"], Int[np.ndarray, " example"]]:
    """Return every distinct example once, queries first, and the position of each query and training example."""
    number: dict[bytes, int] = {}
    kept: list[tuple[TokenizedData, int]] = []

    def place(data: TokenizedData, row: int) -> int:
        ids = np.asarray(data.input_ids[row], dtype=np.int64)
        key = hashlib.sha256(ids.tobytes() + np.asarray(data.targets[row]).tobytes()).digest()
        if key not in number:
            number[key] = len(kept)
            kept.append((data, row))
        return number[key]

    query_place = np.array([place(queries, row) for row in range(len(queries))])
    example_place = np.full(len(train), -1, dtype=np.int64)
    for row in rows:
        example_place[row] = place(train, int(row))
    digest = hashlib.sha256("".join(key.hex() for key in number).encode()).hexdigest()
    data = TokenizedData(
        [data.examples[row] for data, row in kept],
        [data.input_ids[row] for data, row in kept],
        [data.targets[row] for data, row in kept],
        np.array([bool(data.truncated[row]) for data, row in kept]),
        digest,
        "the compared examples",
    )
    return data, query_place, example_place
