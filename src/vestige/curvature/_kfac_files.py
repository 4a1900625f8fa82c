"""Kronecker-factored curvature on disk, named by everything that it was computed from."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vestige.curvature._blocks import find_blocks
from vestige.curvature._fit import CurvatureData, fit_ekfac, fit_kfac
from vestige.curvature._kfac import Eigenbasis, EigenCurvature, KroneckerFactor, KroneckerFactors
from vestige.files import write_durably

FORMAT = 1
"""Raised when the numbers of the same inputs change their meaning, so that no old file is read as a new one."""

Tensors = dict[str, Tensor]


def kfac_of(measured: CurvatureData, model_fingerprint: str, folder: Path | None) -> KroneckerFactors:
    """K-FAC's factors, read from `folder` when they belong to just this model, data and settings."""
    blocks = find_blocks(measured.components)
    path = curvature_path(folder, "kfac", measured, model_fingerprint)
    tensors = _kept(path, lambda: _factor_tensors(fit_kfac(measured)))
    return KroneckerFactors(blocks, tuple(_factor(tensors, number) for number in range(len(blocks))))


def ekfac_of(measured: CurvatureData, model_fingerprint: str, folder: Path | None) -> EigenCurvature:
    """EK-FAC's eigenbases, read from `folder` when they belong to just this model, data and settings."""
    blocks = find_blocks(measured.components)
    path = curvature_path(folder, "ekfac", measured, model_fingerprint)
    tensors = _kept(path, lambda: _basis_tensors(fit_ekfac(measured)))
    return EigenCurvature(blocks, tuple(_basis(tensors, number) for number in range(len(blocks))))


def curvature_path(folder: Path | None, kind: str, measured: CurvatureData, model_fingerprint: str) -> Path | None:
    """The file of this curvature; None without a folder to keep it in.

    Batches are left out of the name: they change no number beyond rounding.
    """
    if folder is None:
        return None
    content = {
        "format": FORMAT,
        "model": model_fingerprint,
        "data": measured.data.fingerprint,
        "components": [[component.name, *component.shape] for component in measured.components],
        "loss": measured.reduction,
        "labels": measured.labels,
        "seed": measured.seed if measured.labels == "sampled" else None,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return folder / f"{kind}-{digest[:16]}.safetensors"


def _kept(path: Path | None, compute: Callable[[], Tensors]) -> Tensors:
    """What the file holds; computed, and written, if there is none or it is damaged."""
    if path is None:
        return _contiguous(compute())
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (FileNotFoundError, SafetensorError):
        tensors = _contiguous(compute())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, [save({key: tensor.cpu() for key, tensor in tensors.items()})])
    return tensors


def _contiguous(tensors: Tensors) -> Tensors:
    """In the order in which a file holds them, so that a first run and a later one round alike."""
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _factor_tensors(factors: KroneckerFactors) -> Tensors:
    tensors: Tensors = {}
    for number, factor in enumerate(factors.factors):
        if isinstance(factor, KroneckerFactor):
            tokens = torch.tensor(factor.tokens, dtype=torch.float64)
            tensors |= {f"{number}.left": factor.left, f"{number}.right": factor.right, f"{number}.tokens": tokens}
        else:
            tensors[f"{number}.values"] = factor
    return tensors


def _factor(tensors: Tensors, number: int) -> KroneckerFactor | Tensor:
    if f"{number}.values" in tensors:
        return tensors[f"{number}.values"]
    tokens = float(tensors[f"{number}.tokens"])
    return KroneckerFactor(tensors[f"{number}.left"], tensors[f"{number}.right"], tokens)


def _basis_tensors(curvature: EigenCurvature) -> Tensors:
    return {
        f"{number}.{side}": tensor
        for number, basis in enumerate(curvature.bases)
        for side, tensor in basis._asdict().items()
        if tensor is not None
    }


def _basis(tensors: Tensors, number: int) -> Eigenbasis:
    return Eigenbasis(tensors.get(f"{number}.left"), tensors.get(f"{number}.right"), tensors[f"{number}.values"])
