"""What `vestige evaluate components` compares: queries, their candidates, projections, and how the work is divided.

Random projections go tensor by tensor: each gradient of n numbers is mapped to k numbers whose inner products are right
on average. As published (Select or Project, arXiv 2601.16651) entries +1 and -1 are not divided by sqrt(k): the product
of a tensor is then k times too large, and a cosine is weighted by the numbers kept of each tensor.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.compress import Compressor, compress_factors, compress_gradient, parse_spec
from vestige.data import Example, TokenizedData, load_records, plan_batches, token_groups
from vestige.errors import DataError, SpecError
from vestige.evaluate import find_right_examples
from vestige.gradients import Gradients
from vestige.indexes import batch_tokens, read_inputs
from vestige.methods import lexical_scores, prompt_words
from vestige.models import Component, LoadedModel, batch_sharing
from vestige.settings import ComponentsSettings
from vestige.training import read_questions

_GRANULE = 512
"""Published budgets are whole multiples of it, for the whole and for every tensor."""
_GIVEN = "candidates"
"""Column of the queries that may name their candidates."""
_VERSION = 3
"""Of what pieces hold, and of how the work is divided."""


def projection_sizes(words: str, parameters: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers kept of each tensor that `256` or `1%` means; never more than a tensor has.

    The budget of a share is that of all N parameters, rounded to a multiple of 512, and a tensor of n parameters gets
    `max(512, 512 * round(n / N * budget / 512))` of it, as published. Steps are of 1 where a tensor would get more than
    its share.

    Raises:
        SpecError: It is neither a whole number nor a percentage between 0 and 100.
    """
    try:
        share = float(words[:-1]) / 100 if words.endswith("%") else int(words)
    except ValueError:
        share = 0
    if not 0 < share <= (1 if words.endswith("%") else math.inf):
        raise SpecError(
            f"--project {words!r} is no projection. Give numbers for each component, such as 256, or a share of all "
            "parameters, such as 1%."
        )
    if not words.endswith("%"):
        return tuple(min(int(share), count) for count in parameters)
    step = _GRANULE if min(parameters) * share >= _GRANULE / 2 else 1
    budget = step * round(share * sum(parameters) / step)
    sizes = (max(step, step * round(count / sum(parameters) * budget / step)) for count in parameters)
    return tuple(map(min, sizes, parameters))


class Projection:
    """A random map of each component's gradient to `sizes` numbers, the same for every process and batch."""

    def __init__(
        self,
        name: str,
        sizes: Sequence[int],
        components: Sequence[Component],
        projector: Literal["tensorsketch", "sjlt", "rademacher", "gauss"],
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.projector, self.seed = name, projector, seed
        self._compressors: list[Compressor] = [
            parse_spec(f"{projector}:{size}").build(part.name, part.shape, seed, device)
            for part, size in zip(components, sizes, strict=True)
        ]
        self.sizes = tuple(one.size for one in self._compressors)

    def apply(self, gradients: Sequence[Gradients]) -> Float[Tensor, "example k"]:
        """Return projected gradients of a batch, component after component, float32 on the CPU."""
        parts = [_project(one, found) for one, found in zip(self._compressors, gradients, strict=True)]
        return torch.cat([part.float().cpu() for part in parts], dim=1)

    def weights_as_published(self) -> Float[Tensor, " k"]:
        """Return the factor of each component's numbers in the published form: the root of their count."""
        sizes = torch.tensor(self.sizes)
        return torch.repeat_interleave(sizes.double().sqrt(), sizes)


def _project(compressor: Compressor, gradients: Gradients) -> Float[Tensor, "example k"]:
    """Compress gradients of one component, from its factors or from its matrices."""
    if gradients.matrices is not None:
        return compress_gradient(compressor, gradients.matrices)
    total = torch.zeros(gradients.examples, compressor.size)
    for piece in gradients.pieces:
        total[piece.examples] += compress_factors(compressor, *piece.pair).to(total)
    return total


def digest(value: object) -> str:
    """Return the sha256 of anything that JSON can express."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


@dataclass(frozen=True)
class ComponentInputs:
    """Everything that is read before the work begins, and how the work is divided."""

    settings: ComponentsSettings
    loaded: LoadedModel
    components: tuple[Component, ...]
    total_parameters: int
    train: TokenizedData
    queries: TokenizedData
    candidates: dict[str, Candidates]
    """By what was requested, such as `5`."""
    groups: Int[np.ndarray, " query"]
    """Queries of the same originals have the same number."""
    data: TokenizedData
    """Distinct examples: the queries first, then what is a candidate and no query."""
    query_place: Int[np.ndarray, " query"]
    """Number of each query among the distinct examples."""
    example_place: Int[np.ndarray, " example"]
    """The same of each training example; -1 for one that is no query's candidate."""
    projections: tuple[Projection, ...]

    @cached_property
    def wanted(self) -> Bool[np.ndarray, "query example"]:
        """The pairs of distinct examples that are requested."""
        wanted = np.zeros((int(self.query_place.max()) + 1, len(self.data)), dtype=bool)
        for one in self.candidates.values():
            query, place = np.nonzero(one.rows >= 0)
            wanted[self.query_place[query], self.example_place[one.rows[query, place]]] = True
        return wanted

    @cached_property
    def identity(self) -> dict[str, str]:
        """Everything that decides a product."""
        tokens = zip(self.data.input_ids, self.data.targets, strict=True)
        return {
            "version": str(_VERSION),
            "model": self.loaded.fingerprint,
            "precision": str(next(self.loaded.model.parameters()).dtype).removeprefix("torch."),
            "components": digest([[part.name, *part.shape] for part in self.components]),
            "loss": self.settings.loss,
            "examples": digest([[ids.tolist(), targets.tolist()] for ids, targets in tokens]),
            "pairs": hashlib.sha256(np.packbits(self.wanted).tobytes()).hexdigest(),
            "projections": digest([[one.name, one.projector, one.seed, *one.sizes] for one in self.projections]),
            "token_budget": str(batch_tokens(self.settings, self.loaded)),
        }

    @cached_property
    def query_batches(self) -> list[Int[np.ndarray, " example"]]:
        """Batches of queries."""
        return [batch for group in self._groups for batch in group if batch[0] < len(self.wanted)]

    @cached_property
    def portions(self) -> list[list[Int[np.ndarray, " example"]]]:
        """The batches of each piece of products: first candidates that are queries too, then all others."""
        return [group for group in self._groups if self.wanted[:, np.concatenate(group)].any()]

    @cached_property
    def _groups(self) -> list[list[Int[np.ndarray, " example"]]]:
        # Every piece of candidates reads the queries' gradients, so of these there are fewer.
        queries, everything = len(self.wanted), np.arange(len(self.data))
        return [*self._divide(everything[:queries], 64, 2**28), *self._divide(everything[queries:], 16, 2**30)]

    @cached_property
    def factor_bytes(self) -> Int[np.ndarray, " example"]:
        """Estimate the bytes that the factors of each distinct example take."""
        tokens, total = self.data.lengths, np.zeros(len(self.data))
        for part in self.components:
            sides = ((0 if use.kind == "embedding" else part.shape[0]) + part.shape[1] for use in part.uses)
            total += np.minimum(tokens * sum(sides), part.size)
        return (total * next(self.loaded.model.parameters()).element_size()).astype(np.int64)

    def _divide(self, rows: Int[np.ndarray, " row"], pieces: int, most_bytes: int) -> list[list[np.ndarray]]:
        """Divide rows into batches, and these into `pieces`, or more where one would have more bytes of factors."""
        if not len(rows):
            return []
        most, budget = max(4, -(-len(rows) // pieces)), batch_tokens(self.settings, self.loaded)
        planned = plan_batches(self.data.lengths[rows], budget, most, sharing=batch_sharing(self.loaded.model))
        batches = [rows[places] for places in planned]
        sizes = np.array([int(self.factor_bytes[batch].sum()) for batch in batches])
        share = max(1, min(most_bytes, -(-int(sizes.sum()) // pieces)))
        numbered = zip(((sizes.cumsum() - sizes) // share).tolist(), batches, strict=True)
        return [[batch for _, batch in group] for _, group in groupby(numbered, key=itemgetter(0))]


def read_component_inputs(settings: ComponentsSettings) -> ComponentInputs:
    """Read the model and the examples, and find each query's candidates.

    Raises:
        DataError: A query has no answer, or names no original.
    """
    loaded, train, selection = read_inputs(settings, settings.model, settings.data, settings.components)
    given = settings.arguments()["queries"] if settings.query_column is None else _read_column(settings)
    queries = read_questions(given, settings, loaded, train, "the queries", settings.limit_queries)
    right = np.zeros((len(queries), len(train)), dtype=bool)
    ids, examples = ([one.id for one in side.examples] for side in (queries, train))
    for query, rows in enumerate(find_right_examples(queries.examples, settings.truth, ids, examples)):
        right[query, rows] = True
    candidates = find_candidates(settings, queries.examples, train.examples, right)
    listed = np.unique(np.concatenate([one.rows.ravel() for one in candidates.values()]))
    listed = listed[listed >= 0]
    both = _join(queries, train.subset(listed))
    places = token_groups(both)
    example_place = np.full(len(train), -1)
    example_place[listed] = places[len(queries) :]
    components, device = selection.components, next(loaded.model.parameters()).device
    sizes = {words: projection_sizes(words, [part.size for part in components]) for words in settings.project}
    return ComponentInputs(
        settings,
        loaded,
        components,
        selection.total_parameters,
        train,
        queries,
        candidates,
        np.unique(right, axis=0, return_inverse=True)[1].ravel(),
        both.subset(np.unique(places, return_index=True)[1]),
        places[: len(queries)],
        example_place,
        tuple(
            Projection(words, each, components, settings.projector, settings.seed, device)
            for words, each in sizes.items()
        ),
    )


def _read_column(settings: ComponentsSettings) -> list[dict[str, Any]]:
    """Return rows whose turns are those in a column; what else a row has stays, and its id names the original."""
    name, rows = settings.query_column, list[dict[str, Any]]()
    for example, columns in load_records(
        settings.queries, limit=settings.limit_queries, on_bad_text=settings.on_bad_text
    ):
        if not columns.get(str(name)) or "input_ids" in columns:
            raise DataError(
                f"--query-column {name}: row {example.row} (id {example.id!r}) has no turns there, or is tokens. "
                f"Its columns are {', '.join(columns)}."
            )
        rows.append({settings.truth: example.id, **columns, "messages": columns[str(name)], "id": example.id})
    return rows


def _join(first: TokenizedData, second: TokenizedData) -> TokenizedData:
    """Return the examples of both, one after the other."""
    return TokenizedData(
        [*first.examples, *second.examples],
        [*first.input_ids, *second.input_ids],
        [*first.targets, *second.targets],
        np.append(first.truncated, second.truncated),
        "",
        "the compared examples",
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
    wanted, documents = ([prompt_words(one) for one in side] for side in (queries, examples))
    order = np.argsort(-lexical_scores(wanted, documents), axis=1, kind="stable")
    ranked = np.take_along_axis(right, order, axis=1)
    found = {}
    for words in settings.candidates:
        if words == "given":
            found[words] = _read_candidates(queries, examples, right)
            continue
        count = len(examples) if words == "all" else int(words)
        rows, own = order[:, :count].copy(), ranked[:, :count].copy()
        forced = np.asarray(~own.any(1)) & settings.include_original
        rows[forced, -1] = order[forced, ranked[forced].argmax(1)]
        own[forced, -1] = True
        found[words] = Candidates(rows, own, ranked.argmax(1) + 1, forced)
    return found


def _read_candidates(
    queries: Sequence[Example], examples: Sequence[Example], right: Bool[np.ndarray, "query example"]
) -> Candidates:
    """Read the candidates that the queries name."""
    place = {one.id: row for row, one in enumerate(examples)}
    lists = []
    for query in queries:
        names = query.extra.get(_GIVEN)
        if not isinstance(names, list | tuple | np.ndarray) or not len(names):
            raise DataError(f"Query {query.id!r} has no list of ids in {_GIVEN!r}. Give it, or type --candidates 5.")
        if unknown := [name for name in names if str(name) not in place]:
            raise DataError(f"Query {query.id!r}: the candidate {unknown[0]!r} is no id of the training data.")
        lists.append(list(dict.fromkeys(place[str(name)] for name in names)))
    rows = np.array(list(zip_longest(*lists, fillvalue=-1)), dtype=np.int64).T
    own = np.take_along_axis(right, np.maximum(rows, 0), axis=1) & (rows >= 0)
    # Candidates of `vestige data candidates` are reported here like candidates found here.
    rank = np.array([int(query.extra.get("original_rank") or 0) for query in queries], dtype=np.int64)
    return Candidates(rows, own, rank, np.array([bool(query.extra.get("forced")) for query in queries]))
