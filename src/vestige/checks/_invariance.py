"""Whether a gradient depends on its batch or its padding, found by trying."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int

from vestige.checks._probes import EXTRA_PADDING, padded
from vestige.checks._types import Check, Verdict
from vestige.data import Sharing, TokenizedData, plan_batches
from vestige.indexes import CompressedGradients, IndexedComponent, ShardContent

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative difference that rounding explains: kernels sum in another order for another shape, and the error
grows with depth. Half precision has 2 to 3 digits to begin with."""
_WARN = 10


def try_batches(
    compute: CompressedGradients,
    probes: TokenizedData,
    ends: TokenizedData,
    sharing: Sharing,
    context: int | None,
    columns: Sequence[IndexedComponent],
    dtype: torch.dtype,
) -> tuple[list[Check], ShardContent]:
    """Check batch and padding, and return the probes' gradients computed one by one without padding.

    `ends` are the longest and the shortest example that can share a batch, or none.
    """
    width = int(probes.lengths.max()) + EXTRA_PADDING
    width = width if context is None else min(width, context)
    checks, bare = _try(compute, probes, width, sharing, columns, dtype)
    if len(ends):
        extreme, _ = _try(compute, ends, int(ends.lengths.max()), sharing, columns, dtype)
        checks = [max(pair, key=_badness) for pair in zip(checks, extreme, strict=True)]
    return checks, bare


def explain_sharing(check: Check, sharing: Sharing, lengths: Int[np.ndarray, "example"]) -> Check:
    """Add to the check of batches which examples the model keeps apart."""
    if sharing.equal:
        advice = "The adapter's invocation holds the padding token: only examples of one length share a batch."
        return dataclasses.replace(check, advice=f"{check.advice} {advice}")
    groups = [int((np.asarray(lengths) > switch).sum()) for switch in sharing.switches]
    if not groups:
        return check
    switches = ", ".join(f"{switch:,}" for switch in sharing.switches)
    advice = (
        f"The model's rotary positions take other factors beyond {switches} tokens, for the whole batch at once: "
        f"{max(groups):,} of {len(lengths):,} examples are longer. Vestige never puts examples from both sides into "
        "one batch, so every score is that of the example alone; other software may not."
    )
    mixed = any(0 < count < len(lengths) for count in groups)
    verdict: Verdict = "warn" if mixed and check.verdict == "good" else check.verdict
    return dataclasses.replace(check, verdict=verdict, advice=f"{check.advice} {advice}")


def _badness(check: Check) -> tuple[int, float]:
    return ("good", "warn", "bad").index(check.verdict), check.number or 0.0


def _try(
    compute: CompressedGradients,
    probes: TokenizedData,
    width: int,
    sharing: Sharing,
    columns: Sequence[IndexedComponent],
    dtype: torch.dtype,
) -> tuple[list[Check], ShardContent]:
    """Run the two checks with padding up to `width`, as far as examples may be padded and share a batch."""
    most = sharing.most(probes.lengths)
    wide = padded(probes, np.where(most < 0, width, np.minimum(most, width)))
    singly = [np.array([row]) for row in range(len(probes))]
    together = compute.rows(wide, [np.sort(rows) for rows in plan_batches(wide.lengths, 2**62, sharing=sharing)])
    order = together.example.argsort()
    together = ShardContent(*(part[order] for part in together))
    alone = compute.rows(wide, singly)
    bare = compute.rows(probes, singly)
    return [
        _check("batch invariance", "the other examples of its batch", alone, together, columns, dtype),
        _check("padding", "padding tokens", bare, alone, columns, dtype),
    ], bare


def _check(
    name: str,
    cause: str,
    before: ShardContent,
    after: ShardContent,
    columns: Sequence[IndexedComponent],
    dtype: torch.dtype,
) -> Check:
    precision, tolerance = str(dtype).removeprefix("torch."), TOLERANCE[dtype]
    moved = (after.gradients - before.gradients).double()
    # An example whose gradient is zero on both sides has not moved.
    relative = moved.norm(dim=1) / before.gradients.double().norm(dim=1).clamp(min=1e-30)
    worst = float(relative.max())
    if not np.isfinite(worst):
        return Check(name, "warn", "could not be compared", "The gradients are not finite: see finite gradients.")
    verdict: Verdict = "good" if worst <= tolerance else "warn" if worst <= _WARN * tolerance else "bad"
    value = f"{worst:.1e} relative difference (up to {tolerance:.0e} is {precision} rounding)"
    if verdict == "good":
        return Check(name, verdict, value, f"A gradient does not depend on {cause}.", worst)
    row = int(relative.argmax())
    # Columns that components share show only that some component moved.
    apart = len({part.start for part in columns}) == len(columns)
    furthest = max(columns, key=lambda part: float(moved[row, part.start : part.stop].norm())).name
    where = f"most in {furthest}" if apart else "in some component"
    if verdict == "warn":
        advice = f"More than usual, {where}; compare with --precision float32."
    else:
        advice = (
            f"A gradient depends on {cause}, {where}: its scores would too. Look for layers that mix "
            "examples (batch norm, a mean over the batch, mixture-of-experts capacity) or read padding; "
            "--token-budget 1 runs every example alone."
        )
    return Check(name, verdict, value, advice, worst)


def check_finite(tried: Sequence[tuple[TokenizedData, ShardContent]]) -> Check:
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
