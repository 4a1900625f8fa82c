"""What the peers' scripts share: the sequences, the model, and how a result is left for the benchmark to read."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure import Measurement, measure, pin
from workload import load

pin()
torch.set_num_threads(1)


class Sequences(torch.utils.data.Dataset):
    """Token sequences of equal length, as the peers take them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.tokens = torch.tensor(load(folder, name).tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[row]}


def load_model(folder: Path) -> LlamaForCausalLM:
    """The model in float32, with eager attention, which every peer can differentiate."""
    return LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager").eval()


def run(name: str, work: Callable[[], Any]) -> tuple[str, Measurement, np.ndarray]:
    """The scores [query, example] that `work` returns, and what they cost."""
    found: list[Any] = []
    cost = measure(lambda: found.append(work()))
    return name, cost, np.asarray(torch.as_tensor(found[0]).float().cpu())


def report(out: Path, peer: str, results: list[tuple[str, Measurement, np.ndarray]]) -> None:
    """Leave scores and costs in `out`."""
    for name, cost, scores in results:
        np.save(out / f"{peer}-{name}.npy", scores)
        (out / f"{peer}-{name}.json").write_text(json.dumps(cost.to_dict()))
