"""A bank as a work plan: its members are the pieces, and the reduce puts their rows into one table."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vestige.banks._design import Subset, run_seed
from vestige.banks._manifest import BankManifest, prepare_folder, read_manifest, require_same
from vestige.banks._members import Measured, Member, MemberFiles, write_table
from vestige.banks._store import Bank, Texts, member_files, members_of, members_table, texts_table
from vestige.errors import IndexMismatch, NonFinite, VestigeError
from vestige.launch import Compute
from vestige.storage import make_folder, remove_strays


@dataclass(frozen=True)
class Run:
    """One model to train: on what, from which seed, and where it may leave files."""

    rows: np.ndarray
    """Rows of the data, sorted."""
    seed: int
    weights: Path | None
    """Where to save the trained model, None not to."""
    checkpoint: Path
    """Where to save it while it is trained."""
    id: str
    """Of the bank: a checkpoint of another one does not count."""


TrainMember = Callable[[Run], Measured]
"""Trains a model and measures it."""


class Diverged(VestigeError):
    """A model of a bank ended in losses that are not finite; the others go on."""


@dataclass(frozen=True)
class BankPlan:
    """The models of a bank, and the finished bank; `prepare_bank` makes it and its folder."""

    folder: Path
    manifest: BankManifest
    subsets: Sequence[Subset]
    texts: tuple[Texts, Texts]
    """Examples and queries."""
    seed: int
    open_trainer: Callable[[], AbstractContextManager[TrainMember]]
    paired: bool
    """Whether runs of the same number share their seed across subsets."""
    keep_weights: bool = False
    name: str = "Bank"
    unit: str = "models"

    @property
    def pieces(self) -> int:
        """Number of members."""
        return len(self._members)

    def is_done(self, piece: int) -> bool:
        """Return whether the member is marked as done and its file has the right size."""
        return self._files.is_done(*self._members[piece], weights=self.keep_weights)

    def weight(self, piece: int) -> float:  # noqa: ARG002
        """Return 1, for one model."""
        return 1.0

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Open what trains a member, measures it and writes the numbers."""
        make_folder(self._files.folder)
        diverged: dict[int, Diverged] = {}
        with self.open_trainer() as train:

            def compute(piece: int) -> None:
                # Training is deterministic: what diverged once would, in this process, diverge again.
                if piece in diverged:
                    raise diverged[piece]
                try:
                    self._train(piece, train)
                except NonFinite as error:
                    diverged[piece] = Diverged(f"{self._described(piece)}: {error}")
                    raise diverged[piece] from error

            yield compute

    def reduce(self) -> Bank:
        """Return the finished bank, all members in one table.

        Raises:
            CorruptFile: Members are missing or damaged; the message lists them.
        """
        write_table(self.folder / "members.parquet", members_table(self.folder, self.manifest))
        return Bank.open(self.folder)

    def forget_damaged(self) -> None:
        """Unmark members as done whose bytes are not what was written."""
        for member, digest in self._members:
            self._files.forget_damaged(member, digest)

    @cached_property
    def _members(self) -> list[tuple[Member, str]]:
        return members_of(self.manifest)

    @cached_property
    def _files(self) -> MemberFiles:
        return member_files(self.folder, self.manifest)

    def _train(self, piece: int, train: TrainMember) -> None:
        member, digest = self._members[piece]
        subset = self.subsets[member.subset]
        run = Run(
            subset.rows,
            run_seed(self.seed, None if self.paired else member.subset, member.seed),
            self._files.weights(member) if self.keep_weights else None,
            self._files.checkpoint(member),
            self.manifest.id,
        )
        measured = train(run)
        _require_finite(measured)
        self._files.write(member, digest, subset.rows, measured)
        run.checkpoint.unlink(missing_ok=True)

    def _described(self, piece: int) -> str:
        member, _ = self._members[piece]
        return f"Model {piece} (subset {self.subsets[member.subset].name!r}, run {member.seed})"


def prepare_bank(plan: BankPlan) -> None:
    """Prepare the folder for `run_plan`: texts are there, and what was damaged no longer counts as done."""
    for kind, texts in zip(("examples", "queries"), plan.texts, strict=True):
        write_table(plan.folder / f"{kind}.parquet", texts_table(texts))
    remove_strays(plan.folder)
    plan.forget_damaged()


def planned_bank(
    folder: Path, wanted: BankManifest, subsets_of: Callable[[int], list[Subset]]
) -> tuple[BankManifest, list[Subset]]:
    """Return the manifest that the folder holds now, and its subsets, which may be more than were wanted.

    Raises:
        IndexMismatch: The bank in the folder was made with other settings; nothing was changed.
    """
    old = read_manifest(folder)
    if old is not None:
        require_same(folder, old, wanted)
        if len(subsets_of(len(old.subsets))) < len(old.subsets):
            raise IndexMismatch(
                f"The bank in {folder} has {len(old.subsets) - 1} lists to leave out, and {len(wanted.subsets) - 1} "
                "were given. Give all of them, with new ones behind, or another --out."
            )
    manifest = prepare_folder(folder, wanted)
    return manifest, subsets_of(len(manifest.subsets))


def _require_finite(measured: Measured) -> None:
    for name in ("query_loss", "example_loss"):
        if name in measured and (bad := np.flatnonzero(~np.isfinite(measured[name]))).size:
            raise NonFinite(
                f"{name} is not finite in {bad.size} positions, the first in row {bad[0]}. Lower the learning rate, or "
                "check that row."
            )
