"""Activated LoRA (PEFT's aLoRA): which acts on an example's tokens from its invocation on."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vestige.gradients._rules import Handle


def keep_examples_apart(model: nn.Module) -> Iterator[Handle]:
    """Make the activated layers of a model compute every example in its own row, until the handles are removed.

    PEFT gathers the activated tokens of the whole batch in one list before it applies the matrices: no row of their
    input belongs to an example. The same matrices applied to all tokens, and counted where PEFT counts them, give the
    same output with the examples apart.
    """
    for _, layer, adapter in activated_layers(model):
        yield _Exchanged(layer.lora_variant, adapter)


def activated_layers(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Yield the path of every layer with an activated adapter, the layer, and the adapter's name."""
    for path, module in model.named_modules():
        variants: Any = getattr(module, "lora_variant", None)
        for adapter, variant in variants.items() if isinstance(variants, dict) else ():
            if getattr(variant, "__name__", type(variant).__name__).startswith("ALora"):
                yield path, module, adapter


class _Exchanged:
    """A variant that was replaced by `_RowByRow`."""

    def __init__(self, variants: dict[str, Any], adapter: str) -> None:
        self._variants, self._adapter, self._before = variants, adapter, variants[adapter]
        variants[adapter] = _RowByRow

    def remove(self) -> None:
        self._variants[self._adapter] = self._before


class _RowByRow:
    """PEFT's variant of a linear layer, as a class with one static function."""

    @staticmethod
    def forward(layer: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Add the adapter's output at the last `alora_offsets[example]` tokens of every example."""
        down, up = layer.lora_A[active_adapter], layer.lora_B[active_adapter]
        tokens = result.shape[-2]
        offsets = kwargs.get("alora_offsets") or [None] * len(result)
        first = torch.tensor([tokens - min(offset or 0, tokens) for offset in offsets], device=result.device)
        active = torch.arange(tokens, device=result.device) >= first[:, None]
        dropout: Callable[[Tensor], Tensor] = layer.lora_dropout[active_adapter]
        added = up(down(dropout(x.to(down.weight.dtype)))) * layer.scaling[active_adapter]
        return torch.where(active[..., None], result + added.to(result.dtype), result)
