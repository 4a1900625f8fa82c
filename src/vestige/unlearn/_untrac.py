"""`vestige untrac`: unlearn one side, measure the other, and write the measurements as a run."""

import time
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import torch
from jaxtyping import Float

from vestige.data import TokenizedData
from vestige.errors import NonFinite
from vestige.launch import is_worker
from vestige.progress import announce, format_seconds
from vestige.runs import (
    CoverageRecord,
    DataRecord,
    Meaning,
    ModelRecord,
    RunRecord,
    RunTables,
    ScoreBlock,
    ScoreCollector,
    Scores,
    TrustRecord,
    check_target,
    environment,
    write_run,
)
from vestige.settings import UntracSettings, verb
from vestige.storage import remove_partial
from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes
from vestige.unlearn._checks import trust_checks
from vestige.unlearn._curves import write_curves
from vestige.unlearn._job import UntracJob, open_job
from vestige.unlearn._losses import loss_weights
from vestige.unlearn._plan import AscentPlan, Ascents
from vestige.unlearn._rate import Stop, choose_rate, stopping_point
from vestige.unlearn._sets import NO_SOURCE, set_means
from vestige.unlearn._shown import shown_columns, shown_tests

MEANINGS = {
    "untrac": "The rise of the test set's loss when the training source is unlearnt by gradient ascent.",
    "inverse": "The rise of the training loss when the test set is unlearnt by gradient ascent.",
}
_RETAINING = " The loss of the training data is held at its value: curvature counts as in an influence function."
NAMES = {"untrac": "untrac", "inverse": "untrac-inv"}


class Scored:
    """Scores, and everything that they were read from."""

    def __init__(self, job: UntracJob) -> None:
        """Run the ascents, at a rate that is chosen first unless it was given.

        Raises:
            NonFinite: A loss overflowed.
            ModelError: The self-test failed, or nothing can move.
        """
        self.job = job
        self.learning_rate = job.settings.learning_rate or choose_rate(job)
        self.recipe = job.recipe(self.learning_rate)
        self.done: Ascents = AscentPlan("Unlearning", job, self.recipe).run()
        self.stop: Stop = stopping_point(job, self.done)
        self.scores: Float[np.ndarray, "test column"] = self._read()

    def _read(self) -> Float[np.ndarray, "test column"]:
        scores = self.job.table(self.done.after[:, self.stop.point] - self.done.before)
        if not np.isfinite(scores).all():
            raise NonFinite(
                f"Losses overflowed at the learning rate {self.learning_rate:g}. Lower it, or leave --learning-rate "
                "out: then one is chosen."
            )
        return scores * _shares(self.job) if self.job.settings.weigh_by_size else scores


@verb(UntracSettings)
def untrac(settings: UntracSettings) -> Scores:
    """Find the training sources, or examples, behind a model's behaviour on test sets, by unlearning.

    UnTrac and UnTrac-Inv (Isonuma and Titov 2024, arXiv:2401.15241). The run holds the scores, their groups by source,
    `curves.parquet` with the losses on the way, and the self-test's outcome; the model is as it was.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
    """
    started = time.perf_counter()
    check_target(settings.out, overwrite=settings.overwrite or is_worker())
    job = open_job(settings)
    scored = Scored(job)
    collector = ScoreCollector(
        len(job.tests.sets),
        len(job.train.sets),
        k=settings.k,
        sources=_sources(job),
        dense=settings.dense or settings.level == "source",
    )
    collector.add(ScoreBlock(torch.arange(len(job.train.sets)), torch.from_numpy(scored.scores)))
    summary = collector.finish()
    columns, tests = shown_columns(job), shown_tests(job)
    record = _record(scored, started)
    ids = [example.id for example in tests.examples]
    record = record.model_copy(
        update={
            "distribution": dict(zip(ids, summary.distribution, strict=True)),
            "groups": dict(zip(ids, summary.groups, strict=True)),
        }
    )
    tables = RunTables(
        train=columns,
        queries=tests,
        ranked=summary.ranked,
        generated=[all(job.generated[row] for row in each.rows) for each in job.tests.sets],
        losses=_test_losses(scored),
        tokenizer=job.loaded.tokenizer,
        dense=summary.dense,
    )
    write_run(
        settings.out, record, tables, overwrite=settings.overwrite, add=lambda folder: write_curves(folder, scored)
    )
    remove_partial(settings.out)
    announce(f"{len(scored.done.after)} ascents in {format_seconds(record.seconds)}; the weights are as they were.")
    return Scores.open(settings.out)


def _record(scored: Scored, started: float) -> RunRecord:
    job, settings = scored.job, scored.job.settings
    total = sum(parameter.numel() for parameter in job.loaded.model.parameters())
    moved = scored.done.moved
    everything = total + (moved if settings.lora_rank is not None else 0)
    config = settings.record() | {"learning_rate": scored.learning_rate, "steps": scored.recipe.steps}
    return RunRecord(
        vestige=version("vestige"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=settings.command_line("untrac"),
        config=config | {"batch_size": scored.recipe.batch_size},
        versions=environment(),
        model=ModelRecord(name=job.loaded.name, fingerprint=job.loaded.fingerprint, parameters=total),
        data=_data_record(job.train.data),
        queries=_data_record(job.tests.data),
        asked=job.asked,
        method=NAMES[settings.direction],
        meaning=_meaning(scored),
        coverage=CoverageRecord(selected=moved, total=everything, fraction=moved / everything),
        components=[],
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_memory_bytes=peak_gpu_memory_bytes(),
        trust=TrustRecord(validated=False, checks=trust_checks(scored)),
        distribution={},
        groups={},
    )


def _meaning(scored: Scored) -> Meaning:
    settings, recipe = scored.job.settings, scored.recipe
    read = recipe.looks[scored.stop.point]
    one_by_one = settings.level == "example" and settings.direction == "inverse"
    per = "example" if settings.loss == "mean" or one_by_one else "token"
    return Meaning(
        sign="positive: training on it lowers the test set's loss",
        unit=f"nats of loss per {per}, after {read} steps of {recipe.optimizer} at {recipe.learning_rate:g}",
        target="this model",
        normalisation="times the source's share of the data" if settings.weigh_by_size else "none",
        estimates=MEANINGS[settings.direction] + (_RETAINING if settings.retain else ""),
        cost=f"{len(scored.done.after)} ascents of {recipe.steps} steps; memory as for training.",
        limits="A local change of this model; copies of a source each score as if they were alone. Compare ranks.",
    )


def _test_losses(scored: Scored) -> list[float] | None:
    """Return the loss of every test set before anything moved, where the test sets were measured."""
    if scored.job.settings.direction != "untrac":
        return None
    return scored.job.table(np.stack([scored.done.before]))[:, 0].tolist()


def _sources(job: UntracJob) -> list[str | None]:
    if job.settings.level == "source":
        return [each.name for each in job.train.sets]
    return [example.source for example in job.train.data.examples]


def _shares(job: UntracJob) -> Float[np.ndarray, "column"]:
    """Return the share of each source in the training data, all of its examples counted, over the mean share."""
    counted = loss_weights(job.train.data, job.settings.loss)
    if job.settings.level == "example":
        sizes = set_means(counted, np.ones_like(counted), job.train.sets)
    else:
        names = np.array([example.source or NO_SOURCE for example in job.train.data.examples])
        sizes = np.array([counted[names == each.name].sum() for each in job.train.sets])
    return sizes / sizes.mean()


def _data_record(data: TokenizedData) -> DataRecord:
    return DataRecord(name=data.name, fingerprint=data.fingerprint, examples=len(data))
