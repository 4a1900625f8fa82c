"""`vestige doctor`: check the model and the data, try a few examples, estimate what an index would cost."""

import shutil
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from vestige.checks._gradients import check_autograd, check_slope, try_batches
from vestige.checks._inputs import (
    PROBE_TOKENS,
    check_adapter,
    check_data,
    check_knowledge,
    check_model,
    choose_probes,
    count_by_kind,
    cut_examples,
    explain_sharing,
    run_precision,
)
from vestige.checks._report import Check, Cost, DoctorReport
from vestige.compress import CompressionSpec, parse_spec
from vestige.data import CutBatches, TokenizedData, make_batch
from vestige.errors import ModelError
from vestige.gradients import (
    BatchMemory,
    CardMemory,
    CausalLoss,
    card_memory,
    longest_and_shortest,
    measure_knowledge,
)
from vestige.indexes import (
    PART_BYTES,
    CompressedGradients,
    Inputs,
    Manifest,
    ShardContent,
    batch_memory,
    batch_tokens,
    choose_spec,
    draft_manifest,
    lay_out,
    read_inputs,
    tokens_at_most,
)
from vestige.models import batch_sharing
from vestige.progress import announce, format_bytes, format_seconds
from vestige.runs import sample_rows
from vestige.settings import DoctorSettings, with_settings
from vestige.timing import peak_memory_bytes

ALTERNATIVES = ("logra:16x16", "tensorsketch:64", "tensorsketch:256", "mask:32x32 | sjlt:256", "none")
SHARED_ALTERNATIVES = (
    "tensorsketch:1024 | sjlt:1024",
    "tensorsketch:4096 | sjlt:4096",
    "mask:32x32 | sjlt:4096",
    "mask:65536 | sjlt:4096",
)
"""The same for the whole model: components can share the columns of their last stage."""
DTYPES = ("float16", "float32", "int8")
"""bfloat16 takes as much disk as float16."""
TRIED_TOKENS = 2048
"""Longer examples are cut to this for the timing: enough for an estimate, and the doctor stays quick."""
COMPARED_TOKENS = 256
ROWS_BYTES = 512 * 2**20
"""Most bytes of gradients that the doctor holds for a timing."""


PROBE_NUMBERS = 16 * 2**20
"""Most numbers per example in the tries of batch and padding; what keeps more is tried under `NARROW`."""
NARROW = {"component": "logra:16x16", "model": "logra:16x16 | sjlt:4096"}
KNOWLEDGE_ROWS = 64
"""Examples whose loss is compared with guessing."""


@with_settings(DoctorSettings)
def doctor(settings: DoctorSettings) -> DoctorReport:
    """Check that the model and the data will work with these settings, what is covered, and what an index would cost.

    Tries a few examples, writes nothing, and leaves the weights as they were, bit by bit. `print` the report to read
    it; `report.ok` is False when some check is bad.

    Raises:
        UserError: The model or the data cannot be read at all, as `vestige index` would report.
    """
    inputs = read_inputs(settings, settings.model, settings.data, settings.components, checked=False)
    loaded, data, selection = inputs
    loss = CausalLoss(settings.loss)
    checks = check_data(data, loaded, max_length=tokens_at_most(settings, loaded), chat=settings.chat)
    costs: tuple[Cost, ...] = ()
    free = shutil.disk_usage(Path.cwd()).free
    if checks[0].verdict == "bad":
        checks.append(Check("gradients", "bad", "not tried", "The model cannot run on tokens without an embedding."))
    else:
        announce(f"Trying {loaded.name} on a few of {len(data):,} examples.")
        checks = [*check_model(loaded, selection, loss), *check_adapter(loaded.model, selection, data), *checks]
        try:
            tried, costs = _try_gradients(settings, inputs, loss, free)
        except ModelError as error:
            tried = [Check("gradients", "bad", "cannot be computed", str(error))]
        checks += tried
    return DoctorReport(
        model=loaded.name,
        data=data.name,
        examples=len(data),
        dtype=settings.dtype,
        checks=tuple(checks),
        coverage=count_by_kind(loaded.model, selection),
        costs=costs,
        free_disk_bytes=free,
    )


def _try_gradients(
    settings: DoctorSettings, inputs: Inputs, loss: CausalLoss, free: int
) -> tuple[list[Check], tuple[Cost, ...]]:
    """Run the checks that need the model, and estimate what an index would cost."""
    loaded, data, selection = inputs
    model, components, device = loaded.model, selection.components, next(loaded.model.parameters()).device
    spec = choose_spec(settings, inputs)
    manifest = draft_manifest(settings, inputs, spec)
    probes = choose_probes(data, loaded.context_length)
    trial = try_batch(settings, inputs, manifest, spec)
    narrow = spec if manifest.width <= PROBE_NUMBERS else parse_spec(NARROW[settings.compress_scope])
    tried = _try_probes(settings, inputs, probes, narrow, trial)
    longest = make_batch(probes, [int(probes.target_counts.argmax())]).to(device)
    sample = cut_examples(data.subset(sample_rows(len(data), KNOWLEDGE_ROWS)), PROBE_TOKENS)
    slope = check_slope(model, components, loss, longest, settings.seed)
    exact = check_autograd(model, components, loss, data, loaded.context_length)
    known = check_knowledge(measure_knowledge(model, sample, batch_tokens(settings, loaded)))
    costs = estimate_costs(settings, inputs, manifest, spec, trial)
    card, memory = card_memory(model), batch_memory(loaded)
    estimates = [] if card is None or memory is None else [check_batches(memory, card, manifest.token_budget, data)]
    estimates += [
        check_time(costs[0], trial),
        check_memory(costs[0], _memory_limit(device), device.type),
        check_disk_space(costs[0], settings.dtype, free, len(data)),
    ]
    return [*tried, exact, slope, known, *estimates], costs


def _try_probes(
    settings: DoctorSettings, inputs: Inputs, probes: TokenizedData, spec: CompressionSpec, trial: "Trial"
) -> list[Check]:
    """Check that gradients are finite and depend neither on the batch nor on padding."""
    loaded, components, scope = inputs.loaded, inputs.selection.components, settings.compress_scope
    columns, sharing = lay_out(components, spec, scope), batch_sharing(loaded.model)
    with CompressedGradients(loaded, components, columns, spec, settings.seed, settings.loss, scope) as compute:
        ends = inputs.data.subset(longest_and_shortest(inputs.data, sharing, batch_tokens(settings, loaded)))
        dtype = run_precision(loaded.model)
        (batches, padding), bare = try_batches(compute, probes, ends, sharing, loaded.context_length, columns, dtype)
    tried = [(probes, bare)] + ([(trial.data, trial.content)] if trial.content is not None else [])
    return [_check_finite(tried), explain_sharing(batches, sharing, inputs.data.lengths), padding]


def _check_finite(tried: Sequence[tuple[TokenizedData, ShardContent]]) -> Check:
    """Check that every loss and gradient that was computed is finite; name the examples where one is not."""
    ids, count = [], 0
    for data, content in tried:
        finite = torch.isfinite(content.loss) & torch.isfinite(content.norm)
        count += len(finite)
        ids += [data.examples[int(row)].id for row in content.example[~finite]]
    name = "finite gradients"
    if not ids:
        return Check(name, "good", f"all of {count} tried", "Losses and gradients are finite numbers.", 0)
    named = ", ".join(repr(one) for one in list(dict.fromkeys(ids))[:5])
    return Check(
        name,
        "bad",
        f"{len(ids)} of {count} tried are not",
        f"NaN or infinite for {named}. If it is every example, the weights hold NaN or overflow: check the checkpoint "
        "and try --precision float32. If it is a few, check those.",
        len(ids),
    )


class Trial(NamedTuple):
    """One batch of the index, computed as `vestige index` would."""

    data: TokenizedData
    """What was computed: whole examples, except where they were too long."""
    content: ShardContent | None
    """None where even one row of gradients is too large to hold."""
    seconds_per_token: float | None
    working_bytes: int
    """Most memory in use during the work, without the rows of gradients themselves."""


def try_batch(
    settings: DoctorSettings,
    inputs: Inputs,
    manifest: Manifest,
    spec: CompressionSpec,
    rows_bytes: int = ROWS_BYTES,
) -> Trial:
    """Time a batch from the middle of the plan; where its rows are too large, as much of it as fits `rows_bytes`."""
    cut = _cut(inputs, manifest)
    count = sum(1 for _ in cut.batches())
    middle = next(islice(cut.batches(), count // 2, None))
    data = cut_examples(inputs.data.subset(cut.rows[middle.start : middle.stop]), TRIED_TOKENS)
    most = rows_bytes // (8 * manifest.width)
    data = data.subset(np.arange(min(len(data), max(1, most))))
    seconds, content = _time_rows(settings, inputs, spec, data) if most else (None, None)
    held = 8 * len(data) * manifest.width if most else 0
    return Trial(data, content, seconds, _most_memory(next(inputs.loaded.model.parameters()).device) - held)


def estimate_costs(
    settings: DoctorSettings,
    inputs: Inputs,
    manifest: Manifest,
    spec: CompressionSpec,
    trial: Trial,
    part_bytes: int = PART_BYTES,
) -> tuple[Cost, ...]:
    """Estimate the requested compression first, then alternatives, whose speed is compared with it on fewer tokens.

    `part_bytes` is how much of a shard is held at once before it is written.
    """
    others = SHARED_ALTERNATIVES if settings.compress_scope == "model" else ALTERNATIVES
    specs = {one.canonical: one for one in (spec, *map(parse_spec, others))}
    few = max(1, COMPARED_TOKENS // max(int(trial.data.lengths.max()), 1))
    small = cut_examples(trial.data.subset(np.arange(min(few, len(trial.data)))), COMPARED_TOKENS)
    cut, examples = _cut(inputs, manifest), len(inputs.data)
    tokens = sum(batch.tokens for batch in cut.batches())
    widest = max(batch.stop - batch.start for batch in cut.batches())
    reference, costs = None, []
    for one in specs.values():
        columns = lay_out(inputs.selection.components, one, settings.compress_scope)
        drafted = manifest.model_copy(update={"components": columns})
        seconds = None
        if 8 * len(small) * drafted.width <= ROWS_BYTES and trial.seconds_per_token is not None:
            rate = _time_rows(settings, inputs, one, small)[0]
            reference = reference or rate
            seconds = rate / reference * trial.seconds_per_token * tokens
        row_bytes = {dtype: drafted.model_copy(update={"dtype": dtype}).row_bytes for dtype in DTYPES}
        disk = {dtype: size * examples for dtype, size in row_bytes.items()}
        # The rows of a part of a shard are held while it is stored, those of a batch while they are computed.
        held = max(min(part_bytes // (4 * drafted.width), examples), widest) + widest
        memory = trial.working_bytes + 4 * drafted.width * held
        costs.append(Cost(one.canonical, drafted.width, seconds, memory, row_bytes, disk, drafted.curvature_bytes))
    return tuple(costs)


def check_disk_space(cost: Cost, dtype: str, free: int, examples: int) -> Check:
    """Check that the index, with the curvature that the first question adds to it, fits on the disk."""
    dtype = "float16" if dtype == "bfloat16" else dtype  # as long
    per_example, needed = cost.row_bytes[dtype], cost.disk_bytes[dtype]
    curvature = format_bytes(cost.curvature_bytes)
    value = (
        f"{format_bytes(needed)} for {examples:,} examples at {format_bytes(per_example)}, {curvature} for the "
        f"curvature of influence, {format_bytes(free)} free"
    )
    if needed > free:
        advice = "It does not fit: choose a smaller --compress, --dtype int8, or --compress auto --disk SIZE."
        return Check("disk", "bad", value, advice, needed)
    needed += cost.curvature_bytes
    if needed > free:
        advice = f"The index fits, but not the {curvature} that influence adds: choose a smaller --compress for it."
        return Check("disk", "warn", value, advice, needed)
    if needed > free / 2:
        return Check("disk", "warn", value, "It fits, but takes more than half of what is free.", needed)
    return Check("disk", "good", value, "It fits on the disk of this folder.", needed)


def check_memory(cost: Cost, limit: int, device: str) -> Check:
    """Check that the work fits into the memory of a kind of device, `limit` bytes."""
    needed = cost.memory_bytes
    value = f"about {format_bytes(needed)} of {format_bytes(limit)} on {device}"
    if needed > limit:
        advice = "It does not fit: choose a smaller --token-budget, fewer --components or a smaller --compress."
        return Check("memory", "bad", value, advice, needed)
    if needed > 0.8 * limit:
        return Check("memory", "warn", value, "It is close; a smaller --token-budget needs less.", needed)
    return Check("memory", "good", value, "It fits.", needed)


def check_batches(memory: BatchMemory, card: CardMemory, tokens: int, data: TokenizedData) -> Check:
    """Check that the model and its batches, of `tokens` tokens at most, fit into the memory of the card."""
    name, longest = "batches", int(data.lengths.max())
    peak, one = memory.peak(max(tokens, longest)), memory.peak(longest)
    sizes = f"{format_bytes(card.free)} free of {format_bytes(card.total)} on the GPU"
    value = f"{tokens:,} tokens at once, about {format_bytes(peak)} at most, with {sizes}"
    smaller = "--quantize 4 for a LoRA adapter, or --device balanced, which spreads the model over all GPUs"
    if memory.weights + memory.fixed > card.free:
        value = f"the model takes {format_bytes(memory.weights)}, with {sizes}"
        return Check(name, "bad", value, f"The model does not fit. Type --precision bfloat16, {smaller}.", peak)
    if one > card.free:
        advice = f"The longest example, {longest:,} tokens, takes about {format_bytes(one)}: --max-length, {smaller}."
        return Check(name, "bad", value, advice, peak)
    if peak > card.free:
        fitting = memory.tokens_within(card.free)
        advice = f"Batches will be halved as they run. Type --token-budget {max(fitting, longest)} to begin with less."
        return Check(name, "warn", value, advice, peak)
    if not memory.tokens_within(card.free):
        advice = f"The model leaves little memory to batches, and passes will be slow: {smaller}."
        return Check(name, "warn", value, advice, peak)
    return Check(name, "good", value, "Measured by two small batches; a batch that does not fit is halved.", peak)


def check_time(cost: Cost, trial: Trial) -> Check:
    """Check how long the index would take; long is not bad."""
    if cost.seconds is None:
        advice = "Even one row of gradients is too large to try: choose a --compress."
        return Check("time", "warn", "not measured", advice)
    advice = f"Measured on {len(trial.data)} examples and scaled by tokens, padding included; other work slows it."
    return Check("time", "good", f"about {format_seconds(cost.seconds)}", advice, cost.seconds)


def _time_rows(
    settings: DoctorSettings, inputs: Inputs, spec: CompressionSpec, data: TokenizedData
) -> tuple[float, ShardContent]:
    """Return the seconds per padded token, and what was computed; hooks and maps are made before the clock starts."""
    components, scope = inputs.selection.components, settings.compress_scope
    columns = lay_out(components, spec, scope)
    with CompressedGradients(inputs.loaded, components, columns, spec, settings.seed, settings.loss, scope) as compute:
        compute.rows(cut_examples(data.subset([0]), 2), [np.arange(1)])
        started = time.perf_counter()
        content = compute.rows(data, [np.arange(len(data))])
        seconds = time.perf_counter() - started
    return seconds / max(len(data) * int(data.lengths.max()), 1), content


def _cut(inputs: Inputs, manifest: Manifest) -> CutBatches:
    """Return the batches of the index."""
    sharing = batch_sharing(inputs.loaded.model)
    return CutBatches(inputs.data.lengths, manifest.token_budget, manifest.plan.max_examples, sharing)


def _most_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def _memory_limit(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = psutil.virtual_memory()
    return memory.available + psutil.Process().memory_info().rss
