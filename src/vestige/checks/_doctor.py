"""`vestige doctor`: check the model and the data, try a few examples, estimate what an index would cost."""

from typing import NamedTuple

import torch

from vestige.checks._autograd import check_autograd
from vestige.checks._costs import (
    Trial,
    check_disk_space,
    check_memory,
    check_time,
    estimate_costs,
    free_disk,
    try_batch,
)
from vestige.checks._data_checks import data_checks
from vestige.checks._invariance import check_finite, explain_sharing, try_batches
from vestige.checks._model_checks import (
    adapter_checks,
    check_knowledge,
    coverage_by_kind,
    model_checks,
    run_precision,
)
from vestige.checks._probes import PROBE_TOKENS, choose_probes, cut_examples
from vestige.checks._slope import check_slope
from vestige.checks._types import Check, Cost, DoctorReport
from vestige.compress import CompressionSpec, parse_spec
from vestige.data import TokenizedData, make_batch
from vestige.errors import ModelError
from vestige.gradients import CausalLoss, measure_knowledge
from vestige.indexes import (
    CompressedGradients,
    Inputs,
    batch_tokens,
    choose_spec,
    draft_manifest,
    lay_out,
    longest_and_shortest,
    read_inputs,
    tokens_at_most,
)
from vestige.models import batch_sharing
from vestige.progress import announce
from vestige.runs import sample_rows
from vestige.settings import DoctorSettings, verb

PROBE_NUMBERS = 16 * 2**20
"""Most numbers per example in the tries of batch and padding; what keeps more is tried under `NARROW`."""
KNOWLEDGE_ROWS = 64
"""Examples whose loss is compared with guessing."""
NARROW = {"component": "logra:16x16", "model": "logra:16x16 | sjlt:4096"}


@verb(DoctorSettings)
def doctor(settings: DoctorSettings) -> DoctorReport:
    """Check that the model and the data will work with these settings, what is covered, and what an index would cost.

    Tries a few examples, writes nothing, and leaves the weights as they were, bit by bit. `print` the report to read
    it; `report.ok` is False when some check is bad.

    Raises:
        UserError: The model or the data cannot be read at all, as `vestige index` would report.
    """
    inputs = read_inputs(settings, settings.model, settings.data, settings.components, checked=False)
    return examine(settings, inputs)


def examine(settings: DoctorSettings, inputs: Inputs) -> DoctorReport:
    """Run `doctor` for a model and data that are loaded already."""
    loaded, data, selection = inputs
    loss = CausalLoss(settings.loss)
    limit = tokens_at_most(settings, loaded)
    checks = data_checks(data, loaded.tokenizer, loaded.model, max_length=limit, chat=settings.chat)
    costs: tuple[Cost, ...] = ()
    free = free_disk()
    if checks[0].verdict == "bad":
        checks.append(Check("gradients", "bad", "not tried", "The model cannot run on tokens without an embedding."))
    else:
        announce(f"Trying {loaded.name} on a few of {len(data):,} examples.")
        checks = [*model_checks(loaded, selection, loss), *adapter_checks(loaded.model, selection, data), *checks]
        try:
            tried = _try_gradients(settings, inputs, loss, free)
        except ModelError as error:
            tried = _Tried([Check("gradients", "bad", "cannot be computed", str(error))], ())
        checks, costs = checks + tried.checks, tried.costs
    return DoctorReport(
        model=loaded.name,
        data=data.name,
        examples=len(data),
        dtype=settings.dtype,
        checks=tuple(checks),
        coverage=coverage_by_kind(loaded.model, selection),
        costs=costs,
        free_disk_bytes=free,
    )


class _Tried(NamedTuple):
    checks: list[Check]
    costs: tuple[Cost, ...]


def _try_gradients(settings: DoctorSettings, inputs: Inputs, loss: CausalLoss, free: int) -> _Tried:
    """Run the checks that need the model."""
    loaded, data, selection = inputs
    spec = choose_spec(settings, inputs)
    manifest = draft_manifest(settings, inputs, spec)
    probes = choose_probes(data, loaded.context_length)
    trial = try_batch(settings, inputs, manifest, spec)
    narrow = spec if manifest.width <= PROBE_NUMBERS else parse_spec(NARROW[settings.compress_scope])
    invariance, finite = _try_probes(settings, inputs, probes, narrow, trial)
    device = next(loaded.model.parameters()).device
    longest = int(probes.target_counts.argmax())
    slope = check_slope(
        loaded.model, selection.components, loss, make_batch(probes, [longest]).to(device), settings.seed
    )
    exact = check_autograd(loaded.model, selection.components, loss, data, loaded.context_length)
    sample = cut_examples(data.subset(sample_rows(len(data), KNOWLEDGE_ROWS)), PROBE_TOKENS)
    known = check_knowledge(measure_knowledge(loaded.model, sample, batch_tokens(settings, loaded)))
    costs = estimate_costs(settings, inputs, manifest, spec, trial)
    estimates = [
        check_time(costs[0], trial),
        check_memory(costs[0], device),
        check_disk_space(costs[0], settings.dtype, free, len(data)),
    ]
    return _Tried([finite, *invariance, exact, slope, known, *estimates], costs)


def _try_probes(
    settings: DoctorSettings, inputs: Inputs, probes: TokenizedData, spec: CompressionSpec, trial: Trial
) -> tuple[list[Check], Check]:
    loaded, components, scope = inputs.loaded, inputs.selection.components, settings.compress_scope
    columns = lay_out(components, spec, scope)
    dtype: torch.dtype = run_precision(loaded.model)
    with CompressedGradients(loaded, components, columns, spec, settings.seed, settings.loss, scope) as compute:
        sharing = batch_sharing(loaded.model)
        ends = inputs.data.subset(longest_and_shortest(inputs.data, sharing, batch_tokens(settings, loaded)))
        (batches, padding), bare = try_batches(compute, probes, ends, sharing, loaded.context_length, columns, dtype)
    tried = [(probes, bare)] + ([(trial.data, trial.content)] if trial.content is not None else [])
    return [explain_sharing(batches, sharing, inputs.data.lengths), padding], check_finite(tried)
