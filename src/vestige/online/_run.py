"""A run directory from the log of a training: in-run influence in the form that `vestige report` opens."""

import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from vestige.data import Example, TokenizedData
from vestige.errors import DataError
from vestige.online._log import OnlineLog
from vestige.runs import (
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
from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes

MEANING = Meaning(
    sign="positive: training on the example lowered the validation loss",
    unit="nats of the mean validation loss, summed over the steps",
    target="this model, over this training",
    normalisation="none",
    estimates="By how much the example's share in every step's gradient lowered the validation loss, as if each step "
    "were plain gradient descent with that step's learning rate (In-Run Data Shapley, arXiv:2406.11011).",
    cost="One pass forward and backward over the validation examples in each training step, and inner products.",
    limits="Adam and momentum move otherwise than plain gradient descent; what an example did to later steps by "
    "changing the weights is not followed; examples that were not trained on have zero.",
)


def write_in_run_influence(
    log: OnlineLog | str | Path,
    train: TokenizedData,
    validation: TokenizedData,
    out: str | Path,
    *,
    k: int = 50,
    overwrite: bool = False,
) -> Scores:
    """Write a run with every training example's accumulated influence on the validation loss, its one query.

    Args:
        log: The log, or its folder.
        train: The training data, with the ids that were logged.
        validation: The validation examples; their texts together are the query.
        out: The run directory.
        k: Examples kept at each end of the ranking.
        overwrite: Replace a run that is there.

    Raises:
        DataError: the log names an id that the training data do not have, or two rows share one.
    """
    started = time.perf_counter()
    log = log if isinstance(log, OnlineLog) else OnlineLog.open(log)
    check_target(out, overwrite=overwrite)
    values, query = _values(log, train), _as_query(validation)
    sources = [example.source for example in train.examples]
    collector = ScoreCollector(1, len(train), k=k, sources=sources, dense=True)
    collector.add(ScoreBlock(torch.arange(len(train)), torch.from_numpy(values)[None]))
    summary = collector.finish()
    table = log.table()
    loss = table["validation_loss"][-1].as_py() if len(table) else float("nan")
    record = RunRecord(
        vestige=version("vestige"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(sys.argv[:1]),
        config={"log": str(log.folder), "steps": log.last_step(), **log.header},
        versions=environment(),
        model=ModelRecord(name=log.header["model"], fingerprint="", parameters=log.header["parameters"]),
        data=DataRecord(name=train.name, fingerprint=train.fingerprint, examples=len(train)),
        queries=DataRecord(name=validation.name, fingerprint=query.fingerprint, examples=1),
        method="in-run",
        meaning=MEANING,
        coverage=None,
        components=[],
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_memory_bytes=peak_gpu_memory_bytes(),
        trust=TrustRecord(),
        distribution={query.examples[0].id: summary.distribution[0]},
        groups={query.examples[0].id: summary.groups[0]},
    )
    tables = RunTables(train, query, summary.ranked, [False], [loss], dense=summary.dense)
    return Scores.open(write_run(out, record, tables, overwrite=overwrite))


def _values(log: OnlineLog, train: TokenizedData) -> np.ndarray:
    """Return the influence of every row, float64; zero where it was never trained on."""
    rows = {example.id: row for row, example in enumerate(train.examples)}
    if len(rows) < len(train):
        raise DataError(f"{train.name}: two rows share an id, so their influence cannot be distinguished.")
    values = np.zeros(len(train))
    for entry in log.influence().values():
        if entry.id not in rows:
            raise DataError(f"The log names the example {entry.id!r}, which {train.name} does not have.")
        values[rows[entry.id]] = entry.influence
    return values


def _as_query(validation: TokenizedData) -> TokenizedData:
    """Return all validation examples as one, since their mean loss is what was watched."""
    text = "\n\n".join(example.display for example in validation.examples)
    return TokenizedData(
        [Example(id="validation", row=0, text=text)],
        [np.concatenate(validation.input_ids)],
        [np.concatenate(validation.targets)],
        np.zeros(1, dtype=bool),
        validation.fingerprint,
        validation.name,
    )
