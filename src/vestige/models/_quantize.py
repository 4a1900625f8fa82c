"""Models whose maps are kept in 4 or 8 bits, by bitsandbytes; only what lies beside them has gradients."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vestige.errors import MissingExtra, ModelError

Bits = Literal[4, 8]


def quantization_of(bits: Bits, dtype: torch.dtype | str, config: Any, folder: Path) -> Any:
    """Return the configuration of transformers that packs the maps of a model as it is read; its head stays whole.

    4 bits are NF4 (Dettmers et al. 2023, "QLoRA"). 8 bits are LLM.int8() (Dettmers et al. 2022) without its threshold
    for outliers: that looks at all tokens of a batch, and an example's loss would depend on the others.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{folder} is quantised already, as its config.json says. Drop --quantize {bits}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(f"--quantize {bits} needs bitsandbytes: pip install 'vestige[quantize]'")
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def keep_as_read(model: nn.Module) -> None:
    """Let no forward pass change packed weights: some CPUs would have them packed again, their scales rounded."""
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def quantized_bits(model: nn.Module) -> int | None:
    """Return the bits that bitsandbytes keeps the model's maps in, None if it keeps none."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    read = (lambda name: config.get(name)) if isinstance(config, dict) else (lambda name: getattr(config, name, None))
    return 4 if read("load_in_4bit") else 8 if read("load_in_8bit") else None


def quantization_scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield, by name, what packed weights are multiplied by, which is no parameter; nothing for any other model."""
    if quantized_bits(model) is None:
        return
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    for name, tensor in sorted(model.state_dict().items()):
        if name not in known and isinstance(tensor, Tensor):
            yield name, tensor
