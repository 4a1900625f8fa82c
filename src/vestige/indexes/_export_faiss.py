"""A FAISS index for approximate search, with its recall measured against exact search."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from vestige.errors import MissingExtra
from vestige.indexes._export_rows import parts_in_order
from vestige.indexes._store import Index
from vestige.progress import announce
from vestige.storage import write_durably

_TRAINED_PER_LIST = 64
"""Rows that the cells are fitted on, for each cell; fewer than 39 make FAISS doubt the cells."""
_FEWEST_PER_LIST = 39
_SAMPLED = 64
_K = 10
_SEED = 0


class Recall(NamedTuple):
    """The share of the exact `k` best that are found, on average over sampled rows used as queries."""

    k: int
    nprobe: int
    queries: int
    recall: float
    """Between 0 and 1; a row's own position among its best counts."""


def write_faiss(index: Index, out: Path) -> list[Path]:
    """Write `index.faiss` (inverted lists, inner product), `recall.json`, `ids.json`; position = row of the data.

    The cells are those of k-means on a sample; `nprobe`, the number of cells that are searched, is a tenth of them
    and kept in the file. The recall@10 of that setting is printed and written beside the file.

    Raises:
        MissingExtra: faiss is not installed.
    """
    faiss = _faiss()
    lists = max(1, min(round(math.sqrt(index.rows)), index.rows // _FEWEST_PER_LIST))
    built = faiss.IndexIVFFlat(faiss.IndexFlatIP(index.width), index.width, lists, faiss.METRIC_INNER_PRODUCT)
    rows = np.random.default_rng(_SEED).permutation(index.rows)[: lists * _TRAINED_PER_LIST]
    built.train(_rows(index, np.sort(rows)))
    for part in parts_in_order(index):
        built.add(np.ascontiguousarray(part.gradients.numpy()))
    built.nprobe = max(1, lists // 10)
    recall = measure_recall(index, built)
    write_durably(out / "index.faiss", [np.asarray(faiss.serialize_index(built)).data])
    write_durably(out / "recall.json", [json.dumps(recall._asdict() | {"lists": lists}, indent=1).encode() + b"\n"])
    ids = json.dumps([example.id for example in index.examples()], ensure_ascii=False)
    write_durably(out / "ids.json", [ids.encode() + b"\n"])
    announce(
        f"recall@{recall.k} {recall.recall:.3f} against exact search, over {recall.queries} rows as queries, with "
        f"{recall.nprobe} of {lists} lists searched. A larger nprobe finds more and takes longer."
    )
    return [out / name for name in ("index.faiss", "recall.json", "ids.json")]


def measure_recall(index: Index, built: Any) -> Recall:
    """Measure the recall of `built` on sampled rows, against inner products with every row."""
    count = min(_SAMPLED, index.rows)
    rows = np.random.default_rng(_SEED + 1).permutation(index.rows)[:count]
    queries, k = _rows(index, rows), min(_K, index.rows)
    found = built.search(queries, k)[1]
    exact = _exact(index, queries, k)
    hits = [len(set(mine) & set(truth)) for mine, truth in zip(found.tolist(), exact.tolist(), strict=True)]
    return Recall(k, int(built.nprobe), count, float(np.mean(hits)) / k)


def _exact(index: Index, queries: Float[np.ndarray, "query column"], k: int) -> Int[np.ndarray, "query k"]:
    """Return the rows with the highest inner products, updated part by part."""
    best = torch.empty((len(queries), 0))
    rows = torch.empty((len(queries), 0), dtype=torch.int64)
    for part in parts_in_order(index):
        scores = torch.from_numpy(queries) @ part.gradients.T
        numbers = torch.arange(part.start, part.stop).expand(len(queries), -1)
        best, rows = torch.cat([best, scores], 1), torch.cat([rows, numbers], 1)
        best, places = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, places)
    return rows.numpy()


def _rows(index: Index, rows: Int[np.ndarray, "row"]) -> Float[np.ndarray, "row column"]:
    return np.ascontiguousarray(index.gradients_of(rows).numpy())


def _faiss() -> Any:
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("Approximate search needs faiss.\nType: pip install 'vestige[faiss]'") from error
    return faiss
