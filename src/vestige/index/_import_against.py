"""Scores between gradients of queries in a published layout and the rows of an index of equal layout."""

import time

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vestige.data import Example
from vestige.errors import IndexMismatch
from vestige.index._import_published import Published
from vestige.index._import_run import HELPS, ImportedScores, write_imported
from vestige.index._manifest import IMPORTED_SPEC
from vestige.index._store import Index
from vestige.runs import Meaning, ScoreBlock, ScoreCollector, Scores, check_target
from vestige.settings import ImportSettings

_LIMITS = "The projection is not known here: that both sides were projected alike is taken on trust; no curvature."
_READING = (
    "The gradients were computed by other software. That queries and training examples were projected with the same "
    "seed, on the same kind of device, cannot be seen from the files."
)


def score_against(settings: ImportSettings, published: Published) -> Scores:
    """Inner products, or cosines, of the published rows with every row of the index `against`, as a run.

    Raises:
        IndexMismatch: The layers or their columns differ.
        UserError: There is no index, or the folder of the run is taken.
    """
    started = time.perf_counter()
    assert settings.against is not None
    check_target(settings.out, overwrite=settings.overwrite)
    index = Index.open(settings.against)
    _require_alike(published, index)
    queries = published.reader.read(np.arange(len(published.names)))
    cosine = settings.method == "grad-cos"
    examples = index.examples()
    collector = ScoreCollector(
        len(queries), len(examples), k=settings.k, sources=[example.source for example in examples]
    )
    vectors = _unit(queries) if cosine else queries
    for block in index.blocks():
        rows = _unit(block.gradients) if cosine else block.gradients
        collector.add(ScoreBlock(block.example, vectors @ rows.T))
    summary = collector.finish()
    named = [Example(id=name, row=row, text="") for row, name in enumerate(published.names)]
    scores = ImportedScores(
        train=examples,
        queries=named,
        ranked=summary.ranked,
        distribution=summary.distribution,
        groups=summary.groups,
        method=settings.method,
        meaning=_meaning(cosine),
    )
    return write_imported(settings, scores, _READING, time.perf_counter() - started)


def _unit(rows: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    lengths = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(lengths > 0, lengths, 1.0)


def _require_alike(published: Published, index: Index) -> None:
    mine = [(part.name, part.start, part.stop) for part in published.components]
    theirs = [(part.name, part.start, part.stop) for part in index.manifest.components]
    if mine == theirs and _source(published) == _source(index):
        return
    pairs = zip(mine, theirs, strict=False)
    first = next((f"{a[0]} {a[1]}:{a[2]} against {b[0]} {b[1]}:{b[2]}" for a, b in pairs if a != b), "")
    first = first or (f"{len(mine)} against {len(theirs)}" if mine != theirs else "another seed or compression")
    raise IndexMismatch(
        f"The layers of the files and those of {index.folder} differ: {first}. Import queries that were projected "
        "with the settings of the training gradients."
    )


def _source(side: Published | Index) -> tuple[str, str, int] | None:
    """Compression and seed where they are known."""
    manifest = side.made_by if isinstance(side, Published) else side.manifest
    if manifest is None or (isinstance(side, Index) and manifest.compression.spec == IMPORTED_SPEC):
        return None
    return manifest.compression.spec, manifest.compression.scope, manifest.seed


def _meaning(cosine: bool) -> Meaning:
    return Meaning(
        sign=HELPS,
        unit="cosine, from -1 to 1" if cosine else "inner product of the gradients, in the unit of the files",
        target="this model",
        normalisation="length of both gradients" if cosine else "none",
        estimates="How well a gradient step on the example serves the query, from gradients computed elsewhere.",
        cost="One read of the index.",
        limits=_LIMITS,
    )
