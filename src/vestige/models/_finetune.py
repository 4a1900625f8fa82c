"""Fine-tuning in its smallest form: AdamW on the mean loss of a batch's target tokens."""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vestige.data import TokenizedData, plan_batches
from vestige.errors import DataError, ModelError, SpecError
from vestige.models._components import LoadedModel
from vestige.models._pretrained import batch_sharing, quiet_transformers
from vestige.models._training import Recipe, Step, train
from vestige.progress import announce, progress

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Lora:
    """Low-rank matrices beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int
    alpha: float | None = None
    """Scale; None is twice the rank."""
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Layers by the end of their name; `all-linear` is every linear layer but the head."""


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
    """Write a folder with a copy of the model trained on `data`, and its tokenizer, and return its path.

    The loaded model is left as it is. The loss is the mean over the target tokens of a batch. Batches hold examples of
    like length; their order is shuffled again in every epoch. AdamW without weight decay, gradients clipped to norm 1,
    the learning rate falling linearly to zero. Dropout stays off, so the same seed, hardware and thread count give the
    same weights.

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
    planned = plan_batches(data.lengths, token_budget, sharing=batch_sharing(loaded.model))
    batches = [rows for rows in planned if data.target_counts[rows].any()]
    if not batches:
        raise DataError(f"{data.name}: no example has a target token, so there is nothing to learn.")
    model = trainable_copy(loaded, lora_rank=lora_rank, seed=seed)
    _train(model, data, batches, epochs, learning_rate, seed)
    return save_trained(model, loaded, out)


def trainable_copy(
    loaded: LoadedModel, *, lora_rank: int | Lora | None = None, from_scratch: bool = False, seed: int = 0
) -> nn.Module:
    """Return a copy of the model whose weights, or LoRA matrices beside them, can be trained and saved.

    Of an adapter its own matrices are trained and nothing beneath them: it is saved without its base.

    Args:
        loaded: Stays as it is.
        lora_rank: Rank of new LoRA matrices on every linear layer, or all their settings; None to train
            all weights, or the adapter that the model is.
        from_scratch: Begin with random weights as the model's class draws them, instead of the loaded ones.
        seed: Of the LoRA matrices or the random weights.

    Raises:
        ModelError: It is no transformers model, an adapter was to begin from scratch, or a target is no layer.
        SpecError: LoRA matrices were requested beside those of an adapter.
    """
    if not hasattr(loaded.model, "save_pretrained"):
        raise ModelError(f"{loaded.name} has no `save_pretrained`; fine-tuning needs a transformers model.")
    if from_scratch:
        return _drawn_anew(loaded, seed).requires_grad_(True)
    model: Any = copy.deepcopy(loaded.model)
    adapter = hasattr(model, "peft_config")
    if lora_rank is None:
        model.requires_grad_(not adapter)
        if adapter:
            model.set_adapter(model.active_adapter)
        return model
    if adapter:
        raise SpecError(f"{loaded.name} is an adapter, which is trained on as it is. Leave --lora-rank out.")
    from peft import LoraConfig, get_peft_model

    path, lora = Path(loaded.name).expanduser(), Lora(lora_rank) if isinstance(lora_rank, int) else lora_rank
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=_target_modules(model, lora.targets, loaded.name),
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
    # Not the cache folder that a GGUF file was unpacked into, but what the user called the model.
    settings.base_model_name_or_path = str(path.resolve()) if path.exists() else loaded.name
    return adapted


def _target_modules(model: Any, targets: tuple[str, ...], name: str) -> str | list[str]:
    """Return the layers as PEFT wants them named."""
    if targets == (ALL_LINEAR,):
        return ALL_LINEAR
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    ends = {path.rpartition(".")[2] for path in linear}
    for target in targets:
        if target != ALL_LINEAR and not any(path == target or path.endswith(f".{target}") for path in linear):
            raise ModelError(
                f"{name} has no linear layer called {target!r}. Its layers end in: {', '.join(sorted(ends))}."
            )
    if ALL_LINEAR not in targets:
        return list(targets)
    head = model.get_output_embeddings()
    inner = {path for path in linear if model.get_submodule(path) is not head}
    return sorted({*inner, *(target for target in targets if target != ALL_LINEAR)})


def _drawn_anew(loaded: LoadedModel, seed: int) -> nn.Module:
    old: Any = loaded.model
    if hasattr(old, "peft_config"):
        raise ModelError(f"{loaded.name} is an adapter; only a whole model can be trained from scratch.")
    weight = next(old.parameters())
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(old)(copy.deepcopy(old.config)).to(device=weight.device, dtype=weight.dtype)


def _train(
    model: nn.Module,
    data: TokenizedData,
    batches: list[np.ndarray],
    epochs: int,
    learning_rate: float,
    seed: int,
) -> None:
    order = np.random.default_rng(seed)
    steps = [batches[number] for _ in range(epochs) for number in order.permutation(len(batches))]
    lengths, seen = data.lengths, [0.0, 0]
    with progress(int(lengths.sum()) * epochs, "Fine-tuning", unit="tokens") as counter:

        def after(step: Step) -> None:
            seen[0], seen[1] = seen[0] + step.loss, seen[1] + step.targets
            counter.advance(int(lengths[steps[step.number - 1]].sum()))
            if step.number % len(batches) == 0:
                announce(
                    f"Epoch {step.number // len(batches)} of {epochs}: loss {seen[0] / seen[1]:.3f} nats per token"
                )
                seen[:] = [0.0, 0]

        train(model, data, steps, Recipe(learning_rate), after)


def save_trained(model: Any, loaded: LoadedModel, out: Path) -> Path:
    """Write the model, or its adapter, and the tokenizer of the model that it was made from to the new folder `out`."""
    unfinished = out.with_name(f"{out.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    # An adapter holds no embedding; left to find out by itself, PEFT would request the base model from the hub.
    extra = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with quiet_transformers():
        model.save_pretrained(unfinished, **extra)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)
    return out
