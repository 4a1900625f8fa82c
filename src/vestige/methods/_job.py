"""From settings to a job: the model, the training data and the queries, tokenised alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from jaxtyping import Float

from vestige import gradients, indexes, models
from vestige.data import Example, TokenizedData, find_focus, load_examples, load_queries, locate_spans, tokenize_source
from vestige.distributed import broadcast_from_rank0, is_rank0
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.jobs import worker_command
from vestige.methods._checkpoints import Checkpoint, find_checkpoints, refuse_checkpoints, settings_of_last
from vestige.methods._plan import find_unscorable
from vestige.methods._protocol import Job, Method
from vestige.methods._queries import Live, OnAnswer, OnAnswers, choose_answers, read_queries
from vestige.progress import announce, format_bytes
from vestige.settings import AttributeSettings, IndexSettings, LaunchSettings
from vestige.storage import partial_folder

EXACT_SHARE = 0.4
"""Share of the free memory that the queries' whole gradients may take; beyond it they are compressed."""


@contextmanager
def open_job(
    settings: AttributeSettings,
    method: Method,
    on_answers: OnAnswers | None = None,
    live: Live | None = None,
    on_answer: OnAnswer | None = None,
) -> Iterator[Job]:
    """Open the job; a temporary index lives as long as the context.

    Args:
        settings: Of the run.
        method: What scores.
        on_answers: Called as soon as the queries have their answers.
        live: The model, where it is in memory already.
        on_answer: Called as soon as the model's answer to one of the queries has ended.
    """
    job = _make_job(settings, method, on_answers, live, on_answer)
    settings = job.settings
    # A method that works on whole gradients refuses by itself what does not fit.
    needs_none = job.index is not None or not method.needs_gradients or method.needs_exact
    if needs_none or (not method.needs_index and gradients_fit(job)):
        yield replace(job, left_out=find_unscorable(job)) if settings.skip_bad and job.loaded else job
        return
    if settings.query_rank is not None:
        raise SpecError(
            f"--query-rank shortens whole gradients, and {method.name} compresses these queries'. Drop "
            "--query-rank, or take fewer queries or a method on whole gradients: grad-dot, grad-cos, ekfac."
        )
    announce("Making a temporary index. To ask again without this pass, keep one: vestige index.")
    # Shares build it together: all of them need all of it.
    launch = {name: getattr(settings, name) for name in LaunchSettings.model_fields if name != "shard"}
    command = worker_command(settings, "attribute")
    yield replace(job, index=build_temporary_index(job, "index", settings.model, command, **launch))


def _make_job(
    settings: AttributeSettings,
    method: Method,
    on_answers: OnAnswers | None,
    live: Live | None,
    on_answer: OnAnswer | None,
) -> Job:
    """Return the job with the index that the settings name."""
    typed = settings.chat
    settings, index, checkpoints = _settle(method.adopt(settings), method)
    given = load_queries(settings.queries, focus="read", on_bad_text=settings.on_bad_text)
    method.require_focus(find_focus(given))
    loaded = _load(settings, method, index, live)
    selection = _select(settings, method, loaded, index)
    train = method.read_train(loaded) if loaded is not None else None
    if train is None:
        train = _read_train(settings, loaded, index)
    name = settings.queries if isinstance(settings.queries, str) and Path(settings.queries).exists() else "queries"
    if loaded is None:
        texts = [locate_spans(query, str(name)) for query in choose_answers(given, settings.answer)]
        queries, generated, asked = _without_tokens(texts, str(name)), [False] * len(given), ""
    else:
        queries, generated, asked = read_queries(
            settings,
            loaded,
            given,
            train.examples,
            chat=typed,
            name=name,
            answer=settings.answer,
            on_answer=on_answer if is_rank0() else None,
            on_text=None if live is None else live.on_text,
        )
    if on_answers is not None and is_rank0():
        on_answers(queries, generated)
    if loaded is not None:
        gradients.require_independence(loaded, queries, indexes.batch_tokens(settings, loaded))
    weights = None if settings.weigh_by is None else read_row_weights(train, settings.weigh_by)
    found = {"asked": asked, "generated": tuple(generated), "row_weights": weights}
    return Job(train, queries, settings, loaded, selection, index, checkpoints, **found)


def _settle(
    settings: AttributeSettings, method: Method
) -> tuple[AttributeSettings, indexes.Index | None, tuple[Checkpoint, ...]]:
    """Return the settings with what index and checkpoints decide, and these."""
    checkpoints: tuple[Checkpoint, ...] = ()
    if method.weighting is not None:
        checkpoints = find_checkpoints(settings, method.weighting)
        settings = settings_of_last(settings, checkpoints)
    else:
        refuse_checkpoints(settings)
    index = indexes.Index.open(settings.index) if settings.index is not None else None
    if index is not None:
        _require_recomputable(index, method)
        settings = _settings_of_index(settings, index)
    return settings.model_copy(update={"chat": bool(settings.chat)}), index, checkpoints


def _require_recomputable(index: indexes.Index, method: Method) -> None:
    """Raise unless gradients of queries can match the index: of an imported one, the projection must be known."""
    record = index.manifest.imported
    if record is None or record.recomputable or not method.needs_model:
        return
    raise IndexMismatch(
        f"The index {index.folder} was imported from {record.layout}, and model, data or projection are not known "
        f"well enough to compute what `{method.name}` needs for a query. Project the queries with the software that "
        f"made the index, then type: vestige import QUERIES --against {index.folder} --out RUN. An export of Vestige's "
        "own can be used directly once it was imported with --model and --data."
    )


def _settings_of_index(settings: AttributeSettings, index: indexes.Index) -> AttributeSettings:
    """Return the settings with those of the index, which decide how text becomes tokens and what the loss is."""
    manifest = index.manifest
    fixed = {"loss": manifest.loss, "max_length": manifest.max_length}
    default = {name: AttributeSettings.model_fields[name].default for name in fixed}
    for name, value in fixed.items():
        if getattr(settings, name) not in (value, default[name]):
            raise SpecError(
                f"The index {index.folder} was made with {name}={value}, and {getattr(settings, name)} was requested. "
                f"Leave it out, or make another index with it."
            )
    return settings.model_copy(update=fixed | ({"chat": manifest.chat} if settings.chat is None else {}))


def _load(
    settings: AttributeSettings, method: Method, index: indexes.Index | None, live: Live | None
) -> models.LoadedModel | None:
    source: Any = settings.model
    if source is None and index is not None and method.needs_model:
        source = index.manifest.model.name
    if source is None:
        return None
    if index is not None and settings.quantize is None:
        settings = settings.model_copy(update={"quantize": index.manifest.quantize})
    loaded = models.load_model(source, **settings.loading) if live is None else live.loaded
    if index is not None and method.needs_gradients and loaded.fingerprint != index.manifest.model.fingerprint:
        raise IndexMismatch(
            f"The index {index.folder} was made with another model: {index.manifest.model.name} "
            f"({index.manifest.model.fingerprint[:12]}), and {loaded.name} is {loaded.fingerprint[:12]}. "
            "Give the model it was made with as --model, or make another index."
        )
    return loaded


def _select(
    settings: AttributeSettings, method: Method, loaded: models.LoadedModel | None, index: indexes.Index | None
) -> models.Selection | None:
    if loaded is None or not (method.needs_gradients or method.splits_components):
        return None
    if index is not None and method.needs_gradients:
        return models.select_components(loaded.model, [part.name for part in index.manifest.components])
    return models.select_components(loaded.model, settings.components)


def _read_train(
    settings: AttributeSettings, loaded: models.LoadedModel | None, index: indexes.Index | None
) -> TokenizedData:
    if loaded is None:
        examples = index.examples() if index is not None else load_examples(settings.data, **settings.reading)
        return _without_tokens(examples, index.manifest.data.name if index is not None else str(settings.data))
    tokens = partial_folder(settings.out) / indexes.TOKENS
    if index is None:
        return indexes.read_data(settings, settings.data, loaded, tokens=tokens)
    manifest = index.manifest
    train = tokenize_source(
        index.examples(),
        loaded.tokenizer,
        max_length=manifest.max_length,
        name=manifest.data.name,
        chat=manifest.chat,
        folder=tokens,
        kept=index.folder / indexes.TOKENS,
        fingerprint=manifest.data.fingerprint,
        workers=indexes.tokenising_processes(settings),
    )
    # The fingerprint of the whole is compared first; the stages, which decide, take a pass over all texts.
    same = train.fingerprint == manifest.data.fingerprint
    for stage in () if same else manifest.plan.stages:
        if indexes.fingerprint_rows(train, stage.start, stage.stop) != stage.fingerprint:
            raise IndexMismatch(
                f"The rows give other tokens or targets than when {index.folder} was made: the tokenizer is another, "
                "or the index is of a version that ignored some of their columns. Give the tokenizer it was made with "
                "as --tokenizer, or make another index."
            )
    return train


def _without_tokens(examples: Sequence[Example], name: str) -> TokenizedData:
    """Return examples without tokens, for methods that read text."""
    empty_ids, empty_mask = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool)
    count = len(examples)
    return TokenizedData(examples, [empty_ids] * count, [empty_mask] * count, np.zeros(count, dtype=bool), "", name)


def read_row_weights(data: TokenizedData, column: str) -> Float[np.ndarray, "row"]:
    """Return a column of the training data as numbers.

    Raises:
        DataError: A row has none there; the message names it.
    """
    found = np.zeros(len(data))
    for row, example in enumerate(data.examples):
        cell = example.extra.get(column)
        if isinstance(cell, bool) or not isinstance(cell, int | float) or not math.isfinite(cell):
            there = f"it is {cell!r}" if column in example.extra else f"its columns are {', '.join(example.columns)}"
            raise DataError(
                f"{data.name}, row {example.row} (id {example.id!r}): --weigh-by takes a finite number from `{column}` "
                f"of every row, and {there}. Give each row one, or name another column."
            )
        found[row] = cell
    return found


def gradients_fit(job: Job) -> bool:
    """Return whether the queries' whole gradients fit into memory; print so if they do not."""
    assert job.selection is not None
    size = 4 * len(job.queries) * job.selection.selected_parameters
    available = psutil.virtual_memory().available
    if broadcast_from_rank0(lambda: size <= EXACT_SHARE * available):
        return True
    announce(
        f"Whole gradients of {len(job.queries)} queries would take {format_bytes(size)} of {format_bytes(available)} "
        "free memory: they are compressed instead."
    )
    return False


def build_temporary_index(
    job: Job, name: str, model: Any, command: Sequence[str] | None = None, **launch: Any
) -> indexes.Index:
    """Build an index beside the run, which goes when the run is written; after a kill, the same command resumes it.

    Args:
        job: Whose training data, model and settings it is of.
        name: Of its folder.
        model: As the index records it.
        command: What a worker runs to come here, as for `run_pieces`.
        launch: Where to build it; not given: in this process.
    """
    settings = job.settings
    names = ("data", "components", "loss", "token_budget", "seed", "skip_bad")
    shared: dict[str, Any] = {name: getattr(settings, name) for name in names} | {"chat": bool(settings.chat)} | launch
    made = IndexSettings(model=model, out=partial_folder(settings.out) / name, **shared)
    assert job.loaded is not None
    assert job.selection is not None
    inputs = indexes.Inputs(job.loaded, job.train, job.selection)
    try:
        return indexes.build_index(made, inputs, command)
    except IndexMismatch:
        # What a run with other settings left when it was killed.
        return indexes.build_index(made.model_copy(update={"overwrite": True}), inputs, command)
