"""In-run scores under AdamW: the predicted change of the validation loss against the actual one, step by step.

A GPT-2-style model of bytes (width 64, two layers) learns sums such as `17+25=42`. Each step's scores say what its
examples did to the loss of 16 held-out sums; those of earlier steps go on by the momentum. Printed are, over the
steps, the correlation of the predicted with the actual change, the slope of the actual over the predicted, and both
totals: for scores as AdamW takes its steps, and for plain ones. One thread.

    python benchmarks/in_run_adamw.py [--steps 200] [--rate 1e-3]
"""

import argparse
import random

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from vestige.data import Batch
from vestige.online import OnlineAttribution

BATCH, HELD_OUT, BETA = 16, 16, 0.9
LETTERS = "0123456789+= "


def sums(count: int, draw: random.Random) -> Batch:
    pairs = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(count)]
    texts = [f" {one}+{other}={one + other}".ljust(10) for one, other in pairs]
    ids = torch.tensor([[LETTERS.index(letter) for letter in text] for text in texts])
    return Batch(torch.arange(count), ids, ids)


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(input_ids=batch.input_ids, labels=batch.labels).loss


def measure(kind: str, steps: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted and the actual fall of the validation loss in each step."""
    torch.manual_seed(0)
    draw = random.Random(0)
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 10, "vocab_size": len(LETTERS)}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **off, bos_token_id=0, eos_token_id=0)).double()
    held_out = sums(HELD_OUT, draw)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(BETA, 0.999), weight_decay=0.0)
    engine = OnlineAttribution(model, held_out, optimizer=optimizer, score_optimizer=kind)
    carried, found = 0.0, []
    for number in range(1, steps + 1):
        with torch.no_grad():
            before = float(loss_of(model, held_out))
        batch = sums(BATCH, draw)
        with engine.step(range(BATCH)) as step:
            loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # A step moves by the mean of gradients so far, in which its own has a share of one minus beta.
        carried = BETA * carried + (1 - BETA) * float(step.result.influence.sum())
        with torch.no_grad():
            found.append((carried / (1 - BETA**number), before - float(loss_of(model, held_out))))
    return np.array(found)[:, 0], np.array(found)[:, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'scores':8} {'correlation':>12} {'slope':>8} {'predicted':>10} {'actual':>8}")
    for kind in ("as-is", "sgd"):
        predicted, actual = measure(kind, given.steps, given.rate)
        slope, correlation = np.polyfit(predicted, actual, 1)[0], np.corrcoef(predicted, actual)[0, 1]
        print(f"{kind:8} {correlation:12.3f} {slope:8.2f} {predicted.sum():10.3f} {actual.sum():8.3f}")


if __name__ == "__main__":
    main()
