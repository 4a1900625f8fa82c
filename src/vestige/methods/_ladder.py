"""The ladder: a cheap ranking of all rows, and exact scores of those that it, or a search for words, puts first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from vestige import runs
from vestige.distributed import FSDP
from vestige.errors import IndexMismatch, SpecError, UserError
from vestige.lazy import torch
from vestige.methods._job import gradients_fit, open_job
from vestige.methods._plan import Member, run_here, vectors_key
from vestige.methods._protocol import METHODS, Job, Method, get_method
from vestige.methods._queries import OnAnswers
from vestige.methods._record import (
    StoredRun,
    begin_run,
    digest_inputs,
    find_begun,
    find_method,
    measure_query_losses,
    take_up,
)
from vestige.methods._trust import find_lexical_tops
from vestige.progress import announce
from vestige.registry import import_object
from vestige.settings import AttributeSettings
from vestige.storage import partial_folder, remove_partial

if TYPE_CHECKING:
    from torch import Tensor

ROWS_AT_ONCE = 256
"""Candidates of one piece of work."""
_ASKED = ("queries", "answer", "rerank", "rerank_method", "bank")
"""Settings that the second rung has its own of while it is opened."""
_JUDGE = "vestige.evaluate:judge_ladder"
"""Evaluations stand above methods, and are found by name, as commands find their functions."""


OnRanking = Callable[[runs.Scores], None]


def climb(
    settings: AttributeSettings,
    rank: Callable[..., runs.Scores],
    on_answers: OnAnswers | None,
    on_ranking: OnRanking | None,
) -> runs.Scores:
    """Rank all rows by the settings' method, score those it puts first exactly, and return the run of those.

    Its folder holds the run of the first rung as well, which is shown as soon as it is there. Interrupted, the same
    call continues.

    Args:
        settings: With `rerank`.
        rank: `attribute`, for the first rung.
        on_answers: As for `attribute`.
        on_ranking: Called with the run of each rung once its ranking is known.

    Raises:
        SpecError: The second method cannot score a few rows exactly.
        IndexMismatch: The model or the data has changed since the first rung.
    """
    exact = _find_exact(settings)
    begun = find_begun(settings)
    if begun is None:
        first = _rank_all(settings, partial(rank, on_answers=on_answers, on_ranking=on_ranking), on_ranking)
    else:
        first = runs.Scores.open(settings.out / runs.FIRST_RUNG)
    started = time.perf_counter()
    with open_job(_second_settings(settings, exact, first), exact) as opened:
        # Whatever is kept of the work follows from what was typed, and not from where the first rung lies.
        job = replace(
            _without_index(opened, exact),
            settings=opened.settings.model_copy(update={name: getattr(settings, name) for name in _ASKED}),
            asked=first.run.asked,
            generated=tuple(first.query(name).generated for name in first.queries),
        )
        _require_same(job, first)
        if begun is None:
            run = _Ladder(job, exact, first, started).write(settings)
        else:
            run = take_up(job, exact, begun, started)
        if on_ranking is not None:
            on_ranking(runs.Scores.open(settings.out))
        if settings.bank is not None:
            import_object(_JUDGE)(settings.out, settings.bank, seed=settings.seed)
            run.record = runs.read_record(settings.out, checked=False)
        run.add_missing()
    remove_partial(settings.out)
    return runs.Scores.open(settings.out)


def _find_exact(settings: AttributeSettings) -> Method:
    """Return the method that scores candidates; refuse one that cannot, before any work."""
    found = get_method(settings.rerank_method)
    able = [each.name for each in METHODS if _is_exact(each)]
    if not _is_exact(type(found)) or settings.device == FSDP:
        what = f"--device {FSDP}" if _is_exact(type(found)) else f"--rerank-method {found.name}"
        raise SpecError(
            f"{what} cannot score a few rows exactly. Type --rerank-method with one of {', '.join(able)}, and no "
            f"--device {FSDP}."
        )
    if (settings.training is not None) != found.needs_training:
        raise SpecError(
            f"--rerank-method {found.name} runs a training again. Type --training FOLDER, of `vestige train`."
            if found.needs_training
            else f"--training replays a training, and {found.name} does not. Drop it, or type --rerank-method replay."
        )
    # The first rung is refused before any work, too.
    find_method(_first_settings(settings))
    return found


def _is_exact(found: type[Method]) -> bool:
    return found.needs_training or (found.works_in_pieces and not found.needs_index)


def _first_settings(settings: AttributeSettings) -> AttributeSettings:
    assert settings.rerank is not None
    changed = {
        "out": partial_folder(settings.out) / runs.FIRST_RUNG,
        "k": max(settings.k, settings.rerank),
        "dense": settings.dense or settings.bank is not None,
        "trust": False,
    }
    changed |= _defaults("rerank", "rerank_method", "bank", "training", "tokens", "self_influence", "overwrite")
    return settings.model_copy(update=changed | _defaults("verbatim", "verbatim_tokens"))


def _second_settings(settings: AttributeSettings, exact: Method, first: runs.Scores) -> AttributeSettings:
    asked = {"queries": str(first.folder), **_defaults("rerank", "rerank_method", "bank", "answer")}
    second = settings.model_copy(update={"method": settings.rerank_method, "options": {}, **asked})
    if not exact.needs_training:
        return second
    # A recorded training brings its model and its data.
    brought = _defaults("index", "data", "model", "components", "skip_bad", "limit", "where", "query_rank")
    return AttributeSettings(**(second.arguments() | brought | _defaults("max_length", "precision")))


def _defaults(*names: str) -> dict[str, Any]:
    return {name: AttributeSettings.model_fields[name].default for name in names}


def _rank_all(
    settings: AttributeSettings, rank: Callable[..., runs.Scores], on_ranking: OnRanking | None
) -> runs.Scores:
    """Return the run of the first rung: the one that an interrupted command left, or a new one."""
    first = _first_settings(settings)
    if runs.is_complete(first.out) and runs.read_record(first.out).config == first.record():
        found = runs.Scores.open(first.out)
        if on_ranking is not None:
            on_ranking(found)
        return found
    try:
        return rank(first)
    except IndexMismatch:
        # What a run with other settings left when it was killed.
        if not runs.is_run(first.out):
            raise
        return rank(first.model_copy(update={"overwrite": True}))


def _without_index(job: Job, exact: Method) -> Job:
    """Return the job on the model itself: stored gradients are compressed."""
    if job.index is None or exact.needs_exact:
        return job
    if not gradients_fit(job):
        raise UserError("Exact scores keep the whole gradient of every query. Ask fewer queries at once.")
    return replace(job, index=None, left_out=job.skipped)


def _require_same(job: Job, first: runs.Scores) -> None:
    """Raise unless the second rung reads what the first one did."""
    ids = [example.id for example in job.queries.examples]
    model = first.run.model
    same = ids == first.queries and len(job.train) == first.run.data.examples
    # Methods that read text alone see no tokens, and have no fingerprint of them.
    if same and model is not None and job.loaded is not None and job.settings.training is None:
        read = (first.run.data.fingerprint, first.run.queries.fingerprint, model.fingerprint)
        same = read == (job.train.fingerprint, job.queries.fingerprint, job.loaded.fingerprint)
    listed = {row.row: row.example_id for name in first.queries for row in first.listed(name, "proponent")}
    if not same or any(job.train.examples[row].id != name for row, name in listed.items()):
        raise IndexMismatch(
            f"The rungs of {job.settings.out} would be of different models or data: the first one ranked "
            f"{first.run.data.examples:,} examples of {first.run.data.name}, the second one reads {len(job.train):,} "
            f"of {job.train.name}. Give both the same; remove {first.folder} where they have changed since."
        )


@dataclass(frozen=True)
class _Ladder:
    """The rungs above the first one."""

    job: Job
    exact: Method
    first: runs.Scores
    started: float

    @property
    def taken(self) -> int:
        """Rows of each rung that are taken for every query."""
        assert self.job.settings.rerank is not None
        return self.job.settings.rerank

    def write(self, settings: AttributeSettings) -> StoredRun:
        """Score the candidates, and write the run without the parts that are added to it."""
        job = self.job
        rungs, tops = self._search()
        candidates = self._unite(tops)
        began = time.perf_counter()
        announce(f"{len(candidates):,} of {len(job.train):,} examples are scored by {self.exact.name}.")
        scores = self._score(candidates)
        rungs.append(runs.RungRecord(name=self.exact.name, seconds=time.perf_counter() - began, rows=len(candidates)))
        skipped = np.setdiff1d(np.arange(len(job.train)), candidates).tolist()
        dense = settings.dense or settings.bank is not None
        collector = runs.ScoreCollector(len(job.queries), len(job.train), k=settings.k, dense=dense, skipped=skipped)
        collector.add(runs.ScoreBlock(torch.from_numpy(candidates), scores))
        summary = collector.finish()
        # A share of all examples is not known where a few have scores.
        summary = summary._replace(ranked=[one._replace(percentile=None) for one in summary.ranked])
        ladder = runs.LadderRecord(
            first=self.taken,
            rungs=rungs,
            candidates=candidates.tolist(),
            stood=self._find_standing(tops, summary.ranked),
        )

        def move_first(run: Path) -> None:
            self.first.folder.rename(run / runs.FIRST_RUNG)

        member, losses = Member(job, self.exact, summary), measure_query_losses(job, self.exact)
        since = self.started - self.first.run.seconds
        return begin_run(settings, member, losses, since, move_first, inputs=digest_inputs(job), ladder=ladder)

    def _search(self) -> tuple[list[runs.RungRecord], list[list[list[int]]]]:
        """Return the rungs below the last one, and the first rows of each, by query."""
        found = self.first.run
        rungs = [
            runs.RungRecord(name=found.method, seconds=found.seconds, rows=found.data.examples - len(found.left_out))
        ]
        tops = [
            [[row.row for row in self.first.listed(name, "proponent")][: self.taken] for name in self.first.queries]
        ]
        asked = replace(self.job, queries=replace(self.job.queries, examples=_with_other_answers(self.job)))
        for each in METHODS:
            if each.searches_words and each.name != found.method:
                began = time.perf_counter()
                tops.append([rows.tolist() for rows in find_lexical_tops(asked, self.taken, each())])
                rungs.append(
                    runs.RungRecord(name=each.name, seconds=time.perf_counter() - began, rows=len(self.job.train))
                )
        return rungs, tops

    def _unite(self, tops: Sequence[Sequence[Sequence[int]]]) -> Int[np.ndarray, "candidate"]:
        """Return the rows that are scored exactly, for all queries: the first of every rung, and the first's last."""
        if self.exact.needs_training:
            return np.setdiff1d(np.arange(len(self.job.train)), self.job.skipped)
        rows = {row for rung in tops for query in rung for row in query}
        for name in self.first.queries if self.first.meaning.causal else ():
            rows |= {row.row for row in self.first.listed(name, "opponent")[: self.taken]}
        return np.setdiff1d(np.array(sorted(rows), dtype=np.int64), self.job.skipped)

    def _score(self, candidates: Int[np.ndarray, "candidate"]) -> Tensor:
        """Return the scores of the candidates, [query, candidate]; what is finished is kept beside the run."""
        if self.exact.needs_training:
            scores = torch.zeros(len(self.job.queries), len(self.job.train), dtype=torch.float64)
            for block in self.exact.blocks(self.job):
                scores[:, block.rows] = block.scores.double()
            return scores[:, torch.from_numpy(candidates)]
        prepared = self.exact.prepare(self.job)
        parts = [candidates[at : at + ROWS_AT_ONCE].tolist() for at in range(0, len(candidates), ROWS_AT_ONCE)]

        def compute(piece: int) -> dict[str, Tensor]:
            return {"scores": prepared.totals(parts[piece]).cpu()}

        def collect(found: Iterator[dict[str, Tensor]]) -> Tensor:
            return torch.cat([each["scores"] for each in found], dim=1)

        key, weights = vectors_key(prepared, parts), [len(part) for part in parts]
        return run_here(self.job, "Re-scoring", key, weights, compute, collect, "examples")

    def _find_standing(
        self, tops: Sequence[Sequence[Sequence[int]]], ranked: Sequence[Any]
    ) -> dict[str, dict[str, list[int | None]]]:
        """Return, for each query and listed proponent, its rank at every rung."""
        places = [[{row: rank for rank, row in enumerate(query, 1)} for query in rung] for rung in tops]
        found: dict[str, dict[str, list[int | None]]] = {name: {} for name in self.first.queries}
        for entry in (entry for entry in ranked if entry.end == "proponent"):
            ranks: list[int | None] = [rung[entry.query].get(entry.row) for rung in places]
            found[self.first.queries[entry.query]][self.job.train.examples[entry.row].id] = [*ranks, entry.rank]
        return found


def _with_other_answers(job: Job) -> list[Any]:
    """Return the queries as word searches read them: with both answers of a contrast."""
    found = []
    for example in job.queries.examples:
        other = None if example.focus is None else example.focus.instead
        answer = f"{example.answer}\n{other}"
        found.append(example if other is None else example.without_answer().with_answer(answer))
    return found
