"""A bank opened again: who was trained on what, and what came of it, as arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jaxtyping import Bool, Float, Int

from vestige.banks._files import BankManifest, open_members, read_manifest
from vestige.errors import CorruptFile, DataError, IndexMismatch, UserError
from vestige.registry import Registry

Weights = dict[str, Any]
Measure = Callable[[Weights], np.ndarray]
"""From the state of one model to the losses of the queries, [query]."""


class Texts(NamedTuple):
    """The examples or the queries of a bank; what is not known is None."""

    ids: list[str]
    sources: list[str | None]
    labels: list[str | None]
    targets: Int[np.ndarray, "text"]
    """Target tokens of each; 1 where texts are not language."""


@dataclass(frozen=True)
class TruthFormat:
    """A layout in which other software leaves ground truth, read as a bank; announced in "vestige.truth_formats"."""

    expected: str
    """What it looks like, for the message that there is no bank: "dattri's (metadata.yml)"."""
    matches: Callable[[Path], bool]
    """Whether a path is in this layout, from the names of files alone."""
    read: "Callable[[Path, Measure | None, int | None], Bank]"
    """The bank at a path, given `measure` and `examples` of `Bank.open`."""


TRUTH_FORMATS: Registry[TruthFormat] = Registry("vestige.truth_formats", "layout of ground truth", TruthFormat)


@final
class Bank:
    """Models trained on subsets of the same data: row `m` of every array is member `m`.

    Members are ordered by subset, and within a subset by seed. Losses are in nats, and falling ones mean that the
    model predicts the text better; margins, gaps and accuracies rise.
    """

    def __init__(
        self, identity: dict[str, Any], names: list[str], table: pa.Table, examples: Texts, queries: Texts, id: str
    ) -> None:
        """Use `Bank.open`: `names` are those of the subsets, `table` has a row per member as members are stored.

        `identity` holds every setting that the numbers follow from; `id` is empty for a bank that was made elsewhere.
        """
        self.id, self.identity, self.subset_names = id, identity, names
        self._table = table
        self.example_ids, self.sources, self.labels = examples.ids, examples.sources, examples.labels
        """Of each training example, in row order."""
        self.query_ids, self.query_sources = queries.ids, queries.sources
        """Of each query, in row order."""
        self.example_targets, self.query_targets = examples.targets, queries.targets
        """Target tokens of each."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        allow_missing: bool = False,
        measure: Measure | None = None,
        examples: int | None = None,
    ) -> "Bank":
        """Open the bank in a folder, or ground truth that other software has left there.

        Args:
            path: A folder that `vestige bank` or `bank_of` made; or, with the recipes installed, ground truth in a
                layout of other software (dattri's, GraSS's, a table of subsets and losses). See docs/bank.md.
            allow_missing: Also open a bank of which members are missing; there is a row for each that is done.
            measure: For a layout that holds weights and no losses: turns the state of one model into losses [query].
            examples: How many training examples there are, where the files do not say; the largest row that a subset
                names is the last one if not given.

        Raises:
            DataError: There is no bank, or it does not read.
            CorruptFile: Members are missing or damaged.
        """
        path = Path(path).expanduser()
        manifest = read_manifest(path) if path.is_dir() else None
        if manifest is None:
            return _read_truth(path, measure, examples)
        table = None if allow_missing else _read_whole(path / "members.parquet")
        if table is None or len(table) != len(manifest.subsets) * manifest.seeds:
            table = read_members(path, manifest, allow_missing=allow_missing)
        names = [name for name, _ in manifest.subsets]
        texts = [_read_texts(path / f"{kind}.parquet") for kind in ("examples", "queries")]
        return cls(manifest.identity, names, table, texts[0], texts[1], manifest.id)

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self._table)

    def __repr__(self) -> str:
        return (
            f"Bank({len(self)} models, {len(self.subset_names)} subsets, {len(self.example_ids)} examples, "
            f"{len(self.query_ids)} queries)"
        )

    @cached_property
    def subsets(self) -> Int[np.ndarray, "member"]:
        """Number of the subset that each member was trained on, an index of `subset_names`."""
        return self._table["subset"].to_numpy()

    @cached_property
    def seeds(self) -> Int[np.ndarray, "member"]:
        """The number of each member among the runs on its subset."""
        return self._table["seed"].to_numpy()

    @cached_property
    def membership(self) -> Bool[np.ndarray, "member example"]:
        """True where the member was trained on the example."""
        count = len(self.example_ids)
        packed = [np.frombuffer(row.as_py(), dtype=np.uint8) for row in self._table["rows"]]
        if not packed:
            return np.zeros((0, count), dtype=bool)
        return np.unpackbits(np.stack(packed), axis=1, count=count, bitorder="little").astype(bool)

    @property
    def query_losses(self) -> Float[np.ndarray, "member query"]:
        """Loss of each query under each member, summed or averaged over its target tokens, as the settings say."""
        return self.values("query_loss")

    @property
    def example_losses(self) -> Float[np.ndarray, "member example"]:
        """Loss of each training example under each member, trained on it or not."""
        return self.values("example_loss")

    @property
    def query_token_losses(self) -> Float[np.ndarray, "member query"]:
        """Mean loss per target token of each query; NaN where there is none."""
        return self._per_token(self.query_losses, self.query_targets)

    @property
    def example_token_losses(self) -> Float[np.ndarray, "member example"]:
        """Mean loss per target token of each training example; NaN where there is none."""
        return self._per_token(self.example_losses, self.example_targets)

    @property
    def query_margins(self) -> Float[np.ndarray, "member query"]:
        """log(p / (1 - p)), p being the geometric mean of the probabilities of a query's target tokens."""
        return self.values("query_margin")

    @property
    def example_margins(self) -> Float[np.ndarray, "member example"]:
        """log(p / (1 - p)), p being the geometric mean of the probabilities of an example's target tokens."""
        return self.values("example_margin")

    def holds(self, column: str) -> bool:
        """Return whether `values` has this column."""
        return column in self._table.column_names

    def values(self, column: str) -> Float[np.ndarray, "member text"]:
        """Return the stored values of every query or example: `query_` or `example_` and loss, margin, gap or accuracy.

        A gap is the logit of the right token minus the largest other one, averaged over target tokens; an accuracy
        the share of target tokens whose gap is above zero.

        Raises:
            DataError: This bank does not hold it.
        """
        if not self.holds(column):
            held = [name for name in self._table.column_names if name.startswith(("query_", "example_"))]
            raise DataError(f"This bank holds no {column}; it holds {', '.join(held) or 'no measurement'}.")
        count = len(self.query_ids) if column.startswith("query_") else len(self.example_ids)
        if not len(self) or not count:
            return np.zeros((len(self), count))
        rows = [chunk.flatten().to_numpy() for chunk in self._table[column].chunks]
        return np.concatenate(rows).reshape(len(self), count)

    def by_subset(self, values: np.ndarray) -> Float[np.ndarray, "subset seed *rest"]:
        """Return rows of members, such as `query_losses`, as an array with an axis of subsets and one of seeds.

        Raises:
            UserError: Members are missing.
        """
        shape = len(self.subset_names), int(self.seeds.max(initial=-1)) + 1
        if shape[0] * shape[1] != len(self):
            raise UserError(f"The bank has {len(self)} of {shape[0] * shape[1]} members. Finish it first.")
        return values.reshape(*shape, *values.shape[1:])

    @property
    def subset_membership(self) -> Bool[np.ndarray, "subset example"]:
        """True where the members of a subset were trained on the example."""
        return self.by_subset(self.membership)[:, 0]

    def _per_token(self, losses: np.ndarray, targets: np.ndarray) -> np.ndarray:
        some = np.where(targets > 0, targets, np.nan)
        return losses + 0 * some if self.identity.get("loss") == "mean" else losses / some


def read_members(path: Path, manifest: BankManifest, *, allow_missing: bool = False) -> pa.Table:
    """Read the rows of all members, by subset and seed; with `allow_missing`, of those that are done.

    Raises:
        CorruptFile: Members are missing or damaged; the message lists them.
        IndexMismatch: Members hold different columns.
    """
    files = open_members(path, manifest)
    tables, faults = [], []
    for member in manifest.members:
        try:
            if not allow_missing or files.is_done(member):
                tables.append(files.read(member))
        except CorruptFile as fault:
            faults.append(str(fault))
    if faults:
        raise CorruptFile(f"{len(faults)} members of {path} do not count: {'; '.join(faults[:5])}")
    if not tables:
        raise DataError(f"The bank in {path} has no finished member yet.")
    if any(table.schema != tables[0].schema for table in tables):
        raise IndexMismatch(f"The members of {path} hold different measurements. Make the bank again, --overwrite.")
    return pa.concat_tables(tables).combine_chunks()


def tabulate_texts(texts: Texts) -> pa.Table:
    """Return examples or queries as a table."""
    return pa.table(
        {
            "id": pa.array(texts.ids, pa.string()),
            "source": pa.array(texts.sources, pa.string()),
            "label": pa.array(texts.labels, pa.string()),
            "targets": pa.array(texts.targets, pa.int64()),
        }
    )


def _read_truth(path: Path, measure: Measure | None, examples: int | None) -> Bank:
    """Return the ground truth in `path`, in whichever of the announced layouts it is."""
    formats = list(TRUTH_FORMATS)
    for each in formats:
        if each.matches(path):
            return each.read(path, measure, examples)
    expected = "".join(f"{', or' if each is formats[-1] else ','} {each.expected}" for each in formats)
    needed = "" if formats else " Ground truth of other software needs: pip install 'vestige[recipes]'."
    raise DataError(f"{path} is no bank. Expected a folder that `vestige bank` made{expected}.{needed}")


def _read_whole(path: Path) -> pa.Table | None:
    """Read the table of all members, None if it has to be made again."""
    try:
        return parquet.read_table(path)
    except (OSError, pa.ArrowInvalid):
        return None


def _read_texts(path: Path) -> Texts:
    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise CorruptFile(f"{path} does not read ({error}). Run the same command again.") from error
    ids, sources, labels = (table[name].to_pylist() for name in ("id", "source", "label"))
    return Texts(ids, sources, labels, table["targets"].to_numpy())
