"""The log of an online run: columns by example and step, in parts that are whole or absent."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vestige.errors import CorruptFile, IndexMismatch, UserError
from vestige.online._step import StepScores
from vestige.parsing import parse_json
from vestige.progress import announce
from vestige.storage import make_folder, remove_durably, remove_strays, write_durably

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
    def open(cls, folder: str | Path) -> "OnlineLog":
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
        tables = [read_part(path) for path in parts(self.folder)]
        table = pa.concat_tables([SCHEMA.empty_table(), *tables])
        if (np.diff(table["step"].to_numpy()) < 0).any():
            raise CorruptFile(f"The parts of {self.folder} overlap. Two training runs wrote to it at once.")
        return table

    def last_step(self) -> int:
        """Return the last step that is on disk, 0 for none."""
        found = parts(self.folder)
        return int(read_part(found[-1])["step"][-1].as_py()) if found else 0

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


class LogWriter:
    """Appends steps to a log; a step is on disk after `flush`, which comes by itself every `flush_every` steps.

    A part is written under a temporary name and renamed, and never changed afterwards but by `rewind`. A kill loses the
    steps since the last flush and nothing else, so flush before every checkpoint: then a resumed training finds a log
    that reaches as far as its weights.
    """

    def __init__(self, folder: str | Path, header: Mapping[str, Any], flush_every: int) -> None:
        if flush_every < 1:
            raise UserError(f"flush_every={flush_every}: give 1 or more steps.")
        self.folder, self._header, self._flush_every = Path(folder), dict(header), flush_every
        self._waiting: list[StepScores] = []

    def begin(self, step: int) -> None:
        """Prepare to log the steps after `step`; drop later ones, of a training that was cut off.

        Raises:
            IndexMismatch: the log holds another training: `step` is 0, or the header differs.
        """
        if (self.folder / HEADER).is_file():
            log = OnlineLog.open(self.folder)
            _refuse_other(self.folder, log.header, self._header)
            last = log.last_step()
            if last and step == 0:
                raise IndexMismatch(
                    f"{self.folder} holds the log of steps 1 to {last}; nothing was changed. To continue that training "
                    "give start_step=STEP, the step of the checkpoint; for a new one give another folder."
                )
            remove_strays(self.folder)
            self._rewind(step)
            if last < step:
                announce(f"{self.folder} ends at step {last}, the training continues after step {step}: a gap remains.")
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise IndexMismatch(f"{self.folder} holds other files and is left alone. Give another folder.")
        make_folder(self.folder)
        text = json.dumps({"format": FORMAT, **self._header}, indent=2, ensure_ascii=False)
        write_durably(self.folder / HEADER, [text.encode()])

    def add(self, scores: StepScores) -> None:
        """Remember one step, and write when there are enough."""
        self._waiting.append(scores)
        if len(self._waiting) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Write everything that was added to the disk before returning."""
        if self._waiting:
            self._write(self._waiting[0].step, pa.concat_tables([_rows(scores) for scores in self._waiting]))
            self._waiting.clear()

    def _rewind(self, step: int) -> None:
        """Drop every row after `step`, the last part first, so that a kill in between leaves no hole."""
        for path in reversed(parts(self.folder)):
            table = read_part(path)
            kept = table.filter(pa.array(table["step"].to_numpy() <= step))
            if len(kept) == 0:
                remove_durably(path)
            elif len(kept) < len(table):
                self._write(kept["step"][0].as_py(), kept)

    def _write(self, first: int, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_durably(self.folder / f"steps-{first:010d}.parquet", [buffer.getbuffer()])


def parts(folder: Path) -> list[Path]:
    """Return the parts of a log in the order of their steps."""
    return sorted(folder.glob("steps-*.parquet"))


def read_part(path: Path) -> pa.Table:
    """Read one part of a log.

    Raises:
        CorruptFile: it is damaged.
    """
    try:
        return pq.read_table(path, schema=SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise CorruptFile(f"{path} cannot be read: {error}. Restore it, or delete it to go on without.") from error


def _rows(scores: StepScores) -> pa.Table:
    count = len(scores.ids)
    columns = [
        [scores.step] * count,
        list(scores.ids),
        scores.score.tolist(),
        scores.influence.tolist(),
        [scores.learning_rate] * count,
        list(scores.loss),
        [scores.validation_loss] * count,
    ]
    return pa.table([pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)], SCHEMA)


def _refuse_other(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in ("components", "validation", "second_order"):
        if found.get(name) != wanted.get(name):
            raise IndexMismatch(
                f"{folder} was logged with other {name.replace('_', ' ')}: its scores could not be added up with new "
                "ones. Nothing was changed. Give the same settings, or another folder."
            )
