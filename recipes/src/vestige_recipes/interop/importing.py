"""`vestige import`: what other software has published, as an index, or as a run where it holds scores."""

from pathlib import Path
from typing import NamedTuple

from vestige.data import Example, TokenizedData, load_examples, tokenize
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
from vestige.runs import Scores
from vestige.settings import with_settings
from vestige_recipes.commands import ImportLayout, ImportSettings
from vestige_recipes.interop.chunks import has_chunks, read_chunks
from vestige_recipes.interop.imported_runs import score_against
from vestige_recipes.interop.iterations import FULL_GRADIENTS, PROJECTIONS, read_full_gradients, read_projections
from vestige_recipes.interop.published import Published, without_tokens
from vestige_recipes.interop.similarities import import_similarities

UNKNOWN = "unknown"
_READERS = {"projections": read_projections, "fullgrads": read_full_gradients, "chunks": read_chunks}
_ROWS_PER_BATCH = 256


class _Mapped(NamedTuple):
    """The rows' examples, and the model they were made with where it was given."""

    data: TokenizedData
    loaded: LoadedModel | None
    recomputable: bool


@with_settings(ImportSettings, "import")
def import_published(settings: ImportSettings) -> Index | Scores:
    """Turn a published layout into an index; similarities, and what is given with `against`, into a run.

    Nothing but tensors and plain values is ever loaded. What the files leave open is announced, and kept in the
    manifest: which example a row is (row i is row i of `data` where that is given), losses (stored as 0), and the
    projection, without which gradients of new queries cannot be made to match.

    Raises:
        UserError: A file is missing, torn or does not fit the others; the message names it.
    """
    layout = settings.layout if settings.layout != "auto" else detect_layout(settings.source)
    if layout == "similarities":
        return import_similarities(settings)
    if settings.dimension is not None or settings.queries is not None:
        raise SpecError(f"--dimension and --queries are for similarities, and {settings.source} holds {layout}.")
    published = _READERS[layout](settings.source)
    for note in published.notes:
        announce(note)
    if settings.against is not None:
        return score_against(settings, published)
    mapped = _mapped(settings, published)
    draft = _draft(published, mapped)
    return write_rows(settings.out, draft, mapped.data, published.reader.read, overwrite=settings.overwrite)


def detect_layout(source: Path) -> ImportLayout:
    """Return the layout of what lies at `source`, by the names of its files."""
    if not source.exists():
        raise DataError(f"{source} does not exist. Give a folder or a file in a published layout.")
    if source.is_file():
        if source.suffix == ".json":
            return "similarities"
        raise DataError(f"{source} is a file. Expected a folder, or a JSON file with similarities.")
    found: list[ImportLayout] = []
    if any(source.glob(f"{PROJECTIONS}_*.pt")):
        found.append("projections")
    if any(source.glob(f"{FULL_GRADIENTS}_*.pt")):
        found.append("fullgrads")
    if has_chunks(source):
        found.append("chunks")
    if any(source.glob("dot_products*")) or any(source.glob("*_part_*.json")):
        found.append("similarities")
    if len(found) != 1:
        what = f"files of several layouts ({', '.join(found)})" if found else "no file of a known layout"
        raise DataError(
            f"{source} holds {what}. Expected proj_iter_*.pt, fullgrad_iter_*.pt, chunk_gradients_*.mmap, or "
            "dot_products; say which with --layout."
        )
    return found[0]


def _mapped(settings: ImportSettings, published: Published) -> _Mapped:
    """Return the examples behind the rows: the data given, or stand-ins that name the place in the files."""
    loaded = load_model(settings.model) if settings.model is not None else None
    if loaded is not None:
        _require_layers(published, loaded)
    if settings.data is None:
        stand_ins = [Example(id=name, row=row, text="") for row, name in enumerate(published.names)]
        return _Mapped(without_tokens(stand_ins, str(settings.source)), loaded, False)
    examples = load_examples(settings.data, on_bad_text=settings.on_bad_text)
    if len(examples) != len(published.names):
        missing = " ".join(note for note in published.notes if "missing" in note)
        raise DataError(
            f"{settings.source} holds {len(published.names):,} rows, and {settings.data} {len(examples):,} examples. "
            f"Row i is taken for example i, so give the data that the rows were made from, in that order. {missing}"
        )
    made_by = published.made_by
    if made_by is None or loaded is None or made_by.imported is not None:
        return _Mapped(without_tokens(examples, str(settings.data)), loaded, False)
    if loaded.fingerprint != made_by.model.fingerprint:
        raise IndexMismatch(
            f"{settings.source} was exported from an index of {made_by.model.name} "
            f"({made_by.model.fingerprint[:12]}), and {loaded.name} is {loaded.fingerprint[:12]}. Give that model, "
            "or leave --model out."
        )
    tokens = tokenize(
        examples, loaded.tokenizer, max_length=made_by.max_length, name=str(settings.data), chat=made_by.chat
    )
    return _Mapped(tokens, loaded, True)


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


def _draft(published: Published, mapped: _Mapped) -> Manifest:
    """Return the manifest without its plan; what made the gradients is known only for exports of our own."""
    data, loaded, own = mapped.data, mapped.loaded, published.made_by
    notes = (*published.notes, "Losses are not in the files: they are stored as 0.")
    record = ImportRecord(
        layout=published.layout, digest=published.digest(), notes=notes, recomputable=mapped.recomputable
    )
    common = {
        "data": DataIdentity(name=data.name, fingerprint=data.fingerprint, examples=len(data)),
        "dtype": published.dtype,
        "components": published.components,
        "imported": record,
    }
    if own is not None:
        plan = own.plan.model_copy(update={"stages": ()})
        return own.model_copy(update=common | {"plan": plan})
    model = ModelIdentity(
        name=loaded.name if loaded is not None else UNKNOWN,
        fingerprint=loaded.fingerprint if loaded is not None else UNKNOWN,
    )
    return Manifest(
        model=model,
        compression=CompressionIdentity(spec=IMPORTED_SPEC),
        seed=0,
        loss="sum",
        precision=UNKNOWN,
        max_length=None,
        chat=False,
        token_budget=_ROWS_PER_BATCH,
        **common,
    )
