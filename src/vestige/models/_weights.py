"""The weights of a model as they are kept: maps packed by bitsandbytes in 4 or 8 bits, and their fingerprint."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vestige.errors import MissingExtra, ModelError

Bits = Literal[4, 8]
"""Only what lies beside maps that are packed has gradients."""
_KNOWN = "VESTIGE_FINGERPRINTS"
"""Environment variable in which a process hands fingerprints on to the workers that it starts: to bring all weights
from a card and hash them would take each of them some ten seconds at 8B, by estimate."""


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


def model_fingerprint(model: nn.Module) -> str:
    """Return the sha256 (hex) of the name, shape, dtype and bytes of every parameter, in the model's own order.

    A tied parameter counts once, under its first name. The device does not enter, so the same weights give
    the same fingerprint on CPU and GPU; the dtype does, since scores computed in another precision are other
    scores, and so do the scales of quantised weights. Weights on a GPU are brought over one tensor at a time.
    """
    digest = hashlib.sha256()
    named = [*model.named_parameters(), *quantization_scales(model)]
    for name, parameter in named:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        # NumPy has no bfloat16, so the bytes are viewed by torch; hashing a view copies nothing.
        content = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def files_identity(paths: Sequence[Path], model: nn.Module, quantize: Bits | None) -> str:
    """Return the sha256 of which files a model was read from, as they are now, and of how it was read."""
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.iterdir()))]
    found = [(str(file.resolve()), file.stat()) for file in files if file.is_file()]
    versions = [(path, one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino) for path, one in found]
    kinds = sorted({f"{parameter.dtype} {parameter.device.type}" for parameter in model.parameters()})
    return hashlib.sha256(json.dumps([versions, kinds, quantize]).encode()).hexdigest()


def hash_once(model: nn.Module, identity: str | None) -> str:
    """Return the fingerprint of a model; that of unchanged files is taken from the process that started this one."""
    if identity is None:
        return model_fingerprint(model)
    known = json.loads(os.environ.get(_KNOWN, "{}"))
    if identity not in known:
        known[identity] = model_fingerprint(model)
        os.environ[_KNOWN] = json.dumps(known)
    return known[identity]
