"""A recorded training on disk: its record, tables and checkpoints, each whole or absent, and open for questions."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, TypeAdapter, ValidationError

from vestige import models
from vestige.errors import CorruptFile, DataError, UserError
from vestige.online import read_steps, read_table
from vestige.parsing import as_record, first_problem, parse_object
from vestige.storage import make_folder, remove_strays, remove_tree, stage_folder, write_durably
from vestige.tables import write_table

if TYPE_CHECKING:
    from vestige.training._engine import Losses

FORMAT = 1
KIND = "training"
RECORD, LOSSES, MEMBERSHIP, AT_RISK = "run.json", "losses.parquet", "membership.parquet", "at_risk"
STEP = "step.json"
"""How far a training is, for `vestige status`; gone when it is complete."""
LOG, _OPTIMIZER = "log", "optimizer.pt"
IN_RUN, IN_RUN_LOG, RESULTS = "in-run", "in-run-log", "results.json"
"""Of scores by the loss of validation examples: a run, the folder of the scores of every step, and its losses."""
_NAME = re.compile(r"checkpoint-(\d+)")
_MADE_OF = "made-of.txt"
_UNFINISHED = re.compile(r"checkpoint-\d+\.(part|gone)")
_IN_CHECKPOINT = (
    *("*.safetensors", "*.json", "*.bin", "*.model", "*.jinja", _OPTIMIZER, "scheduler.pt", "rng_state*.pth"),
    *("merges.txt", "vocab.txt", "README.md", LOSSES),
)
"""What the Trainer, models and tokenizers write into a checkpoint."""
RESULT_FILES = (
    *(RECORD, STEP, LOSSES, MEMBERSHIP, f"{AT_RISK}.parquet", f"{AT_RISK}.jsonl", f"{LOG}/steps-*.parquet"),
    *(f"checkpoint-[0-9]*/{name}" for name in _IN_CHECKPOINT),
    *(IN_RUN, IN_RUN_LOG, RESULTS, "tracking"),
)
"""What a training consists of, as for `require_no_others`."""
STEPS = pa.schema(
    [
        ("step", pa.int64()),
        ("example_id", pa.string()),
        ("loss", pa.float64()),
        ("targets", pa.int64()),
        ("learning_rate", pa.float64()),
    ]
)


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


class CurrentStep(NamedTuple):
    """How far a training is."""

    step: int
    of: int
    loss: float
    """Mean over the examples of the step, each per target token, in nats."""
    rate: float
    """Steps a second since the command began."""


def write_step(folder: Path, step: CurrentStep) -> None:
    """Write how far the training is; the last one before a kill stays."""
    write_durably(folder / STEP, [json.dumps(step._asdict()).encode()])


class TrainingRun:
    """What `vestige train`, or a `Recorder`, has left in a folder.

    run = TrainingRun.open("run")
    run.losses.to_pandas().pivot(index="example_id", columns="checkpoint", values="loss")
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder, self.record = folder, record

    @classmethod
    def open(cls, folder: str | Path) -> TrainingRun:
        """Open the training in a folder; what a running one has saved is there.

        Raises:
            UserError: There is none, or a newer Vestige wrote it.
            CorruptFile: Its record is damaged.
        """
        return cls(Path(folder), require_training(folder))

    @property
    def id(self) -> str | None:
        """Sixteen hexadecimal digits of the sha256 over everything that the weights follow from; None of a Recorder."""
        return self.record.get("id")

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Folders of the checkpoints by their step."""
        return {step: checkpoint_folder(self.folder, step) for step in checkpoint_steps(self.folder)}

    @property
    def current_step(self) -> CurrentStep | None:
        """The last step that was noted; None of one that is complete, or whose first seconds have not passed."""
        try:
            return as_record(CurrentStep, parse_object((self.folder / STEP).read_bytes()))
        except (OSError, ValueError):
            return None

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
    def members(self) -> set[str]:
        """Ids of the examples that were trained on, as `membership` lists them."""
        table = self.membership
        return set(table["example_id"].filter(table["member"]).to_pylist())

    @property
    def steps(self) -> pa.Table:
        """Every example of every step, in the order in which the model took them.

        Columns: step (from 1), example_id, loss (mean per target token before the step, with dropout as it fell, nats;
        NaN without a target), targets, learning_rate (of the first parameter group).
        """
        return read_steps(self.folder / LOG, STEPS)

    @property
    def at_risk(self) -> pa.Table | None:
        """The findings of the alarm, the examples most at risk first; None if it was not triggered."""
        path = self.folder / f"{AT_RISK}.parquet"
        return read_table(path) if path.is_file() else None

    def __repr__(self) -> str:
        steps, found = list(self.checkpoints), self.at_risk
        parts = [f"{len(steps)} checkpoints, the last after step {steps[-1]}" if steps else "no checkpoint yet"]
        if (self.folder / IN_RUN).is_dir():
            parts.append(f"scores of its steps in {IN_RUN}")
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


def require_training(folder: str | Path) -> dict[str, Any]:
    """Return the record of the training in a folder.

    Raises:
        UserError: There is none, or a newer Vestige wrote it.
        CorruptFile: Its record is damaged.
    """
    record = read_record(Path(folder))
    if record is None:
        raise UserError(f"{folder} holds no training. Give the folder that `vestige train` got as --out.")
    return record


def require_trainings(folder: str | Path) -> None:
    """Raise if neither a folder nor one below it has the record of a training.

    Raises:
        DataError: None has.
    """
    if not any(Path(folder).rglob(RECORD)):
        raise DataError(f"There is no training of `vestige train` in {folder}.")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record into `run.json`."""
    write_durably(folder / RECORD, [(json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()])


def begin_record(folder: Path, **facts: Any) -> None:
    """Write the record of a training that begins."""
    write_record(folder, {"format": FORMAT, "kind": KIND, "vestige": version("vestige"), **facts})


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return sixteen hexadecimal digits of the sha256 over the identity."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    write_table(folder / LOSSES, table, compression="zstd")


def merge_losses(folder: Path) -> None:
    """Write the losses of all checkpoints in the folder into `losses.parquet`."""
    found = [checkpoint_folder(folder, step) / LOSSES for step in checkpoint_steps(folder)]
    tables = [read_table(path) for path in found if path.is_file()]
    if tables:
        write_table(folder / LOSSES, pa.concat_tables(tables), compression="zstd")


def plan_steps(epochs: Iterable[float], per_epoch: int, last: int) -> list[int]:
    """Return the steps after which to save: those nearest to the epochs, halves rounded up, and the last one."""
    return sorted({min(last, int(epoch * per_epoch + 0.5)) for epoch in epochs} | {last})


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"checkpoint-{step}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in the folder, ascending; each of them is whole."""
    found = (_NAME.fullmatch(path.name) for path in folder.glob("checkpoint-*"))
    return sorted(int(match[1]) for match in found if match is not None)


def last_resumable(folder: Path) -> int:
    """Return the step of the last checkpoint that holds the optimizer's state, 0 if there is none."""
    found = [step for step in checkpoint_steps(folder) if (checkpoint_folder(folder, step) / _OPTIMIZER).is_file()]
    return found[-1] if found else 0


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, and one that a kill has cut short."""
    remove_strays(folder)
    for path in [path for path in folder.glob("checkpoint-*") if _UNFINISHED.fullmatch(path.name)]:
        remove_tree(path)
    for later in reversed(checkpoint_steps(folder)):
        if later > step:
            remove_tree(checkpoint_folder(folder, later).rename(folder / f"checkpoint-{later}.gone"))


def write_checkpoint(trainer: Any, folder: Path, log: Sequence[dict[str, Any]], add: Callable[[Path], Any]) -> None:
    """Write a new checkpoint's folder, whole or not at all.

    It holds the model or its adapter, the tokenizer, `trainer_state.json` with `log` as its `log_history` and, after
    the first step, the states of optimizer, scheduler and random numbers, under the names that the Trainer gives them;
    `add` writes what else belongs to it into the unfinished folder.
    """
    with stage_folder(folder) as unfinished:
        models.write_model(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, unfinished)
        if trainer.state.global_step:
            trainer._save_optimizer_and_scheduler(str(unfinished))
            trainer._save_rng_state(str(unfinished))
        state = copy.copy(trainer.state)
        state.log_history = list(log)
        state.save_to_json(str(unfinished / "trainer_state.json"))
        add(unfinished)


def keep_last_optimizer(folder: Path) -> None:
    """Remove the state of the optimizer from all checkpoints but the last."""
    for step in checkpoint_steps(folder)[:-1]:
        (checkpoint_folder(folder, step) / _OPTIMIZER).unlink(missing_ok=True)


class Unfinished:
    """The last state of a training on disk, from which it continues after a kill, until it is complete.

    Args:
        folder: Where; nothing else lies there.
        made_of: Everything that the training follows from: what another one has left does not count.
    """

    def __init__(self, folder: Path, *made_of: Any) -> None:
        self._folder = folder
        self._digest = hashlib.sha256(repr(made_of).encode()).hexdigest()

    @property
    def last(self) -> int:
        """Steps that are behind the state on disk; 0 if there is none of this training."""
        for step in reversed(checkpoint_steps(self._folder)):
            path = checkpoint_folder(self._folder, step) / _MADE_OF
            if path.is_file() and path.read_text() == self._digest:
                return step
        return 0

    @property
    def path(self) -> Path | None:
        """The checkpoint to continue from, None to begin."""
        return checkpoint_folder(self._folder, self.last) if self.last else None

    def keep(self, trainer: Any) -> None:
        """Write the present state in place of an earlier one."""
        make_folder(self._folder)
        number = trainer.state.global_step
        new = checkpoint_folder(self._folder, number)
        if new.is_dir():
            remove_tree(new)
        write_checkpoint(trainer, new, (), lambda folder: (folder / _MADE_OF).write_text(self._digest))
        for old in checkpoint_steps(self._folder):
            if old != number:
                remove_tree(checkpoint_folder(self._folder, old))

    def remove(self) -> None:
        """Remove it: the training is complete."""
        if self._folder.is_dir():
            remove_after(self._folder, -1)
            remove_tree(self._folder)
