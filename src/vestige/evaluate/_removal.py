"""`vestige evaluate removal`: what do the queries lose when models are retrained without the top examples?"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from vestige.banks import EVERYTHING, Bank
from vestige.data import Example, describe_copies, load_examples, rows_listed, text_groups
from vestige.errors import SpecError
from vestige.evaluate import (
    AlignedScores,
    Evaluation,
    EvaluationRow,
    Line,
    ScoredRuns,
    Value,
    collect_scores,
    estimate_mean,
    line_figure,
    read_together,
    retrain,
    write_evaluation,
)
from vestige.methods import METHODS
from vestige.runs import id_array
from vestige.settings import RemovalSettings, with_settings

RANDOM = "random lists"
_QUERIES_LISTED = 10


class Drop(NamedTuple):
    """Examples that are left out together."""

    method: str
    length: int
    ids: list[str]
    number: int = 0
    """Which of several lists of this length."""

    @property
    def name(self) -> str:
        """The name of the bank's subset."""
        return f"{self.method} {self.length} #{self.number}"


@with_settings(RemovalSettings)
def removal(settings: RemovalSettings) -> Evaluation:
    """Retrain without lists of rows, or the top examples of methods, and measure the rise of the queries' mean loss.

    Top examples are those with the highest mean score over all queries. The retrained models are a bank in OUT/bank, so
    an interrupted evaluation continues. In `settings.out`: `removal.json`, and the figure `removal`.

    Raises:
        SpecError: Model, data or queries are missing, or more examples are to be removed than there are.
        DataError: A list names rows that the data do not have.
    """
    if settings.model is None or settings.data is None or settings.queries is None:
        raise SpecError("Models are retrained. Type --model, --data and --queries, beside the runs and lists too.")
    data = load_examples(settings.data, **settings.reading)
    found, tables, ids = _collect(settings, data)
    groups = _group_by_text(data, ids)
    drops = _read_lists(settings, ids)
    listed = [drop.method for drop in drops]
    drops += _draw_lists(settings, drops, found, tables, ids, groups)
    lists = {drop.name: drop.ids for drop in drops}
    truth = retrain(settings, lists, model=settings.model if settings.start is None else settings.start)
    rises = _Rises(truth, drops)
    values = {name: rises.values(name, settings) for name in [*listed, *(one.name for one in found.scored), RANDOM]}
    result = Evaluation(
        "removal",
        f"Retrained without some examples: rise of the mean loss of {len(truth.query_ids)} queries, in nats",
        (
            *(EvaluationRow(name, values[name]) for name in listed),
            *(EvaluationRow.of(one, values[one.name]) for one in found.scored),
            EvaluationRow(RANDOM, values[RANDOM], opponent=True),
        ),
        (*_notes(settings, rises.by_query(listed), describe_copies(groups)), *found.notes),
        {
            "removed": sorted({drop.length for drop in drops}),
            "queries": list(truth.query_ids),
            "rise_by_seed": {drop.name: rises.of[drop.name].mean(1).tolist() for drop in drops},
            "rise_by_query": {drop.name: rises.of[drop.name].mean(0).tolist() for drop in drops},
            "lists": lists,
            "bank": truth.identity,
        },
    )
    lines = [rises.line(row.method, row.opponent) for row in result.rows]
    figure = line_figure("removal", lines, "examples left out", "rise of the mean loss, nats")
    return write_evaluation(result, settings.out, figure, settings.report_to)


def _notes(settings: RemovalSettings, by_query: Iterator[str], copies: str | None) -> list[str]:
    return [
        f"{settings.seeds} models for each list, compared with models of everything with the same seeds; the same "
        "number of steps each.",
        f"Random: {settings.random_lists} lists of each length. Intervals: 95 %, {settings.draws} bootstrap draws of "
        "queries; the spread over seeds is in the file and the figure.",
        *by_query,
        *([] if copies is None else [f"{copies} A text is left out with all its copies, but for lists of --rows."]),
    ]


def _collect(
    settings: RemovalSettings, data: Sequence[Example]
) -> tuple[ScoredRuns, list[AlignedScores], pa.ChunkedArray]:
    """Return the scores that are judged, and the ids of the training data."""
    if not settings.judges_methods:
        return ScoredRuns(()), [], id_array(example.id for example in data)
    found = collect_scores(settings, "removal")
    # Random lists are drawn here, several of each length: one list of random scores would be a single draw.
    drawn = {method.name for method in METHODS if method.at_random}
    scored = tuple(one for one in found.scored if one.run.run.method not in drawn)
    _, ids, tables = read_together(scored)
    return ScoredRuns(scored, found.notes), tables, id_array(ids)


def _read_lists(settings: RemovalSettings, examples: pa.ChunkedArray) -> list[Drop]:
    """Return the lists of --rows, named by their files, or by their paths where two have one name."""
    names = [source.name for source in settings.rows]
    ids, drops = examples.to_pylist() if names else [], []
    for source in settings.rows:
        rows = rows_listed(source, ids, str(settings.data))
        name = source.name if names.count(source.name) == 1 else str(source)
        drops.append(Drop(name, len(rows), [ids[row] for row in rows]))
    return drops


def _draw_lists(
    settings: RemovalSettings,
    listed: Sequence[Drop],
    found: ScoredRuns,
    tables: Sequence[AlignedScores],
    ids: pa.ChunkedArray,
    groups: Int[np.ndarray, "example"],
) -> list[Drop]:
    """Return the top lists of each method, and random lists of every length."""
    counts = sorted(set(settings.remove)) if found.scored else []
    lengths = sorted({*counts, *(drop.length for drop in listed)})
    if lengths[-1] >= (distinct := int(groups.max(initial=-1)) + 1):
        raise SpecError(f"Leaving out {lengths[-1]} of {distinct} different examples leaves nothing to train on.")
    drops = []
    for one, table in zip(found.scored, tables, strict=True):
        order = _rank_by_mean(table)
        drops += [Drop(one.name, count, _take_texts(ids, order, groups, count)) for count in counts]
    for number in range(settings.random_lists):
        order = np.random.default_rng([settings.seed, number]).permutation(len(ids))
        drops += [Drop(RANDOM, count, _take_texts(ids, order, groups, count), number) for count in lengths]
    return drops


def _group_by_text(data: Sequence[Example], ids: pa.ChunkedArray) -> Int[np.ndarray, "example"]:
    """Return the group of each example, one for each text, so that no copy of a removed example is learnt from."""
    text_of = dict(zip((one.id for one in data), text_groups(data).tolist(), strict=True))
    texts = [text_of.get(name, -1 - row) for row, name in enumerate(ids.to_pylist())]
    return np.unique(texts, return_inverse=True)[1]


def _take_texts(
    ids: pa.ChunkedArray, order: Int[np.ndarray, "example"], groups: Int[np.ndarray, "example"], count: int
) -> list[str]:
    """Return the ids of the first `count` texts of an order, with all their copies."""
    firsts = np.sort(np.unique(groups[order], return_index=True)[1])[:count]
    return ids.take(order[np.isin(groups[order], groups[order[firsts]])]).to_pylist()


def _rank_by_mean(table: AlignedScores) -> Int[np.ndarray, "example"]:
    """Return the examples by their mean score over queries, highest first."""
    scores = np.empty(table.examples)
    for places, block in table.blocks():
        scores[places] = block.astype(np.float64).mean(0)
    # Ties are broken at random but always alike, never by the order of the data.
    return np.lexsort((np.random.default_rng(0).permutation(len(scores)), -scores))


class _Rises:
    """What the queries lose without each list."""

    def __init__(self, truth: Bank, drops: Sequence[Drop]) -> None:
        losses = dict(zip(truth.subset_names, truth.by_subset(truth.query_losses), strict=True))
        self._queries = truth.query_ids
        self.of: dict[str, Float[np.ndarray, "seed query"]] = {
            drop.name: losses[drop.name] - losses[EVERYTHING] for drop in drops
        }
        self._found: dict[str, dict[int, list[np.ndarray]]] = {}
        """The rises of each list of a method by their length, ascending."""
        for drop in sorted(drops, key=lambda drop: drop.length):
            self._found.setdefault(drop.method, {}).setdefault(drop.length, []).append(self.of[drop.name])

    def values(self, method: str, settings: RemovalSettings) -> dict[str, Value]:
        """Return the columns of a row."""
        return {
            f"without {length}": estimate_mean(np.concatenate(found).mean(0), settings.draws, settings.seed)
            for length, found in self._found[method].items()
        }

    def line(self, method: str, opponent: bool) -> Line:
        """Return the curve of a method, with the spread over seeds."""
        heights, spreads, found = [0.0], [0.0], self._found[method]
        for each in found.values():
            runs = np.concatenate([rise.mean(1) for rise in each])
            heights.append(float(runs.mean()))
            spreads.append(float(runs.std(ddof=1)) if len(runs) > 1 else 0.0)
        return Line(method, [0, *found], heights, spreads, opponent)

    def by_query(self, lists: Sequence[str]) -> Iterator[str]:
        """Yield the effect of each list of --rows on a few queries, beside that of random lists of its length."""
        if len(self._queries) > _QUERIES_LISTED:
            return
        for name in lists:
            length, (own, *_) = next(iter(self._found[name].items()))
            alike = np.concatenate(self._found[RANDOM][length]).mean(0)
            pairs = zip(self._queries, own.mean(0), alike, strict=True)
            words = "; ".join(f"{query} {rise:+.2f} ({chance:+.2f})" for query, rise, chance in pairs)
            yield f"Without {name}, by query (random lists in brackets): {words}."
