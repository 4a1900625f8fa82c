"""What an index would cost in time, memory and disk, for the compression that was requested and for others."""

import shutil
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from vestige.checks._probes import cut_examples
from vestige.checks._types import Check, Cost
from vestige.compress import CompressionSpec, parse_spec
from vestige.data import CutBatches, TokenizedData
from vestige.indexes import PART_BYTES, CompressedGradients, Inputs, Manifest, ShardContent, lay_out
from vestige.models import batch_sharing
from vestige.progress import format_bytes, format_seconds
from vestige.settings import DoctorSettings
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


class Trial(NamedTuple):
    """One batch of the index, computed as `vestige index` would."""

    data: TokenizedData
    """What was computed: whole examples, except where they were too long."""
    content: ShardContent | None
    """None where even one row of gradients is too large to hold."""
    seconds_per_token: float | None
    working_bytes: int
    """Most memory in use during the work, without the rows of gradients themselves."""


def try_batch(settings: DoctorSettings, inputs: Inputs, manifest: Manifest, spec: CompressionSpec) -> Trial:
    """Time a batch from the middle of the plan; where its rows are too large, as much of it as fits."""
    cut = _cut(inputs, manifest)
    count = sum(1 for _ in cut.batches())
    middle = next(islice(cut.batches(), count // 2, None))
    data = cut_examples(inputs.data.subset(cut.rows[middle.start : middle.stop]), TRIED_TOKENS)
    most = ROWS_BYTES // (8 * manifest.width)
    data = data.subset(np.arange(min(len(data), max(1, most))))
    device = next(inputs.loaded.model.parameters()).device
    if not most:
        return Trial(data, None, None, _most_memory(device))
    seconds, content = _timed(settings, inputs, spec, data)
    return Trial(data, content, seconds, _most_memory(device) - 8 * len(data) * manifest.width)


def estimate_costs(
    settings: DoctorSettings, inputs: Inputs, manifest: Manifest, spec: CompressionSpec, trial: Trial
) -> tuple[Cost, ...]:
    """Estimate the requested compression first, then alternatives, whose speed is compared with it on fewer tokens."""
    others = SHARED_ALTERNATIVES if settings.compress_scope == "model" else ALTERNATIVES
    specs = {one.canonical: one for one in (spec, *map(parse_spec, others))}
    few = max(1, COMPARED_TOKENS // max(int(trial.data.lengths.max()), 1))
    small = cut_examples(trial.data.subset(np.arange(min(few, len(trial.data)))), COMPARED_TOKENS)
    cut = _cut(inputs, manifest)
    tokens = sum(batch.tokens for batch in cut.batches())
    widest = max(batch.stop - batch.start for batch in cut.batches())
    reference = None
    costs = []
    for one in specs.values():
        columns = lay_out(inputs.selection.components, one, settings.compress_scope)
        drafted = manifest.model_copy(update={"components": columns})
        seconds = None
        if 8 * len(small) * drafted.width <= ROWS_BYTES and trial.seconds_per_token is not None:
            rate = _timed(settings, inputs, one, small)[0]
            reference = reference or rate
            seconds = rate / reference * trial.seconds_per_token * tokens
        costs.append(_cost(one, drafted, len(inputs.data), seconds, trial, widest))
    return tuple(costs)


def check_disk_space(cost: Cost, dtype: str, free: int, examples: int) -> Check:
    """Check that the index, with the curvature that the first question adds to it, fits on the disk."""
    per_example, needed = bytes_in(cost.row_bytes, dtype), bytes_in(cost.disk_bytes, dtype)
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


def check_memory(cost: Cost, device: torch.device) -> Check:
    """Check that the work fits into memory."""
    limit, needed = _memory_limit(device), cost.memory_bytes
    value = f"about {format_bytes(needed)} of {format_bytes(limit)} on {device.type}"
    if needed > limit:
        advice = "It does not fit: choose a smaller --token-budget, fewer --components or a smaller --compress."
        return Check("memory", "bad", value, advice, needed)
    if needed > 0.8 * limit:
        return Check("memory", "warn", value, "It is close; a smaller --token-budget needs less.", needed)
    return Check("memory", "good", value, "It fits.", needed)


def check_time(cost: Cost, trial: Trial) -> Check:
    """Check how long the index would take; long is not bad."""
    if cost.seconds is None:
        advice = "Even one row of gradients is too large to try: choose a --compress."
        return Check("time", "warn", "not measured", advice)
    advice = f"Measured on {len(trial.data)} examples and scaled by tokens, padding included; other work slows it."
    return Check("time", "good", f"about {format_seconds(cost.seconds)}", advice, cost.seconds)


def bytes_in(by_dtype: dict[str, int], dtype: str) -> int:
    """Return the entry of a number format, bfloat16 being as long as float16."""
    return by_dtype["float16" if dtype == "bfloat16" else dtype]


def free_disk() -> int:
    """Return the free bytes on the disk of the current folder."""
    return shutil.disk_usage(Path.cwd()).free


def _timed(
    settings: DoctorSettings, inputs: Inputs, spec: CompressionSpec, data: TokenizedData
) -> tuple[float, ShardContent]:
    """Return the seconds per padded token, and what was computed; hooks and maps are made before the clock starts."""
    components = inputs.selection.components
    scope = settings.compress_scope
    columns = lay_out(components, spec, scope)
    with CompressedGradients(inputs.loaded, components, columns, spec, settings.seed, settings.loss, scope) as compute:
        compute.rows(cut_examples(data.subset([0]), 2), [np.arange(1)])
        started = time.perf_counter()
        content = compute.rows(data, [np.arange(len(data))])
        seconds = time.perf_counter() - started
    return seconds / max(len(data) * int(data.lengths.max()), 1), content


def _cost(
    spec: CompressionSpec, manifest: Manifest, examples: int, seconds: float | None, trial: Trial, widest: int
) -> Cost:
    row_bytes = {dtype: manifest.model_copy(update={"dtype": dtype}).row_bytes for dtype in DTYPES}
    # The rows of a part of a shard are held while it is stored, those of a batch while they are computed.
    part = min(PART_BYTES // (4 * manifest.width), examples)
    held = max(part, widest) + widest
    memory = trial.working_bytes + 4 * manifest.width * held
    disk = {dtype: size * examples for dtype, size in row_bytes.items()}
    return Cost(spec.canonical, manifest.width, seconds, memory, row_bytes, disk, manifest.curvature_bytes)


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
