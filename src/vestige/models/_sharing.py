"""Sharing of a batch: which examples may share one, where the forward pass depends on the longest of them."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from vestige.data import Sharing

_PADDING = 0
"""The token that `make_batch` fills up with."""


def batch_sharing(model: nn.Module) -> Sharing:
    """Return which examples may share a batch without changing each other's results.

    LongRoPE (Phi-3, Phi-3.5, Phi-4, Phi-MoE) takes one set of factors for the whole batch, by its longest example. An
    activated LoRA whose invocation holds the padding token may find it in the padding.
    """
    switches = sorted({switch for module in model.modules() for switch in _rope_switches(module)})
    return Sharing(tuple(switches), _invoked_by_padding(model))


def _rope_switches(module: nn.Module) -> Iterator[int]:
    """Yield the lengths at which a rotary embedding changes its frequencies for all of the batch."""
    config: Any = getattr(module, "config", None)
    if not hasattr(module, "rope_type") or not isinstance(getattr(config, "rope_parameters", None), dict):
        return
    # Some models have a set of parameters for each kind of layer.
    for found in (config.rope_parameters, *config.rope_parameters.values()):
        if isinstance(found, dict) and found.get("rope_type", found.get("type")) == "longrope":
            yield int(found.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def _invoked_by_padding(model: nn.Module) -> bool:
    configs: Any = getattr(model, "peft_config", None)
    tokens = [getattr(config, "alora_invocation_tokens", None) or () for config in (configs or {}).values()]
    return any(_PADDING in each for each in tokens)
