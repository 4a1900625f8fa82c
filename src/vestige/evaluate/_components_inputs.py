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
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.compress import Compressor, combine, compress_gradient, parse_spec, reduce_factor
from vestige.data import Example, TokenizedData, plan_batches
from vestige.errors import DataError, SpecError
from vestige.evaluate._retrieval import find_right_examples
from vestige.evaluate._scored import read_queries
from vestige.gradients import Gradients, Reduction
from vestige.indexes import batch_tokens, read_inputs
from vestige.methods import lexical_scores, prompt_words
from vestige.models import Component, LoadedModel, batch_sharing
from vestige.settings import ComponentsSettings

_GRANULE = 512
"""Published budgets are whole multiples of it, for the whole and for every tensor."""
_GIVEN = "candidates"
"""Column of the queries that may name their candidates."""
_VERSION = 2
"""Of what pieces hold, and of how the work is divided."""
_PIECE_BYTES = (2**28, 2**30)
"""Most bytes of factors in a piece of queries and in one of candidates, but one batch at least."""
_PIECES = (64, 16)
"""Pieces of a job that is large enough, so that little is lost when it is interrupted. Every piece of candidates reads
the queries' gradients, so of these there are fewer."""


class ProjectionPlan(NamedTuple):
    """How many numbers are kept of every component."""

    name: str
    """As it was requested: `256` numbers a component, or `1%` of all parameters."""
    sizes: tuple[int, ...]


def projection_sizes(parameters: Sequence[int], share: float, granule: int = _GRANULE) -> tuple[int, ...]:
    """Return the numbers kept of each tensor when `share` of all parameters is kept, by the published rule.

    The budget is `share * N` rounded to a multiple of the granule, and a tensor of n parameters gets
    `max(granule, granule * round(n / N * budget / granule))`.
    """
    total = sum(parameters)
    budget = granule * round(share * total / granule)
    return tuple(max(granule, granule * round(count / total * budget / granule)) for count in parameters)


def projection_plan(words: str, parameters: Sequence[int]) -> ProjectionPlan:
    """Return the plan that `256` or `1%` means for components of these sizes; never more numbers than a component has.

    Budgets are divided in steps of 512 as published, in steps of 1 where a component would get more than its share.

    Raises:
        SpecError: It is neither a whole number nor a percentage between 0 and 100.
    """
    text = words.strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        share = 0
    if not 0 < share <= (1 if text.endswith("%") else math.inf):
        raise SpecError(
            f"--project {words!r} is no projection. Give numbers for each component, such as 256, or a share of all "
            "parameters, such as 1%."
        )
    sizes: Sequence[int] = (int(share),) * len(parameters)
    if text.endswith("%"):
        granule = _GRANULE if min(parameters) * share >= _GRANULE / 2 else 1
        sizes = projection_sizes(parameters, share, granule)
    return ProjectionPlan(text, tuple(min(pair) for pair in zip(sizes, parameters, strict=True)))


class Projection:
    """The random map of one plan over some components, the same for every process and batch."""

    def __init__(
        self,
        plan: ProjectionPlan,
        components: Sequence[Component],
        projector: Literal["tensorsketch", "sjlt", "rademacher", "gauss"],
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.plan, self.projector, self.seed = plan, projector, seed
        self._compressors: list[Compressor] = [
            parse_spec(f"{projector}:{size}").build(part.name, part.shape, seed, device)
            for part, size in zip(components, plan.sizes, strict=True)
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
    if gradients.zero:
        return torch.zeros(gradients.examples, compressor.size)
    if gradients.matrices is not None:
        return compress_gradient(compressor, gradients.matrices)
    total = gradients.like().new_zeros(gradients.examples, compressor.size)
    for piece in gradients.pieces:
        left = reduce_factor(compressor, "left", piece.left)
        right = reduce_factor(compressor, "right", piece.right)
        total[piece.examples] += combine(compressor, left, right).to(total.dtype)
    return total


class Portion(NamedTuple):
    """Candidates whose products are one piece."""

    batches: list[np.ndarray]
    held: int | None
    """The piece of queries that they are, or None: their gradients are still to be computed."""

    @property
    def rows(self) -> Int[np.ndarray, " row"]:
        """All of them."""
        return np.concatenate(self.batches)


@dataclass(frozen=True)
class Compared:
    """What is compared, and with what."""

    loaded: LoadedModel
    components: tuple[Component, ...]
    loss: Reduction
    data: TokenizedData
    """Distinct examples: the queries first, then what is a candidate and no query."""
    wanted: Bool[np.ndarray, "query example"]
    """Which of these pairs are requested."""
    projections: tuple[Projection, ...]
    token_budget: int
    folder: Path

    @cached_property
    def identity(self) -> dict[str, str]:
        """Everything that decides a product."""
        return {
            "version": str(_VERSION),
            "model": self.loaded.fingerprint,
            "precision": str(next(self.loaded.model.parameters()).dtype).removeprefix("torch."),
            "components": digest([[part.name, *part.shape] for part in self.components]),
            "loss": self.loss,
            "examples": self.data.fingerprint,
            "pairs": hashlib.sha256(np.packbits(self.wanted).tobytes()).hexdigest(),
            "projections": digest([[one.plan.name, one.projector, one.seed, *one.sizes] for one in self.projections]),
            "token_budget": str(self.token_budget),
        }

    @cached_property
    def held(self) -> list[list[np.ndarray]]:
        """Batches of queries, piece by piece."""
        return self._pieces(np.arange(len(self.wanted)), 0)

    @cached_property
    def portions(self) -> list[Portion]:
        """The sources of the pieces of products: first candidates that are queries too, then all others."""
        both = [Portion(batches, place) for place, batches in enumerate(self.held)]
        fresh = self._pieces(np.arange(len(self.wanted), len(self.data)), 1)
        return [
            *(one for one in both if self.wanted[:, one.rows].any()),
            *(Portion(batches, None) for batches in fresh),
        ]

    def factor_bytes(self, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
        """Estimate the bytes that the factors of each example take."""
        tokens, total = self.data.lengths[rows], np.zeros(len(rows))
        for part in self.components:
            sides = sum(_use_width(part, use.kind, use.role) for use in part.uses)
            total += np.minimum(tokens * float(sides), float(part.size))
        return (total * next(self.loaded.model.parameters()).element_size()).astype(np.int64)

    def _pieces(self, rows: Int[np.ndarray, " row"], side: int) -> list[list[np.ndarray]]:
        """Divide the batches of queries (side 0) or candidates (side 1) into pieces."""
        if not len(rows):
            return []
        sizes = np.zeros(len(self.data), dtype=np.int64)
        sizes[rows] = self.factor_bytes(rows)
        most = max(4, -(-len(rows) // _PIECES[side]))
        groups: list[list[np.ndarray]] = [[]]
        held = count = 0
        sharing = batch_sharing(self.loaded.model)
        for places in plan_batches(self.data.lengths[rows], self.token_budget, most, sharing=sharing):
            batch = rows[places]
            size = int(sizes[batch].sum())
            if groups[-1] and (held + size > _PIECE_BYTES[side] or count + len(batch) > most):
                groups.append([])
                held = count = 0
            groups[-1].append(batch)
            held, count = held + size, count + len(batch)
        return groups


def _use_width(component: Component, kind: str, role: str) -> int:
    """Return the numbers that the factors of one use take for each token."""
    out, width = component.shape
    if kind == "embedding":
        return width + 2
    return 1 if role == "bias" or (out, width) == (component.size, 1) else out + width


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
    queries = read_queries(settings, loaded, train, "the queries")
    if (empty := np.flatnonzero(queries.target_counts == 0)).size:
        raise DataError(
            f"{len(empty)} of {len(queries)} queries have no token to learn, such as "
            f"{queries.examples[int(empty[0])].id!r}: a query needs an answer (`completion`, or an assistant's turn) "
            "that is not cut off. `vestige data generate` writes them."
        )
    examples = list(train.examples)
    originals = find_right_examples(
        queries.examples, settings.truth, [one.id for one in queries.examples], [one.id for one in examples]
    )
    right = np.zeros((len(queries), len(examples)), dtype=bool)
    for query, rows in enumerate(originals):
        right[query, rows] = True
    candidates = find_candidates(settings, queries.examples, examples, right)
    listed = np.unique(np.concatenate([one.rows.ravel() for one in candidates.values()]))
    distinct, query_place, example_place = _find_distinct(queries, train, listed[listed >= 0])
    wanted = np.zeros((int(query_place.max()) + 1, len(distinct)), dtype=bool)
    for one in candidates.values():
        query, place = np.nonzero(one.rows >= 0)
        wanted[query_place[query], example_place[one.rows[query, place]]] = True
    components, device = selection.components, next(loaded.model.parameters()).device
    plans = [projection_plan(words, [component.size for component in components]) for words in settings.project]
    projections = tuple(Projection(plan, components, settings.projector, settings.seed, device) for plan in plans)
    budget = batch_tokens(settings, loaded)
    compared = Compared(loaded, components, settings.loss, distinct, wanted, projections, budget, settings.out)
    groups = np.unique(right, axis=0, return_inverse=True)[1].ravel()
    total = selection.total_parameters
    return ComponentInputs(compared, train, queries, candidates, query_place, example_place, groups, total)


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
    rows = np.full((len(lists), max(map(len, lists))), -1, dtype=np.int64)
    for number, names in enumerate(lists):
        rows[number, : len(names)] = names
    own = np.take_along_axis(right, np.maximum(rows, 0), axis=1) & (rows >= 0)
    # Candidates of `vestige data candidates` are reported here like candidates found here.
    rank = np.array([int(query.extra.get("original_rank") or 0) for query in queries], dtype=np.int64)
    return Candidates(rows, own, rank, np.array([bool(query.extra.get("forced")) for query in queries]))


def _find_distinct(
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
    data = TokenizedData(
        [data.examples[row] for data, row in kept],
        [data.input_ids[row] for data, row in kept],
        [data.targets[row] for data, row in kept],
        np.array([bool(data.truncated[row]) for data, row in kept]),
        hashlib.sha256("".join(key.hex() for key in number).encode()).hexdigest(),
        "the compared examples",
    )
    return data, query_place, example_place
