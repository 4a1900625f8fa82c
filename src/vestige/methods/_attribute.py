"""`vestige attribute`: from a question to the training examples behind its answer, as a run on disk."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from vestige.data import Batch
from vestige.distributed import FSDP, broadcast_from_rank0
from vestige.errors import SpecError
from vestige.gradients import token_losses
from vestige.indexes import batch_tokens
from vestige.launch import follow, is_follower, is_worker, profile, write_profile
from vestige.methods._gradient_method import GradientMethod, Prepared
from vestige.methods._job import compute_losses, open_job, read_batches
from vestige.methods._plan import compute_self_scores, summarise
from vestige.methods._protocol import METHODS, Job, Method, get_method
from vestige.methods._randomise import run_checks
from vestige.methods._sweep import Member, sweep
from vestige.methods._trust import describe_memorized, find_memorized, run_free_checks
from vestige.models import Selection, parameter_view
from vestige.progress import announce, progress
from vestige.runs import (
    RECORD_FILE,
    Check,
    CheckpointRecord,
    ComponentScores,
    CoverageRecord,
    RunRecord,
    RunTables,
    Scores,
    SkippedRecord,
    TokenScores,
    check_target,
    describe_model,
    make_run_record,
    write_run,
)
from vestige.settings import AttributeSettings, with_settings
from vestige.storage import partial_folder, remove_partial

Pairs = Sequence[tuple[int, int]]
"""(query, row) of every listed score."""


@with_settings(AttributeSettings)
def attribute(settings: AttributeSettings) -> Scores:
    """Rank the training examples behind an answer, with what the scores mean and how far to trust them.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
    """
    started = time.perf_counter()
    # A worker never gets --overwrite: the process that a person started was, and writes the run.
    broadcast_from_rank0(
        lambda: check_target(settings.out, overwrite=settings.overwrite or is_worker() or is_follower())
    )
    method = _find_method(settings)
    if is_follower():
        follow(settings.out / RECORD_FILE, lambda: _score_elsewhere(settings, method))
        return Scores.open(settings.out)
    with profile(settings.profile) as measured, open_job(settings, method) as job:
        members, own_scores, stability = _score(job, method)
        main = members[0]
        losses = _query_losses(job)
        if losses is not None and (certain := find_memorized(job.queries, losses, settings.loss)):
            announce(describe_memorized(certain, len(job.queries)))
        tables = _make_tables(main, losses)._replace(self_scores=own_scores)
        if settings.tokens:
            tables = tables._replace(tokens=split_over_tokens(main.job, main.method, _pairs(main)))
        checks = run_checks(main.job, main.method, main.summary.ranked, losses) if settings.trust else []
        record = _make_record(settings, main, [*checks, *stability], time.perf_counter() - started)
        others = [_write_beside(settings, member, losses, started) for member in members[1:]]

    def add(run: Path) -> None:
        for folder in others:
            folder.rename(run / folder.name)
        write_profile(measured, run)

    def write() -> None:
        write_run(settings.out, record, tables, overwrite=settings.overwrite, add=add)
        remove_partial(settings.out)

    broadcast_from_rank0(write)
    return Scores.open(settings.out)


def _score(job: Job, method: Method) -> tuple[list[Member], np.ndarray | None, list[Check]]:
    """Do everything that is done in pieces, which several processes share.

    Returns:
        The scores, at each damping, the run's own first; self-influence; and the check that compares the dampings.
    """
    if job.settings.swept:
        members, check = sweep(job, cast(GradientMethod, method))
        checks = [check]
    else:
        members, checks = [Member(job, method, summarise(job, method))], []
    main = members[0]
    own_scores = compute_self_scores(main.job, main.method) if job.settings.self_influence else None
    return members, own_scores, checks


def _score_elsewhere(settings: AttributeSettings, method: Method) -> None:
    """Compute pieces for the process that writes the run."""
    with open_job(settings, method) as job:
        _score(job, method)


def _pairs(member: Member) -> list[tuple[int, int]]:
    return [(entry.query, entry.row) for entry in member.summary.ranked]


def _make_tables(member: Member, losses: list[float] | None) -> RunTables:
    job = member.job
    return RunTables(
        train=job.train,
        queries=job.queries,
        ranked=member.summary.ranked,
        generated=job.generated,
        losses=losses,
        tokenizer=job.loaded.tokenizer if job.loaded is not None else None,
        components=split_over_components(job, member.method, _pairs(member)),
        dense=member.summary.dense,
    )


def _write_beside(settings: AttributeSettings, member: Member, losses: list[float] | None, started: float) -> Path:
    """Write the run of another damping beside the main one, until that is written; record how to make it alone.

    Of the checks it has those that need no model; tokens and self-influence are the main run's alone.
    """
    job, method, summary = member
    damping = job.settings.damping
    name = f"damping-{damping!r}".removesuffix(".0")
    own = {"damping": damping, "out": settings.out / name, "tokens": False, "self_influence": False}
    checks = run_free_checks(job, method, summary.ranked, losses=losses) if settings.trust else []
    tables = _make_tables(member, losses)
    record = _make_record(settings.model_copy(update=own), member, checks, time.perf_counter() - started)
    return broadcast_from_rank0(partial(write_run, partial_folder(settings.out) / name, record, tables, overwrite=True))


def _make_record(settings: AttributeSettings, member: Member, checks: list[Check], seconds: float) -> RunRecord:
    job, method, summary = member
    checkpoints = [
        CheckpointRecord(name=each.name, weight=each.weight, index=str(each.index.folder) if each.index else None)
        for each in job.checkpoints
    ]
    return make_run_record(
        command=settings.command_line("attribute"),
        config=settings.record(),
        method=method.name,
        meaning=method.meaning,
        against_hubs=method.against_hubs,
        data=job.train,
        queries=job.queries,
        summary=summary,
        seconds=seconds,
        model=describe_model(job.loaded) if job.loaded is not None else None,
        coverage=_describe_coverage(job.selection) if job.selection is not None else None,
        components=[part.name for part in job.components] if method.splits_components else [],
        checks=checks,
        asked=job.asked,
        left_out=[job.train.examples[row].id for row in job.skipped],
        checkpoints=checkpoints,
    )


def _describe_coverage(selection: Selection) -> CoverageRecord:
    return CoverageRecord(
        selected=selection.selected_parameters,
        total=selection.total_parameters,
        fraction=selection.fraction,
        skipped=[
            SkippedRecord(name=row.name, parameters=row.parameters, reason=row.reason)
            for row in selection.coverage
            if not row.selected
        ],
    )


def _find_method(settings: AttributeSettings) -> Method:
    """Return the method; refuse before any work what it cannot do."""
    method = get_method(settings.method, **settings.options)
    if method.command != Method.command:
        raise SpecError(
            f"The method {settings.method} has a command of its own, with settings that `vestige attribute` lacks. "
            f"Type: vestige {method.command} --model MODEL --data FILE --queries FILE --out FOLDER"
        )
    if settings.device == FSDP and (not method.works_sharded or settings.tokens):
        able = ", ".join(each.name for each in METHODS if each.works_sharded)
        what = "--tokens" if settings.tokens else f"--method {settings.method}"
        raise SpecError(
            f"{what} differentiates the model in a way that FSDP2 does not know. With --device {FSDP} there are: "
            f"{able}, without --tokens. Or spread the layers over the GPUs of one process: "
            "--device balanced."
        )
    if settings.swept and not method.sweeps_damping:
        able = ", ".join(each.name for each in METHODS if each.sweeps_damping)
        raise SpecError(
            f"Several dampings were given, and {method.name} cannot score them in one pass: it has no damping, or "
            f"needs new measurements for each. Give one --damping, or type --method with one of: {able}."
        )
    _require_outputs(settings, method)
    without_model = settings.index is None and settings.model is None and settings.checkpoints is None
    if method.needs_model and without_model:
        raise SpecError(f"The method {settings.method} runs the model. Type --model MODEL, or --index FOLDER.")
    return method


def _require_outputs(settings: AttributeSettings, method: Method) -> None:
    """Raise unless the method can give what was requested beside its scores."""
    if settings.tokens and method.weighting is not None:
        raise SpecError(
            f"--tokens splits the score of one model, and {settings.method} adds up several. Drop --tokens, or ask one "
            "checkpoint: --model CHECKPOINT --method grad-dot or grad-cos."
        )
    if settings.tokens and not method.splits_tokens:
        raise SpecError(
            f"--tokens splits a gradient over tokens, and {settings.method} uses none. Drop --tokens, or type "
            "--method influence, grad-dot or grad-cos."
        )
    if settings.engine != "local" and not method.needs_gradients:
        raise SpecError(
            f"--engine {settings.engine} submits passes over gradients, and {settings.method} uses none: it scores in "
            "this process. Drop --engine and what belongs to it."
        )
    if settings.query_rank is not None and not method.needs_gradients:
        raise SpecError(
            f"--query-rank shortens the queries' gradients, and {settings.method} uses none. Drop --query-rank, or "
            "type --method grad-dot, grad-cos or ekfac."
        )
    if settings.self_influence and not method.scores_itself:
        raise SpecError(
            f"Self-influence is defined for gradient methods, and {settings.method} is none. Type --method influence."
        )


def _query_losses(job: Job) -> list[float] | None:
    """Return the loss of every query, None without a model."""
    if job.loaded is None:
        return None
    budget = batch_tokens(job.settings, job.loaded)
    return compute_losses(job.loaded.model, job.queries, job.settings.loss, budget).tolist()


def split_over_components(job: Job, method: Method, pairs: Pairs) -> list[ComponentScores] | None:
    """Return the score of every pair, split over components; None for a method that has none."""
    if not method.splits_components:
        return None
    distinct = sorted(set(pairs))
    queries, rows = torch.tensor([pair[0] for pair in distinct]), torch.tensor([pair[1] for pair in distinct])
    block = method.components(job, queries, rows)
    scores = block.scores.double().cpu().numpy()
    return [ComponentScores(query, row, part) for (query, row), part in zip(distinct, scores, strict=True)]


def split_over_tokens(job: Job, method: Method, pairs: Pairs) -> list[TokenScores]:
    """Return the score of every pair, split over the tokens of the example: the effect of learning to predict each.

    An example's loss is a sum over its target tokens, so its gradient and every score that is linear in it are too.
    With v the vector whose inner product with the gradient is the score, the share of token t is `<v, grad loss_t>`:
    the derivative of that token's loss along v. Forward-mode differentiation gives it for all tokens at once.
    """
    prepared, distinct = cast(GradientMethod, method).prepare(job), sorted(set(pairs))
    found: list[TokenScores] = []
    with progress(len(distinct), "Token scores", unit="pairs") as bar:
        for query in range(len(job.queries)):
            rows = [row for number, row in distinct if number == query]
            found += _split_query(job, prepared, query, rows)
            bar.advance(len(rows))
    return found


def _split_query(job: Job, prepared: Prepared, query: int, rows: Sequence[int]) -> Iterator[TokenScores]:
    """Yield the scores of a query for some rows, split over tokens."""
    loaded, data = job.model_for(job.settings.method), job.train
    model = loaded.model
    device = next(model.parameters()).device
    tangents: dict[str, Tensor] = {}
    for component, matrix in zip(job.components, prepared.direction(query), strict=True):
        parameter = model.get_parameter(component.parameter)
        tangent = tangents.setdefault(component.parameter, torch.zeros_like(parameter))
        parameter_view(model, component, tangent).copy_(matrix.to(device))
    norms = dict(zip(rows, prepared.row_norms(rows).tolist(), strict=True))
    wanted = np.asarray(rows, dtype=np.int64)
    for positions, batch in read_batches(model, data, batch_tokens(job.settings, loaded), wanted):
        derivatives = _derivatives(model, tangents, batch).double().cpu().numpy()
        for row, values in zip(wanted[positions].tolist(), derivatives, strict=True):
            count = max(int(data.target_counts[row]), 1) if job.settings.loss == "mean" else 1
            yield TokenScores(query, row, values[: len(data.input_ids[row])] / count / (norms[row] or 1.0))


def _derivatives(model: nn.Module, tangents: dict[str, Tensor], batch: Batch) -> Float[Tensor, "example token"]:
    """Compute the derivative of every token's loss along the tangents."""
    parameters = dict(model.named_parameters())
    primals = {name: parameters[name].detach() for name in tangents}

    def losses(values: dict[str, Tensor]) -> Tensor:
        return token_losses(lambda **inputs: functional_call(model, values, (), inputs), batch)

    # Only the composed attention has a forward-mode derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _UntrainedRows():
        return torch.func.jvp(losses, (primals,), (tangents,))[1]


class _UntrainedRows(TorchFunctionMode):
    """The row `padding_idx` of an embedding is never trained, so its look-up has no derivative either."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not torch.nn.functional.embedding:
            return output
        ids, weight, *rest = args
        padding = rest[0] if rest else (kwargs or {}).get("padding_idx")
        if padding is None:
            return output
        untrained = unpack_dual(weight).primal[padding]
        return torch.where((ids == padding)[..., None], untrained, output)
