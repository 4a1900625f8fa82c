"""The fingerprint of a model's weights, computed once for all processes that read the same files."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vestige.models._quantize import Bits, quantization_scales

_KNOWN = "VESTIGE_FINGERPRINTS"
"""Environment variable in which a process hands fingerprints on to the workers that it starts: to bring all weights
from a card and hash them would take each of them some ten seconds at 8B, by estimate."""


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
