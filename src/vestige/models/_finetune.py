"""Fine-tuning in its smallest form: AdamW on the mean loss of a batch's target tokens."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vestige.data import NO_TARGET, Batch, TokenizedData, make_batch, plan_batches
from vestige.errors import DataError, ModelError, NonFinite
from vestige.models._transformers import quiet_transformers
from vestige.models._types import LoadedModel
from vestige.progress import announce, progress

_LARGEST_GRADIENT_NORM = 1.0


def finetune(
    loaded: LoadedModel,
    data: TokenizedData,
    *,
    epochs: int,
    learning_rate: float,
    token_budget: int = 512,
    seed: int = 0,
    out: str | Path,
    lora_rank: int | None = None,
) -> Path:
    """A folder with a copy of the model trained on `data`, and its tokenizer; the loaded model is left as it is.

    The loss is the mean over the target tokens of a batch. Batches hold examples of like length; their order is
    shuffled anew in every epoch. AdamW without weight decay, gradients clipped to norm 1, the learning rate falling
    linearly to zero. Dropout stays off, so the same seed, hardware and thread count give the same weights.

    Args:
        loaded: What `load_model` returned.
        data: Training data, tokenised for this model.
        epochs: Passes over the data.
        learning_rate: At the first step.
        token_budget: Most tokens in a batch, padding included.
        seed: Of the order of batches and of the start of LoRA matrices.
        out: The new folder; it appears when it is complete.
        lora_rank: Train LoRA matrices of this rank on every linear layer and save them as a PEFT adapter; None trains
            all weights.

    Raises:
        ModelError: `out` exists, or the model cannot be saved.
        DataError: No example has a target token.
        NonFinite: A loss is not finite; the message names the examples of the batch.
    """
    out = Path(out)
    if out.exists():
        raise ModelError(f"{out} exists already. Give another folder, or delete it to train again.")
    batches = [rows for rows in plan_batches(data.lengths, token_budget) if data.target_counts[rows].any()]
    if not batches:
        raise DataError(f"{data.name}: no example has a target token, so there is nothing to learn.")
    model = _trainable_copy(loaded, lora_rank, seed)
    _train(model, data, batches, epochs, learning_rate, seed)
    return _save(model, loaded, out)


def _trainable_copy(loaded: LoadedModel, lora_rank: int | None, seed: int) -> nn.Module:
    if not hasattr(loaded.model, "save_pretrained"):
        raise ModelError(f"{loaded.name} has no `save_pretrained`; fine-tuning needs a transformers model.")
    model: Any = copy.deepcopy(loaded.model)
    if lora_rank is None:
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    path = Path(loaded.name).expanduser()
    settings = LoraConfig(
        r=lora_rank,
        lora_alpha=2 * lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
    # Not the cache folder that a GGUF file was unpacked into, but what the user called the model.
    settings.base_model_name_or_path = str(path.resolve()) if path.exists() else loaded.name
    return adapted


def _train(
    model: nn.Module,
    data: TokenizedData,
    batches: list[np.ndarray],
    epochs: int,
    learning_rate: float,
    seed: int,
) -> None:
    # Evaluation mode, although weights are trained: it only turns dropout off.
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = np.random.default_rng(seed)
    device = parameters[0].device
    with progress(int(data.lengths.sum()) * epochs, "Fine-tuning", unit="tokens") as counter:
        for epoch in range(epochs):
            total = targets = 0.0
            for number in order.permutation(len(batches)):
                batch = make_batch(data, batches[number]).to(device)
                loss, count = _loss(model, batch)
                if not torch.isfinite(loss):
                    raise NonFinite(_not_finite(data, batches[number], epoch, learning_rate))
                (loss / count).backward()
                nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                total, targets = total + loss.item(), targets + count
                counter.advance(int(data.lengths[batches[number]].sum()))
            announce(f"Epoch {epoch + 1} of {epochs}: loss {total / targets:.3f} nats per token")


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Summed cross-entropy of the target tokens in float32, and how many there are."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    wanted = batch.labels[:, 1:] != NO_TARGET
    chosen = logits[:, :-1][wanted].float()
    return F.cross_entropy(chosen, batch.labels[:, 1:][wanted], reduction="sum"), int(wanted.sum())


def _not_finite(data: TokenizedData, rows: np.ndarray, epoch: int, learning_rate: float) -> str:
    ids = ", ".join(repr(data.examples[row].id) for row in rows[:8])
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return (
        f"The loss of a batch in epoch {epoch + 1} is not finite; its examples are {ids}{more}. Nothing was saved. "
        f"Lower the learning rate (now {learning_rate:g}), or look at these examples."
    )


def _save(model: Any, loaded: LoadedModel, out: Path) -> Path:
    unfinished = out.with_name(f"{out.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    # An adapter holds no embedding; asked to find out by itself, PEFT would look the base model up on the hub.
    extra = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with quiet_transformers():
        model.save_pretrained(unfinished, **extra)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)
    return out
