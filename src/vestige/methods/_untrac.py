"""`vestige untrac`: unlearn one side, measure the other, and write the measurements as a run."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float

from vestige import runs
from vestige.data import Example, TokenizedData, load_examples, tokenize
from vestige.errors import SpecError
from vestige.indexes import tokens_at_most
from vestige.jobs import is_worker
from vestige.methods import Job, Method, loss_weights, method
from vestige.methods._untrac_ascent import NO_SOURCE, ExampleSet, Side, find_overlaps, set_means
from vestige.methods._untrac_job import STOP_SHARE, Unlearning, UntracJob, make_job, open_untrac_job
from vestige.models import LoadedModel, load_model
from vestige.progress import announce, format_seconds
from vestige.settings import AscentOptimizer, Reduction, UntracSettings, with_settings
from vestige.storage import remove_partial
from vestige.tables import write_table

SIGN = "positive: training on it lowers the test set's loss"
LIMITS = "A local change of this model; copies of a source each score as if they were alone. Compare ranks."
ESTIMATES = {
    "untrac": "The rise of the test set's loss when the training source is unlearnt by gradient ascent.",
    "inverse": "The rise of the training loss when the test set is unlearnt by gradient ascent.",
}
NAMES = {"untrac": "untrac", "inverse": "untrac-inv"}
IDENTITY_WARNS = 0.05
"""Rounding and third-order terms stay below this by far in single precision."""
CURVES_FILE = "curves.parquet"
CURVES_SCHEMA = pa.schema(
    [
        ("ascent", pa.string()),
        ("step", pa.int64()),
        ("kind", pa.string()),
        ("set", pa.string()),
        ("loss", pa.float64()),
        ("mirrored", pa.float64()),
    ]
)
_RETAINING = " The loss of the training data is held at its value: curvature counts as in an influence function."
_EXCERPT = 400
"""Characters of the first example of a set."""
_SHOWN = 3
"""Pairs of sources in a check."""


@with_settings(UntracSettings)
def untrac(settings: UntracSettings) -> runs.Scores:
    """Find the training sources, or examples, behind a model's behaviour on test sets, by unlearning.

    UnTrac and UnTrac-Inv (Isonuma and Titov 2024, arXiv:2401.15241). The run holds the scores, their groups by source,
    `curves.parquet` with the losses on the way, and the self-test's outcome; the model is as it was.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
    """
    started = time.perf_counter()
    runs.check_target(settings.out, overwrite=settings.overwrite or is_worker())
    job = open_untrac_job(settings)
    found = Unlearning(job)
    by_source, examples = settings.level == "source", job.train.data.examples
    collector = runs.ScoreCollector(
        len(job.tests.sets),
        len(job.train.sets),
        k=settings.k,
        sources=[each.name for each in job.train.sets] if by_source else [each.source for each in examples],
        dense=settings.dense or by_source,
    )
    collector.add(runs.ScoreBlock(torch.arange(len(job.train.sets)), torch.from_numpy(found.scores)))
    summary, tests = collector.finish(), _show_sets(job.tests)
    # Where the test sets were measured, their losses before anything moved are known.
    before = job.table(np.stack([found.done.before]))[:, 0].tolist() if settings.direction == "untrac" else None
    tables = runs.RunTables(
        train=_show_sets(job.train) if by_source else job.train.data,
        queries=tests,
        ranked=summary.ranked,
        generated=[all(job.generated[row] for row in each.rows) for each in job.tests.sets],
        losses=before,
        tokenizer=job.loaded.tokenizer,
        dense=summary.dense,
    )
    record = _make_record(found, summary, [example.id for example in tests.examples], time.perf_counter() - started)
    runs.write_run(settings.out, record, tables, overwrite=settings.overwrite, add=lambda run: write_curves(run, found))
    remove_partial(settings.out)
    announce(f"{len(found.done.after)} ascents in {format_seconds(record.seconds)}; the weights are as they were.")
    return runs.Scores.open(settings.out)


def _make_record(found: Unlearning, summary: runs.ScoreSummary, tests: list[str], seconds: float) -> runs.RunRecord:
    job, settings, recipe, moved = found.job, found.job.settings, found.recipe, found.done.moved
    model = runs.describe_model(job.loaded)
    everything = model.parameters + (moved if settings.lora_rank is not None else 0)
    chosen = {"learning_rate": recipe.learning_rate, "steps": recipe.steps, "batch_size": recipe.batch_size}
    return runs.make_run_record(
        command=settings.command_line("untrac"),
        config=settings.record() | chosen,
        method=NAMES[settings.direction],
        meaning=_describe(found),
        data=job.train.data,
        queries=job.tests.data,
        query_ids=tests,
        summary=summary,
        seconds=seconds,
        model=model,
        coverage=runs.CoverageRecord(selected=moved, total=everything, fraction=moved / everything),
        checks=check_unlearning(found),
        asked=job.asked,
    )


def _describe(found: Unlearning) -> runs.Meaning:
    settings, recipe = found.job.settings, found.recipe
    read = recipe.looks[found.stop.point]
    one_by_one = settings.level == "example" and settings.direction == "inverse"
    per = "example" if settings.loss == "mean" or one_by_one else "token"
    return runs.Meaning(
        sign=SIGN,
        unit=f"nats of loss per {per}, after {read} steps of {recipe.optimizer} at {recipe.learning_rate:g}",
        target="this model",
        normalisation="times the source's share of the data" if settings.weigh_by_size else "none",
        estimates=ESTIMATES[settings.direction] + (_RETAINING if settings.retain else ""),
        cost=f"{len(found.done.after)} ascents of {recipe.steps} steps; memory as for training.",
        limits=LIMITS,
    )


def _show_sets(side: Side) -> TokenizedData:
    """Return a row for each set: a line about it, or the example itself where it has only one."""
    data, sets = side
    alone = [int(each.rows[0]) if len(each.rows) == 1 else None for each in sets]

    def of_the_only(values: Any, empty: np.ndarray) -> list[np.ndarray]:
        return [empty if row is None else values[row] for row in alone]

    return TokenizedData(
        [_show_set(data, each, number) for number, each in enumerate(sets)],
        of_the_only(data.input_ids, np.zeros(0, dtype=np.int32)),
        of_the_only(data.targets, np.zeros(0, dtype=bool)),
        np.array([row is not None and bool(data.truncated[row]) for row in alone]),
        data.fingerprint,
        data.name,
    )


def _show_set(data: TokenizedData, group: ExampleSet, number: int) -> Example:
    first = data.examples[int(group.rows[0])]
    if len(group.rows) == 1:
        fields = {name: getattr(first, name) for name in ("text", "prompt", "completion", "messages", "label")}
        return Example(group.name, number, source=first.source, **fields)
    tokens = int(data.target_counts[group.rows].sum())
    text = f"{len(group.rows):,} examples, {tokens:,} tokens to learn. The first: {first.display[:_EXCERPT]}"
    return Example(group.name, number, text=text, source=group.name)


def check_unlearning(found: Unlearning) -> list[runs.Check]:
    """Return the checks of a run: the self-test, slope against curvature, and sources with the same content."""
    return [_check_identity(found), _check_curvature(found), *_check_sources(found.job)]


def _check_identity(found: Unlearning) -> runs.Check:
    worst = max(each.error for each in found.done.identities)
    reading = f"A small step changes losses as their gradients say, with the right sign, to within {worst:.1%}"
    verdict = "good" if worst <= IDENTITY_WARNS else "warn"
    more = "." if verdict == "good" else ": more than rounding explains. Try --precision float32."
    return runs.Check(name="first-order self-test", value=worst, reading=reading + more, verdict=verdict)


def _check_curvature(found: Unlearning) -> runs.Check:
    share, recipe = found.stop.curvature_share, found.recipe
    step = recipe.looks[found.stop.point]
    reading = f"Scores are read after step {step} of {recipe.steps} at {recipe.learning_rate:g}"
    if share is None:
        more, verdict = ", as --stop last asks.", "unknown"
    elif share <= STOP_SHARE:
        more, verdict = f", where curvature is {share:.0%} of slope: influence decides them, not damage.", "good"
    else:
        more, verdict = (
            f", and even there curvature is {share:.0%} of slope. Lower --learning-rate, or leave it out.",
            "warn",
        )
    return runs.Check(name="curvature against slope", value=share, reading=reading + more, verdict=verdict)


def _check_sources(job: UntracJob) -> list[runs.Check]:
    name = "redundant sources"
    if job.settings.level != "source":
        return []
    found = find_overlaps(job.train.data, job.train.sets)
    if not found:
        return [runs.Check(name=name, value=0.0, reading="No source is half contained in another.", verdict="good")]
    pairs = "; ".join(f"{each.one} and {each.other} ({each.share:.0%})" for each in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more pairs" if len(found) > _SHOWN else ""
    reading = (
        f"Sources share text: {pairs}{more}. Each scores as if it were alone, while leaving one of them out of "
        "training would change little."
    )
    return [runs.Check(name=name, value=found[0].share, reading=reading, verdict="warn")]


def write_curves(folder: Path, found: Unlearning) -> None:
    """Write a row for each measurement of each set (`measured`, step 0 the start), and each step's batch (`batch`).

    The column `kind` is `measured` or `batch`. Losses are in nats per weight (tokens, or examples for `loss=mean`);
    `mirrored` is the loss on the other side of the start, null where it was not measured. A batch's loss is the one
    before its step.
    """
    table = pa.Table.from_pylist(_curves(found), schema=CURVES_SCHEMA)
    write_table(folder / CURVES_FILE, table, compression="zstd")


def _curves(found: Unlearning) -> list[dict[str, object]]:
    job, done, side = found.job, found.done, found.job.measured
    sets = side.positions
    if job.settings.direction == "inverse" and job.settings.level == "example":
        # Single training examples are shown by their source.
        names = np.array([side.data.examples[row].source or NO_SOURCE for row in side.rows])
        sets = [ExampleSet(str(name), np.flatnonzero(names == name)) for name in sorted(set(names))]
    counted = loss_weights(side.data, job.settings.loss)[side.rows]
    before, after = set_means(done.before, counted, sets), set_means(done.after, counted, sets)
    mirrored = set_means(done.mirrored, counted, sets) if done.mirrored.shape[1] else np.full(after.shape, np.nan)
    rows = []
    for number, ascended in enumerate(job.ascended.sets):
        for place, group in enumerate(sets):
            common = {"ascent": ascended.name, "kind": "measured", "set": group.name}
            rows.append({**common, "step": 0, "loss": before[place], "mirrored": before[place]})
            for point, step in enumerate(found.recipe.looks):
                loss, other = after[number, point, place], mirrored[number, point, place]
                rows.append({**common, "step": step, "loss": loss, "mirrored": None if np.isnan(other) else other})
        for step, loss in enumerate(done.batch_loss[number]):
            rows.append({"ascent": ascended.name, "kind": "batch", "set": ascended.name, "step": step, "loss": loss})
    return rows


@dataclass(frozen=True)
class UnTracConfig:
    """How texts are scored; the names are those of the UnTrac reproduction."""

    model_name: Any = "gpt2"
    """Hub id, folder or a live module."""
    tokenizer: Any = None
    """When it does not lie beside the model."""
    optimizer: AscentOptimizer = "adam"
    unlearning_rate: float | None = None
    """None chooses it without ground truth."""
    unlearning_steps: int = 5
    batch_size: int = 256
    loss: Reduction = "sum"
    """Of a text: the sum or the mean over its tokens, both where it is unlearnt and where it is measured."""
    max_train_samples: int = 10_000
    max_test_samples: int = 100
    top_k_influences: int = 50
    max_length: int | None = None
    """Tokens after which texts are cut; None for the model's context."""
    device: str = "auto"
    precision: str = "auto"
    seed: int = 42
    gradient_checkpointing: bool = False
    lora_rank: int | None = None
    quantize: Literal[4, 8] | None = None
    """Bits of the model's maps; LoRA matrices are then what moves."""


class TextInfluence(NamedTuple):
    """One training text in a ranking."""

    rank: int
    """From 1."""
    position: int
    """Position among the training texts."""
    score: float
    text: str


@method("untrac")
class UnTrac(Method):
    """Rise of the losses of examples when others are unlearnt by gradient ascent, of whole sources or one by one.

    UnTrac unlearns training data and measures test sets, UnTrac-Inv unlearns test sets and measures training data
    (Isonuma and Titov 2024, arXiv:2401.15241). In Python UnTrac-Inv scores texts:

        untrac = UnTrac(UnTracConfig(model_name="gpt2"))
        scores = untrac.compute_influence_scores("This is what the model wrote.", texts)
        for influence in untrac.top_k("This is what the model wrote.", texts, k=10):
            print(influence.rank, influence.score, influence.text)

    The model is loaded once, and is bit for bit the same after every call.
    """

    command = "untrac"
    needs_model = True
    meaning = runs.Meaning(
        sign=SIGN,
        unit="nats of loss per token, or per example, after the steps of the ascent",
        target="this model",
        normalisation="none; or, with --weigh-by-size, times the source's share of the data",
        estimates=ESTIMATES["inverse"],
        cost="An ascent of a few steps for each test set, or for each training source, and a forward pass over what is "
        "measured at each point of it; memory as for training.",
        limits=LIMITS,
    )

    def __init__(self, config: UnTracConfig | None = None) -> None:
        self.config = config or UnTracConfig()

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, loaded when it is first needed."""
        same: dict[str, Any] = {
            name: getattr(self.config, name) for name in ("tokenizer", "precision", "device", "quantize")
        }
        return load_model(self.config.model_name, **same)

    def blocks(self, job: Job) -> Iterator[runs.ScoreBlock]:
        """Yield the scores of all rows by UnTrac-Inv, each query a test set of its own."""
        alone = [replace(example, source=None) for example in job.queries.examples]
        settings = self._settings(job.settings.out, loss=job.settings.loss, seed=job.settings.seed)
        queries = replace(job.queries, examples=alone)
        found = Unlearning(make_job(settings, job.model_for(self.name), job.train, queries))
        yield runs.ScoreBlock(torch.arange(len(job.train)), torch.from_numpy(found.scores))

    def compute_influence_scores(self, test: str | list[str], train_texts: list[str]) -> Float[np.ndarray, "text"]:
        """Return the rise of each training text's loss in nats when the test texts are unlearnt; positive: it helps.

        Raises:
            SpecError: There is no text, or more than `max_train_samples` or `max_test_samples`.
            UserError: Something about the model or the texts needs the caller.
        """
        tests = [test] if isinstance(test, str) else list(test)
        _require(len(tests), self.config.max_test_samples, "test", "max_test_samples")
        _require(len(train_texts), self.config.max_train_samples, "training", "max_train_samples")
        with tempfile.TemporaryDirectory() as folder:
            settings = self._settings(Path(folder) / "run")

            def read(rows: list[dict[str, str]], name: str) -> TokenizedData:
                longest = tokens_at_most(settings, self.loaded)
                return tokenize(load_examples(rows), self.loaded.tokenizer, max_length=longest, name=name)

            train = read([{"text": text} for text in train_texts], "train_texts")
            queries = read([{"text": text, "source": "test"} for text in tests], "test")
            return Unlearning(make_job(settings, self.loaded, train, queries)).scores[0]

    def top_k(self, test: str | list[str], train_texts: list[str], k: int | None = None) -> list[TextInfluence]:
        """Return the `k` training texts whose score is highest (`top_k_influences` if not given), highest first."""
        scores = self.compute_influence_scores(test, train_texts)
        order = np.argsort(-scores, kind="stable")[: k or self.config.top_k_influences]
        return [
            TextInfluence(rank, int(index), float(scores[index]), train_texts[index])
            for rank, index in enumerate(order, start=1)
        ]

    def _settings(self, out: Path, **given: Any) -> UntracSettings:
        config = self.config
        same = ("optimizer", "loss", "batch_size", "max_length", "seed", "gradient_checkpointing", "lora_rank")
        values = {name: getattr(config, name) for name in same} | given
        values |= {"learning_rate": config.unlearning_rate, "steps": config.unlearning_steps}
        values |= {"data": "train_texts", "queries": "test", "out": out, "level": "example"}
        return UntracSettings(model="model", **values)


def _require(number: int, most: int, what: str, setting: str) -> None:
    if not 1 <= number <= most:
        raise SpecError(f"{number} {what} texts, expected 1 to {most}. Give other texts, or a larger {setting}.")
