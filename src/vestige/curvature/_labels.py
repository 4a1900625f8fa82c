"""Labels drawn from the model's own predictions: with them the mean of g g^T is the true Fisher matrix."""

import hashlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vestige.data import NO_TARGET, Batch, TokenizedData, make_batch, plan_batches
from vestige.models import batch_sharing

Labels = Literal["sampled", "data"]
"""`sampled`: true Fisher matrix; `data`: the empirical one, from the labels of the training data."""

LOGIT_BYTES = 256 * 2**20
"""Most bytes of float32 logits alive at once."""


def sampled_labels(model: nn.Module, data: TokenizedData, token_budget: int, seed: int) -> list[np.ndarray]:
    """Return every example's labels, targets drawn from the model's own distribution, `NO_TARGET` elsewhere.

    A draw depends on the seed and on the example's tokens alone: not on its row, its batch or the padding.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    budget = max(1, min(token_budget, LOGIT_BYTES // (4 * vocabulary)))
    labels = [np.full(len(ids), NO_TARGET, dtype=np.int64) for ids in data.input_ids]
    for rows in plan_batches(data.lengths, budget, sharing=batch_sharing(model)):
        batch = make_batch(data, rows).to(device)
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
        for place, row in enumerate(rows):
            predicting = np.flatnonzero(data.targets[row][1:])
            uniform = _uniform(data.input_ids[row], seed)[predicting]
            drawn = _draw(logits[place, torch.from_numpy(predicting).to(device)], uniform.to(device))
            labels[row][predicting + 1] = drawn.cpu().numpy()
    return labels


def relabelled(batch: Batch, labels: Mapping[int, np.ndarray]) -> Batch:
    """Return the batch with these labels, `labels[i]` for row i of the data."""
    replaced = torch.full_like(batch.labels, NO_TARGET)
    for place, row in enumerate(batch.rows.tolist()):
        replaced[place, : len(labels[row])] = torch.from_numpy(labels[row]).to(replaced.device)
    return batch._replace(labels=replaced)


def _uniform(ids: np.ndarray, seed: int) -> Tensor:
    """Return one number in [0, 1) per token."""
    digest = hashlib.blake2b(f"{seed}:".encode() + ids.astype("<i4").tobytes(), digest_size=16).digest()
    numbers = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(len(ids))
    return torch.from_numpy(numbers)


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return where the cumulative distribution passes the uniform number."""
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    found = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)
