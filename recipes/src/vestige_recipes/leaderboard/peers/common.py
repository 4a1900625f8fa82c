"""What the scripts of the peers share. Each runs in its peer's own environment, so nothing here imports Vestige.

`PYTHON SCRIPT MODEL TRAIN QUERIES OUT` leaves a file `OUT/ROW.npz` for each of its rows of the table: `scores`, float
[query, example], higher where a training step on the example lowers the query's loss, with `seconds` and `memory`, the
peak in bytes; or the `reason` why there are none. TRAIN and QUERIES are JSON lines whose `input_ids` are of one length,
and every token but the first is a target.
"""

import json
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

BATCH = 16


class Job(NamedTuple):
    """What is scored, and a folder for what the peer writes."""

    model: str
    train: str
    queries: str
    out: Path

    def load_linear(self) -> tuple[nn.Module, list[str]]:
        """Return the model with `nn.Linear` where GPT-2 has `Conv1D`, which peers do not know, and the blocks' maps."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32, attn_implementation="eager")
        for parent in list(model.modules()):
            for name, part in parent.named_children():
                if isinstance(part, Conv1D):
                    linear = nn.Linear(*part.weight.shape)
                    linear.weight, linear.bias = nn.Parameter(part.weight.detach().T.contiguous()), part.bias
                    setattr(parent, name, linear)
        head = model.get_output_embeddings()
        maps = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]
        return model.eval(), maps

    def load_rows(self) -> tuple[Tensor, Tensor]:
        """Return the tokens of the training data and of the queries, int64 [row, token]."""
        lines = (Path(path).read_text().splitlines() for path in (self.train, self.queries))
        train, queries = (torch.tensor([json.loads(line)["input_ids"] for line in each]) for each in lines)
        return train, queries


def sum_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the summed loss of every token but the first."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def run(rows: Mapping[str, Callable[[Job], Any]]) -> None:
    """Compute the rows that are not there, each in a process of its own: its peak memory is that of nothing else."""
    # A peer may change the current folder.
    model, train, queries, folder = (str(Path(each).resolve()) for each in sys.argv[1:])
    for name, work in rows.items():
        out = Path(folder, name)
        out.mkdir(parents=True, exist_ok=True)
        if not Path(folder, f"{name}.npz").exists():
            process = get_context("spawn").Process(target=_score, args=(work, Job(model, train, queries, out)))
            process.start()
            process.join()
            if process.exitcode:
                _leave(out, reason=f"its process ended with exit code {process.exitcode}")


def _score(work: Callable[[Job], Any], job: Job) -> None:
    torch.manual_seed(0)
    began = time.perf_counter()
    try:
        scores = np.asarray(work(job), dtype=np.float32)
    except Exception as error:
        traceback.print_exc()
        _leave(job.out, reason=f"{type(error).__name__}: {error}")
        return
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    _leave(job.out, scores=scores, seconds=time.perf_counter() - began, memory=memory)


def _leave(out: Path, **content: Any) -> None:
    """Write a file that is whole or absent."""
    part = out / "part.npz"
    np.savez(part, **content)
    part.replace(out.with_name(f"{out.name}.npz"))
