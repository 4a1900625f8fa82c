"""`vestige audit`: evidence for every example of what a model has memorized, judged where the truth is known."""

import time
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import pyarrow as pa

from vestige.launch import follow, is_follower, is_worker
from vestige.measures._assembled import Evidence, Seen, columns_of, gather, reasons
from vestige.measures._attack import share
from vestige.measures._canaries import measure_canaries
from vestige.measures._canary_figures import canary_figures
from vestige.measures._figures import figures
from vestige.measures._job import AuditJob, open_job
from vestige.measures._judge import Known, judge, span, truths
from vestige.progress import announce, format_seconds
from vestige.runs import (
    RECORD_FILE,
    Audit,
    AuditRecord,
    BankRecord,
    DataRecord,
    LayerRecord,
    MeasureRecord,
    ModelRecord,
    SubjectRecord,
    check_target,
    environment,
    evidence_table,
    write_audit,
)
from vestige.settings import AuditSettings, verb
from vestige.storage import remove_partial
from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes

TRIGGER = 0.05
"""Share of the first median loss below which a checkpoint is the one to predict from (Dentan et al. 2024)."""


@verb(AuditSettings)
def audit(settings: AuditSettings) -> Audit:
    """Measure for every example how far a model has memorized it, and how far the evidence can be trusted.

    Interrupted at any moment, the same call continues and leaves the same evidence. A measure that cannot be computed
    is null, with its reason in `run.json`.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
        PieceFailed: Pieces failed every time they were tried; all others are done.
    """
    started = time.perf_counter()
    check_target(settings.out, overwrite=settings.overwrite or is_worker() or is_follower())
    if is_follower():
        follow(settings.out / RECORD_FILE, lambda: _help(open_job(settings)))
        return Audit.open(settings.out)
    job = open_job(settings)
    if not is_worker():
        _announce(job)
    evidence = gather(job)
    canaries = measure_canaries(job)
    known = truths(evidence)
    rows, notes = judge(evidence, known)
    lacking = reasons(evidence)
    for name, (count, reason) in lacking.items():
        if count == len(job.data):
            announce(f"{name} cannot be computed: {reason}.")
    record = _record(evidence, known, notes, started).model_copy(update={"judgement": rows, "canaries": canaries})
    tables = [table for place in range(len(job.subjects)) for table in _tables(evidence, place)]
    drawn = figures(evidence, known, rows) | canary_figures(canaries, [each.number for each in job.subjects])
    write_audit(settings.out, record, tables, _examples(job), drawn, overwrite=settings.overwrite)
    remove_partial(settings.out)
    announce(f"Audit of {len(job.data):,} examples in {format_seconds(record.seconds)}: {settings.out}")
    return Audit.open(settings.out)


def _help(job: AuditJob) -> None:
    """Take part in everything that is done in pieces."""
    gather(job)
    measure_canaries(job)


def _announce(job: AuditJob) -> None:
    own, held = int((~job.held_out).sum()), int(job.held_out.sum())
    models = f"{len(job.subjects)} checkpoints" if len(job.subjects) > 1 else "one model"
    announce(f"Audit of {own:,} examples{f' and {held:,} held out' if held else ''} under {models}.")
    if job.choices.known.any():
        announce(f"Multiple choice: {int(job.choices.known.sum()):,} examples, {len(job.class_names)} classes.")


def _tables(evidence: Evidence, place: int) -> list[pa.Table]:
    """Return the evidence under one subject: measures without a layer, then layer by layer."""
    job, seen = evidence.job, evidence.seen[place]
    ids, rows = [example.id for example in job.data.examples], range(len(job.data))
    number = job.subjects[place].number
    tables = [evidence_table(ids, seen.measures, checkpoint=number, rows=rows)]
    for layer, found in seen.layers.items():
        tables.append(evidence_table(ids, found, checkpoint=number, layer=layer, rows=rows))
    return tables


def _examples(job: AuditJob) -> pa.Table:
    examples, names = job.data.examples, job.class_names
    return pa.table(
        {
            "row": pa.array(range(len(examples)), pa.int64()),
            "example_id": pa.array([example.id for example in examples], pa.string()),
            "part": pa.array(["holdout" if held else "data" for held in job.held_out], pa.string()),
            "source": pa.array([example.source for example in examples], pa.string()),
            "label": pa.array([example.label for example in examples], pa.string()),
            "class": pa.array([None if code < 0 else names[code] for code in job.classes], pa.string()),
            "flag": pa.array(job.flagged, pa.bool_())
            if job.flagged is not None
            else pa.nulls(len(examples), pa.bool_()),
            "targets": pa.array(job.data.target_counts, pa.int64()),
            "text": pa.array(job.texts, pa.string()),
        }
    )


def _record(evidence: Evidence, known: list[Known], notes: list[str], started: float) -> AuditRecord:
    job, settings = evidence.job, evidence.job.settings
    subjects = [_subject(evidence, place) for place in range(len(job.subjects))]
    own, held = int((~job.held_out).sum()), int(job.held_out.sum())
    return AuditRecord(
        vestige=version("vestige"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=settings.command_line("audit"),
        config=settings.record(),
        versions=environment(),
        model=ModelRecord(name=job.main.name, fingerprint=job.main.fingerprint, parameters=job.parameters),
        data=DataRecord(name=job.data.name, fingerprint=job.own_fingerprint, examples=own),
        holdout=DataRecord(name=str(settings.holdout), fingerprint=job.data.fingerprint, examples=held)
        if held
        else None,
        reference=None if settings.reference_model is None else settings.record()["reference_model"],
        bank=_bank(evidence, known),
        checkpoints=subjects,
        trigger=_trigger(subjects),
        layers=[_layer(evidence.last, layer) for layer in job.layers],
        main_layer=evidence.main_layer,
        classes=list(job.class_names),
        measures=_described(evidence),
        judgement=[],
        extraction=_extraction(evidence),
        notes=notes,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_memory_bytes=peak_gpu_memory_bytes(),
    )


def _subject(evidence: Evidence, place: int) -> SubjectRecord:
    subject, seen, own = evidence.job.subjects[place], evidence.seen[place], ~evidence.job.held_out
    answers = seen.measures.get("answer_loss", np.full(len(own), np.nan))
    losses = answers if not np.isnan(answers[own]).all() else seen.measures["loss"]
    known = losses[own & ~np.isnan(losses)]
    return SubjectRecord(
        number=subject.number,
        name=subject.name,
        steps=subject.steps,
        fingerprint=subject.fingerprint,
        median_loss=float(np.median(known)) if len(known) else None,
        norms=seen.norms,
    )


def _trigger(subjects: list[SubjectRecord]) -> int | None:
    """Return the first checkpoint at which half of the examples are learnt: the median loss is 5 % of the first."""
    first = subjects[0].median_loss
    if len(subjects) < 2 or not first:
        return None
    below = (each for each in subjects if each.median_loss is not None and each.median_loss < TRIGGER * first)
    return next((each.number for each in below), None)


def _layer(seen: Seen, layer: int) -> LayerRecord:
    directions = seen.directions.get(layer)
    told = seen.smi.get(layer)
    return LayerRecord(
        layer=layer,
        directions=None if directions is None else int(directions[0]),
        converged=None if directions is None else bool(directions[1]),
        smi=None if told is None else (told[0], told[1], told[2]),
    )


def _bank(evidence: Evidence, known: list[Known]) -> BankRecord | None:
    job, settings = evidence.job, evidence.job.settings
    if job.bank is None:
        return None
    memorized = next((int(each.found[each.judged].sum()) for each in known if each.name == "memorized"), 0)
    return BankRecord(
        name=str(settings.bank),
        id=job.bank.id,
        models=len(job.bank),
        value=settings.bank_value,
        subset=settings.bank_subset,
        memorized_at=settings.memorized_at,
        memorized=memorized,
    )


def _described(evidence: Evidence) -> dict[str, MeasureRecord]:
    """Describe every measure that was requested, and why examples lack it."""
    lacking, found, details = reasons(evidence), {}, {}
    for each in evidence.job.measures:
        count, reason = lacking.get(each.name, (0, None))
        found[each.name] = MeasureRecord(
            meaning=each.meaning,
            high=each.says,
            layered=each.stage == "states" and each.of == "example",
            missing=count,
            reason=reason,
        )
        for name in columns_of(evidence.job, each, evidence.last.measures) if each.detail else []:
            words = each.detail.format(name.removeprefix(f"{each.name}_"))
            details[name] = MeasureRecord(meaning=f"{each.meaning}, {words}", high=each.says)
    details = {name: record for name, record in details.items() if name not in found}
    return found | details


def _extraction(evidence: Evidence) -> dict[int, tuple[float | None, float | None, float | None]]:
    """Return the share of the data's examples that are given back word for word, by prefix length."""
    own, found = ~evidence.job.held_out, {}
    prefixes = evidence.job.settings.prefixes
    for prefix in prefixes:
        name = f"extraction_{prefix}" if len(prefixes) > 1 else "extraction"
        column = evidence.last.measures.get(name)
        if column is not None:
            known = column[own & ~np.isnan(column)]
            found[prefix] = span(share(int((known == 1).sum()), len(known)))
    return found
