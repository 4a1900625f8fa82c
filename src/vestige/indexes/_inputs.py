"""The inputs of gradient commands: the model, the tokens of its training data, the parameters attributed to."""

from pathlib import Path
from typing import NamedTuple

from vestige.data import TokenizedData, tokenize_source
from vestige.errors import DataError
from vestige.gradients import (
    FEWEST_TOKENS,
    BatchMemory,
    card_memory,
    measure_batch_memory,
    require_independence,
)
from vestige.jobs import is_worker
from vestige.models import LoadedModel, Selection, load_model, select_components
from vestige.settings import LaunchSettings, ReadingSettings

CPU_TOKENS, UNMEASURED_TOKENS = 1024, 16_384
"""Tokens per batch by default: on a CPU, and on other devices where no memory is measured. On a CPU larger batches fall
out of the cache: 16 x 128 tokens ran 5 % and 32 x 128 17 % slower than 8 x 128."""


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
    loaded = load_model(model, **settings.loading)  # type: ignore[arg-type]
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


def batch_tokens(
    settings: ReadingSettings, loaded: LoadedModel, *, only_free: bool = False, more_per_token: float = 0.0
) -> int:
    """Return the token budget of a batch: as requested, else what the memory of the model's device takes.

    Args:
        settings: What was requested.
        loaded: The model; on a card two small batches of it are measured, once.
        only_free: Count what is free on the card now. Not so, all of its memory: every process on such a card, now or
            after a kill, then cuts the same batches; where others hold some of it, a batch becomes smaller as it runs.
        more_per_token: Bytes that this pass holds beside those of the model.
    """
    if settings.token_budget is not None:
        return settings.token_budget
    if next(loaded.model.parameters()).device.type == "cpu":
        return CPU_TOKENS
    card, memory = card_memory(loaded.model), batch_memory(loaded)
    if card is None or memory is None:
        return UNMEASURED_TOKENS
    memory = memory._replace(per_token=memory.per_token + more_per_token)
    return memory.tokens_within(card.free if only_free else card.total) or FEWEST_TOKENS


def batch_memory(loaded: LoadedModel) -> BatchMemory | None:
    """Return what a batch of the model takes on its cards; None elsewhere, and where processes hold it in parts."""
    parameters = list(loaded.model.parameters())
    sharded = any(hasattr(parameter, "full_tensor") for parameter in parameters)
    if sharded or parameters[0].device.type != "cuda":
        return None
    if "batch memory" not in loaded.measured:
        loaded.measured["batch memory"] = measure_batch_memory(loaded.model)
    return loaded.measured["batch memory"]
