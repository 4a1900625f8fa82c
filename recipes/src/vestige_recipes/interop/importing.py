"""`vestige import`: what other software has published, as an index, or as a run where it holds scores."""

import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vestige.data import TokenizedData, load_examples, tokenize
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.indexes import (
    IMPORTED_SPEC,
    CompressionIdentity,
    DataIdentity,
    ImportRecord,
    Index,
    Manifest,
    ModelIdentity,
    write_rows,
)
from vestige.models import LoadedModel, load_model
from vestige.progress import announce
from vestige.runs import Meaning, ScoreBlock, ScoreCollector, Scores, check_target
from vestige.settings import with_settings
from vestige_recipes.commands import ImportLayout, ImportSettings
from vestige_recipes.interop.chunks import read_chunks
from vestige_recipes.interop.iterations import FULL_GRADIENTS, PROJECTIONS, read_full_gradients, read_projections
from vestige_recipes.interop.logs import LOGS, import_logs
from vestige_recipes.interop.published import HELPS, Published, stand_ins, without_tokens, write_imported
from vestige_recipes.interop.similarities import import_similarities

UNKNOWN = "unknown"
_READERS = {"projections": read_projections, "fullgrads": read_full_gradients, "chunks": read_chunks}
_FILES: dict[ImportLayout, tuple[str, ...]] = {
    "projections": (f"{PROJECTIONS}_*.pt",),
    "fullgrads": (f"{FULL_GRADIENTS}_*.pt",),
    "chunks": tuple(f"{folder}chunk_*_*_*.mmap" for folder in ("", "grad/", "ifvp/")),
    "similarities": ("dot_products*", "*_part_*.json"),
    "logs": (f"{LOGS}_*.pt",),
}
"""What the names of a layout's files look like."""
AGAINST = Meaning(
    sign=HELPS,
    target="this model",
    normalisation="none",
    unit="inner product of the gradients, in the unit of the files",
    estimates="How well a gradient step on the example serves the query, from gradients computed elsewhere.",
    cost="One read of the index.",
    limits="The projection is not known here: that both sides were projected alike is taken on trust; no curvature.",
)
_READING = (
    "The gradients were computed by other software. That queries and training examples were projected with "
    "the same seed, on the same kind of device, cannot be seen from the files."
)
_ROWS_PER_BATCH = 256


@with_settings(ImportSettings, "import")
def import_published(settings: ImportSettings) -> Index | Scores:
    """Turn a published layout into an index; similarities, and what is given with `against`, into a run.

    Nothing but tensors and plain values is ever loaded. What the files leave open is announced, and kept in the
    manifest: which example a row is (row i is row i of `data` where that is given), losses (stored as 0), and the
    projection, without which gradients of new queries cannot be made to match.

    Raises:
        UserError: A file is missing, torn or does not fit the others; the message names it.
    """
    layout = settings.layout if settings.layout != "auto" else _detect_layout(settings.source)
    if layout == "similarities":
        return import_similarities(settings)
    if settings.dimension is not None or settings.queries is not None:
        raise SpecError(f"--dimension and --queries are for similarities, and {settings.source} holds {layout}.")
    if layout == "logs":
        return import_logs(settings)
    published = _READERS[layout](settings.source)
    for note in published.notes:
        announce(note)
    if settings.against is not None:
        return score_against(settings, published)
    loaded = load_model(settings.model) if settings.model is not None else None
    if loaded is not None:
        _require_layers(published, loaded)
    data, recomputable = _find_examples(settings, published, loaded)
    draft = _draft(published, data, loaded, recomputable)
    return write_rows(settings.out, draft, data, published.read, overwrite=settings.overwrite)


def _detect_layout(source: Path) -> ImportLayout:
    """Return the layout of what lies at `source`, by the names of its files."""
    if not source.exists():
        raise DataError(f"{source} does not exist. Give a folder or a file in a published layout.")
    if source.is_file():
        if source.suffix == ".json":
            return "similarities"
        raise DataError(f"{source} is a file. Expected a folder, or a JSON file with similarities.")
    found: list[ImportLayout] = [
        name for name, patterns in _FILES.items() if any(any(source.glob(pattern)) for pattern in patterns)
    ]
    if len(found) != 1:
        what = f"files of several layouts ({', '.join(found)})" if found else "no file of a known layout"
        raise DataError(
            f"{source} holds {what}. Expected proj_iter_*.pt, fullgrad_iter_*.pt, chunk_gradients_*.mmap, "
            "dot_products, or dot_prod_log_iter_*.pt; say which with --layout."
        )
    return found[0]


def _find_examples(
    settings: ImportSettings, published: Published, loaded: LoadedModel | None
) -> tuple[TokenizedData, bool]:
    """Return the data given, or stand-ins that name the place in the files; and whether gradients can be recomputed."""
    if settings.data is None:
        return without_tokens(stand_ins(published.names), str(settings.source)), False
    examples = load_examples(settings.data, on_bad_text=settings.on_bad_text)
    if len(examples) != len(published.names):
        missing = " ".join(note for note in published.notes if "missing" in note)
        raise DataError(
            f"{settings.source} holds {len(published.names):,} rows, and {settings.data} {len(examples):,} examples. "
            f"Row i is taken for example i, so give the data that the rows were made from, in that order. {missing}"
        )
    made_by = published.made_by
    if made_by is None or loaded is None or made_by.imported is not None:
        return without_tokens(examples, str(settings.data)), False
    if loaded.fingerprint != made_by.model.fingerprint:
        raise IndexMismatch(
            f"{settings.source} was exported from an index of {made_by.model.name} "
            f"({made_by.model.fingerprint[:12]}), and {loaded.name} is {loaded.fingerprint[:12]}. Give that model, "
            "or leave --model out."
        )
    tokens = tokenize(
        examples, loaded.tokenizer, max_length=made_by.max_length, name=str(settings.data), chat=made_by.chat
    )
    return tokens, True


def _require_layers(published: Published, loaded: LoadedModel) -> None:
    """Raise unless every component is a parameter of the model, or a module that has a weight."""
    known = {name: weight.numel() for name, weight in loaded.model.named_parameters()}
    known |= {name.removesuffix(".weight"): size for name, size in known.items()}
    for part in published.components:
        if part.name not in known:
            raise IndexMismatch(
                f"The model {loaded.name} has no layer {part.name}, which the files speak of. Give the model that "
                "the gradients are of, or leave --model out."
            )
        if part.kind != "layer" and known[part.name] != part.shape[0] * part.shape[1]:
            raise IndexMismatch(
                f"Layer {part.name} is {part.shape[0]} x {part.shape[1]} in the files, and {known[part.name]:,} "
                f"numbers in the model {loaded.name}. Give the model that the gradients are of."
            )


def _draft(published: Published, data: TokenizedData, loaded: LoadedModel | None, recomputable: bool) -> Manifest:
    """Return the manifest without its plan; what made the gradients is known only for exports of our own."""
    own = published.made_by
    notes = (*published.notes, "Losses are not in the files: they are stored as 0.")
    record = ImportRecord(layout=published.layout, digest=published.digest(), notes=notes, recomputable=recomputable)
    common = {
        "data": DataIdentity(name=data.name, fingerprint=data.fingerprint, examples=len(data)),
        "dtype": published.dtype,
        "components": published.components,
        "imported": record,
    }
    if own is not None:
        plan = own.plan.model_copy(update={"stages": ()})
        return own.model_copy(update=common | {"plan": plan})
    name, fingerprint = (UNKNOWN, UNKNOWN) if loaded is None else (loaded.name, loaded.fingerprint)
    return Manifest(
        model=ModelIdentity(name=name, fingerprint=fingerprint),
        compression=CompressionIdentity(spec=IMPORTED_SPEC),
        seed=0,
        loss="sum",
        precision=UNKNOWN,
        max_length=None,
        chat=False,
        token_budget=_ROWS_PER_BATCH,
        **common,
    )


def score_against(settings: ImportSettings, published: Published) -> Scores:
    """Return inner products, or cosines, of the published rows with every row of the index `against`, as a run."""
    started = time.perf_counter()
    assert settings.against is not None
    check_target(settings.out, overwrite=settings.overwrite)
    index = Index.open(settings.against)
    _require_alike(published, index)
    queries = published.read(np.arange(len(published.names)))
    cosine = settings.method == "grad-cos"
    examples = index.examples()
    sources = [example.source for example in examples]
    collector = ScoreCollector(len(queries), len(examples), k=settings.k, sources=sources)
    vectors = _unit(queries) if cosine else queries
    for block in index.blocks():
        rows = _unit(block.gradients) if cosine else block.gradients
        collector.add(ScoreBlock(block.example, vectors @ rows.T))
    asked, summary = stand_ins(published.names), collector.finish()
    return write_imported(settings, examples, asked, summary, AGAINST, _READING, cosine=cosine, started=started)


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
