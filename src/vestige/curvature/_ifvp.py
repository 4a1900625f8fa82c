"""Preconditioned gradients of every example of an index on disk, shard by shard.

Scores need none of these: Vestige preconditions the few queries instead. They are for programs that work on
`(F + d I)^-1 g` itself, such as clustering or a search for neighbours under the curvature.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.curvature._fisher import DampedInverse
from vestige.errors import CorruptFile, IndexMismatch, UserError
from vestige.indexes import Index
from vestige.launch import JOB_FILES, Compute, PieceFiles, step_done
from vestige.parsing import parse_object
from vestige.storage import check_disk, make_folder, remove_durably, require_no_others, write_durably

RECORD = "preconditioned.json"
FORMAT = 1

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_OURS = (f"{'[0-9]' * 5}.json", f"{'[0-9]' * 5}.safetensors", "preconditioned.json", "profile.json", *JOB_FILES)


class PreconditionedBlock(NamedTuple):
    """Preconditioned gradients of one shard of an index."""

    example: Int[Tensor, "row"]
    """Positions of the rows' examples in the data."""
    gradients: Float[Tensor, "row column"]
    """`(F + d I)^-1 g`, columns as in the index."""


@dataclass(frozen=True)
class PreconditionedPlan:
    """`(F + d I)^-1 g` of every row of an index, one piece for each of its shards."""

    index: Index
    inverse: DampedInverse
    damping: float
    folder: Path
    dtype: Literal["float32", "bfloat16"] = "float32"
    name: str = "Preconditioning"
    unit: str = "examples"

    @property
    def pieces(self) -> int:
        """The shards of the index."""
        return len(self.index.manifest.shard_rows)

    def is_done(self, piece: int) -> bool:
        """Return whether this shard's file is there, whole, and of this index and damping."""
        return self._files.is_done(piece)

    def weight(self, piece: int) -> float:
        """Return the number of its rows."""
        return self.index.manifest.shard_rows[piece]

    def prepare(self) -> None:
        """Raise unless the folder can take the files; delete damaged ones of an earlier run.

        Raises:
            IndexMismatch: it holds those of another index or damping.
            UserError: it holds other files.
            DiskSpaceError: they would not fit.
        """
        _require_ours(self.folder, self._record())
        self._files.forget_damaged(range(self.pieces))
        rows = sum(self.weight(piece) for piece in range(self.pieces) if not self.is_done(piece))
        check_disk(self.folder, round(rows * (self.index.width * _DTYPES[self.dtype].itemsize + 8)))
        make_folder(self.folder)

    def open(self) -> AbstractContextManager[Compute]:
        """Return a context with `compute`: the matrices are already there."""
        return nullcontext(self.compute)

    def compute(self, piece: int) -> None:
        """Write the preconditioned gradients of one shard."""
        example, solved = [], []
        for block in self.index.blocks(shards=range(piece, piece + 1)):
            example.append(block.example)
            solved.append(self.inverse.apply(block.gradients).to(_DTYPES[self.dtype]))
            step_done(len(block.example))
        self._files.write(piece, {"example": torch.cat(example), "gradients": torch.cat(solved)})

    def reduce(self) -> Path:
        """Write the record when all files are there; without it they do not count.

        Raises:
            CorruptFile: one is missing or damaged.
        """
        for piece in range(self.pieces):
            self._files.check(piece)
        write_durably(self.folder / RECORD, [(json.dumps(self._record(), indent=1) + "\n").encode()])
        return self.folder

    @cached_property
    def _files(self) -> PieceFiles:
        text = f"preconditioned {FORMAT} {self.index.fingerprint} {self.damping!r} {self.dtype}"
        return PieceFiles(self.folder, hashlib.sha256(text.encode()).hexdigest())

    def _record(self) -> dict[str, Any]:
        components = [[part.name, part.start, part.stop] for part in self.index.manifest.components]
        return {
            "format": FORMAT,
            "input": self._files.input,
            "index": self.index.fingerprint,
            "damping": self.damping,
            "dtype": self.dtype,
            "files": self.pieces,
            "rows": self.index.rows,
            "components": components,
        }


def read_preconditioned(folder: str | Path) -> Iterator[PreconditionedBlock]:
    """Yield what `vestige precondition --out` left, shard by shard; every file is compared with its checksum.

    Raises:
        UserError: nothing is there, or not all of it.
        CorruptFile: a file is damaged.
    """
    folder = Path(folder)
    record = _read_record(folder)
    if record is None:
        raise UserError(
            f"There are no complete preconditioned gradients in {folder}. Make or complete them with: "
            f"vestige precondition INDEX --out {folder}"
        )
    if not isinstance(record.get("input"), str) or not isinstance(record.get("files"), int):
        raise CorruptFile(f"{folder / RECORD} is not what Vestige writes. Run `vestige precondition` again.")
    files = PieceFiles(folder, record["input"])
    for piece in range(record["files"]):
        yield PreconditionedBlock(**files.read(piece))


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        return parse_object((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None


def _require_ours(folder: Path, record: dict[str, Any]) -> None:
    """Raise unless the folder is absent, empty, or holds these files or their beginning."""
    require_no_others(folder, _OURS)
    old = _read_record(folder)
    if old is not None and old.get("input") != record["input"]:
        differing = ", ".join(key for key in ("index", "damping", "dtype") if old.get(key) != record[key])
        raise IndexMismatch(
            f"{folder} holds preconditioned gradients with another {differing}; nothing was changed. "
            "Give another --out, or delete that folder."
        )
    if old is None and (folder / RECORD).exists():
        remove_durably(folder / RECORD)
