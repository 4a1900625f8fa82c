"""What the tests of the online engine share: models with dropout, batches of uneven lengths, a plain training loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from tests.architectures import CAUSAL, Sequences, move_off_start, sequences
from vestige.data import NO_TARGET, Batch
from vestige.online import OnlineAttribution

DATA = sequences(12)
HELD_OUT = sequences(6, seed=9)
STEPS = 6
BATCH = 4


def training_model(name: str, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of the table in training mode; GPT-2 with dropout, Llama with attention dropout."""
    torch.manual_seed(0)
    model = move_off_start(CAUSAL[name]()).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model.train()


def step_rows(step: int, size: int = BATCH) -> list[int]:
    """Rows of a step's batch: shuffled, some twice over the training."""
    order = torch.randperm(len(DATA.ids), generator=torch.Generator().manual_seed(step))
    return order[:size].tolist()


def inputs(batch: Batch) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.input_ids, "labels": batch.labels}


def mean_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean over the target tokens of the batch, as transformers has it, which rounds the logits to float32 though."""
    logits = model(input_ids=batch.input_ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:], ignore_index=NO_TARGET)


def named(rows: Sequence[int]) -> list[str]:
    return [f"example-{row}" for row in rows]


def validation(count: int, data: Sequences = HELD_OUT) -> Batch:
    return data.batch(list(range(count)))


def train(
    model: nn.Module,
    make_engine: Callable[..., OnlineAttribution] | None,
    optimizer: torch.optim.Optimizer | None = None,
    clip: float | None = None,
    micro_batches: int = 1,
    autocast: bool = False,
    steps: int = STEPS,
) -> tuple[list[float], OnlineAttribution | None]:
    """Losses of an ordinary training loop; with an engine the passes stand inside its block, else nothing differs."""
    torch.manual_seed(3)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    engine = make_engine(model, optimizer) if make_engine else None
    losses = []
    for step in range(steps):
        with engine.step() if engine else nullcontext() as opened:
            for rows in _chunks(step_rows(step), micro_batches):
                if opened is not None:
                    opened.batch(named(rows))
                with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                    loss = model(**inputs(DATA.batch(rows))).loss / micro_batches
                loss.backward()
                losses.append(loss.item())
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, engine


def _chunks(rows: list[int], count: int) -> Iterator[list[int]]:
    size = len(rows) // count
    return (rows[start : start + size] for start in range(0, len(rows), size))


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    """Whether every parameter and buffer is equal bit for bit."""
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, twin) for (name, value), (other, twin) in pairs)
