"""Weights that move while a block runs, and are bit for bit what they were when it is over."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from vestige.data import TokenizedData
from vestige.errors import DataError, ModelError, VestigeError
from vestige.gradients import Reduction, token_losses
from vestige.jobs import step_done
from vestige.methods._queries import read_batches
from vestige.models import LoadedModel, everything_of, model_fingerprint, own_part, write_own_part

Vector = dict[str, Tensor]
"""A tensor for each weight, by name."""
Rows = Int[np.ndarray, "row"]


def loss_weights(data: TokenizedData, reduction: Reduction) -> Float[np.ndarray, "example"]:
    """Return the weight of each example in the loss of a set: its target tokens for `sum`, else 1; 0 if it has none."""
    counts = data.target_counts
    return (counts if reduction == "sum" else counts > 0).astype(np.float64)


class Weights:
    """The weights that may move, with a copy of where they were at the start."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.model = model
        self.parameters = parameters
        self.start = self.copy()

    @property
    def count(self) -> int:
        """The number of values that may move."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def copy(self) -> Vector:
        """Return a copy of every weight as it is now."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def restore(self) -> None:
        """Restore every weight bit for bit to where it was at the start."""
        self._put(self.start)

    @contextmanager
    def at(self, values: Vector) -> Iterator[None]:
        """Give the weights these values within the block, and afterwards those of before."""
        now = self.copy()
        try:
            self._put(values)
            yield
        finally:
            self._put(now)

    def mirror(self) -> Vector:
        """Return the values on the other side of the start: 2 start - now."""
        return {name: 2 * self.start[name] - parameter.detach() for name, parameter in self.parameters.items()}

    def step(self, direction: Vector, scale: float) -> Vector:
        """Return the values `scale` times the direction away."""
        moved = {name: self.parameters[name].detach().add(step, alpha=scale) for name, step in direction.items()}
        return self.copy() | moved

    def take_gradients(self) -> Vector:
        """Return a copy of the gradients, of the weights that have one."""
        grads = {name: parameter.grad for name, parameter in self.parameters.items()}
        return {name: grad.detach().clone() for name, grad in grads.items() if grad is not None}

    def backward(self, data: TokenizedData, rows: Rows, reduction: Reduction, token_budget: int) -> float:
        """Set `grad` of every weight to the gradient of the rows' loss, whatever it held before; return that loss.

        The batch may be computed in several passes: its loss and gradient are sums over examples divided once.
        """
        for parameter in self.parameters.values():
            parameter.grad = None
        total, whole = 0.0, loss_weights(data, reduction)[rows].sum()
        for positions, batch in read_batches(self.model, data, token_budget, rows):
            part = rows[positions]
            each = token_losses(self.model, batch).sum(1)
            if reduction == "mean":
                each = each / torch.from_numpy(np.maximum(data.target_counts[part], 1)).to(each)
            loss = each.sum() / whole
            loss.backward()
            total += loss.item()
            step_done(len(part))
        return total

    def gradient(self, data: TokenizedData, rows: Rows, reduction: Reduction, token_budget: int) -> Vector:
        """Return the gradient of the rows' loss, of the weights that have one."""
        self.backward(data, rows, reduction, token_budget)
        return self.take_gradients()

    def _put(self, values: Vector) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])


@contextmanager
def borrow_weights(
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
            model = stack.enter_context(_add_lora(model, lora_rank, seed))
        if checkpointing:
            stack.enter_context(_checkpoint_layers(model))
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
def _add_lora(model: Any, rank: int, seed: int) -> Iterator[nn.Module]:
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
def _checkpoint_layers(model: nn.Module) -> Iterator[None]:
    """Let layers forget their activations; the model's own switch works in training mode only, with dropout."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers that transformers can checkpoint. Drop --gradient-checkpointing, "
            "and lower --token-budget if memory is short."
        )

    def recompute(forward: Any) -> Any:
        def run(*values: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*values, **named)
            return checkpoint(forward, *values, use_reentrant=False, **named)

        return run

    for layer in layers:
        # An attribute of the object hides the method of its class until it is deleted again.
        layer.forward = recompute(layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def randomise(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """Draw the model's weights at random while the context lasts; afterwards every bit is as it was.

    Each floating-point parameter becomes normal noise with the mean and the standard deviation that it had, so a
    constant one (a fresh norm weight) stays. The noise depends on seed and parameter name alone. Tied weights stay
    tied. Costs a copy of the weights on the CPU.

    Raises:
        ModelError: Weights are quantised.
    """
    if packed := [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]:
        raise ModelError(
            f"{len(packed)} weights ({packed[0]}, ...) are quantised, and a model is random only if all of its weights "
            "are. Drop --quantize."
        )
    with ExitStack() as stack:
        for name, parameter in model.named_parameters():
            if parameter.numel():
                stack.callback(_replace_values(parameter, _noise_like(parameter, f"{seed}:{name}")))
        yield model


def _replace_values(parameter: nn.Parameter, values: Tensor) -> Callable[[], Any]:
    """Give the parameter these values; return what gives its own back.

    On the CPU its own tensor is set aside: written over, weights that are pages of a mapped file are copied one by one.
    """
    own = parameter.data
    if own.device.type == "cpu" and not hasattr(own, "to_local"):
        parameter.data = values.to(own.dtype)
        return partial(setattr, parameter, "data", own)
    part = own_part(parameter)
    kept = part.to("cpu", copy=True)
    write_own_part(parameter, values)
    return partial(part.copy_, kept)


def _noise_like(parameter: Tensor, key: str) -> Tensor:
    values = everything_of(parameter).float()
    mean, deviation = values.mean().item(), values.std(correction=0).item()
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    # Drawn on the CPU, so that every device sees the same model.
    generator = torch.Generator().manual_seed(number)
    return torch.empty(parameter.shape).normal_(mean, max(deviation, 0.0), generator=generator)


def shuffle_batches(data: TokenizedData, rows: np.ndarray, size: int, steps: int, seed: int) -> list[np.ndarray]:
    """Return batches for `steps` steps: pass after pass over the rows, each in its own order, the last batch smaller.

    Rows of `data` without a target token are left out, for nothing can be learnt from them.

    Raises:
        DataError: No row has a target token.
    """
    counts = data.target_counts
    useful = np.sort(rows[counts[rows] > 0])
    if not len(useful):
        raise DataError(f"{data.name}: none of {len(rows)} examples has a target token, so there is nothing to learn.")
    order, batches = np.random.default_rng(seed), []
    while len(batches) < steps:
        shuffled = order.permutation(useful)
        batches += [shuffled[begin : begin + size] for begin in range(0, len(shuffled), size)]
    return batches[:steps]
