"""From settings to a job: the model, the training data and the queries, tokenised alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
from jaxtyping import Float, Int

from vestige import gradients, indexes, models
from vestige.data import (
    Batch,
    Example,
    TokenizedData,
    ask,
    find_focus,
    focus_queries,
    load_examples,
    load_queries,
    locate_spans,
    make_batch,
    plan_batches,
    require_answers,
    tokenize,
    tokenize_source,
)
from vestige.distributed import broadcast_from_rank0, is_rank0
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.jobs import step_done, worker_command
from vestige.lazy import torch
from vestige.methods._checkpoints import Checkpoint, find_checkpoints, refuse_checkpoints, settings_of_last
from vestige.methods._plan import find_unscorable
from vestige.methods._protocol import Job, Method, Vectors
from vestige.progress import announce, format_bytes
from vestige.settings import AttributeSettings, IndexSettings, LaunchSettings, UntracSettings
from vestige.storage import partial_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

EXACT_SHARE = 0.4
"""Share of the free memory that the queries' whole gradients may take; beyond it they are compressed."""


OnAnswers = Callable[[TokenizedData, Sequence[bool]], None]
"""Takes the queries, and whether each answer is the model's own."""
OnAnswer = Callable[[Sequence[Example], int], None]
"""Takes the queries as far as they have answers, and the number of the one whose answer has just ended."""


class Live(NamedTuple):
    """A loaded model that is asked again and again."""

    loaded: models.LoadedModel
    """The model of the index, as `load_model` returns it."""
    on_text: Callable[[str], None]
    """Takes the answer so far after each of its tokens, of a single question."""


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
    checkpoints: tuple[Checkpoint, ...] = ()
    typed = settings.chat
    settings = method.adopt(settings)
    if method.weighting is not None:
        checkpoints = find_checkpoints(settings, method.weighting)
        settings = settings_of_last(settings, checkpoints)
    else:
        refuse_checkpoints(settings)
    index = indexes.Index.open(settings.index) if settings.index is not None else None
    if index is not None:
        _require_recomputable(index, method)
        settings = _settings_of_index(settings, index)
    settings = settings.model_copy(update={"chat": bool(settings.chat)})
    given = load_queries(settings.queries, focus="read", on_bad_text=settings.on_bad_text)
    method.require_focus(find_focus(given))
    loaded = _load(settings, method, index, live)
    selection = _select(settings, method, loaded, index)
    train = method.read_train(loaded) if loaded is not None else None
    if train is None:
        train = _read_train(settings, loaded, index)
    name = settings.queries if isinstance(settings.queries, str) and Path(settings.queries).exists() else "queries"
    if loaded is None:
        texts = [locate_spans(query, str(name)) for query in _choose_answers(given, settings.answer)]
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
    made_by_model = tuple(generated)
    job = Job(
        train,
        queries,
        settings,
        loaded,
        selection,
        index,
        checkpoints,
        asked=asked,
        generated=made_by_model,
        row_weights=None if settings.weigh_by is None else read_row_weights(train, settings.weigh_by),
    )
    # A method that works on whole gradients refuses by itself what does not fit.
    needs_none = index is not None or not method.needs_gradients or method.needs_exact
    if needs_none or (not method.needs_index and gradients_fit(job)):
        yield replace(job, left_out=find_unscorable(job)) if settings.skip_bad and loaded else job
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


def read_queries(
    settings: AttributeSettings | UntracSettings,
    loaded: models.LoadedModel,
    given: list[Example],
    train: Sequence[Example],
    *,
    chat: bool | None,
    name: Any,
    answer: str = "auto",
    on_answer: OnAnswer | None = None,
    on_text: Callable[[str], None] | None = None,
) -> tuple[TokenizedData, list[bool], str]:
    """Put the queries as the data are, or as `chat` says, let the model continue those without an answer, tokenise.

    Returns:
        The queries, whether each answer is the model's own, and how they were put where that is not as they were typed.

    Raises:
        DataError: A query has no answer, and `answer` is "given", or has nothing to explain.
    """
    put, how = ask(given, train, chat=chat, tokenizer=loaded.tokenizer)
    put = _choose_answers(put, answer)
    generated = [query.lacks_answer for query in put]
    if any(generated):
        answered = list(put)

        def show(number: int, query: Example) -> None:
            assert on_answer is not None
            answered[number] = query
            on_answer(answered, number)

        put = models.generate_answers(
            loaded,
            put,
            max_new_tokens=settings.max_new_tokens,
            chat=bool(settings.chat),
            on_answer=None if on_answer is None else show,
            on_text=on_text,
        )
    reading: dict[str, Any] = {
        "max_length": indexes.tokens_at_most(settings, loaded),
        "chat": bool(settings.chat),
        "vocabulary": loaded.vocabulary,
    }
    queries = tokenize(put, loaded.tokenizer, name=str(name), **reading)
    require_answers(queries, generated, loaded.tokenizer)
    chosen = focus_queries(queries, loaded.tokenizer, **reading) if find_focus(put) else queries
    return chosen, generated, how


def _choose_answers(queries: list[Example], answer: str) -> list[Example]:
    """Return the queries, without their answers where these are to be generated; refuse missing ones where given."""
    if answer == "generate":
        return [query.without_answer() for query in queries]
    missing = [query.id for query in queries if query.lacks_answer]
    if answer == "given" and missing:
        raise DataError(
            f'Query "{missing[0]}" has no answer, and --answer given was requested. Add a `completion`, or drop '
            "--answer."
        )
    return queries


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


def read_batches(
    model: nn.Module, data: TokenizedData, token_budget: int, rows: Int[np.ndarray, "row"]
) -> Iterator[tuple[Int[np.ndarray, "position"], Batch]]:
    """Yield (positions in `rows`, the batch of these rows on the model's device), longest rows first."""
    device = next(model.parameters()).device
    for positions in plan_batches(data.lengths[rows], token_budget, sharing=models.batch_sharing(model)):
        yield positions, make_batch(data, rows[positions]).to(device)


def compute_losses(
    model: nn.Module,
    data: TokenizedData,
    reduction: gradients.Reduction,
    token_budget: int,
    rows: Int[np.ndarray, "row"] | None = None,
) -> Float[np.ndarray, "row"]:
    """Measure the loss of each of the rows, of all if none are given, in nats, whatever they are batched with.

    Of a contrast it is the loss of the answer less that of the other one.
    """
    wanted = np.arange(len(data)) if rows is None else rows
    losses, objective = np.zeros(len(wanted)), gradients.CausalLoss(reduction)
    device, fitting = next(model.parameters()).device, gradients.FittingBatches(data.lengths)

    def run(rows: Int[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
        return objective.losses(model, make_batch(data, rows).to(device)).double().cpu().numpy()

    with torch.no_grad():
        for positions in plan_batches(data.lengths[wanted], token_budget, sharing=models.batch_sharing(model)):
            losses[positions] = np.concatenate(fitting.run(wanted[positions], run))
            step_done(len(positions))
    if data.contrast is not None:
        others = np.zeros(len(data))
        others[data.contrast.rows] = compute_losses(model, data.contrast.data, reduction, token_budget)
        losses -= others[wanted]
    return losses


def query_loss(model: nn.Module, data: TokenizedData, query: int, reduction: gradients.Reduction) -> Tensor:
    """Return the differentiable loss of one query; of a contrast, that of its answer less that of the other one."""
    batch = make_batch(data, np.array([query])).to(next(model.parameters()).device)
    loss = gradients.token_losses(model, batch).sum()
    loss = loss / max(int(data.target_counts[query]), 1) if reduction == "mean" else loss
    one = data.subset([query]).contrast
    return loss if one is None else loss - query_loss(model, one.data, 0, reduction)


def subtract_contrast(
    data: TokenizedData, measure: Callable[[TokenizedData], tuple[Vectors, Float[Tensor, "example"]]]
) -> tuple[Vectors, Float[Tensor, "example"]]:
    """Return gradients and losses of queries; of a contrast, those of its answer less those of the other one."""
    vectors, losses = measure(data)
    if data.contrast is not None:
        others, other_losses = measure(data.contrast.data)
        places = torch.from_numpy(data.contrast.rows)
        for vector, other in zip(vectors, others, strict=True):
            vector[places] -= other
        losses[places] -= other_losses
    return vectors, losses


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
