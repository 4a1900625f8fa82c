"""`vestige evaluate sketch` without a model: finished indexes of the same examples, compared with one of them."""

from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from vestige.compress import parse_spec
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.evaluate._products import Advance, Computed, KeptProducts, Rows, Samples, multiply_gradients
from vestige.evaluate._sketch_report import Measured, SketchReport, build_report, measure_quality, write_report
from vestige.indexes import IMPORTED_SPEC, Index
from vestige.models import Component
from vestige.progress import progress
from vestige.settings import SketchSettings

_ROWS = 256
"""Tests that are read at once."""


def compare_stored(settings: SketchSettings) -> SketchReport:
    """Compare inner products of finished indexes, imported ones too, with those of the widest, or of rank=K.

    Raises:
        SpecError: There is no index of that rank, or there are several.
        IndexMismatch: They hold other examples or other parameters.
        DataError: There are no examples besides the references.
    """
    indexes = [Index.open(Path(folder)) for folder in settings.index]
    for index in indexes[1:]:
        _require_alike(indexes[0], index)
    ranks = [max(span.columns.stop - span.columns.start for span in index.spans) for index in indexes]
    right = _find_right(settings, indexes, ranks)
    samples = _divide(settings, indexes[0].rows)
    prints = sorted(index.fingerprint for index in indexes)
    kept = KeptProducts(settings.out, {"indexes": prints, "samples": list(samples.counts)})
    with progress(len(indexes) * sum(samples.counts), "Comparing", "gradients") as bar:
        for index in indexes:
            if not kept.has(index.fingerprint):
                columns = [span.columns for span in index.spans]
                found = multiply_gradients(columns, samples, partial(_read, index, samples.counts[0], bar.advance))
                kept.write(index.fingerprint, Computed(found))
    points: dict[str, dict[int, list[Measured]]] = {}
    exact = kept.read(right.fingerprint).products
    for index, rank in zip(indexes, ranks, strict=True):
        if index is not right:
            quality = measure_quality(kept.read(index.fingerprint).products, exact)
            manifest = index.manifest
            found = Measured(manifest.seed, manifest.width, manifest.row_bytes, None, quality)
            points.setdefault(_name_family(index), {}).setdefault(rank, []).append(found)
    parts = [Component(part.name, part.shape, ()) for part in indexes[0].manifest.components]
    # The number of the model's parameters is not known without the model.
    asked = settings.model_copy(update={"reference": str(right.folder)})
    report = build_report(asked, points, samples.counts, parts, sum(part.size for part in parts))
    write_report(report, settings.out)
    return report


def _require_alike(first: Index, other: Index) -> None:
    mine, theirs = first.manifest, other.manifest
    both_known = mine.imported is None and theirs.imported is None
    parameters = ({part.name for part in one.components} for one in (mine, theirs))
    different = {
        "numbers of examples": first.rows != other.rows,
        "examples": both_known and mine.data.fingerprint != theirs.data.fingerprint,
        "parameters": len(set(map(frozenset, parameters))) > 1,
    }
    if found := [name for name, differs in different.items() if differs]:
        raise IndexMismatch(
            f"{first.folder} and {other.folder} hold other {' and '.join(found)}, so their inner products cannot "
            "agree. Compare indexes of the same examples and parameters."
        )


def _find_right(settings: SketchSettings, indexes: list[Index], ranks: list[int]) -> Index:
    """Return the index that the others are compared with."""
    wanted = settings.reference_size or max(ranks)
    found = [index for index, rank in zip(indexes, ranks, strict=True) if rank == wanted]
    if len(found) != 1:
        raise SpecError(
            f"{len(found)} of the indexes keep {wanted} numbers of a parameter, and one is to be right. They keep "
            f"{', '.join(map(str, sorted(ranks)))}: type --reference rank=K with one of these that is there once."
        )
    return found[0]


def _divide(settings: SketchSettings, rows: int) -> Samples:
    """Return references and tests by their positions."""
    total, references = min(settings.samples, rows), settings.num_ref
    if references >= total:
        raise DataError(
            f"{references} references leave nothing to compare with: {total} examples take part. Give a smaller "
            "--num-ref, or more examples (--samples)."
        )
    tests = np.array_split(np.arange(total - references), -(-(total - references) // _ROWS))
    return Samples((Rows(np.arange(references), None),), tuple(Rows(part, None) for part in tests))


def _read(index: Index, references: int, advance: Advance, side: str, rows: Rows) -> Tensor:
    advance(len(rows.positions))
    return index.gradients_of(rows.positions if side == "reference" else rows.positions + references)


def _name_family(index: Index) -> str:
    spec = index.manifest.compression.spec
    known = " | ".join(stage.name for stage in parse_spec(spec).stages) if spec != IMPORTED_SPEC else ""
    return f"index of {known or 'none' if spec != IMPORTED_SPEC else 'other software'}, {index.manifest.dtype}"
