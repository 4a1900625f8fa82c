"""Copies of a model that can be trained and saved."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vestige.errors import ModelError, SpecError
from vestige.models._components import LoadedModel
from vestige.models._pretrained import quiet_transformers
from vestige.models._weights import quantized_bits
from vestige.storage import stage_folder

_ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Lora:
    """Low-rank matrices beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int
    alpha: float | None = None
    """Scale; None is twice the rank."""
    dropout: float = 0.0
    targets: tuple[str, ...] = (_ALL_LINEAR,)
    """Layers by the end of their name; `all-linear` is every linear layer but the head."""


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
        ModelError: It is no transformers model, an adapter was to begin from scratch, a target is no layer, or whole
            weights of a quantised model were to be trained.
        SpecError: LoRA matrices were requested beside those of an adapter.
    """
    if not hasattr(loaded.model, "save_pretrained"):
        raise ModelError(f"{loaded.name} has no `save_pretrained`; fine-tuning needs a transformers model.")
    adapter = hasattr(loaded.model, "peft_config")
    if (bits := quantized_bits(loaded.model)) and (from_scratch or (lora_rank is None and not adapter)):
        raise ModelError(
            f"The maps of {loaded.name} are packed in {bits} bits, and training would not reach them. Train LoRA "
            "matrices beside them: --lora-rank 8, or drop --quantize."
        )
    if from_scratch:
        return _draw_weights(loaded, seed).requires_grad_(True)
    model: Any = copy.deepcopy(loaded.model)
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
    if targets == (_ALL_LINEAR,):
        return _ALL_LINEAR
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    ends = {path.rpartition(".")[2] for path in linear}
    for target in targets:
        if target != _ALL_LINEAR and not any(path == target or path.endswith(f".{target}") for path in linear):
            raise ModelError(
                f"{name} has no linear layer called {target!r}. Its layers end in: {', '.join(sorted(ends))}."
            )
    if _ALL_LINEAR not in targets:
        return list(targets)
    head = model.get_output_embeddings()
    inner = {path for path in linear if model.get_submodule(path) is not head}
    return sorted({*inner, *(target for target in targets if target != _ALL_LINEAR)})


def _draw_weights(loaded: LoadedModel, seed: int) -> nn.Module:
    old: Any = loaded.model
    if hasattr(old, "peft_config"):
        raise ModelError(f"{loaded.name} is an adapter; only a whole model can be trained from scratch.")
    weight = next(old.parameters())
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(old)(copy.deepcopy(old.config)).to(device=weight.device, dtype=weight.dtype)


def save_trained(model: Any, loaded: LoadedModel, out: Path) -> Path:
    """Write the model, or its adapter, and the tokenizer of the model that it was made from to the new folder `out`."""
    with stage_folder(out) as unfinished:
        write_model(model, loaded.tokenizer, unfinished)
    return out


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model, or its adapter, and the tokenizer if there is one."""
    # An adapter holds no embedding; left to find out by itself, PEFT would request the base model from the hub.
    extra = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with quiet_transformers():
        model.save_pretrained(str(folder), **extra)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
