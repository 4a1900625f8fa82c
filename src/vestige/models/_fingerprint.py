"""The fingerprint of a model: a hash of everything that its parameters hold."""

import hashlib

import torch
from torch import Tensor, nn

_CHUNK_BYTES = 64 * 2**20


def model_fingerprint(model: nn.Module) -> str:
    """Return the sha256 (hex) of the name, shape, dtype and bytes of every parameter, in the model's own order.

    A tied parameter counts once, under its first name. The device does not enter, so the same weights give
    the same fingerprint on CPU and GPU; the dtype does, since scores computed in another precision are other
    scores. Weights on a GPU are brought over one tensor at a time.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        _update(digest, parameter.detach())
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    # NumPy has no bfloat16, so the bytes are viewed by torch; hashing a view copies nothing.
    content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(content), _CHUNK_BYTES):
        digest.update(content[start : start + _CHUNK_BYTES])
