"""Kronecker-factored curvature on disk, named by everything that it was computed from."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vestige.curvature._fit import CurvatureData, fit_ekfac, fit_kfac
from vestige.curvature._fit_plan import BasesPlan, SumsPlan, Tensors, read_tensors, write_tensors
from vestige.curvature._kfac import (
    Eigenbasis,
    EigenCurvature,
    EigenvalueSink,
    KroneckerFactor,
    KroneckerFactors,
    KroneckerSink,
    kronecker_factors,
    with_eigenvalues,
)
from vestige.distributed import broadcast_from_rank0
from vestige.launch import PieceFiles, phase, run_plan
from vestige.settings import LaunchSettings

FORMAT = 2
"""Raised when the numbers of the same inputs change their meaning, so that no old file is read as a new one.

1 counted the tokens whose gradient was not exactly zero.
"""


class Work(NamedTuple):
    """The launcher of passes over the data, as for `run_plan`."""

    settings: LaunchSettings
    command: Sequence[str] | None = None


HERE = Work(LaunchSettings.model_validate({}))


def kfac_of(
    measured: CurvatureData, model_fingerprint: str, folder: Path | None, work: Work = HERE
) -> KroneckerFactors:
    """Return K-FAC's factors, read from `folder` when they belong to just this model, data and settings.

    Data of several pieces leaves its sums there piece by piece: killed at any moment, the same call continues.
    """
    path = curvature_path(folder, "kfac", measured, model_fingerprint)
    if path is None:
        return _factors(_contiguous(_factor_tensors(fit_kfac(measured))), measured)
    found = read_tensors(path) if broadcast_from_rank0(path.exists) else None
    if found is None and len(measured.groups) == 1:
        found = write_tensors(path, _factor_tensors(fit_kfac(measured)))
    if found is None:
        found = _run(
            SumsPlan(
                "Kronecker factors",
                path.parent.parent,
                measured,
                lambda: KroneckerSink(measured.components, measured.blocks, measured.heads),
                _pieces(path, measured),
                lambda sums: _factor_tensors(kronecker_factors(measured.blocks, sums)),
                path,
            ),
            work,
        )
    return _factors(found, measured)


def ekfac_of(measured: CurvatureData, model_fingerprint: str, folder: Path | None, work: Work = HERE) -> EigenCurvature:
    """Return EK-FAC's eigenbases, read from `folder` when they belong to just this model, data and settings.

    Each of its steps (factors, eigenvectors, eigenvalues) is kept there when it is finished, and pieces of it before.
    """
    path = curvature_path(folder, "ekfac", measured, model_fingerprint)
    if path is None:
        return _bases(_contiguous(_basis_tensors(fit_ekfac(measured))), measured)
    found = read_tensors(path) if broadcast_from_rank0(path.exists) else None
    if found is None and len(measured.groups) == 1:
        found = write_tensors(path, _basis_tensors(fit_ekfac(measured)))
    if found is None:
        found = _measured_eigenvalues(path, measured, kfac_of(measured, model_fingerprint, folder, work), work)
    return _bases(found, measured)


def _measured_eigenvalues(path: Path, measured: CurvatureData, factors: KroneckerFactors, work: Work) -> Tensors:
    """Measure EK-FAC's eigenvalues along the eigenvectors of the factors; return its tensors as stored."""
    bases = BasesPlan(path.parent.parent, factors, _pieces(path, measured, "vectors"))
    bases.files.forget_damaged(range(bases.pieces))
    curvature = run_plan(bases, work.settings, work.command)
    # Eigenvectors that were computed again may be rounded otherwise: squares along the old ones do not count then.
    files = _pieces(path, measured, bases.files.fingerprint(range(bases.pieces)))
    found = _run(
        SumsPlan(
            "EK-FAC eigenvalues",
            path.parent.parent,
            measured,
            lambda: EigenvalueSink(curvature),
            files,
            lambda sums: _basis_tensors(with_eigenvalues(curvature, _on(sums, measured))),
            path,
        ),
        work,
    )
    bases.files.remove()
    return found


def _run(plan: SumsPlan, work: Work) -> Tensors:
    plan.forget_damaged()
    with phase(plan.name, plan.unit) as done:
        done.extend(round(plan.weight(piece)) for piece in range(plan.pieces) if not plan.is_done(piece))
        return run_plan(plan, work.settings, work.command)


def _pieces(path: Path, measured: CurvatureData, of: str = "") -> PieceFiles:
    """Return the files of the pieces of `path`: the same only where the data is cut into the same batches."""
    dtype = next(measured.model.parameters()).dtype
    content = [path.name, of, str(dtype), [[len(batch) for batch in group] for group in measured.groups]]
    suffix = "-vectors" if of == "vectors" else ""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return PieceFiles(path.with_name(path.stem + suffix), digest)


def curvature_path(folder: Path | None, kind: str, measured: CurvatureData, model_fingerprint: str) -> Path | None:
    """Return the file of this curvature; None without a folder to keep it in.

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


def _contiguous(tensors: Tensors) -> Tensors:
    """Return the tensors in the order in which a file holds them, so that a first run and a later one round alike."""
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


def _factors(tensors: Tensors, measured: CurvatureData) -> KroneckerFactors:
    found = _on(tensors, measured)
    return KroneckerFactors(measured.blocks, tuple(_factor(found, number) for number in range(len(measured.blocks))))


def _factor(tensors: Tensors, number: int) -> KroneckerFactor | Tensor:
    if f"{number}.values" in tensors:
        return tensors[f"{number}.values"]
    tokens = float(tensors[f"{number}.tokens"])
    return KroneckerFactor(tensors[f"{number}.left"], tensors[f"{number}.right"], tokens)


def _bases(tensors: Tensors, measured: CurvatureData) -> EigenCurvature:
    found = _on(tensors, measured)
    return EigenCurvature(measured.blocks, tuple(_basis(found, number) for number in range(len(measured.blocks))))


def _on(tensors: Tensors, measured: CurvatureData) -> Tensors:
    """Return the tensors on the model's device."""
    return {name: tensor.to(measured.device) for name, tensor in tensors.items()}


def _basis_tensors(curvature: EigenCurvature) -> Tensors:
    return {
        f"{number}.{side}": tensor
        for number, basis in enumerate(curvature.bases)
        for side, tensor in basis._asdict().items()
        if tensor is not None
    }


def _basis(tensors: Tensors, number: int) -> Eigenbasis:
    return Eigenbasis(tensors.get(f"{number}.left"), tensors.get(f"{number}.right"), tensors[f"{number}.values"])
