"""Ground truth made by other software, read as a bank: dattri's folders, GraSS's, and tables of subsets and losses."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from vestige.banks import Bank, Measure, Texts, TruthFormat
from vestige.errors import DataError
from vestige.parsing import parse_json, parse_yaml


class _Row(NamedTuple):
    """One model as its software left it."""

    subset: int
    seed: int
    rows: np.ndarray
    values: np.ndarray
    """[query]"""


def _dattri(path: Path, measure: Measure | None, examples: int | None) -> Bank:
    try:
        metadata = parse_yaml((path / "metadata.yml").read_text(encoding="utf-8"), numbers_as_keys=True)
        runs, folders = int(metadata.get("num_runs_per_subset", 1)), metadata["subset_dir_map"]
    except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path / 'metadata.yml'} is not what dattri's retrain_lds writes ({error!r}).") from error
    if measure is None:
        raise DataError(
            f"{path} holds dattri's models and no losses. Give Bank.open(..., measure=function), which turns the "
            "state of a model into the losses of the queries."
        )
    import torch

    rows = []
    for place, (_, folder) in enumerate(sorted(folders.items())):
        # The map holds the paths of the computer where it was made: only the last part says something here.
        here = path / Path(str(folder)).name
        members = _integers(here / "indices.txt")
        for seed in range(runs):
            weights = here / f"model_weights_{seed}.pt"
            if not weights.is_file():
                raise DataError(f"{weights} is missing: the metadata promises {runs} runs of each subset.")
            state = torch.load(weights, map_location="cpu", weights_only=True)
            rows.append(_Row(place, seed, members, np.asarray(measure(state), dtype=np.float64)))
    return _bank("dattri", "query_loss", rows, examples or metadata.get("data_length"))


def _grass(path: Path, _: Measure | None, examples: int | None) -> Bank:
    import torch

    margins = torch.load(path / "gt.pt", map_location="cpu", weights_only=True).double().numpy()
    margins = margins.reshape(len(margins), -1)
    files = [path / str(number) / "train_index.csv" for number in range(len(margins))]
    rows = [_Row(number, 0, _integers(file), margins[number]) for number, file in enumerate(files)]
    return _bank("grass", "query_margin", rows, examples)


def _table(path: Path, _: Measure | None, examples: int | None) -> Bank:
    rows, subsets, header = [], {}, {}
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = parse_json(text) if text.strip() else {}
            if "train_subset" not in record:
                header |= record.get("_meta", {}) if isinstance(record.get("_meta"), dict) else {}
                continue
            members = np.unique(np.asarray(record["train_subset"], dtype=np.int64))
            losses = np.asarray(record["test_loss"], dtype=np.float64)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}, line {line}: expected `train_subset` and `test_loss` ({error!r}).") from error
        # Lines with equal subsets are runs of the same one with different seeds.
        subset = subsets.setdefault(members.tobytes(), len(subsets))
        seed = sum(row.subset == subset for row in rows)
        rows.append(_Row(subset, seed, members, losses))
    size = next((len(value) for value in header.values() if isinstance(value, list)), None)
    return _bank("table", "query_loss", sorted(rows, key=lambda row: row[:2]), examples or size)


def _bank(layout: str, column: str, rows: list[_Row], examples: int | None) -> Bank:
    if not rows:
        raise DataError("There is not one subset in it.")
    largest = max(int(row.rows.max(initial=-1)) for row in rows) + 1
    count, queries = max(largest, examples or 0), len(rows[0].values)
    if examples is not None and largest > examples:
        raise DataError(f"A subset names row {largest - 1}, and there are {examples} examples.")
    wrong = [row for row in rows if row.values.shape != (queries,) or not np.isfinite(row.values).all()]
    if wrong or any(row.rows.min(initial=0) < 0 for row in rows):
        raise DataError(f"{len(wrong)} models have values that are not finite, or not {queries} of them.")
    inside = np.zeros((len(rows), count), dtype=bool)
    for place, row in enumerate(rows):
        inside[place, row.rows] = True
    packed = [line.tobytes() for line in np.packbits(inside, axis=1, bitorder="little")]
    values = pa.array(np.concatenate([row.values for row in rows]))
    table = pa.table(
        {
            "subset": pa.array([row.subset for row in rows], pa.int64()),
            "seed": pa.array([row.seed for row in rows], pa.int64()),
            "rows": pa.array(packed, pa.binary()),
            column: pa.FixedSizeListArray.from_arrays(values, queries),
        }
    )
    names = [f"{layout} {number}" for number in range(max(row.subset for row in rows) + 1)]
    identity = {"layout": layout, "examples": count, "query_count": queries}
    return Bank(identity, names, table, _texts(count), _texts(queries), "")


def _texts(count: int) -> Texts:
    nothing: list[str | None] = [None] * count
    return Texts([str(row) for row in range(count)], nothing, nothing, np.ones(count, dtype=np.int64))


def _integers(path: Path) -> np.ndarray:
    """Return all whole numbers of a file, in lines or in columns; words in a first line are its header."""
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        if lines and not all(cell.strip().lstrip("-").isdigit() for cell in lines[0] if cell.strip()):
            lines = lines[1:]
        return np.unique(np.array([int(cell) for line in lines for cell in line if cell.strip()], dtype=np.int64))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no list of row numbers ({error}).") from error


dattri = TruthFormat("dattri's (metadata.yml)", lambda path: (path / "metadata.yml").is_file(), _dattri)
grass = TruthFormat("GraSS's (gt.pt)", lambda path: (path / "gt.pt").is_file(), _grass)
table = TruthFormat(
    "a .jsonl file with a `train_subset` and a `test_loss` in each line",
    lambda path: path.is_file() and path.suffix in (".jsonl", ".json"),
    _table,
)
