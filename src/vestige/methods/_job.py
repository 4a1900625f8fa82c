"""From settings to a job: the model, the training data and the queries, tokenised alike."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vestige.data import (
    Example,
    TokenizedData,
    ask,
    load_examples,
    load_queries,
    require_answers,
    tokenize,
    tokenize_stored,
)
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.folders import partial_folder
from vestige.indexes import (
    TOKENS,
    Index,
    Inputs,
    batch_tokens,
    build_index,
    fingerprint_rows,
    read_data,
    require_independence,
    tokenising_processes,
    tokens_at_most,
)
from vestige.launch import worker_command
from vestige.methods._checkpoints import Checkpoint, find_checkpoints, refuse_checkpoints, settings_of_last
from vestige.methods._plan import unscorable
from vestige.methods._protocol import Job, Method
from vestige.methods._stores import gradients_fit
from vestige.models import LoadedModel, Selection, generate_answers, load_model, select_components
from vestige.progress import announce
from vestige.settings import AttributeSettings, IndexSettings, LaunchSettings


@dataclass(frozen=True)
class Question:
    """The queries with their answers, which of these the model gave, and how prompts were put."""

    examples: list[Example]
    generated: list[bool]
    asked: str = ""


@contextmanager
def open_job(settings: AttributeSettings, method: Method) -> Iterator[tuple[Job, list[bool]]]:
    """Open the job, with whether each query's answer was generated; a temporary index lives as long as the context."""
    checkpoints: tuple[Checkpoint, ...] = ()
    if method.weighting is not None:
        checkpoints = find_checkpoints(settings, method.weighting)
        settings = settings_of_last(settings, checkpoints)
    else:
        refuse_checkpoints(settings)
    index = Index.open(settings.index) if settings.index is not None else None
    typed = settings.chat
    if index is not None:
        _require_recomputable(index, method)
        settings = _settings_of_index(settings, index)
    settings = settings.model_copy(update={"chat": bool(settings.chat)})
    given = load_queries(settings.queries, on_bad_text=settings.on_bad_text)
    loaded = _load(settings, method, index)
    selection = _selection(settings, method, loaded, index)
    train = _training_data(settings, loaded, index)
    question = _answered(settings, given, loaded, train, typed)
    queries = _tokenised_queries(settings, question, loaded)
    job = Job(train, queries, settings, loaded, selection, index, checkpoints, asked=question.asked)
    if index is None and method.needs_gradients and not _is_exact(job, method):
        if settings.query_rank is not None:
            raise SpecError(
                f"--query-rank shortens whole gradients, and {method.name} compresses these queries'. Drop "
                "--query-rank, or take fewer queries or a method on whole gradients: grad-dot, grad-cos, ekfac."
            )
        yield replace(job, index=_temporary_index(job)), question.generated
    else:
        yield replace(job, left_out=unscorable(job)) if settings.skip_bad and loaded else job, question.generated


def _require_recomputable(index: Index, method: Method) -> None:
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


def _settings_of_index(settings: AttributeSettings, index: Index) -> AttributeSettings:
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


def _load(settings: AttributeSettings, method: Method, index: Index | None) -> LoadedModel | None:
    source: Any = settings.model
    if source is None and index is not None and method.needs_model:
        source = index.manifest.model.name
    if source is None:
        return None
    loaded = load_model(source, tokenizer=settings.tokenizer, precision=settings.precision, device=settings.device)
    if index is not None and method.needs_gradients and loaded.fingerprint != index.manifest.model.fingerprint:
        raise IndexMismatch(
            f"The index {index.folder} was made with another model: {index.manifest.model.name} "
            f"({index.manifest.model.fingerprint[:12]}), and {loaded.name} is {loaded.fingerprint[:12]}. "
            "Give the model it was made with as --model, or make another index."
        )
    return loaded


def _answered(
    settings: AttributeSettings,
    queries: list[Example],
    loaded: LoadedModel | None,
    train: TokenizedData,
    chat: bool | None,
) -> Question:
    """Put the queries as the data are, or as `chat` says; let the model continue those without an answer."""
    asked, how = queries, ""
    if loaded is not None:
        asked, how = ask(queries, train.examples, chat=chat, tokenizer=loaded.tokenizer)
    asked = [_without_answer(query) for query in asked] if settings.answer == "generate" else asked
    waiting = [query.lacks_answer for query in asked]
    if settings.answer == "given" and any(waiting):
        missing = asked[waiting.index(True)].id
        raise DataError(
            f'Query "{missing}" has no answer, and --answer given was requested. Add a `completion`, or drop --answer.'
        )
    if not any(waiting) or loaded is None:
        return Question(asked, [False] * len(asked), how)
    answered = generate_answers(loaded, asked, max_new_tokens=settings.max_new_tokens, chat=bool(settings.chat))
    return Question(answered, waiting, how)


def _without_answer(query: Example) -> Example:
    if query.messages and query.messages[-1].role == "assistant":
        return replace(query, messages=query.messages[:-1])
    return replace(query, completion=None) if query.prompt is not None else query


def _tokenised_queries(settings: AttributeSettings, question: Question, loaded: LoadedModel | None) -> TokenizedData:
    name = settings.queries if isinstance(settings.queries, str) and Path(settings.queries).exists() else "queries"
    if loaded is None:
        return _text_only(question.examples, str(name))
    queries = tokenize(
        question.examples,
        loaded.tokenizer,
        max_length=tokens_at_most(settings, loaded),
        name=str(name),
        chat=bool(settings.chat),
        vocabulary=loaded.vocabulary,
    )
    require_answers(queries, question.generated, loaded.tokenizer)
    require_independence(loaded, queries, batch_tokens(settings, loaded))
    return queries


def _selection(
    settings: AttributeSettings, method: Method, loaded: LoadedModel | None, index: Index | None
) -> Selection | None:
    if loaded is None or not (method.needs_gradients or method.splits_components):
        return None
    if index is not None and method.needs_gradients:
        return select_components(loaded.model, [part.name for part in index.manifest.components])
    return select_components(loaded.model, settings.components)


def _training_data(settings: AttributeSettings, loaded: LoadedModel | None, index: Index | None) -> TokenizedData:
    if loaded is None:
        examples = (
            index.examples()
            if index is not None
            else load_examples(settings.data, limit=settings.limit, on_bad_text=settings.on_bad_text)
        )
        return _text_only(examples, index.manifest.data.name if index is not None else str(settings.data))
    tokens = partial_folder(settings.out) / TOKENS
    if index is None:
        return read_data(settings, settings.data, loaded, tokens=tokens)
    manifest = index.manifest
    train = tokenize_stored(
        index.examples(),
        manifest.data.fingerprint,
        loaded.tokenizer,
        max_length=manifest.max_length,
        name=manifest.data.name,
        chat=manifest.chat,
        kept=index.folder / TOKENS,
        folder=tokens,
        workers=tokenising_processes(settings),
    )
    # The fingerprint of the whole is compared first; the stages, which decide, take a pass over all texts.
    same = train.fingerprint == manifest.data.fingerprint
    for stage in () if same else manifest.plan.stages:
        if fingerprint_rows(train, stage.start, stage.stop) != stage.fingerprint:
            raise IndexMismatch(
                f"The rows give other tokens or targets than when {index.folder} was made: the tokenizer is another, "
                "or the index is of a version that ignored some of their columns. Give the tokenizer it was made with "
                "as --tokenizer, or make another index."
            )
    return train


def _text_only(examples: Sequence[Example], name: str) -> TokenizedData:
    """Return examples without tokens, for methods that read text."""
    empty_ids, empty_mask = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool)
    count = len(examples)
    return TokenizedData(examples, [empty_ids] * count, [empty_mask] * count, np.zeros(count, dtype=bool), "", name)


def _is_exact(job: Job, method: Method) -> bool:
    """Return whether the method works without an index and the queries' whole gradients fit into memory."""
    if method.needs_index:
        return False
    # A method that needs them refuses by itself what does not fit.
    return method.needs_exact or gradients_fit(job)


def _temporary_index(job: Job) -> Index:
    """Build an index beside the run, which goes when the run is written; after a kill, the same command resumes it."""
    settings, folder = job.settings, partial_folder(job.settings.out) / "index"
    announce("Making a temporary index. To ask again without this pass, keep one: vestige index.")
    names = ("components", "loss", "chat", "token_budget", "seed", "skip_bad")
    shared = {name: getattr(settings, name) for name in names}
    # Shares build it together: all of them need all of it.
    shared |= {name: getattr(settings, name) for name in LaunchSettings.model_fields if name != "shard"}
    made = IndexSettings(model=settings.model, data=settings.data, out=folder, **shared)
    command = worker_command(settings, "attribute")
    assert job.loaded is not None
    assert job.selection is not None
    inputs = Inputs(job.loaded, job.train, job.selection)
    try:
        return build_index(made, inputs, command)
    except IndexMismatch:
        # What a run with other settings left when it was killed.
        return build_index(made.model_copy(update={"overwrite": True}), inputs, command)
