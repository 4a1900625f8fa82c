"""`vestige audit`: evidence for every example of what a model has memorized, judged where the truth is known."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from vestige import runs
from vestige.data import record_line
from vestige.jobs import follow, is_follower, is_worker
from vestige.measures._attack import share
from vestige.measures._benchmark import Benchmark, describe_contamination, measure_benchmark
from vestige.measures._canaries import bound_epsilon, measure_canaries
from vestige.measures._conclusion import FLAGGED, conclude_audit
from vestige.measures._evidence import Evidence, Known, as_span, columns_of, compare_sets, find_truths, gather, judge
from vestige.measures._figures import Drawn, draw_files
from vestige.measures._job import AuditJob
from vestige.measures._token_evidence import TokenEvidence, measure_tokens
from vestige.progress import announce, format_seconds
from vestige.settings import AuditSettings, with_settings
from vestige.storage import remove_partial
from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes

TRIGGER = 0.05
"""Share of the first median loss below which a checkpoint is the one to predict from (Dentan et al. 2024)."""


@with_settings(AuditSettings)
def audit(settings: AuditSettings) -> runs.Audit:
    """Measure for every example how far a model has memorized it, and how far the evidence can be trusted.

    Interrupted at any moment, the same call continues and leaves the same evidence. A measure that cannot be computed
    is null, with its reason in `run.json`.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
        PieceFailed: Pieces failed every time they were tried; all others are done.
    """
    started = time.perf_counter()
    runs.check_target(settings.out, overwrite=settings.overwrite or is_worker() or is_follower())
    if is_follower():
        follow(settings.out / runs.RECORD_FILE, lambda: _measure(AuditJob(settings)))
        return runs.Audit.open(settings.out)
    job = AuditJob(settings)
    if not is_worker():
        _announce(job)
    evidence, canaries, (tokens, against), (contamination, items) = _measure(job)
    known = find_truths(evidence)
    rows, notes = judge(evidence, known)
    for name, (count, reason) in evidence.missing_reasons().items():
        if count == len(job.data):
            announce(f"{name} cannot be computed: {reason}.")
    usage, reasons = compare_sets(evidence, known)
    epsilon = bound_epsilon(canaries)
    notes += [*reasons, *_describe_usage(usage), *_describe_epsilon(epsilon, job.main.number), *_summarise(evidence)]
    notes += [] if contamination is None else describe_contamination(contamination)
    findings, flagged = conclude_audit(evidence, known, rows)
    record = _make_record(
        evidence,
        known,
        judgement=rows,
        canaries=canaries,
        epsilon=epsilon,
        usage=usage,
        tokens_against=against,
        contamination=contamination,
        findings=findings,
        notes=notes,
        seconds=time.perf_counter() - started,
    )
    files = {"tokens": tokens, "contamination": items, FLAGGED: _list_rows(job, flagged) if flagged else None}
    _write(evidence, known, record, {name: content for name, content in files.items() if content is not None})
    remove_partial(settings.out)
    announce(f"Audit of {len(job.data):,} examples in {format_seconds(record.seconds)}: {settings.out}")
    return runs.Audit.open(settings.out)


def _write(
    evidence: Evidence, known: list[Known], record: runs.AuditRecord, more: Mapping[str, pa.Table | bytes]
) -> None:
    """Write the run: the record, the evidence, the examples, the figures and `more` files."""
    job, settings = evidence.job, evidence.job.settings
    tables = [table for number in range(len(job.subjects)) for table in _make_tables(evidence, number)]
    figures = draw_files(Drawn(record, [each.name for each in job.measures], evidence.values, known, job.own))
    examples = _make_examples(job)
    runs.write_audit(settings.out, record, tables, examples, figures, overwrite=settings.overwrite, more=more)


def _list_rows(job: AuditJob, flagged: Mapping[int, str]) -> bytes:
    """Return rows as lines of JSON that every list of rows, and every set of queries, may be given as."""
    examples = [(job.data.examples[row], why) for row, why in sorted(flagged.items())]
    return b"".join(record_line(each, {"id": each.id, "rule": why, **each.columns}) for each, why in examples)


def _measure(job: AuditJob) -> tuple[Evidence, list[runs.CanaryRecord], TokenEvidence, Benchmark]:
    """Do everything that is done in pieces."""
    evidence = gather(job)
    return evidence, measure_canaries(job), measure_tokens(evidence), measure_benchmark(job)


def _announce(job: AuditJob) -> None:
    own, held = job.count, len(job.data) - job.count
    models = f"{len(job.subjects)} checkpoints" if len(job.subjects) > 1 else "one model"
    announce(f"Audit of {own:,} examples{f' and {held:,} held out' if held else ''} under {models}.")
    if job.choices.known.any():
        announce(f"Multiple choice: {int(job.choices.known.sum()):,} examples, {len(job.class_names)} classes.")


def _describe_usage(usage: runs.UsageRecord | None) -> list[str]:
    """Return in words whether the data as a whole were trained on."""
    if usage is None:
        return []
    value, low, high = usage.effect
    other = "its twin" if usage.paired else "a held-out one"
    shown = "" if value is None or low is None or high is None else f" {value:.3f} [{low:.3f}, {high:.3f}]"
    return [
        f"Usage of the data as a whole: chance{shown} that an example scores above {other} by {len(usage.measures)} "
        f"measures together, p = {usage.p_value:.2g} (one-sided, {usage.data:,} against {usage.holdout:,}). It speaks "
        "for training on the data only if nothing else sets the two apart: look at the blind baseline."
    ]


def _describe_epsilon(bounds: list[runs.EpsilonRecord], checkpoint: int) -> list[str]:
    """Return the bounds on epsilon under the model in words."""
    return [
        f"Epsilon of the training is at least {each.epsilon:.2f} by {each.secrets} secrets"
        f"{'' if each.copies is None else f' planted {each.copies} times each'}, at {each.confidence:.0%} confidence "
        "(delta 0, all copies of a secret together), if each was drawn at random from its alternatives."
        for each in bounds
        if each.checkpoint == checkpoint
    ]


def _summarise(evidence: Evidence) -> list[str]:
    """Return what measures say of the data as a whole."""
    own, found = evidence.job.own, evidence.last.measures
    return [
        sentence
        for each in evidence.job.measures
        if each.summary is not None
        for sentence in each.summary(
            {name: found[name][own] for name in columns_of(evidence.job, each, found)}, evidence.job.settings
        )
    ]


def _make_tables(evidence: Evidence, number: int) -> list[pa.Table]:
    """Return the evidence under one subject: measures without a layer, then layer by layer."""
    job, found = evidence.job, evidence.subjects[number]
    ids, rows = [example.id for example in job.data.examples], range(len(job.data))
    columns = {None: found.measures, **found.layers}
    return [
        runs.evidence_table(ids, each, checkpoint=job.subjects[number].number, layer=layer, rows=rows)
        for layer, each in columns.items()
    ]


def _make_examples(job: AuditJob) -> pa.Table:
    examples, names = job.data.examples, job.class_names
    flags = [None] * len(examples) if job.flagged is None else job.flagged
    columns = {
        "row": (range(len(examples)), pa.int64()),
        "example_id": ([example.id for example in examples], pa.string()),
        "part": (["holdout" if held else "data" for held in job.held_out], pa.string()),
        "source": ([example.source for example in examples], pa.string()),
        "label": ([example.label for example in examples], pa.string()),
        "class": ([None if code < 0 else names[code] for code in job.classes], pa.string()),
        "flag": (flags, pa.bool_()),
        "targets": (job.data.target_counts, pa.int64()),
        "text": (job.texts, pa.string()),
    }
    return pa.table({name: pa.array(values, kind) for name, (values, kind) in columns.items()})


def _make_record(evidence: Evidence, known: list[Known], **found: Any) -> runs.AuditRecord:
    """Return the record of what the audit was given and measured; `found` are the fields that say what it shows."""
    job, settings = evidence.job, evidence.job.settings
    subjects = [_make_subject(evidence, number) for number in range(len(job.subjects))]
    own, held = job.count, len(job.data) - job.count
    recorded, data = settings.record(), job.data
    holdout = runs.DataRecord(name=str(settings.holdout), fingerprint=data.fingerprint, examples=held)
    return runs.AuditRecord(
        vestige=version("vestige"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=settings.command_line("audit"),
        config=recorded,
        versions=runs.environment(),
        model=runs.ModelRecord(name=job.main.name, fingerprint=job.main.fingerprint, parameters=job.parameters),
        data=runs.DataRecord(name=data.name, fingerprint=job.own_fingerprint, examples=own),
        holdout=holdout if held else None,
        reference=None if settings.reference_model is None else recorded["reference_model"],
        bank=_describe_bank(evidence, known),
        checkpoints=subjects,
        trigger=_find_trigger(subjects),
        layers=[_describe_layer(evidence.last.of_layers.get(layer, {}), layer) for layer in job.layers],
        main_layer=evidence.main_layer,
        classes=list(job.class_names),
        measures=_describe_measures(evidence),
        extraction=_count_extracted(evidence),
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_memory_bytes=peak_gpu_memory_bytes(),
        **found,
    )


def _make_subject(evidence: Evidence, number: int) -> runs.SubjectRecord:
    subject, found, own = evidence.job.subjects[number], evidence.subjects[number], evidence.job.own
    answers = found.measures.get("answer_loss", np.full(len(own), np.nan))
    losses = answers if not np.isnan(answers[own]).all() else found.measures["loss"]
    known = losses[own & ~np.isnan(losses)]
    return runs.SubjectRecord(
        number=subject.number,
        name=subject.name,
        steps=subject.steps,
        fingerprint=subject.fingerprint,
        median_loss=float(np.median(known)) if len(known) else None,
        norms=found.norms,
    )


def _find_trigger(subjects: list[runs.SubjectRecord]) -> int | None:
    """Return the first checkpoint at which half of the examples are learnt: the median loss is 5 % of the first."""
    first = subjects[0].median_loss
    if len(subjects) < 2 or not first:
        return None
    below = (each for each in subjects if each.median_loss is not None and each.median_loss < TRIGGER * first)
    return next((each.number for each in below), None)


def _describe_layer(values: dict[str, list[float]], layer: int) -> runs.LayerRecord:
    directions, information = values.get("layer:directions"), values.get("layer:smi")
    return runs.LayerRecord(
        layer=layer,
        directions=None if directions is None else int(directions[0]),
        converged=None if directions is None else bool(directions[1]),
        smi=None if information is None else (information[0], information[1], information[2]),
    )


def _describe_bank(evidence: Evidence, known: list[Known]) -> runs.BankRecord | None:
    bank, settings = evidence.job.bank, evidence.job.settings
    if bank is None:
        return None
    return runs.BankRecord(
        name=str(settings.bank),
        id=bank.id,
        models=len(bank),
        value=settings.bank_value,
        subset=settings.bank_subset,
        memorized_at=settings.memorized_at,
        memorized=next((int(each.found[each.judged].sum()) for each in known if each.name == "memorized"), 0),
    )


def _describe_measures(evidence: Evidence) -> dict[str, runs.MeasureRecord]:
    """Describe every measure that was requested, and why examples lack it."""
    missing, found, details = evidence.missing_reasons(), {}, {}
    for each in evidence.job.measures:
        count, reason = missing.get(each.name, (0, None))
        layered = each.stage == "states" and each.of == "example"
        found[each.name] = runs.MeasureRecord(
            meaning=each.meaning, high=each.says, layered=layered, missing=count, reason=reason
        )
        for name in columns_of(evidence.job, each, evidence.last.measures) if each.detail else []:
            words = each.detail.format(name.removeprefix(f"{each.name}_"))
            details[name] = runs.MeasureRecord(meaning=f"{each.meaning}, {words}", high=each.says)
    return found | {name: record for name, record in details.items() if name not in found}


def _count_extracted(evidence: Evidence) -> dict[int, runs.Span]:
    """Return the share of the data's examples that are given back word for word, by prefix length."""
    own, found = evidence.job.own, {}
    prefixes = evidence.job.settings.prefixes
    for prefix in prefixes:
        name = f"extraction_{prefix}" if len(prefixes) > 1 else "extraction"
        column = evidence.last.measures.get(name)
        if column is not None:
            known = column[own & ~np.isnan(column)]
            found[prefix] = as_span(share(int((known == 1).sum()), len(known)))
    return found
