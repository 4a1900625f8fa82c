"""What the pieces of a plan leave on disk: tensors in one file each, and a marker that says they are whole.

The marker is written last and carries the fingerprint of everything that decides the piece, so that a piece of other
settings, of another version or of a damaged disk is never taken for this one.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vestige.errors import CorruptFile
from vestige.lockstep import decided, is_first
from vestige.parsing import as_record, parse_object
from vestige.storage import make_folder, remove_durably, remove_strays, sha256_of, write_durably

if TYPE_CHECKING:
    from torch import Tensor


class PieceMarker(NamedTuple):
    """What `00012.json` says about `00012.safetensors`."""

    piece: int
    bytes: int
    sha256: str
    input: str
    """Fingerprint of everything that decides the piece's content."""


@dataclass(frozen=True)
class PieceFiles:
    """Numbered pieces of tensors in a folder, all made from the same `input`."""

    folder: Path
    input: str
    """Fingerprint of settings, inputs and code: a piece with another one does not count as done."""

    def is_done(self, piece: int) -> bool:
        """Return whether the piece is marked as done for this input and its file has the right size; read no tensor."""
        marker = self._marker(piece)
        if marker is None or marker.input != self.input:
            return False
        try:
            return self.path(piece).stat().st_size == marker.bytes
        except FileNotFoundError:
            return False

    def write(self, piece: int, tensors: "dict[str, Tensor]") -> None:
        """Write the piece to disk, whole, and then mark it so; in a process group the first process writes it."""
        if not is_first():
            return
        # Torch is imported where it is needed: `vestige status` and a driver that only waits do without.
        from safetensors.torch import save

        make_folder(self.folder)
        # A marker of an earlier file must not vouch for the new one while that is being written.
        if self._marker_path(piece).exists():
            remove_durably(self._marker_path(piece))
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        written = write_durably(self.path(piece), [save(content)])
        marker = PieceMarker(piece, written.bytes, written.sha256, self.input)
        write_durably(self._marker_path(piece), [(json.dumps(marker._asdict(), indent=1) + "\n").encode()])

    def read(self, piece: int) -> "dict[str, Tensor]":
        """Read the tensors of a piece.

        Raises:
            CorruptFile: it is missing, of another input, or its bytes are not those in its marker.
        """
        from safetensors.torch import load

        self.check(piece)
        return load(self.path(piece).read_bytes())

    def check(self, piece: int) -> None:
        """Raise unless the piece is done and every byte of it is what was written.

        Raises:
            CorruptFile: it is not.
        """
        marker = self._marker(piece)
        if marker is None or not self.is_done(piece) or sha256_of(self.path(piece)) != marker.sha256:
            raise CorruptFile(f"{self.path(piece)} is missing or damaged. Run the same command again: it is redone.")

    def forget_damaged(self, pieces: Sequence[int]) -> list[int]:
        """Undo those of these pieces that are marked as done and whose bytes have changed; return their numbers.

        Reads every byte. Call it once before the work, so that a reduce finds nothing damaged after it.
        """
        return decided(lambda: self._forget_damaged(pieces))

    def _forget_damaged(self, pieces: Sequence[int]) -> list[int]:
        damaged = []
        for piece in pieces:
            marker = self._marker(piece)
            if marker is not None and self.is_done(piece) and sha256_of(self.path(piece)) != marker.sha256:
                remove_durably(self._marker_path(piece))
                damaged.append(piece)
        if self.folder.is_dir():
            remove_strays(self.folder)
        return damaged

    def fingerprint(self, pieces: Sequence[int]) -> str:
        """Return the sha256 over the contents of these pieces, from their markers."""
        markers = [self._marker(piece) for piece in pieces]
        return hashlib.sha256(json.dumps([marker and marker.sha256 for marker in markers]).encode()).hexdigest()

    def remove(self) -> None:
        """Remove the folder with all that is in it; two processes that remove it at once do no harm."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, piece: int) -> Path:
        """Return the path of a piece's tensors."""
        return self.folder / f"{piece:05d}.safetensors"

    def _marker_path(self, piece: int) -> Path:
        return self.folder / f"{piece:05d}.json"

    def _marker(self, piece: int) -> PieceMarker | None:
        """Return the marker, None if there is none or it does not read."""
        try:
            return as_record(PieceMarker, parse_object(self._marker_path(piece).read_bytes()))
        except (OSError, ValueError):
            return None
