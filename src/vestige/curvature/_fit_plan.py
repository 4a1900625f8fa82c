"""The passes of a Kronecker-factored curvature as work plans: any process that measures a piece writes equal bytes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vestige.curvature._fit import CurvatureData, SummingSink, added
from vestige.curvature._kfac import Eigenbasis, EigenCurvature, KroneckerFactor, KroneckerFactors
from vestige.launch import Compute, PieceFiles, step_done
from vestige.storage import make_folder, write_durably

Tensors = dict[str, Tensor]


@final
@dataclass(frozen=True)
class SumsPlan:
    """Sums over the training data and their result, stored in one file; a piece leaves the sums of its examples."""

    name: str
    folder: Path
    measured: CurvatureData
    sink: Callable[[], SummingSink]
    files: PieceFiles
    become: Callable[[Tensors], Tensors]
    """From the sums over all pieces to what is stored."""
    result: Path
    unit: str = "examples"

    @property
    def pieces(self) -> int:
        """Groups of batches."""
        return len(self.measured.groups)

    def is_done(self, piece: int) -> bool:
        """Return whether the sums of this piece are there, or all have been added up."""
        return self.files.is_done(piece) or self.result.exists()

    def weight(self, piece: int) -> float:
        """Return the number of its examples."""
        return sum(map(len, self.measured.groups[piece]))

    def open(self) -> AbstractContextManager[Compute]:
        """Return a context with what computes a piece: the model is already loaded."""
        return nullcontext(self._compute)

    def _compute(self, piece: int) -> None:
        sink = self.sink()
        self.measured.stream_piece(piece, sink, step_done)
        self.files.write(piece, sink.sums())

    def reduce(self) -> Tensors:
        """Return the result of the sums; delete the pieces.

        Raises:
            CorruptFile: a piece is missing or damaged.
        """
        found = read_tensors(self.result)
        if found is None:
            found = write_tensors(self.result, self.become(added(map(self.files.read, range(self.pieces)))))
        self.files.remove()
        return found

    def forget_damaged(self) -> None:
        """Delete what an earlier run left damaged, so that it does not count as done."""
        if read_tensors(self.result) is None:
            self.result.unlink(missing_ok=True)
        self.files.forget_damaged(range(self.pieces))


@final
@dataclass(frozen=True)
class BasesPlan:
    """The eigenvectors of every block, one piece each: computed by other processes they would be rounded otherwise."""

    folder: Path
    factors: KroneckerFactors
    files: PieceFiles
    name: str = "Eigenvectors"
    unit: str = "layers"

    @property
    def pieces(self) -> int:
        """The blocks that have two factors."""
        return len(self._numbers)

    def is_done(self, piece: int) -> bool:
        """Return whether the block's eigenvectors are there."""
        return self.files.is_done(piece)

    def weight(self, piece: int) -> float:  # noqa: ARG002
        """Return 1: every piece is one layer."""
        return 1

    def open(self) -> AbstractContextManager[Compute]:
        """Return a context with what computes a piece: the factors are already there."""
        return nullcontext(self._compute)

    def _compute(self, piece: int) -> None:
        factor = self.factors.factors[self._numbers[piece]]
        assert isinstance(factor, KroneckerFactor)
        found = factor.eigenbasis()._asdict()
        self.files.write(piece, {name: tensor for name, tensor in found.items() if tensor is not None})

    def reduce(self) -> EigenCurvature:
        """Return all of them.

        Raises:
            CorruptFile: one is missing or damaged.
        """
        place = {number: piece for piece, number in enumerate(self._numbers)}
        bases = []
        for number, factor in enumerate(self.factors.factors):
            if isinstance(factor, KroneckerFactor):
                read = self.files.read(place[number])
                bases.append(Eigenbasis(**{name: tensor.to(factor.left.device) for name, tensor in read.items()}))
            else:
                bases.append(Eigenbasis(None, None, factor))
        return EigenCurvature(self.factors.blocks, tuple(bases))

    @property
    def _numbers(self) -> list[int]:
        return [number for number, factor in enumerate(self.factors.factors) if isinstance(factor, KroneckerFactor)]


def read_tensors(path: Path) -> Tensors | None:
    """Return the tensors of a file, None if there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (FileNotFoundError, SafetensorError):
        return None


def write_tensors(path: Path, tensors: Tensors) -> Tensors:
    """Write the tensors and return them as the file holds them, so that a later run rounds alike."""
    kept = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    make_folder(path.parent)
    write_durably(path, [save(kept)])
    return kept
