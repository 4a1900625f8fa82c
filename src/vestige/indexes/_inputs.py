"""The inputs of gradient commands: the model, the tokens of its training data, the parameters attributed to."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vestige.data import Sharing, TokenizedData, make_batch, tokenize_source
from vestige.errors import DataError, ModelError
from vestige.gradients import CausalLoss
from vestige.jobs import is_worker
from vestige.models import LoadedModel, Selection, batch_sharing, load_model, select_components
from vestige.settings import LaunchSettings, ReadingSettings

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Nats per target token, and share of the loss, that rounding explains: kernels sum in another order in a batch."""


def longest_and_shortest(data: TokenizedData, sharing: Sharing, token_budget: int) -> list[int]:
    """Return the rows of the longest and the shortest example that can share a batch; fewer if no two can.

    Both have a target and are of different lengths, so that one of them is padded.
    """
    lengths = np.asarray(data.lengths)
    rows = np.flatnonzero((np.asarray(data.target_counts) > 0) & (2 * lengths <= token_budget))
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    groups = sharing.most(lengths[rows])
    for group in [] if sharing.equal else dict.fromkeys(groups[::-1].tolist()):
        members = rows[groups == group]
        if lengths[members[0]] < lengths[members[-1]]:
            return [int(members[-1]), int(members[0])]
    return []


def require_independence(loaded: LoadedModel, data: TokenizedData, token_budget: int) -> None:
    """Raise if the longest and the shortest example that can share a batch change each other's loss in one.

    Raises:
        ModelError: They do; the message contains the option that runs every example alone.
    """
    pair = longest_and_shortest(data, batch_sharing(loaded.model), token_budget)
    if not pair:
        return
    objective = CausalLoss()
    together = _losses(loaded, objective, data, pair)
    alone = torch.cat([_losses(loaded, objective, data, [row]) for row in pair])
    counts = torch.from_numpy(np.asarray(data.target_counts)[pair])
    formats = {one.dtype for one in loaded.model.parameters() if one.dtype in _TOLERANCE}
    tolerance = max((_TOLERANCE[one] for one in formats), default=_TOLERANCE[torch.bfloat16])
    apart = (together - alone).abs() / (alone.abs() + counts)
    worst = int(apart.nan_to_num(0.0).argmax())
    if apart[worst] > tolerance:
        shown = (pair[worst], pair[1 - worst])
        names = [f'"{data.examples[row].id}" ({int(data.lengths[row])} tokens)' for row in shown]
        raise ModelError(
            f"The loss of {names[0]} is {float(alone[worst]):.4f} alone and {float(together[worst]):.4f} in a batch "
            f"with {names[1]}: the forward pass of {loaded.name} depends on the batch (a mask made from token ids, "
            "experts with a capacity, statistics of the batch). Type --token-budget 1: it runs every example alone."
        )


def _losses(
    loaded: LoadedModel, objective: CausalLoss, data: TokenizedData, rows: list[int]
) -> Float[Tensor, "example"]:
    with torch.no_grad():
        batch = make_batch(data, rows).to(next(loaded.model.parameters()).device)
        return objective.losses(loaded.model, batch).double().cpu()


CPU_TOKENS, GPU_TOKENS = 1024, 16384
"""Tokens per batch by default. On a CPU larger batches fall out of the cache: 16 x 128 tokens ran 5 % and 32 x 128
17 % slower than 8 x 128."""


class Inputs(NamedTuple):
    """The model, its training data as tokens, and the selected components."""

    loaded: LoadedModel
    data: TokenizedData
    selection: Selection


def read_inputs(
    settings: ReadingSettings,
    model: object,
    data: object,
    components: tuple[str, ...],
    *,
    tokens: Path | None = None,
    checked: bool = True,
) -> Inputs:
    """Load the model and the training data; the rest is as for `read_data`."""
    options = {"tokenizer": settings.tokenizer, "precision": settings.precision, "device": settings.device}
    loaded = load_model(model, **options)  # type: ignore[arg-type]
    selection = select_components(loaded.model, components)
    return Inputs(loaded, read_data(settings, data, loaded, tokens=tokens, checked=checked), selection)


def read_data(
    settings: ReadingSettings, source: object, loaded: LoadedModel, *, tokens: Path | None = None, checked: bool = True
) -> TokenizedData:
    """Read the training data as the model receives it, cut at the model's context.

    Args:
        settings: How text becomes tokens, and how many processes may share that.
        source: As for `load_examples`.
        loaded: The model.
        tokens: Folder for the tokens of data that is too large for memory; None: a temporary one.
        checked: Refuse tokens without an embedding, and models in which examples of a batch change each other's loss.

    Raises:
        DataError: No example has a target token, or one has a token that the model has no embedding for.
        ModelError: Examples change each other's loss in a batch.
    """
    name = source if isinstance(source, str) else getattr(source, "name", None) or type(source).__name__
    data = tokenize_source(
        source,
        loaded.tokenizer,
        max_length=tokens_at_most(settings, loaded),
        name=str(name),
        chat=bool(settings.chat),
        folder=tokens,
        workers=tokenising_processes(settings),
        **settings.reading,
        vocabulary=loaded.vocabulary if checked else None,
    )
    if not data.target_counts.any():
        raise DataError(
            f"None of the {len(data):,} examples of {name} has a token to learn: expected a `text`, a `completion` "
            "or an assistant's message that is not cut off. Check --max-length and the columns."
        )
    if checked and not is_worker():
        require_independence(loaded, data, batch_tokens(settings, loaded))
    return data


def tokenising_processes(settings: ReadingSettings) -> int:
    """Return how many processes turn text into tokens: the local workers, before their own work begins."""
    if not isinstance(settings, LaunchSettings) or settings.engine != "local" or is_worker():
        return 1
    return settings.workers


def tokens_at_most(settings: ReadingSettings, loaded: LoadedModel) -> int | None:
    """Return the tokens beyond which examples are cut: as requested, but never beyond the model's context."""
    limits = [limit for limit in (settings.max_length, loaded.context_length) if limit is not None]
    return min(limits, default=None)


def batch_tokens(settings: ReadingSettings, loaded: LoadedModel) -> int:
    """Return the token budget of a batch."""
    if settings.token_budget is not None:
        return settings.token_budget
    on_cpu = next(loaded.model.parameters()).device.type == "cpu"
    return CPU_TOKENS if on_cpu else GPU_TOKENS
