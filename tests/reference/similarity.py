"""Slow, obvious counterparts of the methods without gradients: one example at a time, plain loops, float64."""

import math
import re
from collections import Counter

import numpy as np
import torch
from torch import nn


def bm25(query: str, documents: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """BM25 with Lucene's inverse document frequency, written from the formula."""
    words = [re.findall(r"\w+", document.lower()) for document in documents]
    average = sum(len(row) for row in words) / len(words)
    scores = []
    for row in words:
        counts, score = Counter(row), 0.0
        for word in re.findall(r"\w+", query.lower()):
            holding = sum(word in other for other in words)
            rarity = math.log(1 + (len(words) - holding + 0.5) / (holding + 0.5))
            score += rarity * counts[word] / (counts[word] + k1 * (1 - b + b * len(row) / average))
        scores.append(score)
    return scores


def predicting_positions(targets: np.ndarray) -> list[int]:
    """Positions whose output predicts a target token."""
    return [position - 1 for position in range(1, len(targets)) if targets[position]]


def pooled_hidden_state(model: nn.Module, ids: np.ndarray, targets: np.ndarray, layer: int, last: bool) -> torch.Tensor:
    """Mean (or last) hidden state over the predicting positions of one unpadded example."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True).hidden_states
    positions = predicting_positions(targets)
    return states[layer][0, positions[-1:] if last else positions].double().mean(0)


def layer_outputs(model: nn.Module, ids: np.ndarray, targets: np.ndarray, modules: list[str]) -> list[torch.Tensor]:
    """Summed output of each module over the predicting positions of one unpadded example."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, output, name=name: found.update({name: output}))
        for name in modules
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor(ids[None].astype(np.int64)))
    for handle in handles:
        handle.remove()
    positions = predicting_positions(targets)
    return [found[name].reshape(len(ids), -1)[positions].double().sum(0) for name in modules]
