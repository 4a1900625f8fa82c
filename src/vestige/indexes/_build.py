"""`vestige index`: from a model and its training data to an index on disk."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vestige import compress
from vestige.compress import CompressingSink, CompressionSpec, parse_spec
from vestige.data import TokenizedData, forget_tokens, make_batch
from vestige.distributed import broadcast_from_rank0, exchange_rows, is_rank0, round_robin, this_rank
from vestige.errors import DiskSpaceError, SpecError, WorkElsewhere
from vestige.gradients import (
    CausalLoss,
    FittingBatches,
    GradientPass,
    Reduction,
    card_memory,
    describe_device,
)
from vestige.indexes._inputs import Inputs, batch_tokens, read_inputs, tokens_at_most
from vestige.indexes._manifest import (
    BYTES_PER_NUMBER,
    CompressionIdentity,
    DataIdentity,
    IndexedComponent,
    Manifest,
    ModelIdentity,
    lay_out,
    read_manifest,
)
from vestige.indexes._plan import PlannedShard, fingerprint_rows, plan_index
from vestige.indexes._shards import ShardContent, parts_of
from vestige.indexes._store import Index
from vestige.indexes._work import TOKENS, IndexWork, ShardCompute, prepare_index, remove_index
from vestige.jobs import is_worker, phase, profile, refuse_overwrite_by_ranks, run_pieces, worker_command, write_profile
from vestige.models import Component, LoadedModel, batch_sharing, leave_card, quantized_bits
from vestige.progress import announce, format_bytes, format_memory, format_seconds
from vestige.settings import CompressionSettings, DoctorSettings, IndexSettings, Scope, with_settings
from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes

MOST = 4096
"""Most numbers per component that `auto` takes: more bytes bring little."""
FEWEST_SHARED = 256
"""Least numbers for the whole model, whose components disturb each other in them."""
ROW_BYTES = 64 * 2**10
"""Bytes per example that `auto` aims at when no budget is given: a million examples in 64 GiB."""


def choose_spec(
    settings: CompressionSettings, inputs: Inputs, *, earlier: CompressionSpec | None = None
) -> CompressionSpec:
    """Return the requested compression, or with `auto` the choice for the disk budget and the device.

    For the whole model that is the widest tensor sketch, followed by a sparse projection of the same width, because
    components cannot share a tensor sketch. An index that was begun goes on with its own choice, `earlier`, if the
    budget still allows it: on another kind of device another compressor may be cheaper.

    Raises:
        DiskSpaceError: Nothing fits the budget.
        SpecError: The spec does not parse, or a budget came without `auto`.
    """
    selection, examples = inputs.selection, len(inputs.data)
    if settings.compress != "auto":
        if settings.disk is not None:
            raise SpecError(
                f"--disk belongs to --compress auto; --compress {settings.compress!r} sets the size itself. Drop one."
            )
        return parse_spec(settings.compress)
    budget = settings.disk_bytes if settings.disk_bytes is not None else ROW_BYTES * examples
    number_bytes = BYTES_PER_NUMBER[settings.dtype] * examples
    shared = settings.compress_scope == "model"
    parts, fewest = (1, FEWEST_SHARED) if shared else (len(selection.components), compress.FEWEST)
    width = min(MOST, budget // (number_bytes * parts))
    if width < fewest:
        of_what = "the whole model" if shared else f"each of {parts} components"
        raise DiskSpaceError(
            f"{examples:,} examples do not fit in {format_bytes(budget)}: {fewest} numbers for {of_what} take "
            f"{format_bytes(fewest * number_bytes * parts)}. Give a larger --disk, fewer --components, or --dtype int8."
        )
    if shared:
        spec, reason = parse_spec(f"tensorsketch:{width} | sjlt:{width}"), "The widest sketch of the whole model."
    else:
        spec, reason = _choose_for(inputs, width, earlier)
    size = lay_out(selection.components, spec, settings.compress_scope)[-1].stop * number_bytes
    used = f"{format_bytes(size)} of {format_bytes(budget)}"
    announce(f"--compress auto: {spec} takes {used} for {examples:,} examples. {reason}")
    return spec


def _choose_for(inputs: Inputs, width: int, earlier: CompressionSpec | None) -> tuple[CompressionSpec, str]:
    """Return the compressor for a model on its device and examples as long as these are on average, and the reason."""
    components = inputs.selection.components
    shapes = [component.shape for component in components]
    most = width * len(shapes)
    fitting = [one for one in compress.list_candidates(width) if sum(map(one.spec.size_for, shapes)) <= most]
    if earlier is not None and earlier in [one.spec for one in fitting]:
        return earlier, "The index was begun with it."
    device = next(inputs.loaded.model.parameters()).device.type
    linear = [component.shape for component in components if _is_linear(component)]
    choice = compress.choose_compressor(fitting, linear, round(float(np.mean(inputs.data.lengths))), device)
    return choice.taken.spec, choice.reason


def _is_linear(component: Component) -> bool:
    """Return whether the layer's own work is a matrix product: vectors and look-ups cost next to nothing."""
    used = any(use.kind not in ("embedding", "norm", "relative_bias") for use in component.uses)
    return used and min(component.shape) > 1


class CompressedGradients:
    """Computes compressed gradients of examples; use it as a context, which places and removes the hooks."""

    def __init__(
        self,
        loaded: LoadedModel,
        components: Sequence[Component],
        columns: Sequence[IndexedComponent],
        spec: CompressionSpec,
        seed: int,
        loss: Reduction,
        scope: Scope = "component",
    ) -> None:
        self._device = next(loaded.model.parameters()).device
        shared = scope == "model"
        places = [loaded.model.get_submodule(part.uses[0].module) for part in components]
        devices = [next((one.device for one in place.parameters()), self._device) for place in places]
        compressors = [
            spec.build(part.name, part.shape, seed, device, shared=shared)
            for part, device in zip(components, devices, strict=True)
        ]
        self._sink = CompressingSink(compressors, [part.start for part in columns], max(part.stop for part in columns))
        self._pass = GradientPass(loaded.model, components, CausalLoss(loss))

    def __enter__(self) -> "CompressedGradients":
        self._pass.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._pass.__exit__()

    def rows(self, data: TokenizedData, batches: Sequence[np.ndarray]) -> ShardContent:
        """Return gradients, losses and norms of the batches' examples, in that order, on the CPU in float32."""
        return self._compute(data, FittingBatches(data.lengths), sum(map(len, batches)), iter(batches))()

    def parts(self, data: TokenizedData, batches: Sequence[np.ndarray]) -> Iterator[ShardContent]:
        """Yield `rows` of a shard's batches, part by part: memory does not grow with the shard.

        A card is given the next part before the one before is copied from it, so that it never waits for the disk.
        """
        fitting, before = FittingBatches(data.lengths), None
        for count, part in parts_of(batches, self._sink.width, fewest=this_rank().world_size):
            finish = self._compute(data, fitting, count, part)
            if self._device.type != "cuda":
                yield finish()
                continue
            if before is not None:
                yield before()
            before = finish
        if before is not None:
            yield before()

    def _compute(
        self, data: TokenizedData, fitting: FittingBatches, count: int, batches: Iterator[np.ndarray]
    ) -> Callable[[], ShardContent]:
        """Compute the batches, and return what waits for the device and returns their rows."""
        # One array for all from the start: joined at the end, they would be in memory twice.
        gradients, losses = torch.empty(count, self._sink.width), torch.empty(count)
        rows = torch.empty(count, dtype=torch.int64)
        starts = [0]

        def note_rows() -> Iterator[np.ndarray]:
            for batch in batches:
                starts.append(starts[-1] + len(batch))
                rows[starts[-2] : starts[-1]] = torch.as_tensor(np.asarray(batch, dtype=np.int64))
                yield batch

        def run(part: np.ndarray) -> tuple[Tensor, Tensor]:
            self._sink.begin(len(part), self._device)
            loss = self._pass.run(make_batch(data, part).to(self._device), self._sink).float()
            # From a card into pinned memory, which is filled when `copied` is.
            return loss.to("cpu", non_blocking=True), self._sink.gradients.to("cpu", non_blocking=True)

        waiting = list[tuple[slice, tuple[Tensor, Tensor]]]()
        for number, batch, counts in round_robin(note_rows()):
            first = starts[number]
            for found in fitting.run(batch, run):
                places = slice(first, first + len(found[0]))
                first = places.stop
                if self._device.type == "cuda":
                    waiting += [(places, found)] if counts else []
                elif counts:
                    losses[places], gradients[places] = found
        copied = torch.cuda.Event() if self._device.type == "cuda" else None
        if copied is not None:
            copied.record()

        def finish() -> ShardContent:
            if copied is not None:
                copied.synchronize()
            for places, found in waiting:
                losses[places], gradients[places] = found
            exchange_rows((gradients, losses), np.diff(starts).tolist())
            return ShardContent(gradients, losses, gradients.norm(dim=1), rows)

        return finish


PROBED = 0.02
"""Share of the padded tokens that may be computed for the estimate alone."""


@with_settings(IndexSettings)
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
        if settings.verbatim and not built.missing_shards():
            from vestige.indexes._verbatim import VERBATIM, open_search

            open_search(settings.out / VERBATIM, inputs.data, inputs.loaded.vocabulary)
    write_profile(measured, settings.out)
    return built


def build_index(settings: IndexSettings, inputs: Inputs, command: Sequence[str] | None = None) -> Index:
    """Build the index of a model and data that are already loaded; also run by a worker of `command`."""
    begun = broadcast_from_rank0(lambda: None if settings.overwrite else read_manifest(settings.out))
    earlier = parse_spec(begun.compression.spec, settings.out) if begun else None
    spec = choose_spec(settings, inputs, earlier=earlier)
    if settings.overwrite:
        refuse_overwrite_by_ranks()
        broadcast_from_rank0(lambda: remove_index(settings.out))
    if any(stage.is_untrained for stage in spec.stages):
        from vestige.indexes._trained import train_spec

        spec = train_spec(settings, inputs, spec, earlier, command)
    draft = draft_manifest(settings, inputs, spec)
    if begun and settings.token_budget is None and card_memory(inputs.loaded.model) is not None:
        # What was free when the index was begun decides its batches, not what is free now.
        draft = draft.model_copy(update={"token_budget": begun.token_budget})
    lengths, fingerprint_of = inputs.data.lengths, partial(fingerprint_rows, inputs.data)
    options = {"append": settings.append, "sharing": batch_sharing(inputs.loaded.model)}
    manifest, plan = broadcast_from_rank0(lambda: plan_index(settings.out, draft, lengths, fingerprint_of, **options))

    def open_gradients() -> CompressedGradients:
        components, columns = inputs.selection.components, manifest.components
        arguments = settings.seed, settings.loss, settings.compress_scope
        return CompressedGradients(inputs.loaded, components, columns, spec, *arguments)

    @contextmanager
    def compute() -> Iterator[ShardCompute]:
        with open_gradients() as gradients:
            yield lambda batches: gradients.parts(inputs.data, batches)

    work = IndexWork(settings.out, manifest, plan, inputs.data.examples, compute, skip_bad=settings.skip_bad)
    missing = list[int]()
    if not is_worker():
        missing = broadcast_from_rank0(lambda: prepare_index(work))
        number, parts = settings.part or (0, 1)
        if own := [plan.shards[piece] for piece in missing if piece % parts == number]:
            with open_gradients() as gradients:
                _announce_cost(gradients, inputs, manifest, own)
        if is_rank0():
            forget_tokens(settings.out / TOKENS, inputs.data)
    try:
        with phase(work.pieces.name, "tokens") as tokens, phase(work.pieces.name, work.pieces.unit) as examples:
            for piece in missing:
                examples.append(plan.shards[piece].examples)
                tokens.append(plan.shards[piece].tokens)
            with leave_card(inputs.loaded.model, settings):
                return run_pieces(work.pieces, settings, command)
    except WorkElsewhere as note:
        if settings.part is None:
            raise
        announce(str(note))
        return Index.open(settings.out, allow_missing=True)


def _announce_cost(
    compute: CompressedGradients, inputs: Inputs, manifest: Manifest, shards: Sequence[PlannedShard]
) -> None:
    """Announce coverage, time, memory and disk of this process's share, before it begins.

    A few examples from the middle of the plan, at most 2 % of the work, are timed; time follows padded tokens.
    """
    shard, padded = shards[len(shards) // 2], sum(shard.padded_tokens for shard in shards)
    batches = list(shard.cut_batches())
    middle = batches[len(batches) // 2]
    stop = min(middle.stop, middle.start + max(1, int(PROBED * padded) // middle.longest))
    probe = shard.rows[middle.start - shard.start : stop - shard.start]
    if next(inputs.loaded.model.parameters()).device.type == "cuda":
        # The first pass on a card also loads its libraries.
        compute.rows(inputs.data, [probe[:1]])
    started = time.perf_counter()
    compute.rows(inputs.data, [probe])
    seconds = padded * (time.perf_counter() - started) / (len(probe) * middle.longest)
    examples, selection = sum(shard.examples for shard in shards), inputs.selection
    memory = format_memory(peak_memory_bytes(), peak_gpu_memory_bytes())
    announce(
        f"Covers {selection.selected_parameters:,} of {selection.total_parameters:,} parameters "
        f"({selection.fraction:.0%}) in {len(selection.components)} components; "
        f"{manifest.compression.spec}, {manifest.dtype}: {format_bytes(manifest.row_bytes)} an example."
    )
    announce(
        f"{examples:,} examples, {padded:,} tokens: about {format_seconds(seconds)}, "
        f"{format_bytes(examples * manifest.row_bytes)} of disk, {memory}. The "
        f"first use of --method influence adds its curvature: {format_bytes(manifest.curvature_bytes)} of disk."
    )


def draft_manifest(settings: IndexSettings | DoctorSettings, inputs: Inputs, spec: CompressionSpec) -> Manifest:
    """Return the manifest without its plan."""
    columns = lay_out(inputs.selection.components, spec, settings.compress_scope)
    # On a card a batch's rows are computed and copied, in float32.
    of_rows = 8 * max(part.stop for part in columns) / max(float(np.mean(inputs.data.lengths)), 1)
    parameters = list(inputs.loaded.model.parameters())
    return Manifest(
        model=ModelIdentity(name=inputs.loaded.name, fingerprint=inputs.loaded.fingerprint),
        data=DataIdentity(name=inputs.data.name, fingerprint=inputs.data.fingerprint, examples=len(inputs.data)),
        compression=CompressionIdentity(spec=spec.canonical, scope=settings.compress_scope),
        seed=settings.seed,
        dtype=settings.dtype,
        loss=settings.loss,
        precision=str(parameters[0].dtype).removeprefix("torch."),
        quantize=quantized_bits(inputs.loaded.model),
        device=" + ".join(sorted({describe_device(one.device) for one in parameters})),
        max_length=tokens_at_most(settings, inputs.loaded),
        chat=settings.chat,
        token_budget=batch_tokens(settings, inputs.loaded, only_free=True, more_per_token=of_rows),
        components=columns,
    )
