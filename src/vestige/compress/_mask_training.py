"""Training of a mask: it finds the coordinates of a gradient that keep the inner products of examples in order.

The objective is that of the selective mask of GraSS. Logits S give a soft mask `m = sigmoid(S)`; maximised is

    mean over queries t of Pearson over examples i of ( <g_i, g_t>, <m * g_i, m * g_t> )  -  sum of lambda f |m|_1

where f is 1 while more than twice the wanted k entries of m exceed one half, and falls with their number to 0.1.
For a mask of both sides, m is the outer product of one mask for each, and the penalties add up. What differs from the
published training: Adam takes one step a batch (there: two); the best mask is kept, judged as it will be used,
with exactly k coordinates, on queries that the training never used (there: the last one); and the kept
coordinates are scaled so that inner products are right on average over those pairs (there: not at all).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.compress._mask import Coordinates, MaskPart, read_masks, write_masks
from vestige.compress._registry import Stream, Work, compressor, gaussians, permutation
from vestige.errors import DataError, SpecError
from vestige.gradients import Side

_LEAST_EXAMPLES = 10
_SPREAD = 0.01  # of the first logits
_SHARP = 0.01  # temperature at which the stop rule measures the soft mask
_CONSTANT = 1e-6  # a row of products that varies less, relative to its size, has no correlation


@dataclass(frozen=True)
class MaskTraining:
    """Settings of the training of a mask; the defaults are the published ones for GPT-2 and Llama.

    Attributes:
        penalty: lambda, the price of one entry of the soft mask.
        learning_rate: Of Adam; also the most that a logit moves in a step, beside 0.01 between the first logits.
        epochs: Passes over the examples, at most.
        batch: Examples a step.
        check_every: Epochs between two measurements on the unseen queries.
        stop_below: Training ends when the rank correlation of the soft mask, sharpened 100 times, has been at
            least this and falls below it: from there on, sparsity costs more than it gives.
        examples: How many `vestige index` draws from the data to train on; of gradients that are given, all are used.
    """

    penalty: float = 5e-5
    learning_rate: float = 1e-5
    epochs: int = 500
    batch: int = 100
    check_every: int = 10
    stop_below: float = 0.9
    examples: int = 200


class SelectiveMask(NamedTuple):
    """A trained mask.

    `parts` are `left` and `right`, or `whole`, as `write_masks` takes them; `correlation` is the mean rank
    correlation (Spearman, at most 1) of masked and exact inner products with unseen queries; `history` has one for
    every measurement, the first before any training.
    """

    parts: dict[str, MaskPart]
    correlation: float
    history: tuple[float, ...]


class _Split(NamedTuple):
    """Flattened gradients in three roles."""

    examples: Float[Tensor, "example entry"]
    queries: Float[Tensor, "query entry"]
    unseen: Float[Tensor, "unseen entry"]


class _Face(NamedTuple):
    """The candidates of one logit vector: a side or the whole gradient; nothing to choose if all is kept."""

    word: str
    size: int
    kept: int
    logits: Float[Tensor, " size"]

    @property
    def free(self) -> bool:
        return self.kept < self.size


def train_selective_mask(
    gradients: Float[Tensor, "example out in"],
    size: tuple[int, ...],
    stream: Stream,
    training: MaskTraining = MaskTraining(),
) -> SelectiveMask:
    """Train the mask of one component, from gradients of some examples under the checkpoint that will be explained.

    From factors, the gradients are `torch.einsum("nto,nti->noi", left, right)`. A fifth of the examples are the
    objective's queries, another fifth are never trained on. Memory is about twice that of the gradients; a
    step costs one product of queries and batch over all entries, forward and backward.

    Args:
        gradients: At least 10, of examples like those to be attributed. The published runs take 200.
        size: `(A, B)` for masks of both sides, `(K,)` for one of the whole gradient.
        stream: Decides the split, the order and the first logits.
        training: Penalty, learning rate and when to stop.

    Raises:
        DataError: Fewer than 10 examples, or no example that differs from zero.
    """
    split = _split(gradients, stream)
    faces = _faces(gradients.shape[1:], size, stream, gradients.device)
    free = [face.logits for face in faces if face.free]
    chosen = _choose(faces)
    history = [_rank_correlation(split, _hard(faces, chosen))]
    best, was_high = (history[0], chosen), False
    if not free:
        return SelectiveMask(_scale_parts(split, faces, chosen), history[0], tuple(history))
    optimizer = torch.optim.Adam(free, lr=training.learning_rate)
    for epoch in range(1, training.epochs + 1):
        _run_epoch(split, faces, optimizer, training, permutation(stream.child("epoch", epoch), len(split.examples)))
        if epoch % training.check_every and epoch != training.epochs:
            continue
        chosen = _choose(faces)
        history.append(_rank_correlation(split, _hard(faces, chosen)))
        if history[-1] > best[0]:
            best = history[-1], chosen
        sharp = _rank_correlation(split, _soft(faces, _SHARP)[0])
        if was_high and sharp < training.stop_below:
            break
        was_high = was_high or sharp >= training.stop_below
    return SelectiveMask(_scale_parts(split, faces, best[1]), best[0], tuple(history))


def _split(gradients: Float[Tensor, "example out in"], stream: Stream) -> _Split:
    count = len(gradients)
    if count < _LEAST_EXAMPLES:
        raise DataError(f"A mask is trained on at least {_LEAST_EXAMPLES} examples, given {count}. Give some 200.")
    flat = gradients.detach().flatten(1).to(torch.float32)
    length = flat.norm() / math.sqrt(count)
    if not length > 0:
        raise DataError("All gradients of the component are zero, so no mask can keep them apart. Leave it out.")
    flat = flat[permutation(stream.child("split"), count).to(flat.device)] / length
    fifth = count // 5
    return _Split(flat[2 * fifth :], flat[:fifth], flat[fifth : 2 * fifth])


def _faces(shape: Sequence[int], size: tuple[int, ...], stream: Stream, device: torch.device) -> list[_Face]:
    lengths = tuple(shape) if len(size) == 2 else (math.prod(shape),)
    faces = []
    for word, length, kept in zip(("left", "right") if len(size) == 2 else ("whole",), lengths, size, strict=True):
        logits = gaussians(stream.child("logits", word), torch.arange(length, device=device)) * _SPREAD
        faces.append(_Face(word, length, min(kept, length), logits.requires_grad_()))
    return faces


# Lists of tensors have one entry a side, whose lengths differ: one axis name cannot serve both.
def _outer(masks: Sequence[Tensor]) -> Float[Tensor, " entry"]:
    return masks[0] if len(masks) == 1 else torch.outer(masks[0], masks[1]).flatten()


def _soft(faces: list[_Face], temperature: float = 1.0) -> tuple[Float[Tensor, " entry"], list[Tensor]]:
    """Return the soft mask of the whole gradient, and that of each face."""
    masks = [torch.sigmoid(one.logits / temperature) if one.free else torch.ones_like(one.logits) for one in faces]
    return _outer(masks), masks


def _choose(faces: list[_Face]) -> list[Tensor]:
    """Return the coordinates with the largest logits, ascending."""
    return [face.logits.detach().topk(face.kept).indices.sort().values for face in faces]


def _hard(faces: list[_Face], chosen: list[Tensor]) -> Float[Tensor, " entry"]:
    """Return the mask of the whole gradient that the chosen coordinates make, of zeros and ones."""
    zeros = [torch.zeros_like(face.logits, requires_grad=False) for face in faces]
    return _outer([one.index_fill_(0, index, 1.0) for one, index in zip(zeros, chosen, strict=True)])


def _run_epoch(
    split: _Split,
    faces: list[_Face],
    optimizer: torch.optim.Optimizer,
    training: MaskTraining,
    order: Int[Tensor, " example"],
) -> None:
    for rows in order.tensor_split(math.ceil(len(order) / training.batch)):
        optimizer.zero_grad()
        (-objective(split.examples[rows], split.queries, faces, training.penalty)).backward()
        optimizer.step()
        for face in faces:
            _keep_enough(face)


def _keep_enough(face: _Face) -> None:
    """Set the k largest logits to 2 where fewer than k are positive: the mask never gets smaller than wanted."""
    with torch.no_grad():
        if int((face.logits > 0).sum()) < face.kept:
            face.logits[face.logits.topk(face.kept).indices] = 2.0


def objective(
    examples: Float[Tensor, "example entry"],
    queries: Float[Tensor, "query entry"],
    faces: list[_Face],
    penalty: float,
) -> Float[Tensor, ""]:
    """Return the value of the formula above."""
    mask, masks = _soft(faces)
    exact, masked = queries @ examples.t(), (queries * mask.square()) @ examples.t()
    price = mask.new_zeros(())
    for face, one in zip(faces, masks, strict=True):
        if face.free:
            active = int((one > 0.5).sum())
            price = price + one.sum() * (1.0 if active > 2 * face.kept else max(0.1, active / (2 * face.kept)))
    return _pearson(exact, masked) - penalty * price


def _pearson(exact: Float[Tensor, "query example"], other: Float[Tensor, "query example"]) -> Float[Tensor, ""]:
    """Return the mean correlation of the rows that vary; 0 if none does."""
    centered = [one - one.mean(1, keepdim=True) for one in (exact, other)]
    sums = [one.square().sum(1) for one in centered]
    sizes = [one.square().sum(1) for one in (exact, other)]
    varies = torch.stack([spread > _CONSTANT**2 * size for spread, size in zip(sums, sizes, strict=True)]).all(0)
    if not varies.any():
        return other.sum() * 0.0
    product = (centered[0] * centered[1]).sum(1)[varies]
    return (product / (sums[0][varies] * sums[1][varies]).sqrt()).mean()


def _rank_correlation(split: _Split, mask: Float[Tensor, " entry"]) -> float:
    """Return the mean Spearman correlation of exact and masked products of the unseen queries with the examples."""
    with torch.no_grad():
        exact, masked = split.unseen @ split.examples.t(), (split.unseen * mask.square()) @ split.examples.t()
    from scipy.stats import rankdata  # half a second, for training of a mask alone

    ranks = [torch.from_numpy(np.asarray(rankdata(one.cpu().numpy(), axis=1))) for one in (exact, masked)]
    return float(_pearson(*ranks))


def _scale_parts(split: _Split, faces: list[_Face], chosen: list[Tensor]) -> dict[str, MaskPart]:
    """Return the mask with the scale whose square fits masked to exact products of unseen pairs by least squares."""
    exact = split.unseen @ split.examples.t()
    masked = (split.unseen * _hard(faces, chosen)) @ split.examples.t()
    slope = float((exact * masked).sum() / masked.square().sum().clamp(min=torch.finfo(torch.float32).tiny))
    scale = math.sqrt(slope) if slope > 0 else 1.0
    parts = {}
    for face, index in zip(faces, chosen, strict=True):
        parts[face.word] = MaskPart(index.cpu(), face.size, scale if face.free else 1.0)
        scale = 1.0 if face.free else scale  # on the first side that is not kept whole, once
    return parts


def _train_component(
    gradients: Float[Tensor, "example out in"], size: tuple[int, ...], stream: Stream, training: MaskTraining
) -> dict[str, Tensor]:
    """Return the trained mask as tensors, which a piece of work can leave in a file."""
    mask = train_selective_mask(gradients, size, stream, training)
    found = {"correlation": torch.tensor(mask.correlation, dtype=torch.float64)}
    for word, part in mask.parts.items():
        found |= {word: part.coordinates, f"{word}:facts": torch.tensor([part.size, part.scale], dtype=torch.float64)}
    return found


def _write_components(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write the masks of all components to one file; return how good they are."""
    masks: dict[str, dict[str, MaskPart]] = {}
    correlations: dict[str, float] = {}
    for key, tensor in tensors.items():
        name, _, word = key.rpartition("/")
        if word == "correlation":
            correlations[name] = float(tensor)
        elif not word.endswith(":facts"):
            size, scale = tensors[f"{key}:facts"].tolist()
            masks.setdefault(name, {})[word] = MaskPart(tensor, int(size), scale)
    write_masks(path, masks)
    if not correlations:
        return "No component is larger than the mask: all are kept whole."
    worst = min(correlations, key=correlations.__getitem__)
    mean = sum(correlations.values()) / len(correlations)
    return (
        f"Trained masks: rank correlation of masked and exact products with unseen queries {mean:.2f} on average, "
        f"least {correlations[worst]:.2f} ({worst}). Where it is low, raise learning_rate or keep more."
    )


def _with_digest(size: tuple[int, ...], options: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG001
    """Add the file's digest to the options, by which a spec on disk recognises the masks that it was made with."""
    if not options.get("file") or "digest" in options:
        return options
    return {**options, "digest": read_masks(options["file"]).digest}


@compressor(
    "selective",
    forms=("K", "AxB"),
    example="selective:32x32",
    complete=_with_digest,
    work=lambda _, kept: Work(gathered=kept),
    picks=True,
    located=True,
    training=MaskTraining,
    train=_train_component,
    write=_write_components,
)
def selective(
    in_size: int,
    out_size: int,
    stream: Stream,  # noqa: ARG001  (nothing is drawn)
    component: str,
    side: Side | None,
    *,
    file: str = "",
    digest: str = "",
) -> Coordinates:
    """Return the trained coordinates of a component's side, or of its whole gradient, times their trained scale."""
    masks = read_masks(file)
    if digest != masks.digest:
        raise SpecError(
            f"The masks in '{file}' have changed: their digest is {masks.digest}, and the spec was made with "
            f"{digest}. Restore the old file, or leave digest= out and compress everything again."
        )
    word = side or "whole"
    part = masks.part(component, word)
    if (part.size, len(part.coordinates)) != (in_size, out_size):
        raise SpecError(
            f"The mask '{component}/{word}' in '{file}' keeps {len(part.coordinates)} of {part.size} coordinates; "
            f"the spec keeps {out_size} of {in_size}. Use the size that the masks were trained with, or train again."
        )
    return Coordinates(in_size, part.coordinates, part.scale)
