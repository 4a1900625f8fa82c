"""`vestige select`: from scores or gradients to a smaller data set, with a reason for every example in it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vestige.data import describe_copies, read_row_list, rows_named
from vestige.errors import DataError, SpecError, UserError
from vestige.indexes import Index
from vestige.progress import announce, format_bytes, progress
from vestige.selection._data import Rows, lines_of, query_values, read_rows, row_lengths
from vestige.selection._diverse import facility_location
from vestige.selection._duplicates import Judged, without_twins
from vestige.selection._orders import (
    Candidate,
    CutShort,
    Order,
    diverse_order,
    gumbel_order,
    random_order,
    round_robin_order,
    target_order,
    targets_of,
    top_order,
    whole_texts,
)
from vestige.selection._random import uniforms
from vestige.selection._removed import Reasons, removed_rows
from vestige.selection._scores import ScoreSource, head, open_scores
from vestige.selection._store import (
    Choice,
    SelectedData,
    Wanted,
    digest_of,
    finished,
    remove_selection,
    write_selection,
)
from vestige.settings import SelectSettings, verb
from vestige.storage import sha256_of

_MOST_BYTES = 4 * 2**30
"""Of gradients in memory, for facility location."""
_SCORE_FILES = ("scores.parquet", "scores.safetensors")
_CHOICES = ("strategy", "budget", "targets", "temperature", "min_score", "duplicates", "pool", "seed")


@dataclass(frozen=True)
class Inputs:
    """Everything that is chosen by."""

    rows: Rows
    scores: ScoreSource | None
    index: Index | None
    lengths: np.ndarray | None
    targets: dict[str, list[int]]
    dropped: frozenset[int] = frozenset()
    """Rows that `drop` names."""


class Limits(NamedTuple):
    """Where to stop."""

    examples: int | None
    tokens: int | None


@verb(SelectSettings)
def select(settings: SelectSettings) -> SelectedData:
    """Write the chosen examples as a data set to `settings.out`, with the reason for each; a repeated call finds them.

    Equal scores are ordered by a hash of the example's id and the seed, never by their position in the data.

    Raises:
        SpecError: More is to be chosen than there is, or an input is missing.
        UserError: The run keeps too few scores for this, or the data are not those that were scored.
        DataError: Nothing is left to choose.
        IndexMismatch: The folder holds a selection made otherwise.
    """
    started = time.perf_counter()
    if settings.overwrite:
        remove_selection(settings.out)
    inputs = _inputs(settings)
    wanted = Wanted(_identity(settings, inputs), settings.record(), settings.command_line("select"))
    if (found := finished(settings.out, wanted)) is not None:
        announce(f"{settings.out} holds this selection already.")
        return found
    limits = _limits(settings, inputs)
    if settings.strategy != "random" and (own := _own_answers(inputs.scores)):
        announce(own)
    choices = _filled(settings, inputs, limits)
    removed = removed_rows(settings, inputs.scores, inputs.targets, inputs.rows.ids, choices)
    removed |= {row: {"problem": f"named in {settings.drop}"} for row in inputs.dropped}
    about = {
        "vestige": version("vestige"),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "title": _title(settings, inputs, choices),
        "notes": _notes(settings, inputs, limits, choices, removed),
        "chosen": len(choices),
        "examples": len(inputs.rows),
        "tokens": None if inputs.lengths is None else sum(choice.tokens or 0 for choice in choices),
        "seconds": time.perf_counter() - started,
    }
    lines = lines_of(inputs.rows, [choice.row for choice in choices])
    others = lines_of(inputs.rows, list(removed), removed) if removed else None
    return write_selection(settings.out, wanted, lines, choices, others, about)


def _inputs(settings: SelectSettings) -> Inputs:
    scores = None if settings.scores is None else open_scores(settings.scores)
    index = None if settings.index is None else Index.open(settings.index)
    rows = read_rows(settings, scores, index)
    targets = {}
    if scores is not None and settings.strategy == "per-target":
        value_of = None if settings.targets is None else query_values(settings, scores)
        targets = targets_of(scores.queries, value_of)
    return Inputs(rows, scores, index, row_lengths(settings, rows, index), targets, _dropped(settings, rows))


def _dropped(settings: SelectSettings, rows: Rows) -> frozenset[int]:
    if settings.drop is None:
        return frozenset()
    names = [entry.name for entry in read_row_list(settings.drop)]
    return frozenset(rows_named(names, rows.ids, place=str(settings.drop), data=rows.name).values())


def _identity(settings: SelectSettings, inputs: Inputs) -> dict[str, Any]:
    folder = None if inputs.scores is None else inputs.scores.run.folder
    files = [] if folder is None else [folder / name for name in _SCORE_FILES]
    return {
        **{name: getattr(settings, name) for name in _CHOICES},
        "data": inputs.rows.digest,
        "scores": digest_of([sha256_of(path) for path in files if path.is_file()]) if files else None,
        "index": None if inputs.index is None else inputs.index.fingerprint,
        "targets of queries": digest_of([f"{name} {queries}" for name, queries in inputs.targets.items()]),
        "tokenizer": _tokenizer_name(settings.tokenizer),
        **({"drop": digest_of([inputs.rows.ids[row] for row in sorted(inputs.dropped)])} if inputs.dropped else {}),
    }


def _tokenizer_name(tokenizer: Any) -> str | None:
    if tokenizer is None or isinstance(tokenizer, str | Path):
        return None if tokenizer is None else str(tokenizer)
    return type(tokenizer).__name__


def _limits(settings: SelectSettings, inputs: Inputs) -> Limits:
    count, (number, unit) = len(inputs.rows), settings.amount
    if unit == "tokens":
        assert inputs.lengths is not None, "a budget of tokens has lengths"
        total = int(inputs.lengths.sum())
        if number > total:
            raise SpecError(f"--budget '{settings.budget}' of {inputs.rows.name}, which has {total} tokens.")
        return Limits(None, int(number))
    if unit == "examples" and number > count:
        raise SpecError(f"--budget {settings.budget} of {inputs.rows.name}, which has {count} examples.")
    return Limits(max(1, int(number if unit == "examples" else number / 100 * count + 0.5)), None)


def _order(settings: SelectSettings, inputs: Inputs) -> Order:
    ids, scores, least = inputs.rows.ids, inputs.scores, settings.min_score
    ties = uniforms(ids, settings.seed, "ties")
    if settings.strategy == "random":
        draws = uniforms(inputs.rows.text_names(), settings.seed, "random")
        return random_order(draws, ties, scores, least)
    if settings.strategy == "diverse":
        return _diverse(settings, inputs, ties)
    assert scores is not None, "checked with the settings"
    if settings.strategy == "per-target":
        return target_order(scores, inputs.targets, ties, least)
    if settings.strategy == "round-robin":
        return round_robin_order(scores, ties, least)
    if settings.strategy == "gumbel":
        draws = uniforms(inputs.rows.text_names(), settings.seed, "gumbel")
        return gumbel_order(scores, draws, ties, settings.temperature, least)
    return top_order(scores, ties, least)


def _diverse(settings: SelectSettings, inputs: Inputs, ties: np.ndarray) -> Order:
    """Order by facility location over the gradients of the pool."""
    index = inputs.index
    assert index is not None, "checked with the settings"
    means = inputs.scores.means() if inputs.scores is not None and _uses_scores(settings) else None
    rows = np.arange(len(inputs.rows))
    if means is not None:
        allowed = means if settings.min_score is None else np.where(means >= settings.min_score, means, np.nan)
        most = len(rows) if settings.pool is None else int(np.ceil(settings.pool * _expected(settings, inputs)))
        rows = np.sort(head(allowed, most, ties).rows)
    rows = rows[~np.isin(rows, [*index.skipped, *inputs.dropped])]
    needed = 4 * len(rows) * index.width
    if needed > _MOST_BYTES:
        raise UserError(
            f"The gradients of {len(rows)} examples take {format_bytes(needed)} of memory, and "
            f"{format_bytes(_MOST_BYTES)} are allowed. Choose among fewer with --scores RUN --pool 4, or make an index "
            "with a smaller --compress."
        )
    announce(f"Comparing the gradients of {len(rows):,} examples with each other")
    picks = facility_location(index.gradients_of(rows), torch.from_numpy(ties[rows]))
    return diverse_order(picks, rows, means)


def _uses_scores(settings: SelectSettings) -> bool:
    return settings.pool is not None or settings.min_score is not None


def _expected(settings: SelectSettings, inputs: Inputs) -> float:
    """Estimate the number of examples that the budget will buy."""
    limits = _limits(settings, inputs)
    if limits.examples is not None:
        return limits.examples
    assert limits.tokens is not None, "one of the two"
    assert inputs.lengths is not None, "a budget of tokens has lengths"
    return limits.tokens / max(float(inputs.lengths.mean()), 1.0)


def _filled(settings: SelectSettings, inputs: Inputs, limits: Limits) -> list[Choice]:
    """Choose until the budget is spent: with tokens, up to the first example that does not fit any more."""
    choices: list[Choice] = []
    spent = 0
    with progress(limits.examples or len(inputs.rows), "Choosing") as bar:
        for candidate, twin, cosine in _judged(settings, inputs, limits):
            if isinstance(candidate, CutShort):
                raise candidate.reason
            if twin is not None:
                choices[twin].replaces.append(inputs.rows.ids[candidate.row])
                choices[twin].cosines.append(cosine)
                continue
            choice = _choice(inputs, candidate, len(choices) + 1)
            spent += choice.tokens or 0
            if limits.tokens is not None and spent > limits.tokens:
                break
            choices.append(choice)
            bar.advance()
            if len(choices) == limits.examples:
                break
    if not choices:
        raise DataError(
            "Nothing can be chosen: no example has a score that is a number and high enough, the first one is longer "
            "than the budget, or every text has more copies than the budget has rows. Give a lower --min-score, or a "
            "larger --budget."
        )
    return choices


def _judged(settings: SelectSettings, inputs: Inputs, limits: Limits) -> Iterator[Judged]:
    order = (each for each in _order(settings, inputs) if isinstance(each, CutShort) or each.row not in inputs.dropped)
    if settings.strategy == "random" and limits.examples is not None:
        groups = inputs.rows.groups.copy()
        groups[list(inputs.dropped)] = -1
        order = whole_texts(order, groups, limits.examples)
    if settings.duplicates is None:
        return (Judged(candidate) for candidate in order)
    assert inputs.index is not None, "checked with the settings"
    return without_twins(order, inputs.index, settings.duplicates)


def _choice(inputs: Inputs, candidate: Candidate, rank: int) -> Choice:
    row = candidate.row
    return Choice(
        rank,
        inputs.rows.ids[row],
        row,
        candidate.score,
        candidate.target,
        candidate.reason,
        inputs.rows.sources[row],
        None if inputs.lengths is None else int(inputs.lengths[row]),
    )


def _own_answers(scores: ScoreSource | None) -> str | None:
    """Return a warning if rows are kept that led a model to its own answers; None where answers were given."""
    if scores is None or not scores.run.generated:
        return None
    return (
        f"{scores.run.generated} of {len(scores.queries)} queries are answers that the model gave itself: what is kept "
        "supports these answers, right or wrong. To take out what led to a wrong answer, list those rows and type "
        "--drop FILE."
    )


def _copies(settings: SelectSettings, inputs: Inputs, choices: list[Choice]) -> list[str]:
    """Return a note on rows that repeat the text of others: drawn together, or chosen one by one by their scores."""
    if settings.strategy == "random":
        return [found] if (found := describe_copies(inputs.rows.groups)) else []
    repeats = len(choices) - len({int(inputs.rows.groups[choice.row]) for choice in choices})
    if not repeats:
        return []
    return [
        f"{repeats:,} of the chosen rows repeat the text of another chosen one. To have each text once, give --index "
        "IDX --duplicates 1."
    ]


def _title(settings: SelectSettings, inputs: Inputs, choices: list[Choice]) -> str:
    share = len(choices) / len(inputs.rows)
    by = f" by {inputs.scores.run.run.method}" if inputs.scores is not None else ""
    return f"{len(choices)} of {len(inputs.rows)} examples ({share:.1%}) of {inputs.rows.name}, {settings.strategy}{by}"


def _notes(
    settings: SelectSettings, inputs: Inputs, limits: Limits, choices: list[Choice], removed: Reasons
) -> list[str]:
    notes = _copies(settings, inputs, choices)
    if inputs.dropped:
        notes.append(f"{len(inputs.dropped)} examples are named in {settings.drop} and were never chosen.")
    if inputs.scores is not None and settings.strategy != "random":
        notes.append(f"Score: {inputs.scores.run.meaning.sign}")
        notes += [own] if (own := _own_answers(inputs.scores)) else []
        left_out = len(inputs.scores.run.run.left_out)
        notes += [f"{left_out} examples have no score, and cannot be chosen."] if left_out else []
    if harmful := sum("score" in reason for reason in removed.values()):
        notes.append(f"{harmful} examples have a score below {settings.min_score:g} and were kept out.")
    if replaced := sum(len(choice.replaces) for choice in choices):
        notes.append(f"{replaced} near copies of chosen ones were left out: cosine at least {settings.duplicates:g}.")
    if limits.examples is not None and len(choices) < limits.examples:
        notes.append(f"{limits.examples} were requested; no more are allowed, or fit with all copies of their text.")
    return notes
