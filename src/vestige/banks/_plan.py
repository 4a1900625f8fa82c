"""A bank whose members are pieces of work; a bank of anything that the caller's function trains."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vestige.banks._design import Subset, make_design, run_seed
from vestige.banks._files import (
    BANK_FORMAT,
    BankManifest,
    Measured,
    Member,
    MemberFiles,
    list_subsets,
    open_members,
    prepare_manifest,
    remove_bank,
    update_table,
)
from vestige.banks._store import Bank, Texts, read_members, tabulate_texts
from vestige.errors import NonFinite, SpecError, VestigeError
from vestige.jobs import Compute, Pieces, is_worker, run_pieces
from vestige.settings import LaunchSettings
from vestige.storage import make_folder, remove_strays, remove_tree


@dataclass(frozen=True)
class Run:
    """One model to train: on what, from which seed, and where it may leave files."""

    rows: np.ndarray
    """Rows of the data, sorted."""
    seed: int
    weights: Path | None
    """Where to save the trained model, None not to."""
    unfinished: Path
    """Folder of its state while it is trained."""
    id: str
    """Of the bank: what another one has left does not count."""
    member: Member
    """Which of the bank's models it is."""


class Diverged(VestigeError):
    """A model of a bank ended in losses that are not finite; the others go on."""


@dataclass(frozen=True)
class BankWork:
    """The models of a bank, and the finished bank; `prepare_manifest` makes its folder."""

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

    def run(self, settings: LaunchSettings, command: Sequence[str] | None) -> Bank:
        """Train the members that are missing and return the bank, as `run_pieces` does."""
        if not is_worker():
            for kind, texts in zip(("examples", "queries"), self.texts, strict=True):
                update_table(self.folder / f"{kind}.parquet", tabulate_texts(texts))
            remove_strays(self.folder)
            for member in self.manifest.members:
                self._files.forget_damaged(member)
        pieces = Pieces(
            name="Bank",
            unit="models",
            folder=self.folder,
            weights=[1] * len(self.manifest.members),
            is_done=lambda piece: self._files.is_done(self.manifest.members[piece], weights=self.keep_weights),
            open=self._open,
            reduce=self._reduce,
        )
        return run_pieces(pieces, settings, command)

    @contextmanager
    def _open(self) -> Iterator[Compute]:
        """Yield what trains a member, measures it and writes the numbers."""
        make_folder(self._files.folder)
        diverged: dict[int, Diverged] = {}

        def compute(piece: int) -> None:
            # Training is deterministic: what diverged once would, in this process, diverge again.
            if piece in diverged:
                raise diverged[piece]
            try:
                self._train(piece)
            except NonFinite as error:
                member = self.manifest.members[piece]
                name = f"Model {piece} (subset {self.subsets[member.subset].name!r}, run {member.seed})"
                diverged[piece] = Diverged(f"{name}: {error}")
                raise diverged[piece] from error

        yield compute

    def _reduce(self) -> Bank:
        """Return the finished bank, all members in one table."""
        update_table(self.folder / "members.parquet", read_members(self.folder, self.manifest))
        return Bank.open(self.folder)

    @cached_property
    def _files(self) -> MemberFiles:
        return open_members(self.folder, self.manifest)

    def _train(self, piece: int) -> None:
        member = self.manifest.members[piece]
        subset = self.subsets[member.subset]
        run = Run(
            subset.rows,
            run_seed(self.seed, None if self.paired else member.subset, member.seed),
            self._files.path(member, "-model") if self.keep_weights else None,
            self._files.path(member, "-unfinished"),
            self.manifest.id,
            member,
        )
        measured = self.train(run)
        for name in ("query_loss", "example_loss"):
            if name in measured and (bad := np.flatnonzero(~np.isfinite(measured[name]))).size:
                raise NonFinite(
                    f"{name} is not finite in {bad.size} positions, the first in row {bad[0]}. Lower the learning "
                    "rate, or check that row."
                )
        self._files.write(member, subset.rows, measured)
        remove_tree(run.unfinished)


TrainFunction = Callable[[np.ndarray, int], np.ndarray | Measured]
"""From rows to train on, sorted, and a seed to the losses of the queries [query], or to several columns by name, such
as `query_loss`, `query_margin`, `example_loss`."""


def bank_of(
    train: TrainFunction,
    *,
    examples: int | Sequence[str],
    queries: int | Sequence[str],
    out: str | Path,
    settings: Mapping[str, Any],
    subsets: int = 50,
    fraction: float = 0.5,
    sources: Sequence[str] | None = None,
    leave_source_out: bool = False,
    leave_out: Mapping[str, Sequence[int]] | None = None,
    leave_one_out: int | None = None,
    groups: Sequence[str | int] | None = None,
    seeds: int = 2,
    seed: int = 0,
    retries: int = 0,
    overwrite: bool = False,
    launch: LaunchSettings | None = None,
    command: Sequence[str] | None = None,
) -> Bank:
    """Make a bank of models that `train` trains: the same folder, the same `Bank`, for any model and framework.

    Killed at any moment, the same call continues; called in several processes at once, they share the work.

    Args:
        train: Trains on rows with a seed, and returns what is measured, in float64.
        examples: How many there are to train on, or their ids.
        queries: How many losses `train` returns, or their ids.
        out: Folder of the bank.
        settings: Everything that the numbers follow from, in JSON terms: the data by a name or a hash, the model, the
            recipe. It becomes the bank's identity together with the text of `train` itself, and a bank made with other
            settings is refused.
        subsets: Random subsets, unless something is left out.
        fraction: Share of the examples in each.
        sources: Of the examples.
        leave_source_out: Everything, then all but each source.
        leave_out: Everything, then all but each of these lists of rows.
        leave_one_out: Everything, then all but one, for N examples.
        groups: Which group each example belongs to: random subsets hold, and `leave_one_out` leaves out, all of a group
            or none of it. Copies of one example belong together, or what it teaches is never left out. Not given:
            each is a group of its own.
        seeds: Runs of each subset.
        seed: Of the subsets and the runs.
        retries: How often a run that raised is tried again.
        overwrite: Delete a bank that is already there.
        launch: Where the models are trained, `retries` included; None for this process.
        command: Words of a command that comes to the same call in another process; workers need one.

    Raises:
        SpecError: Settings that JSON cannot hold, or two ways to leave out.
        IndexMismatch: The bank in `out` was made with other settings.
        PieceFailed: `train` raised, or returned losses that are not finite; all other members are done.
    """
    if sum([leave_source_out, leave_out is not None, leave_one_out is not None]) > 1:
        raise SpecError("leave_source_out, leave_out and leave_one_out each need a bank of their own.")
    out, texts = Path(out), (_texts(examples, sources), _texts(queries, None))
    numbers = _number(groups, len(texts[0].ids))
    if overwrite and not is_worker():
        remove_bank(out)
    lists = None if leave_out is None else {name: np.array(rows) for name, rows in leave_out.items()}
    design = make_design(
        texts[0].ids,
        texts[0].sources,
        numbers,
        seed,
        fraction=fraction,
        leave_source_out=leave_source_out,
        leave_out=lists,
        leave_one_out=leave_one_out,
    )
    wanted = design(subsets if leave_one_out is None else leave_one_out + 1)
    paired = leave_source_out or leave_out is not None or leave_one_out is not None
    identity = _identify(train, texts, settings) | {"fraction": None if paired else fraction, "seed": seed}
    manifest, chosen = prepare_manifest(out, BankManifest(identity, list_subsets(wanted), seeds, {}), design)

    def train_member(run: Run) -> Measured:
        result = train(run.rows.copy(), run.seed)
        return result if isinstance(result, Mapping) else {"query_loss": np.asarray(result)}

    work = BankWork(out, manifest, chosen, texts, seed, train_member, paired)
    return work.run(launch or LaunchSettings.model_validate({"retries": retries}), command)


def _number(groups: Sequence[str | int] | None, count: int) -> np.ndarray:
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise SpecError(f"There are {len(groups)} groups for {count} examples.")
    number = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    return np.array([number[group] for group in groups], dtype=np.int64)


def _texts(given: int | Sequence[str], sources: Sequence[str] | None) -> Texts:
    ids = [str(row) for row in range(given)] if isinstance(given, int) else list(given)
    if sources is not None and len(sources) != len(ids):
        raise SpecError(f"There are {len(sources)} sources for {len(ids)} examples.")
    known: list[str | None] = [None] * len(ids) if sources is None else [*sources]
    return Texts(ids, known, [None] * len(ids), np.ones(len(ids), dtype=np.int64))


def _identify(train: TrainFunction, texts: tuple[Texts, Texts], settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain = json.loads(json.dumps(dict(settings)))
    except TypeError as error:
        raise SpecError(f"settings: {error}. Give numbers, texts, lists and mappings of them.") from error
    counts = {"examples": len(texts[0].ids), "query_count": len(texts[1].ids)}
    names = {"ids": hashlib.sha256(repr(texts[0].ids + texts[1].ids).encode()).hexdigest()[:16]}
    clash = {"format", "function", "fraction", "seed", *counts, *names} & set(plain)
    if clash:
        raise SpecError(f"settings: {', '.join(sorted(clash))} are names that the bank itself uses. Choose others.")
    return {"format": BANK_FORMAT, "function": _source(train), **counts, **names, **plain}


def _source(function: TrainFunction) -> str:
    name = getattr(function, "__qualname__", type(function).__name__)
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return name
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
