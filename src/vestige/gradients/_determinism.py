"""Kernels that give the same bytes each time, on a CUDA card too.

A CPU, one thread or several, adds up in the same order each time. On a card attention's backward pass and sums into
computed positions do not, unless torch is in its deterministic mode; products of matrices need a workspace of a fixed
size as well. What the mode costs was not measured.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_NO_KERNEL = "does not have a deterministic implementation"


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Put torch in its deterministic mode while the block runs, on a CUDA card; elsewhere change nothing."""
    if device.type != "cuda":
        yield
        return
    mode, memory = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    workspace = os.environ.get(_WORKSPACE)
    os.environ[_WORKSPACE] = workspace or ":4096:8"
    torch.set_deterministic_debug_mode("error")
    # Else the mode fills every buffer before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = memory  # type: ignore[attr-defined]
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)


def lacks_kernel(error: RuntimeError) -> bool:
    """Return whether torch refused an operation that has no deterministic kernel."""
    return _NO_KERNEL in str(error)


def describe_device(device: torch.device) -> str:
    """Return what a result's last bits depend on: `cpu`, or the name of the card, with TF32 where it is allowed."""
    if device.type != "cuda":
        return device.type
    rounded = torch.get_float32_matmul_precision() != "highest"
    return torch.cuda.get_device_name(device) + (" with TF32" if rounded else "")
