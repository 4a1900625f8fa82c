"""A bank as a work plan: its members are the pieces, and the reduce puts their rows into one table."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from vestige.banks._design import Subset, run_seed
from vestige.banks._files import (
    BankManifest,
    Measured,
    Member,
    MemberFiles,
    open_members,
    read_manifest,
    require_same,
    update_table,
    write_manifest,
)
from vestige.banks._store import Bank, Texts, read_members, tabulate_texts
from vestige.errors import IndexMismatch, NonFinite, VestigeError
from vestige.files import make_folder, remove_strays
from vestige.folders import require_no_others
from vestige.launch import Compute


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


class Diverged(VestigeError):
    """A model of a bank ended in losses that are not finite; the others go on."""


@dataclass(frozen=True)
class BankPlan:
    """The models of a bank, and the finished bank; `plan_bank` makes its folder."""

    folder: Path
    manifest: BankManifest
    subsets: Sequence[Subset]
    texts: tuple[Texts, Texts]
    """Examples and queries."""
    seed: int
    train: Callable[[Run], Measured]
    """Trains a model and measures it."""
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
        return self._files.is_done(self._members[piece], weights=self.keep_weights)

    def weight(self, piece: int) -> float:  # noqa: ARG002
        """Return 1, for one model."""
        return 1.0

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Open what trains a member, measures it and writes the numbers."""
        make_folder(self._files.folder)
        diverged: dict[int, Diverged] = {}

        def compute(piece: int) -> None:
            # Training is deterministic: what diverged once would, in this process, diverge again.
            if piece in diverged:
                raise diverged[piece]
            try:
                self._train(piece)
            except NonFinite as error:
                member = self._members[piece]
                name = f"Model {piece} (subset {self.subsets[member.subset].name!r}, run {member.seed})"
                diverged[piece] = Diverged(f"{name}: {error}")
                raise diverged[piece] from error

        yield compute

    def reduce(self) -> Bank:
        """Return the finished bank, all members in one table.

        Raises:
            CorruptFile: Members are missing or damaged; the message lists them.
        """
        update_table(self.folder / "members.parquet", read_members(self.folder, self.manifest))
        return Bank.open(self.folder)

    def prepare(self) -> None:
        """Prepare the folder for `run_plan`: texts are there, and what was damaged no longer counts as done."""
        for kind, texts in zip(("examples", "queries"), self.texts, strict=True):
            update_table(self.folder / f"{kind}.parquet", tabulate_texts(texts))
        remove_strays(self.folder)
        for member in self._members:
            self._files.forget_damaged(member)

    @cached_property
    def _members(self) -> list[Member]:
        return self.manifest.members

    @cached_property
    def _files(self) -> MemberFiles:
        return open_members(self.folder, self.manifest)

    def _train(self, piece: int) -> None:
        member = self._members[piece]
        subset = self.subsets[member.subset]
        run = Run(
            subset.rows,
            run_seed(self.seed, None if self.paired else member.subset, member.seed),
            self._files.path(member, "-model") if self.keep_weights else None,
            self._files.path(member, "-unfinished.pt"),
            self.manifest.id,
        )
        measured = self.train(run)
        for name in ("query_loss", "example_loss"):
            if name in measured and (bad := np.flatnonzero(~np.isfinite(measured[name]))).size:
                raise NonFinite(
                    f"{name} is not finite in {bad.size} positions, the first in row {bad[0]}. Lower the learning "
                    "rate, or check that row."
                )
        self._files.write(member, subset.rows, measured)
        run.checkpoint.unlink(missing_ok=True)


def prepare_manifest(
    folder: Path, wanted: BankManifest, design: Callable[[int], list[Subset]]
) -> tuple[BankManifest, list[Subset]]:
    """Return the manifest that the folder holds from now on, and its subsets, which may be more than were wanted.

    A bank that is there is extended, or stays if it is larger.

    Raises:
        IndexMismatch: The bank in the folder was made with other settings; nothing was changed.
        UserError: The folder holds other files.
    """
    old = read_manifest(folder)
    if old is None:
        require_no_others(folder, ())
        merged = wanted
    else:
        require_same(folder, old, wanted)
        if len(design(len(old.subsets))) < len(old.subsets):
            raise IndexMismatch(
                f"The bank in {folder} has {len(old.subsets) - 1} lists to leave out, and {len(wanted.subsets) - 1} "
                "were given. Give all of them, with new ones behind, or another --out."
            )
        subsets = max(old.subsets, wanted.subsets, key=len)
        merged = replace(old, subsets=subsets, seeds=max(old.seeds, wanted.seeds))
    make_folder(folder)
    remove_strays(folder)
    if merged != old:
        write_manifest(folder, merged)
    make_folder(folder / "members")
    return merged, design(len(merged.subsets))
