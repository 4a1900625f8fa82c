"""Weights that an ascent may move, and that are bit for bit what they were when it is over."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from vestige.errors import ModelError, VestigeError
from vestige.models import LoadedModel, model_fingerprint


@final
class Weights:
    """The weights that may move, with a copy of where they were at the start."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.model = model
        self.parameters = parameters
        self._start = self.copied()

    @property
    def count(self) -> int:
        """The number of values that may move."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def copied(self) -> dict[str, Tensor]:
        """Return a copy of every weight as it is now."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def restore(self) -> None:
        """Restore every weight bit for bit to where it was at the start."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._start[name])

    @contextmanager
    def mirrored(self) -> Iterator[None]:
        """Mirror the weights within the block to the other side of the start: 2 start - now."""
        now = self.copied()
        try:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(2 * self._start[name] - now[name])
            yield
        finally:
            self._put(now)

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Move the weights within the block to where they began."""
        now = self.copied()
        try:
            self.restore()
            yield
        finally:
            self._put(now)

    @contextmanager
    def moved(self, direction: dict[str, Tensor], scale: float) -> Iterator[None]:
        """Move the weights within the block by `scale` times the direction; put them back to the start after it."""
        try:
            with torch.no_grad():
                for name, step in direction.items():
                    self.parameters[name].add_(step, alpha=scale)
            yield
        finally:
            self.restore()

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])


@contextmanager
def borrowed_weights(
    loaded: LoadedModel, *, lora_rank: int | None = None, seed: int = 0, checkpointing: bool = False
) -> Iterator[Weights]:
    """Let the model's weights move within the block; restore them after it, also after an error or Ctrl-C.

    An adapter's LoRA matrices move if the model has them, else every weight, or fresh LoRA matrices of `lora_rank`. The
    model stays in evaluation mode: dropout never acts.

    Raises:
        ModelError: Weights are quantised, so that no gradient reaches them, and no LoRA matrices were requested.
        VestigeError: The weights are not what they were, by their fingerprint.
    """
    model = loaded.model
    with ExitStack() as stack:
        stack.callback(_require_unchanged, model, model_fingerprint(model))
        stack.callback(_freeze, model)
        if lora_rank is not None:
            model = stack.enter_context(_adapted(model, lora_rank, seed))
        if checkpointing:
            stack.enter_context(_checkpointed(model))
        model.eval()
        parameters = movable_parameters(model)
        weights = Weights(model, parameters)
        stack.callback(weights.restore)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield weights


def movable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the LoRA matrices of an adapter, else all weights of the model.

    Raises:
        ModelError: There are quantised weights and no LoRA matrices: only norms and embeddings would move.
    """
    named = dict(model.named_parameters())
    lora = {name: parameter for name, parameter in named.items() if ".lora_" in name}
    if lora:
        return lora
    frozen = [name for name, parameter in named.items() if not parameter.is_floating_point()]
    config: Any = getattr(model, "config", None)
    if frozen or getattr(config, "quantization_config", None) is not None:
        what = f"{len(frozen)} of {len(named)} weights ({frozen[0]}, ...)" if frozen else "The weights"
        raise ModelError(
            f"{what} are quantised and receive no gradient, so an ascent would move what is left and score that. "
            "Move LoRA matrices beside them: --lora-rank 8."
        )
    return named


def _freeze(model: nn.Module) -> None:
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = None


def _require_unchanged(model: nn.Module, before: str) -> None:
    if model_fingerprint(model) != before:
        raise VestigeError(
            "The weights are not bit for bit what they were before the ascent. Please report this with the model's "
            "class; load the model again before using it."
        )


@contextmanager
def _adapted(model: Any, rank: int, seed: int) -> Iterator[nn.Module]:
    """Yield the model with LoRA matrices that change nothing yet; remove them after the block."""
    from peft import LoraConfig, get_peft_model

    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ModelError("The model has LoRA matrices already, and these are moved. Drop --lora-rank.")
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    # The matrices are put around layers in place; with the children as they were, no trace of them is left.
    children = {module: dict(module._modules) for module in model.modules()}
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # What one library deprecates in another is nothing that a user could fix.
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        yield adapted
    finally:
        for module, kept in children.items():
            module._modules = kept
        vars(model).pop("peft_config", None)


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Let layers forget their activations and compute them again in the backward pass.

    The model's own switch works in training mode only, in which dropout acts.

    Raises:
        ModelError: The model has no layers that can.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers that transformers can checkpoint. Drop --gradient-checkpointing, "
            "and lower --token-budget if memory is short."
        )
    for layer in layers:
        # An attribute of the object hides the method of its class until it is deleted again.
        layer.forward = _recomputing(layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _recomputing(forward: Any) -> Any:
    def run(*values: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*values, **named)
        return checkpoint(forward, *values, use_reentrant=False, **named)

    return run
