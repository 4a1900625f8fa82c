"""What `vestige evaluate sketch` compares: a model's gradients of some examples, or finished indexes of them alone."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vestige.data import TokenizedData, make_batch, plan_batches
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.evaluate._products import Rows, Samples
from vestige.indexes import Index, batch_tokens, read_inputs, tokens_at_most
from vestige.models import Component, LoadedModel, batch_sharing
from vestige.settings import SketchSettings

_ROWS = 256
"""Tests that are read from an index at once."""


class SketchInputs(NamedTuple):
    """Everything that is read before the work begins."""

    loaded: LoadedModel | None
    """None where finished indexes are compared with one of them."""
    samples: Samples
    components: tuple[Component, ...]
    """Whose gradients are compressed."""
    indexes: tuple[Index, ...]
    test_tokens: int
    """Tokens of all tests; 0 without a model."""
    parameters: int
    """Of the whole model; without it, of the components, for more is not known."""
    identity: dict[str, Any]
    """What every inner product depends on."""


def read_sketch_inputs(settings: SketchSettings) -> SketchInputs:
    """Read the model, the examples and the indexes; without a model the indexes, imported ones too.

    Raises:
        DataError: There are no examples besides the references.
        IndexMismatch: An index is of another model, of other data, or of other parameters than the first one.
        SpecError: Components were chosen although the indexes say them.
    """
    indexes = tuple(Index.open(Path(folder)) for folder in settings.index)
    if settings.model is None:
        return _read_indexes(settings, indexes)
    if indexes and settings.components != SketchSettings.model_fields["components"].default:
        raise SpecError("--components and --index were both given, and the indexes say which parameters. Drop one.")
    patterns = ("all",) if indexes else settings.components
    loaded, data, selection = read_inputs(settings, settings.model, settings.data, patterns)
    for index in indexes:
        _require_belongs(index, settings, loaded, data)
        _require_alike(indexes[0], index)
    held = {part.name for index in indexes for part in index.manifest.components}
    components = tuple(one for one in selection.components if not indexes or one.name in held)
    samples, tokens = _make_samples(settings, data, loaded)
    identity = {
        "model": loaded.fingerprint,
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "data": data.fingerprint,
        "references": samples.counts[0],
        "examples": sum(samples.counts),
        "loss": settings.loss,
        "max_length": tokens_at_most(settings, loaded),
        "components": [component.name for component in components],
    }
    return SketchInputs(loaded, samples, components, indexes, tokens, selection.total_parameters, identity)


def _read_indexes(settings: SketchSettings, indexes: tuple[Index, ...]) -> SketchInputs:
    first = indexes[0]
    for index in indexes[1:]:
        _require_alike(first, index)
    tests = _count_tests(settings, first.rows)
    parts = np.array_split(np.arange(tests), -(-tests // _ROWS))
    samples = Samples((Rows(np.arange(settings.num_ref), None),), tuple(Rows(part, None) for part in parts))
    components = tuple(Component(part.name, part.shape, ()) for part in first.manifest.components)
    identity = {"indexes": sorted(index.fingerprint for index in indexes), "samples": list(samples.counts)}
    return SketchInputs(None, samples, components, indexes, 0, sum(part.size for part in components), identity)


def _count_tests(settings: SketchSettings, rows: int) -> int:
    """Return the number of examples that the references are compared with."""
    total = min(settings.samples, rows)
    if settings.num_ref >= total:
        raise DataError(
            f"{settings.num_ref} references leave nothing to compare with: {total} examples take part. "
            "Give a smaller --num-ref, or more examples (--samples, and --limit if it was given)."
        )
    return total - settings.num_ref


def _make_samples(settings: SketchSettings, data: TokenizedData, loaded: LoadedModel) -> tuple[Samples, int]:
    """Return references and tests, and the tokens of the tests."""
    rest, device = (
        settings.num_ref + np.arange(_count_tests(settings, len(data))),
        next(loaded.model.parameters()).device,
    )
    lengths = data.lengths[rest]
    planned = plan_batches(lengths, batch_tokens(settings, loaded), sharing=batch_sharing(loaded.model))
    reference = tuple(
        Rows(np.array([row]), make_batch(data, np.array([row])).to(device)) for row in range(settings.num_ref)
    )
    test = tuple(Rows(places, make_batch(data, rest[places]).to(device)) for places in planned)
    return Samples(reference, test), int(lengths.sum())


def _require_belongs(index: Index, settings: SketchSettings, loaded: LoadedModel, data: TokenizedData) -> None:
    manifest = index.manifest
    pairs = (
        ("model", manifest.model.fingerprint, loaded.fingerprint),
        ("data", manifest.data.fingerprint, data.fingerprint),
        ("loss", manifest.loss, settings.loss),
    )
    for name, there, here in pairs:
        if there != here:
            raise IndexMismatch(
                f"The index {index.folder} was made with another {name} ({there[:12]}) than this evaluation "
                f"({here[:12]}), so their inner products cannot agree. Give the --{name} it was made with "
                "(and its --max-length, --chat and --limit), or make another index."
            )


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
