"""The page of a component search: what each representation is worth, every component, greedy paths, wrong decisions."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from vestige.errors import UserError
from vestige.parsing import parse_json
from vestige.progress import format_bytes
from vestige.reports._audit_panels import shown_span
from vestige.reports._component_charts import interval
from vestige.reports._component_panels import Panel, charts_of, parameters_chart, similarity_charts, types_of
from vestige.reports._header import Chip, Fact, compact, duration, short_name

RESULT, SIMILARITY = "components.json", "self_similarity.csv"
FULL, CHANCE, BM25 = "full gradient", "random", "bm25 of the prompts"
SHOWN_WRONG = 50
_COMPARED = ("best component, held out", "greedy for accuracy, held out", "greedy for agreement, held out")


class Row(NamedTuple):
    """A line of the table of representations."""

    name: str
    accuracy: str
    drawing: str
    cells: tuple[str, ...]
    opponent: bool


class Choice(NamedTuple):
    """Everything about one choice of candidates."""

    words: str
    listed: str
    chips: tuple[Chip, ...]
    rows: tuple[Row, ...]
    charts: tuple[Panel, ...]
    types: tuple[tuple[str, ...], ...]
    components: tuple[tuple[str, ...], ...]
    wrong: tuple[tuple[str, ...], ...]
    wrong_count: int


@dataclass(frozen=True)
class ComponentPage:
    """Everything on the page."""

    title: str
    subtitle: str
    facts: tuple[Fact, ...]
    command: tuple[str, ...]
    choices: tuple[Choice, ...]
    charts: tuple[Panel, ...]
    """What is the same for every choice of candidates."""
    notes: tuple[str, ...]
    vestige: str


def is_component_run(folder: Path) -> bool:
    """Return whether `vestige evaluate components` has left its result in the folder."""
    return (folder / RESULT).is_file()


def component_page(folder: Path) -> ComponentPage:
    """Return the page of the result in the folder.

    Raises:
        UserError: A file of it is damaged.
    """
    try:
        return _page(parse_json((folder / RESULT).read_text(encoding="utf-8")), _similarity(folder / SIMILARITY))
    except (ArithmeticError, AttributeError, LookupError, OSError, StopIteration, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / RESULT} or {SIMILARITY} beside it cannot be read ({type(error).__name__}: {error}).\n"
            f"The command that made it writes both again from what it keeps in {folder / 'products'}."
        ) from error


def _similarity(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _page(found: dict[str, Any], similarity: list[dict[str, str]]) -> ComponentPage:
    choices = tuple(_choice(words, each) for words, each in found["candidates"].items())
    parts = next(iter(found["candidates"].values()))["components"]
    return ComponentPage(
        title="Which components distinguish originals from other examples?",
        subtitle="components",
        facts=_facts(found, parts),
        command=tuple(re.split(r" (?=--)", found["command"])),
        choices=choices,
        charts=(parameters_chart(parts), *similarity_charts(similarity, parts)),
        notes=tuple(found["notes"]),
        vestige=version("vestige"),
    )


def _facts(found: dict[str, Any], parts: list[dict[str, Any]]) -> tuple[Fact, ...]:
    passes = found["passes"]
    times = f"{passes['published_to_ours']:.1f} times as many in the published protocol"
    return (
        Fact("Model", short_name(found["model"])),
        Fact("Compared", found["title"].partition(" (")[0]),
        Fact("Candidates", ", ".join(found["candidates"])),
        Fact("Components", str(len(parts)), note=f"{compact(sum(one['parameters'] for one in parts))} parameters"),
        Fact("Gradients computed", compact(passes["backward_passes"]), note=times),
        Fact("Passes took", duration(passes["gradient_seconds"])),
    )


def _choice(words: str, found: dict[str, Any]) -> Choice:
    rows = {row["name"]: row for row in found["representations"]}
    spans = [_span(row["accuracy"]) for row in rows.values() if not row["opponent"] or row["name"] == BM25]
    known = [end for span in spans for end in span if math.isfinite(end)]
    ends, full = (min(known), max(known)), _span(rows[FULL]["accuracy"])[0]
    parts = sorted(found["components"], key=lambda one: -_span(one["accuracy"])[0])
    return Choice(
        words,
        _listed(found),
        tuple(_chips(rows)),
        tuple(_row(row, ends, full) for row in rows.values()),
        tuple(charts_of(found, rows)),
        types_of(found["components"]),
        tuple(map(_component, parts)),
        tuple(map(_wrong, found["wrong"][:SHOWN_WRONG])),
        len(found["wrong"]),
    )


def _span(estimate: dict[str, Any]) -> tuple[float, float, float]:
    parts = (estimate["value"], *estimate["interval"])
    value, low, high = (math.nan if part is None else float(part) for part in parts)
    return value, low, high


def _listed(found: dict[str, Any]) -> str:
    """Return the ranks that BM25 gives the originals, in words."""
    ranks = {int(rank): count for rank, count in found["rank_of_original_by_bm25"].items()}
    total, put = sum(ranks.values()), found["original_put_there"]
    words = f"The original is among the candidates of {found['original_listed']:.1%} of {total:,} queries"
    words += f", for {put:,} because it was put there. " if put else ". "
    if 0 in ranks:
        return words + "The candidates were given with the queries."
    further = total - sum(ranks.get(rank, 0) for rank in (1, 2, 3))
    if ranks.get(1) == total:
        return words + "Among all examples BM25 puts every one first."
    return words + (
        f"Among all examples BM25 puts it first for {ranks.get(1, 0):,}, second for {ranks.get(2, 0):,}, third for "
        f"{ranks.get(3, 0):,} and further down for {further:,}."
    )


def _chips(rows: dict[str, dict[str, Any]]) -> list[Chip]:
    """Return chips of the full gradient, of what was chosen on other queries, and of words alone."""
    full = shown_span(_span(rows[FULL]["accuracy"]))
    chips = [Chip("Full gradient", full.partition(" ")[0], f"Accuracy {full}", "unknown", "", "")]
    for name in (*_COMPARED, BM25):
        row = rows.get(name)
        if row is None or row["against_full"] is None:
            continue
        value, low, high = _span(row["against_full"])
        verdict, word, sign = "unknown", "no clear difference", "="
        if low > 0:
            verdict, word, sign = "good", "better", "+"
        elif high < 0:
            verdict, word, sign = "warn", "worse", "−"
        if name == BM25 and verdict == "good":
            verdict = "warn"
        share = "" if row["parameters"] is None else f", from {_percent(row['parameters'])} of the parameters"
        reading = f"{shown_span((value, low, high)).replace('-', '−')} against the full gradient{share}"
        shown = f"{_span(row['accuracy'])[0]:.3f}"
        chips.append(Chip(_capital(name), shown, reading, verdict, word, sign))
    return chips


def _capital(name: str) -> str:
    return name.replace("bm25", "BM25") if name == BM25 else name[:1].upper() + name[1:]


def _row(row: dict[str, Any], ends: tuple[float, float], full: float) -> Row:
    span = _span(row["accuracy"])
    against = "" if row["against_full"] is None else shown_span(_span(row["against_full"])).replace("-", "−")
    cells = (
        against,
        _shown(row["agreement"] and row["agreement"]["value"]),
        _shown(row["centred"] and row["centred"]["value"]),
        "" if row["parameters"] is None else _percent(row["parameters"]),
        "" if row["backward"] is None else f"{row['backward']:.0%}",
        "" if row["bytes"] is None else format_bytes(row["bytes"]),
        "" if row["seconds"] is None else duration(row["seconds"]),
    )
    return Row(row["name"], shown_span(span), interval(*span, ends, full), cells, row["opponent"])


def _component(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        one["name"],
        f"{one['parameters']:,}",
        f"{one['backward']:.0%}",
        shown_span(_span(one["accuracy"])),
        _shown(one["agreement"]),
        _shown(one["centred"]),
        _shown(one["output_accuracy"]),
        _shown(one["self_similarity"]),
    )


def _wrong(one: dict[str, Any]) -> tuple[str, ...]:
    lengths = ", ".join(map(str, one["original_tokens"]))
    return (
        one["query"],
        one["picked"],
        _shown(one["similarity"]),
        ", ".join(one["originals"]) or "not listed",
        _shown(one["original_similarity"]),
        str(one["rank_by_bm25"] or ""),
        f"{one['query_tokens']} / {one['picked_tokens']} / {lengths or '–'}",
    )


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 0.01 or not share else f"{100 * share:.2g}%"


def _shown(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.3f}".replace("-", "−")


def with_marked_drawings(page: ComponentPage, mark: Any) -> ComponentPage:
    """Return the page with drawings that are no longer escaped: every text in them was, when it was drawn."""

    def marked(charts: Sequence[Panel]) -> tuple[Panel, ...]:
        return tuple(chart._replace(svg=mark(chart.svg)) for chart in charts if chart.svg)

    choices = tuple(
        each._replace(
            charts=marked(each.charts), rows=tuple(row._replace(drawing=mark(row.drawing)) for row in each.rows)
        )
        for each in page.choices
    )
    return replace(page, choices=choices, charts=marked(page.charts))
