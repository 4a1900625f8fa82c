"""What a sketch evaluation compares: the examples, the parameters, and the indexes that belong to them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vestige.data import TokenizedData, make_batch, plan_batches
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.evaluate._products import Rows, Samples
from vestige.gradients import Reduction
from vestige.indexes import Index, batch_tokens, read_inputs, tokens_at_most
from vestige.models import Component, LoadedModel, batch_sharing, select_components
from vestige.progress import announce
from vestige.settings import SketchSettings


class SketchInputs(NamedTuple):
    """Everything that is read before the work begins."""

    loaded: LoadedModel
    samples: Samples
    components: tuple[Component, ...]
    """Whose gradients are compressed."""
    indexes: tuple[Index, ...]
    test_tokens: int
    """Tokens of all tests."""
    parameters: int
    """Of the whole model."""
    loss: Reduction
    identity: dict[str, Any]
    """What every inner product depends on."""


def read_sketch_inputs(settings: SketchSettings) -> SketchInputs:
    """Read the model, the examples and the indexes.

    Raises:
        DataError: There are no examples besides the references.
        IndexMismatch: An index is of another model, of other data, or of other parameters than the first one.
        SpecError: Components were chosen although the indexes say them.
    """
    indexes = tuple(Index.open(folder) for folder in settings.index)
    if indexes and settings.components != SketchSettings.model_fields["components"].default:
        raise SpecError("--components and --index were both given, and the indexes say which parameters. Drop one.")
    patterns = ("all",) if indexes else settings.components
    loaded, data, selection = read_inputs(settings, settings.model, settings.data, patterns)
    components = selection.components
    for index in indexes:
        _require_belongs(index, settings, loaded, data)
        components = _components_of(index, components, indexes[0])
    samples, tokens = _samples(settings, data, loaded)
    identity = {
        "model": loaded.fingerprint,
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "data": data.fingerprint,
        "references": samples.counts[0],
        "examples": samples.total,
        "loss": settings.loss,
        "max_length": tokens_at_most(settings, loaded),
        "components": [component.name for component in components],
    }
    return SketchInputs(
        loaded, samples, components, indexes, tokens, selection.total_parameters, settings.loss, identity
    )


def all_components(loaded: LoadedModel) -> tuple[Component, ...]:
    """Return every parameter that has a rule; print so where that is not all of them."""
    selection = select_components(loaded.model, ("all",))
    if skipped := [row for row in selection.coverage if not row.selected]:
        announce(
            f"--reference full covers {selection.fraction:.1%} of the parameters: there is no rule for "
            f"{', '.join(row.name for row in skipped[:3])}{' ...' if len(skipped) > 3 else ''}."
        )
    return selection.components


def _samples(settings: SketchSettings, data: TokenizedData, loaded: LoadedModel) -> tuple[Samples, int]:
    total = min(settings.samples, len(data))
    if settings.num_ref >= total:
        raise DataError(
            f"{settings.num_ref} references leave nothing to compare with: {total} examples take part. "
            "Give a smaller --num-ref, or more examples (--samples, and --limit if it was given)."
        )
    lengths = data.lengths
    rest = np.arange(settings.num_ref, total)
    planned = plan_batches(lengths[rest], batch_tokens(settings, loaded), sharing=batch_sharing(loaded.model))
    batches = [rest[places] for places in planned]
    device = next(loaded.model.parameters()).device

    def rows(numbers: np.ndarray, first: int) -> Rows:
        return Rows(numbers - first, make_batch(data, numbers).to(device))

    reference = tuple(rows(np.array([row]), 0) for row in range(settings.num_ref))
    test = tuple(rows(batch, settings.num_ref) for batch in batches)
    return Samples(reference, test), int(lengths[rest].sum())


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


def _components_of(index: Index, components: Sequence[Component], first: Index) -> tuple[Component, ...]:
    """Return the components that an index holds, in its order."""
    known = {component.name: component for component in components}
    wanted = [(part.name, part.shape) for part in index.manifest.components]
    if [(part.name, part.shape) for part in first.manifest.components] != wanted:
        raise IndexMismatch(f"{index.folder} and {first.folder} hold different parameters. Evaluate them one by one.")
    return tuple(known[name] for name, _ in wanted)
