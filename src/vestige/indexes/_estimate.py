"""The cost of an index, announced before the work starts: measured on one batch, not guessed."""

import time
from typing import NamedTuple

from vestige.data import TokenizedData
from vestige.indexes._compute import CompressedGradients
from vestige.indexes._manifest import Manifest
from vestige.indexes._plan import PlannedShard
from vestige.models import Selection
from vestige.progress import announce, format_bytes, format_seconds
from vestige.timing import peak_memory_bytes

PROBED = 0.02
"""Share of the padded tokens that may be computed for the estimate alone."""


class Estimate(NamedTuple):
    """Cost of computing some shards."""

    seconds: float
    disk_bytes: int
    memory_bytes: int
    """Peak of the process while one batch of the middle lengths ran."""
    examples: int
    tokens: int


def estimate_cost(
    compute: CompressedGradients, data: TokenizedData, manifest: Manifest, shards: list[PlannedShard]
) -> Estimate:
    """Time a few examples from the middle of the plan, at most 2 % of the work, and scale by padded tokens."""
    shard, padded = shards[len(shards) // 2], sum(shard.padded_tokens for shard in shards)
    batches = list(shard.cut_batches())
    middle = batches[len(batches) // 2]
    stop = min(middle.stop, middle.start + max(1, int(PROBED * padded) // middle.longest))
    probe = shard.rows[middle.start - shard.start : stop - shard.start]
    started = time.perf_counter()
    compute.rows(data, [probe])
    rate = (time.perf_counter() - started) / (len(probe) * middle.longest)
    examples = sum(shard.examples for shard in shards)
    return Estimate(padded * rate, examples * manifest.row_bytes, peak_memory_bytes(), examples, padded)


def announce_estimate(estimate: Estimate, manifest: Manifest, selection: Selection) -> None:
    """Announce in one paragraph what is covered, how long it takes, how much memory and disk."""
    announce(
        f"Covers {selection.selected_parameters:,} of {selection.total_parameters:,} parameters "
        f"({selection.fraction:.0%}) in {len(selection.components)} components; "
        f"{manifest.compression.spec}, {manifest.dtype}: {format_bytes(manifest.row_bytes)} an example."
    )
    announce(
        f"{estimate.examples:,} examples, {estimate.tokens:,} tokens: about {format_seconds(estimate.seconds)}, "
        f"{format_bytes(estimate.disk_bytes)} of disk, {format_bytes(estimate.memory_bytes)} of memory. The first "
        f"use of --method influence adds its curvature: {format_bytes(manifest.curvature_bytes)} of disk."
    )
