"""The one pass as two work plans: every distinct gradient is computed once, by any worker.

The queries' gradients are kept on disk as factors (a few vectors a token, less than the gradients themselves) while the
candidates' are computed, piece by piece, and multiplied with them. What stays is a table of products by component.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
from pydantic import FiniteFloat
from safetensors import safe_open
from torch import Tensor

from vestige.data import make_batch
from vestige.errors import CorruptFile
from vestige.evaluate._component_compared import Compared, Portion, digest
from vestige.evaluate._component_pass import OnePass, Passed, as_tensors, one_pass, read_passed
from vestige.evaluate._component_tables import Tables
from vestige.launch import Compute, PieceFiles, step_done
from vestige.parsing import as_record, parse_object
from vestige.storage import make_folder, write_durably


@final
@dataclass(frozen=True)
class QueryGradients:
    """The gradients of all queries as factors on disk, each computed once."""

    compared: Compared
    name: str = "Query gradients"
    unit: str = "examples"

    @property
    def folder(self) -> Path:
        """The folder of the evaluation."""
        return self.compared.folder

    @cached_property
    def files(self) -> PieceFiles:
        """The files of the gradients until the products are done."""
        kept = {name: value for name, value in self.compared.identity.items() if name != "pairs"}
        return PieceFiles(self.folder / "gradients", digest(kept))

    @property
    def pieces(self) -> int:
        """Groups of batches."""
        return len(self.compared.held)

    def is_done(self, piece: int) -> bool:
        """Return whether this piece's gradients are there."""
        return self.files.is_done(piece)

    def weight(self, piece: int) -> float:
        """Return the number of the piece's examples."""
        return sum(map(len, self.compared.held[piece]))

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Open the model with its taps."""
        with _pass_of(self.compared) as runs:
            yield lambda piece: self._fill(piece, runs)

    def _fill(self, piece: int, runs: OnePass) -> None:
        tensors: dict[str, Tensor] = {}
        spent: list[Mapping[str, float]] = []
        for number, batch in enumerate(self.compared.held[piece]):
            passed = runs.run(make_batch(self.compared.data, batch))
            tensors |= as_tensors(passed, str(number))
            spent.append(passed.seconds)
            step_done(len(batch))
        self.files.write(piece, tensors)
        write_seconds(self.folder, f"queries-{piece:05d}", self.weight(piece), spent)

    def reduce(self) -> None:
        """Do nothing: the pieces themselves are read."""

    def read(self, piece: int, batches: Sequence[int]) -> list[Passed]:
        """Read some batches of a piece; its bytes are compared with its marker once in a process.

        Raises:
            CorruptFile: it is missing or damaged.
        """
        if piece not in self._checked:
            self.files.check(piece)
            self._checked.add(piece)
        device = next(self.compared.loaded.model.parameters()).device
        names = {str(number) for number in batches}
        with safe_open(self.files.path(piece), "pt") as file:
            keys = [key for key in file.keys() if key.partition(".")[0] in names]  # noqa: SIM118 (not a dict)
            tensors = {key: file.get_tensor(key) for key in keys}
        return [read_passed(tensors, str(number), self.compared.components, device) for number in batches]

    @cached_property
    def _checked(self) -> set[int]:
        return set()


@final
@dataclass(frozen=True)
class CandidateProducts:
    """Products of the queries' gradients with the candidates', which are computed once and never kept."""

    compared: Compared
    queries: QueryGradients
    name: str = "Products"
    unit: str = "examples"

    @property
    def folder(self) -> Path:
        """The folder of the evaluation."""
        return self.compared.folder

    @cached_property
    def files(self) -> PieceFiles:
        """The table of products; it stays."""
        return PieceFiles(self.folder / "products", digest(self.compared.identity))

    @property
    def pieces(self) -> int:
        """Portions of the candidates."""
        return len(self.compared.portions)

    def is_done(self, piece: int) -> bool:
        """Return whether the piece's products are there."""
        return self.files.is_done(piece)

    def weight(self, piece: int) -> float:
        """Return the number of the piece's candidates."""
        return len(self.compared.portions[piece].rows)

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Open the model with its taps."""
        with _pass_of(self.compared) as runs:
            yield lambda piece: self._fill(piece, runs)

    def _fill(self, piece: int, runs: OnePass) -> None:
        portion = self.compared.portions[piece]
        spent: list[Mapping[str, float]] = []
        if portion.held is None:
            found = [runs.run(make_batch(self.compared.data, batch)) for batch in portion.batches]
            spent += [passed.seconds for passed in found]
        else:
            found = self.queries.read(portion.held, range(len(portion.batches)))
        tables = Tables(self.compared.wanted[:, portion.rows], portion.rows, found, self.compared.projections)
        for number, batches in enumerate(self.compared.held):
            asked = [place for place, rows in enumerate(batches) if piece == 0 or self._asks(rows, portion)]
            for place, passed in zip(asked, self.queries.read(number, asked) if asked else [], strict=True):
                tables.add(batches[place], passed, portion.batches, found)
        self.files.write(piece, tables.tensors(with_queries=piece == 0))
        write_seconds(
            self.folder,
            f"candidates-{piece:05d}",
            len(portion.rows) if portion.held is None else 0,
            [*spent, tables.seconds],
        )
        step_done(len(portion.rows))

    def _asks(self, rows: np.ndarray, portion: Portion) -> bool:
        return bool(self.compared.wanted[np.ix_(rows, portion.rows)].any())

    def reduce(self) -> list[dict[str, Tensor]]:
        """Return the tables of all pieces; delete the queries' gradients.

        Raises:
            CorruptFile: a piece is missing or damaged.
        """
        tables = [self.files.read(piece) for piece in range(self.pieces)]
        self.queries.files.remove()
        return tables


class _Spent(NamedTuple):
    computed: int
    seconds: dict[str, FiniteFloat]


def write_seconds(folder: Path, name: str, computed: float, spent: Sequence[Mapping[str, float]]) -> None:
    """Write the cost of a piece beside the pieces: their bytes depend on no clock."""
    make_folder(folder / "seconds")
    total: dict[str, float] = {}
    for one in spent:
        for key, value in one.items():
            total[key] = total.get(key, 0.0) + value
    content = json.dumps(_Spent(int(computed), total)._asdict())
    write_durably(folder / "seconds" / f"{name}.json", [content.encode()])


def read_seconds(folder: Path) -> tuple[int, dict[str, float]]:
    """Return how many gradients were computed for the result that is there, and the seconds of everything.

    Raises:
        CorruptFile: A file is not what Vestige writes.
    """
    computed, total = 0, dict[str, float]()
    for path in sorted((folder / "seconds").glob("*.json")):
        try:
            spent = as_record(_Spent, parse_object(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise CorruptFile(f"{path} is damaged ({error}). Delete it: it says only what the work cost.") from None
        computed += spent.computed
        for key, value in spent.seconds.items():
            total[key] = total.get(key, 0.0) + value
    return computed, total


@contextmanager
def _pass_of(compared: Compared) -> Iterator[OnePass]:
    with one_pass(compared.loaded, compared.components, compared.loss, compared.projections) as runs:
        yield runs
