"""A recorded training on disk, open for questions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, TypeAdapter, ValidationError

from vestige.errors import CorruptFile, UserError
from vestige.parsing import first_problem, parse_object
from vestige.training._alarm import AT_RISK
from vestige.training._checkpoint import checkpoint_folder, checkpoint_steps
from vestige.training._log import read_steps
from vestige.training._losses import Losses
from vestige.training._tables import read_table, write_table

FORMAT = 1
KIND = "training"
RECORD, LOG, LOSSES, MEMBERSHIP = "run.json", "log", "losses.parquet", "membership.parquet"


class _Identity(BaseModel):
    checkpoints: list[int] | None = None


class _Trained(BaseModel):
    """What is read of the record of `vestige train`."""

    id: str
    identity: _Identity
    names: dict[str, str]


class _Model(BaseModel):
    name: str


class _Recorded(BaseModel):
    """What is read of the record that a `Recorder` writes."""

    model: _Model


_FORMAT, _RECORD = TypeAdapter(int), TypeAdapter(_Trained | _Recorded)


class TrainingRun:
    """What `vestige train`, or a `Recorder`, has left in a folder.

    run = TrainingRun.open("run")
    run.losses.to_pandas().pivot(index="example_id", columns="checkpoint", values="loss")
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder, self.record = folder, record

    @classmethod
    def open(cls, folder: str | Path) -> "TrainingRun":
        """Open the training in a folder; what a running one has saved is there.

        Raises:
            UserError: There is none, or a newer Vestige wrote it.
            CorruptFile: Its record is damaged.
        """
        record = read_record(Path(folder))
        if record is None:
            raise UserError(f"{folder} holds no training. Give the folder that `vestige train` got as --out.")
        return cls(Path(folder), record)

    @property
    def id(self) -> str | None:
        """Sixteen hexadecimal digits of the sha256 over everything that the weights follow from; None of a Recorder."""
        return self.record.get("id")

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Folders of the checkpoints by their step."""
        return {step: checkpoint_folder(self.folder, step) for step in checkpoint_steps(self.folder)}

    @property
    def losses(self) -> pa.Table:
        """Losses of all examples at every checkpoint: checkpoint, example_id, loss, gap, targets.

        Raises:
            UserError: None were measured.
        """
        return self._table(LOSSES, "No losses were measured at the checkpoints.")

    @property
    def membership(self) -> pa.Table:
        """The examples that were trained on: example_id, member, source, label.

        Raises:
            UserError: It is not known: the training was a Trainer's of one's own.
        """
        return self._table(MEMBERSHIP, "The log lists the examples that a training of your own has used.")

    @property
    def steps(self) -> pa.Table:
        """Every example of every step in order: step, example_id, loss, targets, learning_rate."""
        return read_steps(self.folder / LOG)

    @property
    def at_risk(self) -> pa.Table | None:
        """The findings of the alarm, the examples most at risk first; None if it was not triggered."""
        return read_at_risk(self.folder)

    def __repr__(self) -> str:
        steps, found = list(self.checkpoints), self.at_risk
        parts = [f"{len(steps)} checkpoints, the last after step {steps[-1]}" if steps else "no checkpoint yet"]
        if found is not None:
            flagged = int(np.sum(found["flagged"].to_numpy(zero_copy_only=False)))
            parts.append(f"alarm at step {found['step'][0].as_py()}: {flagged} of {len(found)} examples at risk")
        return f"TrainingRun({str(self.folder)!r}: {'; '.join(parts)})"

    def _table(self, name: str, reason: str) -> pa.Table:
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{self.folder} has no {name}. {reason}")
        return read_table(path)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read `run.json` of a training, None if there is none.

    Raises:
        UserError: It is the record of something else, or of a newer Vestige.
        CorruptFile: It does not read.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = parse_object(path.read_bytes())
        if record.get("kind") != KIND:
            raise UserError(f"{folder} is the run of another command, not a training. Give another folder.")
        if _FORMAT.validate_python(record.get("format", 0)) > FORMAT:
            raise UserError(f"{folder} was written by a newer Vestige. Type: pip install --upgrade vestige")
        _RECORD.validate_python(record)
    except ValueError as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error
        raise CorruptFile(
            f"{path} is not the record of a training ({reason}). Run the command that made it again, with --overwrite."
        ) from error
    return record


def write_losses(folder: Path, step: int, ids: Sequence[str], losses: Losses) -> None:
    """Write the losses of a checkpoint into its folder."""
    table = pa.table(
        {
            "checkpoint": pa.array([step] * len(ids), pa.int64()),
            "example_id": pa.array(list(ids), pa.string()),
            "loss": pa.array(losses.loss, pa.float64()),
            "gap": pa.array(losses.gap, pa.float64()),
            "targets": pa.array(losses.targets, pa.int64()),
        }
    )
    write_table(folder / LOSSES, table)


def merge_losses(folder: Path) -> None:
    """Write the losses of all checkpoints in the folder into `losses.parquet`."""
    found = [checkpoint_folder(folder, step) / LOSSES for step in checkpoint_steps(folder)]
    tables = [read_table(path) for path in found if path.is_file()]
    if tables:
        write_table(folder / LOSSES, pa.concat_tables(tables))


def read_at_risk(folder: Path) -> pa.Table | None:
    """Return what the alarm found, None if it was not triggered."""
    path = folder / f"{AT_RISK}.parquet"
    return read_table(path) if path.is_file() else None
