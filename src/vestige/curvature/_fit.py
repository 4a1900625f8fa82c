"""Kronecker-factored curvature of a model over its training data: one pass for K-FAC, one more for EK-FAC.

The data falls into pieces that follow from it and from the components alone. Sums of each piece are added in the order
of the pieces, in memory as on disk, so the numbers do not depend on which process measured which piece. Files are named
by everything that they were computed from.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vestige.curvature._fisher import SavedPieces, add_pieces, read_tensors
from vestige.curvature._kfac import (
    Block,
    Eigenbasis,
    EigenvalueSink,
    KroneckerCurvature,
    KroneckerFactor,
    KroneckerSink,
    find_blocks,
    kronecker_factors,
    with_eigenvalues,
)
from vestige.data import NO_TARGET, Batch, TokenizedData, make_batch, plan_batches, send
from vestige.distributed import broadcast_from_rank0
from vestige.errors import NonFinite
from vestige.gradients import CausalLoss, FactorSink, GradientPass, Reduction, describe_device
from vestige.jobs import PieceFiles, Tensors, group_items, step_done
from vestige.models import Component, batch_sharing
from vestige.progress import progress
from vestige.settings import LaunchSettings

Labels = Literal["sampled", "data"]
"""`sampled`: true Fisher matrix; `data`: the empirical one, from the labels of the training data."""

LOGIT_BYTES = 256 * 2**20
"""Most bytes of float32 logits alive at once, of a model whose head cannot be split off."""

_BLOCK = 256
"""Words whose chances are added up at once."""


def sample_labels(model: nn.Module, data: TokenizedData, token_budget: int, seed: int) -> list[np.ndarray]:
    """Return every example's labels, targets drawn from the model's own distribution, `NO_TARGET` elsewhere.

    A draw depends on the seed and on the example's tokens alone: not on its row, its batch or the padding.
    """
    device, loss = next(model.parameters()).device, CausalLoss()
    if loss.head_module(model) is None:
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        token_budget = max(1, min(token_budget, LOGIT_BYTES // (4 * vocabulary)))
    labels = [np.full(len(ids), NO_TARGET, dtype=np.int64) for ids in data.input_ids]
    for rows in plan_batches(data.lengths, token_budget, sharing=batch_sharing(model)):
        predicting = [np.flatnonzero(data.targets[row][1:]) for row in rows]
        pairs = zip(rows, predicting, strict=True)
        uniform = send(torch.cat([_uniform(data.input_ids[row], seed)[places] for row, places in pairs]), device)
        with torch.no_grad():
            parts = loss.target_logits(model, make_batch(data, rows).to(device))
            drawn = torch.cat([_draw(logits, uniform[part]) for part, logits in parts]).cpu().numpy()
        for row, places in zip(rows, predicting, strict=True):
            labels[row][places + 1], drawn = drawn[: len(places)], drawn[len(places) :]
    return labels


def replace_labels(batch: Batch, labels: Mapping[int, np.ndarray]) -> Batch:
    """Return a batch on the CPU with these labels, `labels[i]` for row i of the data."""
    replaced = torch.full_like(batch.labels, NO_TARGET)
    for place, row in enumerate(batch.rows.tolist()):
        replaced[place, : len(labels[row])] = torch.from_numpy(labels[row])
    return batch._replace(labels=replaced)


def _uniform(ids: np.ndarray, seed: int) -> Tensor:
    """Return one number in [0, 1) per token."""
    digest = hashlib.blake2b(f"{seed}:".encode() + ids.astype("<i4").tobytes(), digest_size=16).digest()
    numbers = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(len(ids))
    return torch.from_numpy(numbers)


def _draw(logits: Float[Tensor, "position word"], uniform: Float[Tensor, "position"]) -> Int[Tensor, "position"]:
    """Return where the cumulative distribution passes the uniform number: the block of words, then the word in it.

    Sums up to a block or a word are products with a triangle of ones, which are the same each time on a card too.
    """
    padded = nn.functional.pad(logits, (0, -logits.shape[-1] % _BLOCK), value=-torch.inf)
    chances = torch.softmax(padded, -1, dtype=torch.float64).unflatten(-1, (-1, _BLOCK))
    totals = chances.sum(-1)
    edges = totals @ _sum_up_to(totals.shape[1], totals)
    wanted = uniform * edges[:, -1]
    block = torch.searchsorted(edges, wanted[:, None], right=True).clamp(max=totals.shape[1] - 1)
    inside = chances.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0] @ _sum_up_to(_BLOCK, totals)
    rest = wanted[:, None] - (edges - totals).gather(1, block)
    found = block * _BLOCK + torch.searchsorted(inside, rest, right=True)
    return found[:, 0].clamp(max=logits.shape[-1] - 1)


def _sum_up_to(size: int, like: Tensor) -> Float[Tensor, "size size"]:
    return torch.ones(size, size, dtype=like.dtype, device=like.device).triu()


PIECE_TOKENS = 2**16
"""Tokens in one piece at least."""
MOST_PIECES = 64
MOST_BYTES = 2**35
"""What the sums of all pieces may take on disk together; there are fewer pieces where matrices are large."""

FORMAT = 2
"""Raised when the numbers of the same inputs change their meaning, so that no old file is read as a new one.

1 counted the tokens whose gradient was not exactly zero.
"""


class BatchSink(FactorSink, Protocol):
    """A sink that is notified where a batch begins and ends."""

    def begin(self, examples: int, predicting: Bool[Tensor, "example token"] | None = None) -> None:
        """Start a batch; `predicting` are the positions that predict a target, if examples have tokens."""
        ...

    def finish(self) -> None:
        """End a batch: all its factors have arrived."""
        ...


@dataclass(frozen=True)
class CurvatureData:
    """The data that a curvature is measured on: sums over all of it, so no result depends on the batches."""

    model: nn.Module
    components: Sequence[Component]
    data: TokenizedData
    token_budget: int
    reduction: Reduction = "sum"
    labels: Labels = "sampled"
    seed: int = 0
    _drawn: dict[int, dict[int, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @cached_property
    def groups(self) -> list[list[np.ndarray]]:
        """The batches of every piece."""
        matrices = 4 * sum(rows**2 + columns**2 for rows, columns in (block.shape for block in self.blocks))
        most = max(1, min(MOST_PIECES, MOST_BYTES // max(matrices, 1)))
        lengths = self.data.lengths
        batches = plan_batches(lengths, self.token_budget, sharing=batch_sharing(self.model))
        return group_items(
            batches, lambda batch: int(lengths[batch].sum()), max(PIECE_TOKENS, -(-int(lengths.sum()) // most))
        )

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Components that are preconditioned together."""
        return find_blocks(self.components)

    @cached_property
    def heads(self) -> frozenset[int]:
        """The components of the output head."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        paths = {path for path, module in self.model.named_modules() if module is head}
        pairs = enumerate(self.components)
        return frozenset(number for number, part in pairs if not paths.isdisjoint(use.module for use in part.uses))

    def stream(self, sink: BatchSink, label: str) -> None:
        """Stream every example's factors through `sink`, batch by batch."""
        with progress(len(self.data), label) as bar:
            for piece in range(len(self.groups)):
                self.stream_piece(piece, sink, bar.advance)

    def stream_piece(self, piece: int, sink: BatchSink, advance: Callable[[int], None]) -> None:
        """Stream the factors of a piece's examples, with the requested labels.

        Raises:
            NonFinite: An example's loss is NaN or infinite; its id is named.
        """
        # Labels are drawn before the hooks are placed: drawing them runs the model.
        drawn = self._labels_of(piece)
        with GradientPass(self.model, self.components, CausalLoss(self.reduction)) as gradient_pass:
            for rows in self.groups[piece]:
                batch = make_batch(self.data, rows)
                # The label of a position is predicted by the one before it.
                sink.begin(len(rows), nn.functional.pad(batch.labels[:, 1:] != NO_TARGET, (0, 1)))
                batch = batch if drawn is None else replace_labels(batch, drawn)
                losses = gradient_pass.run(batch.to(self.device), sink)
                if not torch.isfinite(losses).all():
                    bad = [self.data.examples[row] for row in rows[~torch.isfinite(losses).cpu().numpy()].tolist()]
                    raise NonFinite.of_examples("loss", [f'"{example.id}" (row {example.row})' for example in bad])
                sink.finish()
                advance(len(rows))

    def _labels_of(self, piece: int) -> dict[int, np.ndarray] | None:
        """Return labels by row, None for those of the data; drawn once for the passes of one process."""
        if self.labels == "data":
            return None
        if piece not in self._drawn:
            rows = np.concatenate(self.groups[piece]).tolist()
            drawn = sample_labels(self.model, self.data.subset(rows), self.token_budget, self.seed)
            self._drawn[piece] = dict(zip(rows, drawn, strict=True))
        return self._drawn[piece]


def kfac_of(
    measured: CurvatureData,
    model_fingerprint: str = "",
    folder: Path | None = None,
    settings: LaunchSettings | None = None,
    command: Sequence[str] | None = None,
) -> KroneckerCurvature:
    """Return K-FAC's S and A of every block, from one pass; `folder` keeps them for this model, data and settings.

    Data of several pieces leaves its sums there piece by piece: killed at any moment, the same call continues. It runs
    as `run_pieces`, by default in this process.
    """
    path = curvature_path(folder, "kfac", measured, model_fingerprint)
    plan = _sums_plan(
        "Kronecker factors",
        measured,
        path,
        "",
        lambda: KroneckerSink(measured.components, measured.blocks, measured.heads),
        lambda sums: kronecker_factors(measured.blocks, sums).tensors(),
    )
    found = _read_stored(path)
    if found is None:
        found = plan.run_in_memory() if path is None or len(plan.weights) == 1 else plan.run(settings, command)
    return _curvature(found, measured)


def ekfac_of(
    measured: CurvatureData,
    model_fingerprint: str = "",
    folder: Path | None = None,
    settings: LaunchSettings | None = None,
    command: Sequence[str] | None = None,
) -> KroneckerCurvature:
    """Return EK-FAC's eigenvectors from one pass and eigenvalues from another; `folder` as for `kfac_of`.

    Each of its steps (factors, eigenvectors, eigenvalues) is kept there when it is finished, and pieces of it before.
    """
    path = curvature_path(folder, "ekfac", measured, model_fingerprint)
    found = _read_stored(path)
    if found is None and (path is None or len(measured.groups) == 1):
        curvature = kfac_of(measured).eigenbases()
        found = _eigenvalue_plan(measured, path, "", curvature).run_in_memory()
    elif found is None and path is not None:
        bases = _bases_plan(measured, path, kfac_of(measured, model_fingerprint, folder, settings, command))
        curvature = _curvature(bases.run(settings, command), measured)
        # Eigenvectors that were computed again may be rounded otherwise: squares along the old ones do not count then.
        vectors = bases.files.fingerprint(range(len(bases.weights)))
        found = _eigenvalue_plan(measured, path, vectors, curvature).run(settings, command)
        bases.files.remove()
    assert found is not None
    return _curvature(found, measured)


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


def _sums_plan(
    name: str,
    measured: CurvatureData,
    path: Path | None,
    of: str,
    make: Callable[[], KroneckerSink | EigenvalueSink],
    finish: Callable[[Tensors], Tensors],
) -> SavedPieces:
    """Return the plan of a pass: a piece leaves the sums of its examples, `finish` turns the sums over all around."""

    def compute(piece: int) -> Tensors:
        sink = make()
        measured.stream_piece(piece, sink, step_done)
        return sink.sums()

    sizes = [sum(map(len, group)) for group in measured.groups]
    place = path or Path(name)
    files = _pieces(place, measured, of)
    return SavedPieces(
        name, place.parent.parent, files, sizes, compute, lambda parts: finish(add_pieces(parts)), result=path
    )


def _eigenvalue_plan(measured: CurvatureData, path: Path | None, of: str, curvature: KroneckerCurvature) -> SavedPieces:
    def finish(sums: Tensors) -> Tensors:
        on_device = {name: tensor.to(measured.device) for name, tensor in sums.items()}
        return with_eigenvalues(curvature, on_device).tensors()

    return _sums_plan("EK-FAC eigenvalues", measured, path, of, lambda: EigenvalueSink(curvature), finish)


def _bases_plan(measured: CurvatureData, path: Path, factors: KroneckerCurvature) -> SavedPieces:
    """Return the plan of the eigenvectors, a block a piece: another process would round them otherwise."""
    numbers = [number for number, factor in enumerate(factors.factors) if isinstance(factor, KroneckerFactor)]
    rest = [(number, factor) for number, factor in enumerate(factors.factors) if number not in numbers]

    def combine(parts: Iterable[Tensors]) -> Tensors:
        found = {f"{number}.values": factor.tensors()["values"] for number, factor in rest}
        for number, part in zip(numbers, parts, strict=True):
            found |= {f"{number}.{side}": tensor for side, tensor in part.items()}
        return found

    return SavedPieces(
        "Eigenvectors",
        path.parent.parent,
        _pieces(path, measured, "vectors"),
        [1] * len(numbers),
        lambda piece: factors.factors[numbers[piece]].eigenbasis().tensors(),
        combine,
        unit="layers",
    )


def _pieces(path: Path, measured: CurvatureData, of: str) -> PieceFiles:
    """Return the files of the pieces of `path`: the same only where the data is cut into the same batches.

    Nor are sums of two devices added up, which differ by rounding.
    """
    dtype, device = next(measured.model.parameters()).dtype, measured.device
    content = [path.name, of, str(dtype), [[len(batch) for batch in group] for group in measured.groups]]
    content += [] if device.type == "cpu" else [describe_device(device)]
    suffix = "-vectors" if of == "vectors" else ""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return PieceFiles(path.with_name(path.stem + suffix), digest)


def _read_stored(path: Path | None) -> Tensors | None:
    return read_tensors(path) if path is not None and broadcast_from_rank0(path.exists) else None


def _curvature(tensors: Tensors, measured: CurvatureData) -> KroneckerCurvature:
    """Return the curvature that a file keeps as these tensors, on the model's device."""
    parts: list[Tensors] = [{} for _ in measured.blocks]
    for name, tensor in tensors.items():
        number, _, side = name.partition(".")
        parts[int(number)][side] = tensor.to(measured.device)
    factors = (
        KroneckerFactor(part["left"], part["right"], float(part["tokens"]))
        if "tokens" in part
        else Eigenbasis(part.get("left"), part.get("right"), part["values"])
        for part in parts
    )
    return KroneckerCurvature(measured.blocks, tuple(factors))
