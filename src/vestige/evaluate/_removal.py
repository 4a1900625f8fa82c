"""`vestige evaluate removal`: what do the queries lose when models are retrained without the top examples?"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from vestige.banks import EVERYTHING, Bank, bank
from vestige.data import describe_copies, load_examples, read_row_list, rows_named, text_groups
from vestige.errors import SpecError
from vestige.evaluate._aligned import Aligned
from vestige.evaluate._figures import Line, line_figure
from vestige.evaluate._result import Evaluation, EvaluationRow, write_evaluation
from vestige.evaluate._scored import Judged, judged, reading_of, together
from vestige.evaluate._statistics import mean_estimate
from vestige.runs import id_array
from vestige.settings import MemberSettings, RemovalSettings, verb

RANDOM = "random lists"
_QUERIES_SHOWN = 10


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


@verb(RemovalSettings)
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
    found, tables, examples = _judged(settings)
    groups = _groups(settings, examples)
    counts = sorted(set(settings.remove)) if found.scored else []
    drops = _named_lists(settings, examples)
    most, distinct = max([*counts, *(drop.length for drop in drops)]), int(groups.max(initial=-1)) + 1
    if most >= distinct:
        raise SpecError(f"Leaving out {most} of {distinct} different examples leaves nothing to train on.")
    names = [(drop.method, False) for drop in drops]
    for one, table in zip(found.scored, tables, strict=True):
        drops += _top_lists(one.name, table, examples, counts, groups)
    drops += _random_lists(settings, examples, sorted({drop.length for drop in drops}), groups)
    copies = describe_copies(groups)
    truth = _retrained(settings, drops)
    rise = {drop.name: _rise(truth, drop.name) for drop in drops}
    result = Evaluation(
        "removal",
        f"Retrained without some examples: rise of the mean loss of {len(truth.query_ids)} queries, in nats",
        (
            *(EvaluationRow(name, _values(name, drops, rise, settings)) for name, _ in names),
            *(EvaluationRow.of(one, _values(one.name, drops, rise, settings)) for one in found.scored),
            EvaluationRow(RANDOM, _values(RANDOM, drops, rise, settings), opponent=True),
        ),
        (
            f"{settings.seeds} models for each list, compared with models of everything with the same seeds; the same "
            "number of steps each.",
            f"Random: {settings.random_lists} lists of each length. Intervals: 95 %, {settings.draws} bootstrap draws "
            "of queries; the spread over seeds is in the file and the figure.",
            *_by_query(names, drops, rise, truth.query_ids),
            *([] if copies is None else [f"{copies} A text is left out with all its copies, but for lists of --rows."]),
            *found.notes,
        ),
        {
            "removed": sorted({drop.length for drop in drops}),
            "queries": list(truth.query_ids),
            "rise_by_seed": {drop.name: rise[drop.name].mean(1).tolist() for drop in drops},
            "rise_by_query": {drop.name: rise[drop.name].mean(0).tolist() for drop in drops},
            "lists": {drop.name: drop.ids for drop in drops},
            "bank": truth.identity,
        },
    )
    names += [(one.name, one.opponent) for one in found.scored] + [(RANDOM, True)]
    lines = [_line(name, opponent, drops, rise) for name, opponent in names]
    figure = line_figure("removal", lines, "examples left out", "rise of the mean loss, nats")
    return write_evaluation(result, settings.out, figure)


def _judged(settings: RemovalSettings) -> tuple[Judged, list[Aligned], pa.ChunkedArray]:
    """Return the scores that are judged, and the ids of the training data."""
    if not settings.judges_methods:
        loaded = load_examples(settings.data, limit=settings.limit, on_bad_text=settings.on_bad_text)
        return Judged(()), [], pa.chunked_array([[example.id for example in loaded]], pa.string())
    found = judged(settings, "removal")
    # Random lists are drawn here, several of each length: one list of random scores would be a single draw.
    scored = tuple(one for one in found.scored if one.run.run.method != "random")
    _, ids, tables = together(scored)
    return Judged(scored, found.notes), tables, id_array(ids)


def _named_lists(settings: RemovalSettings, examples: pa.ChunkedArray) -> list[Drop]:
    """Return the lists of --rows, named by their files, or by their paths where two have one name."""
    short = [source.name for source in settings.rows]
    ids, drops = examples.to_pylist() if settings.rows else [], []
    for source, name in zip(settings.rows, short, strict=True):
        names = [entry.name for entry in read_row_list(source)]
        rows = sorted(set(rows_named(names, ids, place=str(source), data=str(settings.data)).values()))
        drops.append(Drop(name if short.count(name) == 1 else str(source), len(rows), [ids[row] for row in rows]))
    return drops


def _by_query(
    names: Sequence[tuple[str, bool]], drops: Sequence[Drop], rise: Mapping[str, np.ndarray], queries: Sequence[str]
) -> Iterator[str]:
    """Yield the effect of each list of --rows on a few queries, beside the mean of the random lists of that length."""
    if len(queries) > _QUERIES_SHOWN:
        return
    for name, _ in names:
        drop = next(each for each in drops if each.method == name)
        alike = [rise[each.name] for each in drops if (each.method, each.length) == (RANDOM, drop.length)]
        pairs = zip(queries, rise[drop.name].mean(0), np.concatenate(alike).mean(0), strict=True)
        shown = "; ".join(f"{query} {own:+.2f} ({chance:+.2f})" for query, own, chance in pairs)
        yield f"Without {name}, by query (random lists in brackets): {shown}."


def _groups(settings: RemovalSettings, examples: pa.ChunkedArray) -> Int[np.ndarray, "example"]:
    """Return the group of each example, one for each text, so that no copy of a removed example is learnt from."""
    found = load_examples(settings.data, limit=settings.limit, on_bad_text=settings.on_bad_text)
    text_of = dict(zip((one.id for one in found), text_groups(found).tolist(), strict=True))
    return np.unique(
        [text_of.get(name, -1 - row) for row, name in enumerate(examples.to_pylist())], return_inverse=True
    )[1]


def _first_texts(
    order: Int[np.ndarray, "example"], groups: Int[np.ndarray, "example"], count: int
) -> Int[np.ndarray, "_rows"]:
    """Return the first `count` texts of an order, with all their copies."""
    firsts = np.sort(np.unique(groups[order], return_index=True)[1])[:count]
    return order[np.isin(groups[order], groups[order[firsts]])]


def _top_lists(
    method: str, table: Aligned, examples: pa.ChunkedArray, counts: list[int], groups: Int[np.ndarray, "example"]
) -> list[Drop]:
    scores = np.empty(table.examples)
    for places, block in table.blocks():
        scores[places] = block.astype(np.float64).mean(0)
    # Ties are broken at random but always alike, never by the order of the data.
    order = np.lexsort((np.random.default_rng(0).permutation(len(scores)), -scores))
    return [Drop(method, count, examples.take(_first_texts(order, groups, count)).to_pylist()) for count in counts]


def _random_lists(
    settings: RemovalSettings, examples: pa.ChunkedArray, counts: list[int], groups: Int[np.ndarray, "example"]
) -> list[Drop]:
    drops = []
    for number in range(settings.random_lists):
        order = np.random.default_rng([settings.seed, number]).permutation(len(examples))
        for count in counts:
            drops.append(Drop(RANDOM, count, examples.take(_first_texts(order, groups, count)).to_pylist(), number))
    return drops


def _retrained(settings: RemovalSettings, drops: list[Drop]) -> Bank:
    return bank(
        **reading_of(settings),
        **{name: getattr(settings, name) for name in MemberSettings.model_fields},
        model=settings.model if settings.start is None else settings.start,
        data=settings.data,
        queries=settings.queries,
        out=settings.out / "bank",
        leave_out_lists={drop.name: drop.ids for drop in drops},
        seeds=settings.seeds,
        seed=settings.seed,
    )


def _rise(truth: Bank, name: str) -> np.ndarray:
    """Return [seed, query]: loss without the list minus loss with everything, seed by seed."""
    losses = truth.by_subset(truth.query_losses)
    return losses[truth.subset_names.index(name)] - losses[truth.subset_names.index(EVERYTHING)]


def _values(method: str, drops: list[Drop], rise: dict[str, np.ndarray], settings: RemovalSettings) -> dict[str, Any]:
    def without(count: int) -> Any:
        found = [rise[drop.name] for drop in drops if (drop.method, drop.length) == (method, count)]
        return mean_estimate(np.concatenate(found).mean(0), settings.draws, settings.seed)

    return {f"without {count}": without(count) for count in _lengths(method, drops)}


def _lengths(method: str, drops: list[Drop]) -> list[int]:
    return sorted({drop.length for drop in drops if drop.method == method})


def _line(method: str, opponent: bool, drops: list[Drop], rise: dict[str, np.ndarray]) -> Line:
    heights, spreads = [0.0], [0.0]
    counts = _lengths(method, drops)
    for count in counts:
        found = [rise[drop.name].mean(1) for drop in drops if (drop.method, drop.length) == (method, count)]
        runs = np.concatenate(found)
        heights.append(float(runs.mean()))
        spreads.append(float(runs.std(ddof=1)) if len(runs) > 1 else 0.0)
    return Line(method, [0, *counts], heights, spreads, opponent)
