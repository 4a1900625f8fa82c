"""What the model itself costs: the plain passes that every other engine is compared with."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from workload import Workload, padded

BATCH = 16


def batches(workload: Workload, size: int, by_length: bool) -> Iterator[list[int]]:
    """Rows in the order of the data, or longest first, `size` at a time."""
    rows = list(range(len(workload.tokens)))
    if by_length:
        rows.sort(key=lambda row: -len(workload.tokens[row]))
    return (rows[start : start + size] for start in range(0, len(rows), size))


def plain(model: LlamaForCausalLM, workload: Workload, size: int = BATCH, by_length: bool = False) -> None:
    """Forward and backward with the gradients of all weights, as in training without the optimiser."""
    model.requires_grad_(True)
    for rows in batches(workload, size, by_length):
        _loss(model, workload, rows).backward()
        model.zero_grad(set_to_none=True)


def floor(model: LlamaForCausalLM, workload: Workload, size: int = BATCH, by_length: bool = False) -> None:
    """Forward and backward with frozen weights: every activation is differentiated, no weight is."""
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(_differentiate)
    for rows in batches(workload, size, by_length):
        _loss(model, workload, rows).backward()
    handle.remove()


def forward(model: LlamaForCausalLM, workload: Workload, size: int = BATCH, by_length: bool = False) -> None:
    """Forward alone, with the loss."""
    with torch.no_grad():
        for rows in batches(workload, size, by_length):
            _loss(model, workload, rows)


def _loss(model: LlamaForCausalLM, workload: Workload, rows: list[int]) -> Tensor:
    # Padding is on the right, so a causal model needs no attention mask, and is faster without one.
    batch = padded(workload, rows)
    return model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss


def _differentiate(module: nn.Module, inputs: object, output: Tensor) -> Tensor:  # noqa: ARG001
    return output.requires_grad_()
