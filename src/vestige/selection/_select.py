"""`vestige select`: from scores or gradients to a smaller data set, with a reason for every example in it."""

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vestige.data import describe_copies, rows_listed
from vestige.errors import DataError, SpecError, UserError
from vestige.indexes import Index
from vestige.progress import announce, format_bytes, progress
from vestige.selection._inputs import (
    Scored,
    head,
    open_scores,
    read_lengths,
    read_rows,
    read_targets,
)
from vestige.selection._orders import (
    Candidate,
    Order,
    keep_texts_whole,
    order_at_random,
    order_by_best,
    order_by_diversity,
    order_by_gumbel,
    order_round_robin,
    uniforms,
    without_twins,
)
from vestige.selection._store import FILES, RECORD, Choice, SelectedData, digest_of, find_finished, write_selection
from vestige.settings import SelectSettings, with_settings
from vestige.storage import remove_result, sha256_of

_MOST_BYTES = 4 * 2**30
"""Of gradients in memory, for facility location."""
_SCORE_FILES = ("scores.parquet", "scores.safetensors")
_CHOICES = ("strategy", "budget", "targets", "temperature", "min_score", "duplicates", "pool", "seed")


@with_settings(SelectSettings)
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
        remove_result(settings.out, FILES, RECORD)
    job = _Job(settings)
    identity = job.identity()
    if (found := find_finished(settings.out, identity)) is not None:
        announce(f"{settings.out} holds this selection already.")
        return found
    if settings.strategy != "random" and (own := job.warn_of_own_answers()):
        announce(own)
    choices = job.choose()
    removed = job.list_removed(choices)
    about = {
        "vestige": version("vestige"),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "title": job.title(choices),
        "notes": job.notes(choices, removed),
        "chosen": len(choices),
        "examples": len(job.rows),
        "tokens": None if job.lengths is None else sum(choice.tokens or 0 for choice in choices),
        "seconds": time.perf_counter() - started,
        "command": settings.command_line("select"),
        "config": settings.record(),
        "identity": identity,
    }
    lines = job.rows.lines(choice.row for choice in choices)
    others = job.rows.lines(removed, removed) if removed else None
    return write_selection(settings.out, about, lines, choices, others)


class _Job:
    """One selection: its settings, and everything that is chosen by."""

    def __init__(self, settings: SelectSettings) -> None:
        self.settings = settings
        self.scores = None if settings.scores is None else open_scores(settings.scores)
        self.index = None if settings.index is None else Index.open(settings.index)
        self.rows = read_rows(settings, self.scores, self.index)
        by_target = self.scores if settings.strategy == "per-target" else None
        self.targets = {} if by_target is None else read_targets(settings, by_target)
        self.lengths = read_lengths(settings, self.rows, self.index)
        """Tokens of each example, int64; known with a budget of tokens."""
        dropped = () if settings.drop is None else rows_listed(settings.drop, self.rows.ids, self.rows.name)
        self.dropped = frozenset(dropped)
        """Rows that `drop` names."""

    def identity(self) -> dict[str, Any]:
        """Return every setting and the digest of every input, in JSON terms."""
        folder = None if self.scores is None else self.scores.run.folder
        files = [] if folder is None else [folder / name for name in _SCORE_FILES]
        given = self.settings.tokenizer
        tokenizer = str(given) if isinstance(given, str | Path) else type(given).__name__
        return {
            **{name: getattr(self.settings, name) for name in _CHOICES},
            "data": self.rows.digest,
            "scores": digest_of([sha256_of(path) for path in files if path.is_file()]) if files else None,
            "index": None if self.index is None else self.index.fingerprint,
            "targets of queries": digest_of([f"{name} {queries}" for name, queries in self.targets.items()]),
            "tokenizer": None if given is None else tokenizer,
            **({"drop": digest_of([self.rows.ids[row] for row in sorted(self.dropped)])} if self.dropped else {}),
        }

    @cached_property
    def limits(self) -> tuple[int | None, int | None]:
        """Examples, or else tokens, at which to stop."""
        count, (number, unit) = len(self.rows), self.settings.amount
        if unit == "tokens":
            assert self.lengths is not None, "a budget of tokens has lengths"
            total = int(self.lengths.sum())
            if number > total:
                raise SpecError(f"--budget '{self.settings.budget}' of {self.rows.name}, which has {total} tokens.")
            return None, int(number)
        if unit == "examples" and number > count:
            raise SpecError(f"--budget {self.settings.budget} of {self.rows.name}, which has {count} examples.")
        return max(1, int(number if unit == "examples" else number / 100 * count + 0.5)), None

    def choose(self) -> list[Choice]:
        """Choose until the budget is spent: with tokens, up to the first example that does not fit any more."""
        examples, tokens = self.limits
        choices: list[Choice] = []
        spent = 0
        with progress(examples or len(self.rows), "Choosing") as bar:
            for candidate, twin, cosine in self._without_copies():
                row = candidate.row
                if twin is not None:
                    choices[twin].replaces.append(self.rows.ids[row])
                    choices[twin].cosines.append(cosine)
                    continue
                length = None if self.lengths is None else int(self.lengths[row])
                spent += length or 0
                if tokens is not None and spent > tokens:
                    break
                names = self.rows.ids[row], row, *candidate[1:], self.rows.sources[row]
                choices.append(Choice(len(choices) + 1, *names, length))
                bar.advance()
                if len(choices) == examples:
                    break
        if not choices:
            raise DataError(
                "Nothing can be chosen: no example has a score that is a number and high enough, the first one is "
                "longer than the budget, or every text has more copies than the budget has rows. Give a lower "
                "--min-score, or a larger --budget."
            )
        return choices

    def _without_copies(self) -> Iterator[tuple[Candidate, int | None, float]]:
        """Yield what may be chosen in the order of the strategy, each with the earlier one that it repeats."""
        order = (each for each in self._order() if each.row not in self.dropped)
        if self.settings.strategy == "random" and self.limits[0] is not None:
            groups = self.rows.groups.copy()
            groups[list(self.dropped)] = -1
            order = keep_texts_whole(order, groups, self.limits[0])
        if self.settings.duplicates is None:
            return ((candidate, None, 0.0) for candidate in order)
        assert self.index is not None, "checked with the settings"
        return without_twins(order, self.index, self.settings.duplicates)

    def _order(self) -> Order:
        settings, scores, least = self.settings, self.scores, self.settings.min_score
        ties = uniforms(self.rows.ids, settings.seed, "ties")
        if settings.strategy == "random":
            return order_at_random(uniforms(self.rows.text_names(), settings.seed, "random"), ties, scores, least)
        if settings.strategy == "diverse":
            return self._order_by_diversity(ties)
        assert scores is not None, "checked with the settings"
        if settings.strategy == "round-robin":
            return order_round_robin(scores, ties, least)
        if settings.strategy == "gumbel":
            draws = uniforms(self.rows.text_names(), settings.seed, "gumbel")
            return order_by_gumbel(scores, draws, ties, settings.temperature, least)
        return order_by_best(scores, self.targets, ties, least)

    def _order_by_diversity(self, ties: Scored) -> Order:
        """Order by facility location over the gradients of the pool."""
        index, pool, least = self.index, self.settings.pool, self.settings.min_score
        assert index is not None, "checked with the settings"
        rows, means = np.arange(len(self.rows)), None
        if self.scores is not None and (pool is not None or least is not None):
            means = self.scores.means()
            allowed = means if least is None else np.where(means >= least, means, np.nan)
            most = len(rows) if pool is None else int(np.ceil(pool * self._estimate_count()))
            rows = np.sort(head(allowed, most, ties)[0])
        rows = rows[~np.isin(rows, [*index.skipped, *self.dropped])]
        needed = 4 * len(rows) * index.width
        if needed > _MOST_BYTES:
            raise UserError(
                f"The gradients of {len(rows)} examples take {format_bytes(needed)} of memory, and "
                f"{format_bytes(_MOST_BYTES)} are allowed. Choose among fewer with --scores RUN --pool 4, or make an "
                "index with a smaller --compress."
            )
        announce(f"Comparing the gradients of {len(rows):,} examples with each other")
        return order_by_diversity(index.gradients_of(rows), rows, ties, means)

    def _estimate_count(self) -> float:
        """Estimate the number of examples that the budget will buy."""
        examples, tokens = self.limits
        if tokens is None or self.lengths is None:
            return examples or 0
        return tokens / max(float(self.lengths.mean()), 1.0)

    def list_removed(self, choices: Sequence[Choice]) -> dict[int, dict[str, Any]]:
        """Return by row what was kept out: `problem`, `score`, `copy_of` and `cosine`, as far as they apply.

        These are rows below `min_score` by the strategy's score, those whose gradients repeat a chosen one's, and what
        `drop` names. What merely did not fit into the budget is not among them. Of a run that keeps only the ends of
        its rankings, examples in between are not reported.
        """
        found: dict[int, dict[str, Any]] = {}
        settings, scores = self.settings, self.scores
        if settings.min_score is not None and scores is not None and scores.complete:
            every = range(len(scores.queries))
            groups = {"per-target": list(self.targets.values()), "round-robin": [[query] for query in every]}
            values = scores.best(groups.get(settings.strategy, [every]))[0]
            # NaN is not below anything: what has no score is reported in a note.
            for row in np.flatnonzero(values < settings.min_score).tolist():
                found[row] = {"problem": f"score below {settings.min_score:g}", "score": float(values[row])}
        numbers = {name: row for row, name in enumerate(self.rows.ids)}
        for choice in choices:
            for name, cosine in zip(choice.replaces, choice.cosines, strict=True):
                found[numbers[name]] = {"problem": "near copy", "copy_of": choice.example_id, "cosine": cosine}
        return found | {row: {"problem": f"named in {settings.drop}"} for row in self.dropped}

    def warn_of_own_answers(self) -> str | None:
        """Return a warning if rows are kept that led a model to its own answers; None where answers were given."""
        if self.scores is None or not self.scores.run.generated:
            return None
        return (
            f"{self.scores.run.generated} of {len(self.scores.queries)} queries are answers that the model gave "
            "itself: what is kept supports these answers, right or wrong. To take out what led to a wrong answer, type "
            f"--drop FILE with a list of those rows, or: vestige fix {self.settings.scores} --top 1 --queries ID"
        )

    def title(self, choices: Sequence[Choice]) -> str:
        """Return what was chosen, in a line."""
        count, by = len(self.rows), f" by {self.scores.run.run.method}" if self.scores is not None else ""
        share = f"{len(choices)} of {count} examples ({len(choices) / count:.1%})"
        return f"{share} of {self.rows.name}, {self.settings.strategy}{by}"

    def notes(self, choices: Sequence[Choice], removed: dict[int, dict[str, Any]]) -> list[str]:
        """Return what a reader should know of the selection."""
        settings, notes = self.settings, []
        repeats = len(choices) - len({int(self.rows.groups[choice.row]) for choice in choices})
        if settings.strategy == "random":
            notes += [found] if (found := describe_copies(self.rows.groups)) else []
        elif repeats:
            notes.append(
                f"{repeats:,} of the chosen rows repeat the text of another chosen one. To have each text once, give "
                "--index IDX --duplicates 1."
            )
        if self.dropped:
            notes.append(f"{len(self.dropped)} examples are named in {settings.drop} and were never chosen.")
        if self.scores is not None and settings.strategy != "random":
            notes.append(f"Score: {self.scores.run.meaning.sign}")
            notes += [own] if (own := self.warn_of_own_answers()) else []
            left_out = len(self.scores.run.run.left_out)
            notes += [f"{left_out} examples have no score, and cannot be chosen."] if left_out else []
        if harmful := sum("score" in reason for reason in removed.values()):
            notes.append(f"{harmful} examples have a score below {settings.min_score:g} and were kept out.")
        if replaced := sum(len(choice.replaces) for choice in choices):
            notes.append(
                f"{replaced} near copies of chosen ones were left out: cosine at least {settings.duplicates:g}."
            )
        wanted = self.limits[0]
        if wanted is not None and len(choices) < wanted:
            notes.append(f"{wanted} were requested; no more are allowed, or fit with all copies of their text.")
        return notes
