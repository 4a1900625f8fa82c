"""`vestige index`: from a model and its training data to an index on disk."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vestige.compress import CompressionSpec, parse_spec
from vestige.data import forget_tokens
from vestige.distributed import broadcast_from_rank0, is_rank0
from vestige.errors import UserError, WorkElsewhere
from vestige.indexes._budget import choose_spec
from vestige.indexes._compute import CompressedGradients, lay_out
from vestige.indexes._estimate import announce_estimate, estimate_cost
from vestige.indexes._examples import fingerprint_rows
from vestige.indexes._inputs import Inputs, batch_tokens, read_inputs, tokens_at_most
from vestige.indexes._manifest import CompressionIdentity, DataIdentity, Manifest, ModelIdentity, read_manifest
from vestige.indexes._plan import Plan, plan_index
from vestige.indexes._run import TOKENS, prepare_index, remove_index
from vestige.indexes._store import Index
from vestige.indexes._work import IndexPlan, ShardCompute
from vestige.launch import (
    is_one_of_several,
    is_worker,
    phase,
    profile,
    run_plan,
    worker_command,
    write_profile,
)
from vestige.models import batch_sharing
from vestige.progress import announce
from vestige.settings import DoctorSettings, IndexSettings, verb


@verb(IndexSettings)
def index(settings: IndexSettings) -> Index:
    """Index the training data: the compressed gradient of every example, at the model as it is.

    Interrupted at any moment, the same call continues where it stopped and gives the same bytes; another setting over
    an old index is refused, with the difference shown.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
    """
    tokens = settings.out / TOKENS
    with profile(settings.profile) as measured:
        inputs = read_inputs(settings, settings.model, settings.data, settings.components, tokens=tokens)
        built = build_index(settings, inputs, worker_command(settings, "index"))
    write_profile(measured, settings.out)
    return built


def build_index(settings: IndexSettings, inputs: Inputs, command: Sequence[str] | None = None) -> Index:
    """Build the index of a model and data that are already loaded; also run by a worker of `command`."""
    begun = broadcast_from_rank0(lambda: None if settings.overwrite else read_manifest(settings.out))
    spec = choose_spec(settings, inputs, earlier=parse_spec(begun.compression.spec) if begun else None)
    if settings.overwrite:
        _require_one_process()
        broadcast_from_rank0(lambda: remove_index(settings.out))
    draft = draft_manifest(settings, inputs, spec)
    manifest, plan = broadcast_from_rank0(lambda: _planned(settings, draft, inputs))

    @contextmanager
    def compute() -> Iterator[ShardCompute]:
        with _gradients(settings, inputs, manifest, spec) as gradients:
            yield lambda batches: gradients.parts(inputs.data, batches)

    work = IndexPlan(settings.out, manifest, plan, inputs.data.examples, compute, skip_bad=settings.skip_bad)
    missing = list[int]()
    if not is_worker():
        missing = broadcast_from_rank0(lambda: prepare_index(work))
        _announce_cost(settings, inputs, work, spec, missing)
        if is_rank0():
            forget_tokens(settings.out / TOKENS, inputs.data)
    try:
        with phase(work.name, "tokens") as tokens, phase(work.name, work.unit) as examples:
            for piece in missing:
                examples.append(plan.shards[piece].examples)
                tokens.append(plan.shards[piece].tokens)
            return run_plan(work, settings, command)
    except WorkElsewhere as note:
        if settings.part is None:
            raise
        announce(str(note))
        return Index.open(settings.out, allow_missing=True)


def _gradients(
    settings: IndexSettings, inputs: Inputs, manifest: Manifest, spec: CompressionSpec
) -> CompressedGradients:
    return CompressedGradients(
        inputs.loaded,
        inputs.selection.components,
        manifest.components,
        spec,
        settings.seed,
        settings.loss,
        settings.compress_scope,
    )


def _announce_cost(
    settings: IndexSettings, inputs: Inputs, work: IndexPlan, spec: CompressionSpec, missing: list[int]
) -> None:
    """Announce time, memory and disk before this process's share begins."""
    number, parts = settings.part or (0, 1)
    shards = [work.plan.shards[piece] for piece in missing if piece % parts == number]
    if shards:
        with _gradients(settings, inputs, work.manifest, spec) as gradients:
            estimate = estimate_cost(gradients, inputs.data, work.manifest, shards)
        announce_estimate(estimate, work.manifest, inputs.selection)


def _require_one_process() -> None:
    if is_one_of_several():
        raise UserError(
            "--overwrite under torchrun would have every rank delete what the others make. Delete the folder first, "
            "and run the command without --overwrite."
        )


def draft_manifest(settings: IndexSettings | DoctorSettings, inputs: Inputs, spec: CompressionSpec) -> Manifest:
    """Return the manifest without its plan."""
    return Manifest(
        model=ModelIdentity(name=inputs.loaded.name, fingerprint=inputs.loaded.fingerprint),
        data=DataIdentity(name=inputs.data.name, fingerprint=inputs.data.fingerprint, examples=len(inputs.data)),
        compression=CompressionIdentity(spec=spec.canonical, scope=settings.compress_scope),
        seed=settings.seed,
        dtype=settings.dtype,
        loss=settings.loss,
        precision=str(next(inputs.loaded.model.parameters()).dtype).removeprefix("torch."),
        max_length=tokens_at_most(settings, inputs.loaded),
        chat=settings.chat,
        token_budget=batch_tokens(settings, inputs.loaded),
        components=lay_out(inputs.selection.components, spec, settings.compress_scope),
    )


def _planned(settings: IndexSettings, draft: Manifest, inputs: Inputs) -> tuple[Manifest, Plan]:
    return plan_index(
        settings.out,
        draft,
        inputs.data.lengths,
        lambda start, stop: fingerprint_rows(inputs.data, start, stop),
        append=settings.append,
        sharing=batch_sharing(inputs.loaded.model),
    )
