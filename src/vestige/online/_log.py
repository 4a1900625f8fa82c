"""The log of a training: columns by example and step, in parts that are whole or absent; its run directory."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.data import Example, TokenizedData
from vestige.errors import CorruptFile, DataError, IndexMismatch, UserError
from vestige.lazy import torch
from vestige.parsing import parse_json
from vestige.progress import announce
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
    describe_process,
    write_run,
)
from vestige.storage import make_folder, remove_durably, remove_strays, write_durably
from vestige.tables import reading, write_table

HEADER = "log.json"
FORMAT = 1
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("id", pa.string()),
        ("score", pa.float64()),
        ("influence", pa.float64()),
        ("learning_rate", pa.float64()),
        ("loss", pa.float64()),
        ("validation_loss", pa.float64()),
    ]
)
MEANING = Meaning(
    sign="positive: training on the example lowered the validation loss",
    unit="nats of the mean validation loss, summed over the steps",
    target="this model, over this training",
    normalisation="none",
    estimates="By how much the example's share in every step's gradient lowered the validation loss, to first order "
    "(In-Run Data Shapley, arXiv:2406.11011).",
    cost="One pass forward and backward over the validation examples in each training step, and inner products.",
    limits="What an example did to later steps by changing the weights is not followed, nor weight decay; examples "
    "that were not trained on have zero.",
)
_STEPS = {
    "as-is": " Steps count as the optimizer takes them: Adam's and AdamW's divide every entry by the root of its mean "
    "square, and what momentum carries into later steps counts in this one; of SGD's momentum nothing counts.",
    "sgd": " Steps count as if each were plain gradient descent with that step's learning rate.",
}
"""By `score_optimizer` of the log."""
_PLAIN = "sgd"
"""How logs without that entry were scored."""
_MOST_ROWS = 2**16
"""Rows that wait in memory at most."""


class StepLog:
    """Appends the steps of a training to a folder of Parquet parts, a row for each example, on disk after `flush`.

    A part is written under a temporary name and renamed, and changed afterwards by `begin` alone. A kill loses the
    steps since the last flush and nothing else, so flush before every checkpoint: then a resumed training finds a log
    that reaches as far as its weights.
    """

    def __init__(self, folder: Path, schema: pa.Schema, flush_every: int | None = None) -> None:
        """Write nothing yet; the first column of the schema is the step, and at most `flush_every` of them wait."""
        self.folder, self.schema, self._flush_every = folder, schema, flush_every
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def begin(self, step: int) -> None:
        """Prepare for the steps after `step`; drop what an interrupted training has logged of them."""
        make_folder(self.folder)
        remove_strays(self.folder)
        self._waiting, self._rows = [], 0
        # The last part first: a kill in between leaves no hole.
        for path in reversed(_parts(self.folder)):
            table = read_table(path)
            kept = table.filter(pa.array(table["step"].to_numpy() <= step))
            if len(kept) == 0:
                remove_durably(path)
            elif len(kept) < len(table):
                self._write(kept)

    def add(self, step: int, *columns: Any) -> None:
        """Remember one step: for each column but the first a value for every example."""
        every = zip([[step] * len(columns[0]), *columns], self.schema, strict=True)
        self._waiting.append(pa.table([pa.array(values, field.type) for values, field in every], self.schema))
        self._rows += len(columns[0])
        if self._rows >= _MOST_ROWS or len(self._waiting) == self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Write everything that was added to the disk before returning."""
        if self._waiting:
            self._write(pa.concat_tables(self._waiting))
            self._waiting, self._rows = [], 0

    def _write(self, table: pa.Table) -> None:
        write_table(self.folder / f"steps-{table['step'][0].as_py():010d}.parquet", table, compression="zstd")


def read_steps(folder: Path, schema: pa.Schema) -> pa.Table:
    """Read all rows of a log on disk, in the order of training.

    Raises:
        CorruptFile: A part is damaged.
    """
    # A table of no rows gives the columns where nothing is logged yet; `schema.empty_table` imports pandas for it.
    return pa.concat_tables([pa.Table.from_batches([], schema), *(read_table(path, schema) for path in _parts(folder))])


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """Read the Parquet table of a training.

    Raises:
        CorruptFile: It is damaged.
    """
    with reading(path, "Restore it, or delete it to go on without."):
        return parquet.read_table(path, schema=schema)


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("steps-*.parquet"))


class InRunInfluence(NamedTuple):
    """One example's influence over the steps of a training."""

    id: str
    influence: float
    """Nats by which it lowered the validation loss, summed over its steps; positive helped."""
    steps: int
    """How often it was trained on."""


class OnlineLog:
    """A log on disk, open for questions; what a running training has flushed is there.

    log = OnlineLog.open("run-log")
    log.top(10)
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder, self.header = folder, header

    @classmethod
    def open(cls, folder: str | Path) -> OnlineLog:
        """Open the log in a folder.

        Raises:
            UserError: there is none, or a newer Vestige wrote it.
            CorruptFile: its header is damaged.
        """
        folder = Path(folder)
        if not (folder / HEADER).is_file():
            raise UserError(f"{folder} holds no log of an online run. Give the folder that out= named.")
        try:
            header = parse_json((folder / HEADER).read_text(encoding="utf-8"))
            written = int(header["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"{folder / HEADER} is not the header of a log: {error}.") from error
        if written > FORMAT:
            raise UserError(f"{folder} was written by a newer Vestige. Type: pip install --upgrade vestige")
        return cls(folder, header)

    def table(self) -> pa.Table:
        """Return all rows, steps in order: step, id, score, influence, learning_rate, loss, validation_loss.

        Raises:
            CorruptFile: a part is damaged, or a step is there twice.
        """
        table = read_steps(self.folder, SCHEMA)
        if (np.diff(table["step"].to_numpy()) < 0).any():
            raise CorruptFile(f"The parts of {self.folder} overlap. Two training runs wrote to it at once.")
        return table

    def last_step(self) -> int:
        """Return the last step that is on disk, 0 for none."""
        found = _parts(self.folder)
        return int(read_table(found[-1], SCHEMA)["step"][-1].as_py()) if found else 0

    def influence(self) -> dict[str, InRunInfluence]:
        """Return the accumulated influence of every example that was trained on: the sum over its steps."""
        table = self.table()
        totals: dict[str, list[float]] = {}
        for name, value in zip(table["id"].to_pylist(), table["influence"].to_pylist(), strict=True):
            totals.setdefault(name, []).append(value)
        return {name: InRunInfluence(name, float(sum(values)), len(values)) for name, values in totals.items()}

    def top(self, k: int = 10) -> list[InRunInfluence]:
        """Return the `k` examples that lowered the validation loss most, first the best."""
        return sorted(self.influence().values(), key=lambda row: (-row.influence, row.id))[:k]

    def bottom(self, k: int = 10) -> list[InRunInfluence]:
        """Return the `k` examples that raised the validation loss most, first the worst."""
        return sorted(self.influence().values(), key=lambda row: (row.influence, row.id))[:k]


def begin_log(log: StepLog, header: Mapping[str, Any], step: int) -> None:
    """Prepare to log the steps after `step` under this header; drop later ones, of a training that was cut off."""
    folder = log.folder
    if (folder / HEADER).is_file():
        old = OnlineLog.open(folder)
        for name in ("components", "validation", "second_order", "score_optimizer"):
            plain = _PLAIN if name == "score_optimizer" else None
            if old.header.get(name, plain) != header.get(name):
                raise IndexMismatch(
                    f"{folder} was logged with other {name.replace('_', ' ')}: its scores could not be added up with "
                    "new ones. Nothing was changed. Give the same settings, or another folder."
                )
        last = old.last_step()
        if last and step == 0:
            raise IndexMismatch(
                f"{folder} holds the log of steps 1 to {last}; nothing was changed. To continue that training give "
                "start_step=STEP, the step of the checkpoint; for a new one give another folder."
            )
        if last < step:
            announce(f"{folder} ends at step {last}, the training continues after step {step}: a gap remains.")
    else:
        if folder.is_dir() and any(folder.iterdir()):
            raise IndexMismatch(f"{folder} holds other files and is left alone. Give another folder.")
        make_folder(folder)
        text = json.dumps({"format": FORMAT, **header}, indent=2, ensure_ascii=False)
        write_durably(folder / HEADER, [text.encode()])
    log.begin(step)


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
    values, query, losses = _read_values(log, train), _join(validation), log.table()["validation_loss"]
    collector = ScoreCollector(1, len(train), k=k, sources=[one.source for one in train.examples], dense=True)
    collector.add(ScoreBlock(torch.arange(len(train)), torch.from_numpy(values)[None]))
    summary = collector.finish()
    record = RunRecord(
        **describe_process(),
        command=" ".join(sys.argv[:1]),
        config={"log": str(log.folder), "steps": log.last_step(), **log.header},
        model=ModelRecord(name=log.header["model"], fingerprint="", parameters=log.header["parameters"]),
        data=DataRecord(name=train.name, fingerprint=train.fingerprint, examples=len(train)),
        queries=DataRecord(name=validation.name, fingerprint=query.fingerprint, examples=1),
        method="in-run",
        meaning=replace(MEANING, estimates=MEANING.estimates + _STEPS[log.header.get("score_optimizer", _PLAIN)]),
        coverage=None,
        components=[],
        seconds=time.perf_counter() - started,
        trust=TrustRecord(),
        distribution={query.examples[0].id: summary.distribution[0]},
        groups={query.examples[0].id: summary.groups[0]},
    )
    loss = losses[-1].as_py() if len(losses) else math.nan
    tables = RunTables(train, query, summary.ranked, [False], [loss], dense=summary.dense)
    return Scores.open(write_run(out, record, tables, overwrite=overwrite))


def _read_values(log: OnlineLog, train: TokenizedData) -> np.ndarray:
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


def _join(validation: TokenizedData) -> TokenizedData:
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
