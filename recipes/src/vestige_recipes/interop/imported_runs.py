"""Scores of other software as a run, and scores between published gradients of queries and an index."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vestige.data import Example
from vestige.errors import IndexMismatch
from vestige.indexes import IMPORTED_SPEC, Index
from vestige.runs import (
    Check,
    ComponentScores,
    Meaning,
    RunTables,
    ScoreBlock,
    ScoreCollector,
    Scores,
    ScoreSummary,
    check_target,
    make_run_record,
    write_run,
)
from vestige_recipes.commands import ImportSettings
from vestige_recipes.interop.published import Published, without_tokens

_HELPS = "positive: a training step on the example lowers the query's loss; negative: it raises it"


class Wording(NamedTuple):
    """What a run says of products of gradients that were computed elsewhere."""

    unit: str
    """Of the products; cosines have none."""
    estimates: str
    cost: str
    limits: str
    reading: str
    """The sentence on what cannot be checked."""


AGAINST = Wording(
    unit="inner product of the gradients, in the unit of the files",
    estimates="How well a gradient step on the example serves the query, from gradients computed elsewhere.",
    cost="One read of the index.",
    limits="The projection is not known here: that both sides were projected alike is taken on trust; no curvature.",
    reading="The gradients were computed by other software. That queries and training examples were projected with "
    "the same seed, on the same kind of device, cannot be seen from the files.",
)


def write_imported(
    settings: ImportSettings,
    train: Sequence[Example],
    queries: Sequence[Example],
    summary: ScoreSummary,
    wording: Wording,
    *,
    cosine: bool,
    started: float,
    parameters: Sequence[str] = (),
    components: Sequence[ComponentScores] | None = None,
) -> Scores:
    """Write scores as a run and return it opened."""
    texts = without_tokens(train, str(settings.data or settings.source))
    asked = without_tokens(queries, str(settings.queries or settings.source))
    ids = [example.id for example in queries]
    meaning = Meaning(
        sign=_HELPS,
        unit="cosine, from -1 to 1" if cosine else wording.unit,
        target="this model",
        normalisation="length of both gradients" if cosine else "none",
        estimates=wording.estimates,
        cost=wording.cost,
        limits=wording.limits,
    )
    record = make_run_record(
        command=settings.command_line("import"),
        config=settings.record(),
        method="grad-cos" if cosine else "grad-dot",
        meaning=meaning,
        data=texts,
        queries=asked,
        summary=summary,
        seconds=time.perf_counter() - started,
        components=list(parameters),
        checks=[Check(name="imported", value=None, reading=wording.reading, verdict="unknown")],
    )
    tables = RunTables(texts, asked, summary.ranked, generated=[False] * len(ids), components=components)
    write_run(settings.out, record, tables, overwrite=settings.overwrite)
    return Scores.open(settings.out)


def score_against(settings: ImportSettings, published: Published) -> Scores:
    """Return inner products, or cosines, of the published rows with every row of the index `against`, as a run."""
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
    asked = [Example(id=name, row=row, text="") for row, name in enumerate(published.names)]
    return write_imported(settings, examples, asked, collector.finish(), AGAINST, cosine=cosine, started=started)


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
