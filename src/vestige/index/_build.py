"""`vestige index`: from a model and its training data to an index on disk."""

from pathlib import Path

from vestige.compress import CompressionSpec
from vestige.data import TokenizedData
from vestige.files import check_disk
from vestige.index._budget import choose_spec
from vestige.index._compute import CompressedGradients, lay_out
from vestige.index._estimate import announce_estimate, estimate_cost
from vestige.index._examples import fingerprint_rows
from vestige.index._inputs import Inputs, batch_tokens, read_inputs, tokens_at_most
from vestige.index._manifest import CompressionIdentity, DataIdentity, Manifest, ModelIdentity, expected_shards
from vestige.index._plan import Plan, PlannedShard, plan_index
from vestige.index._run import remove_index, write_shards
from vestige.index._shards import shard_fault
from vestige.index._store import Index
from vestige.settings import DoctorSettings, IndexSettings, verb


@verb(IndexSettings)
def index(settings: IndexSettings) -> Index:
    """An index of the training data: the compressed gradient of every example, at the model as it is.

    Interrupted at any moment, the same call continues where it stopped and gives the same bytes; another setting over
    an old index is refused, with the difference shown.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
    """
    return build_index(settings, read_inputs(settings, settings.model, settings.data, settings.components))


def build_index(settings: IndexSettings, inputs: Inputs) -> Index:
    """`index` for a model and data that are loaded already."""
    spec = choose_spec(settings, inputs.selection, len(inputs.data))
    if settings.overwrite:
        remove_index(settings.out)
    draft = draft_manifest(settings, inputs, spec)
    manifest, plan = _planned(settings, draft, inputs.data)
    missing = _missing_shards(settings, manifest, plan)
    check_disk(settings.out, sum(len(shard.rows) for shard in missing) * manifest.row_bytes)
    components = inputs.selection.components
    with CompressedGradients(
        inputs.loaded, components, manifest.components, spec, settings.seed, settings.loss
    ) as compute:
        if missing:
            announce_estimate(estimate_cost(compute, inputs.data, manifest, missing), manifest, inputs.selection)
        write_shards(
            settings.out,
            manifest,
            plan,
            lambda batches: compute.rows(inputs.data, batches),
            examples=inputs.data.examples,
            shard=settings.part,
        )
    return Index.open(settings.out, allow_missing=settings.part is not None)


def draft_manifest(settings: IndexSettings | DoctorSettings, inputs: Inputs, spec: CompressionSpec) -> Manifest:
    """The manifest without its plan."""
    return Manifest(
        model=ModelIdentity(name=inputs.loaded.name, fingerprint=inputs.loaded.fingerprint),
        data=DataIdentity(name=inputs.data.name, fingerprint=inputs.data.fingerprint, examples=len(inputs.data)),
        compression=CompressionIdentity(spec=spec.canonical),
        seed=settings.seed,
        dtype=settings.dtype,
        loss=settings.loss,
        precision=str(next(inputs.loaded.model.parameters()).dtype).removeprefix("torch."),
        max_length=tokens_at_most(settings, inputs.loaded),
        chat=settings.chat,
        token_budget=batch_tokens(settings, inputs.loaded),
        components=lay_out(inputs.selection.components, spec),
    )


def _planned(settings: IndexSettings, draft: Manifest, data: TokenizedData) -> tuple[Manifest, Plan]:
    return plan_index(
        settings.out,
        draft,
        data.lengths,
        lambda start, stop: fingerprint_rows(data, start, stop),
        append=settings.append,
    )


def _missing_shards(settings: IndexSettings, manifest: Manifest, plan: Plan) -> list[PlannedShard]:
    """Shards of this worker's share that are not on disk yet."""
    folder = Path(settings.out)
    expected = expected_shards(manifest)
    number, parts = settings.part or (0, 1)
    return [
        shard
        for shard in plan.shards[number::parts]
        if shard_fault(folder, shard.number, expected[shard.number], contents=False)
    ]
