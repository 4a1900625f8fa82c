"""The record of an attribution run, made from the job, the method and the scores."""

from datetime import UTC, datetime
from importlib.metadata import version

from vestige.data import TokenizedData
from vestige.methods._protocol import Job, Method
from vestige.runs import (
    Check,
    CheckpointRecord,
    CoverageRecord,
    DataRecord,
    ModelRecord,
    RunRecord,
    ScoreSummary,
    SkippedRecord,
    TrustRecord,
    environment,
)
from vestige.settings import AttributeSettings
from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes


def run_record(
    settings: AttributeSettings,
    job: Job,
    method: Method,
    summary: ScoreSummary,
    checks: list[Check],
    seconds: float,
) -> RunRecord:
    """Return the record of a run: model, data, queries and method, and how far the scores can be trusted."""
    ids = [example.id for example in job.queries.examples]
    return RunRecord(
        vestige=version("vestige"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=settings.command_line("attribute"),
        config=settings.record(),
        versions=environment(),
        model=_model_record(job),
        data=_data_record(job.train),
        queries=_data_record(job.queries),
        asked=job.asked,
        left_out=[job.train.examples[row].id for row in job.skipped],
        checkpoints=[
            CheckpointRecord(name=each.name, weight=each.weight, index=str(each.index.folder) if each.index else None)
            for each in job.checkpoints
        ],
        method=method.name,
        meaning=method.meaning,
        coverage=_coverage(job),
        components=[part.name for part in job.components] if method.splits_components else [],
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_memory_bytes=peak_gpu_memory_bytes(),
        trust=TrustRecord(validated=False, checks=checks),
        distribution=dict(zip(ids, summary.distribution, strict=True)),
        groups=dict(zip(ids, summary.groups, strict=True)),
    )


def _model_record(job: Job) -> ModelRecord | None:
    if job.loaded is None:
        return None
    parameters = sum(parameter.numel() for parameter in job.loaded.model.parameters())
    return ModelRecord(name=job.loaded.name, fingerprint=job.loaded.fingerprint, parameters=parameters)


def _data_record(data: TokenizedData) -> DataRecord:
    return DataRecord(name=data.name, fingerprint=data.fingerprint, examples=len(data))


def _coverage(job: Job) -> CoverageRecord | None:
    selection = job.selection
    if selection is None:
        return None
    skipped = [
        SkippedRecord(name=row.name, parameters=row.parameters, reason=row.reason)
        for row in selection.coverage
        if not row.selected
    ]
    return CoverageRecord(
        selected=selection.selected_parameters,
        total=selection.total_parameters,
        fraction=selection.fraction,
        skipped=skipped,
    )
