"""Scores of other software as a run, and scores between published gradients of queries and an index."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vestige.data import Example, TokenizedData
from vestige.errors import IndexMismatch
from vestige.index import IMPORTED_SPEC, Index
from vestige.runs import (
    Check,
    ComponentScores,
    DataRecord,
    DistributionRecord,
    GroupRecord,
    Meaning,
    RankedScore,
    RunRecord,
    RunTables,
    ScoreBlock,
    ScoreCollector,
    Scores,
    TrustRecord,
    check_target,
    environment,
    write_run,
)
from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes
from vestige_recipes.interop.command import ImportSettings
from vestige_recipes.interop.published import Published, without_tokens

_HELPS = "positive: a training step on the example lowers the query's loss; negative: it raises it"
_LIMITS = "The projection is not known here: that both sides were projected alike is taken on trust; no curvature."
_READING = (
    "The gradients were computed by other software. That queries and training examples were projected with the same "
    "seed, on the same kind of device, cannot be seen from the files."
)


class ImportedScores(NamedTuple):
    """Scores, and what they are about."""

    train: Sequence[Example]
    queries: list[Example]
    ranked: list[RankedScore]
    distribution: list[DistributionRecord]
    method: str
    meaning: Meaning
    groups: list[list[GroupRecord]] | None = None
    """Per query; None where the scores do not cover all examples."""
    component_names: Sequence[str] = ()
    components: list[ComponentScores] | None = None


def write_imported(settings: ImportSettings, scores: ImportedScores, reading: str, seconds: float) -> Scores:
    """Write scores as a run and return it opened; `reading` is its sentence on what cannot be checked.

    Raises:
        UserError: The folder holds something else.
    """
    train = without_tokens(scores.train, str(settings.data or settings.source))
    queries = without_tokens(scores.queries, str(settings.queries or settings.source))
    ids = [example.id for example in scores.queries]
    record = RunRecord(
        vestige=version("vestige"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=settings.command_line("import"),
        config=settings.record(),
        versions=environment(),
        model=None,
        data=_described(train),
        queries=_described(queries),
        method=scores.method,
        meaning=scores.meaning,
        coverage=None,
        components=list(scores.component_names),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_memory_bytes=peak_gpu_memory_bytes(),
        trust=TrustRecord(checks=[Check(name="imported", value=None, reading=reading, verdict="unknown")]),
        distribution=dict(zip(ids, scores.distribution, strict=True)),
        groups=dict(zip(ids, scores.groups or [[] for _ in ids], strict=True)),
    )
    tables = RunTables(
        train=train,
        queries=queries,
        ranked=scores.ranked,
        generated=[False] * len(ids),
        components=scores.components,
    )
    write_run(settings.out, record, tables, overwrite=settings.overwrite)
    return Scores.open(settings.out)


def gradient_meaning(*, cosine: bool, unit: str, estimates: str, cost: str, limits: str) -> Meaning:
    """Return what products of gradients, or their cosines, mean; `unit` is that of the products."""
    return Meaning(
        sign=_HELPS,
        unit="cosine, from -1 to 1" if cosine else unit,
        target="this model",
        normalisation="length of both gradients" if cosine else "none",
        estimates=estimates,
        cost=cost,
        limits=limits,
    )


def _described(data: TokenizedData) -> DataRecord:
    return DataRecord(name=data.name, fingerprint=data.fingerprint, examples=len(data))


def score_against(settings: ImportSettings, published: Published) -> Scores:
    """Return inner products, or cosines, of the published rows with every row of the index `against`, as a run.

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
        meaning=gradient_meaning(
            cosine=cosine,
            unit="inner product of the gradients, in the unit of the files",
            estimates="How well a gradient step on the example serves the query, from gradients computed elsewhere.",
            cost="One read of the index.",
            limits=_LIMITS,
        ),
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
    """Return compression, scope and seed where they are known."""
    manifest = side.made_by if isinstance(side, Published) else side.manifest
    if manifest is None or (isinstance(side, Index) and manifest.compression.spec == IMPORTED_SPEC):
        return None
    return manifest.compression.spec, manifest.compression.scope, manifest.seed
