"""The loss of each example, normalised inside that example, with logits only where a label needs them."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vestige.data import NO_TARGET, Batch
from vestige.models import acts_in_forward

Reduction = Literal["sum", "mean"]

"""Most bytes of float32 logits alive at once; the loss is computed in chunks of positions of this size."""


HeadTap = Callable[[Tensor, Tensor, slice, Tensor], None]
"""Receives the factors of the output head, chunk by chunk, while the loss is computed: left `[example, row, out]`,
right `[example, row, in]`, the batch's examples that they belong to, and the tokens of the rows `[example, row]`, -1
for a row that only fills the tensor."""


@runtime_checkable
class Objective(Protocol):
    """The differentiated function: one loss per example, independent of the other examples of the batch."""

    def head_module(self, model: nn.Module) -> str | None:  # noqa: ARG002
        """Return the path of an output head whose gradient comes through `head_tap` instead of a hook, if any."""
        return None

    def losses(self, model: nn.Module, batch: Any, head_tap: HeadTap | None = None) -> Float[Tensor, "example"]:
        """Return the differentiable loss of every example of the batch."""
        ...


def example_count(batch: Any) -> int:
    """Return the number of examples in a batch: of its `rows`, else of its first tensor (tuple, dict or tensor)."""
    if hasattr(batch, "rows"):
        return len(batch.rows)
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return len(batch)


class FunctionObjective(Objective):
    """Any function `(model, batch) -> losses [example]`, for models that are not causal language models.

    The losses must be differentiable in the parameters, one per example, and no example's loss may depend on the others
    (no mean over the batch, no batch statistics); logits are as good as losses. A batch is anything with `rows`, or a
    tensor, tuple or dict of tensors whose first axis is the example. Inputs of uneven length need their attention mask
    in it, or padding would change the scores.
    """

    def __init__(self, function: Callable[[nn.Module, Any], Tensor]) -> None:
        self._function = function

    def losses(self, model: nn.Module, batch: Any, head_tap: HeadTap | None = None) -> Float[Tensor, "example"]:  # noqa: ARG002
        """Return the function's value."""
        return self._function(model, batch)


class _Targets(NamedTuple):
    """Positions that carry a label, flattened over the batch, examples in order."""

    mask: Tensor
    """bool [example, token - 1]: hidden states that predict a target."""
    labels: Int[Tensor, "position"]
    example: Int[Tensor, "position"]
    token: Int[Tensor, "position"]
    weights: Float[Tensor, "position"]
    """1, or one over the example's number of targets; times what the batch gives the token."""


def _targets(batch: Batch, reduction: Reduction) -> _Targets:
    labels = batch.labels
    shifted = labels[:, 1:]
    mask = shifted != NO_TARGET
    example, token = mask.nonzero().unbind(1)
    weights = torch.ones(len(example), dtype=torch.float64, device=labels.device)
    if reduction == "mean":
        weights = weights / mask.sum(1).clamp(min=1)[example]
    if batch.weights is not None:
        weights = weights * batch.weights[:, 1:][mask]
    return _Targets(mask, shifted[mask], example, token, weights)


class CausalLoss:
    """Next-token cross-entropy in nats, summed or averaged over the example's own target tokens.

    Weights of a batch multiply the tokens' losses; a mean is still divided by the number of target tokens.

    The output head runs only at positions that predict a target, in chunks of at most `logit_bytes`, outside autograd:
    the gradient of a softmax is known. A model whose logits are not simply `head(hidden)` (soft-capping, scaling) is
    found out by comparison on two short sequences and runs whole instead.
    """

    logit_bytes: ClassVar[int] = 64 * 2**20
    """Most bytes of logits, in float32, that are alive at once."""

    def __init__(self, reduction: Reduction = "sum") -> None:
        self.reduction: Reduction = reduction
        self._split_heads: dict[int, str | None] = {}

    def head_module(self, model: nn.Module) -> str | None:
        """Return the path of the output head if the model's logits are exactly `head(backbone(tokens))`, else None."""
        if id(model) not in self._split_heads:
            self._split_heads[id(model)] = _find_plain_head(model)
        return self._split_heads[id(model)]

    def losses(self, model: nn.Module, batch: Batch, head_tap: HeadTap | None = None) -> Float[Tensor, "example"]:
        """Return the loss of every example: padding is on the right, so a causal model needs no attention mask."""
        targets = _targets(batch, self.reduction)
        path = self.head_module(model)
        if path is None:
            return _whole_losses(model, batch, targets)
        hidden = _causal(model).base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        head = model.get_submodule(path)
        assert isinstance(head, nn.Linear)
        # Of a model on several devices, the head may be on another one than the last layer and the tokens.
        device = head.weight.device
        hidden, targets = hidden.to(device), _Targets(*(tensor.to(device) for tensor in targets))
        step = max(1, self.logit_bytes // (4 * head.weight.shape[0]))
        return _HeadLoss.apply(hidden, head.weight, head.bias, targets, step, head_tap)  # type: ignore[no-any-return]


def token_losses(model: Callable[..., Any], batch: Batch) -> Float[Tensor, "example token"]:
    """Return every target token's cross-entropy, times its weight, at its own position; zero elsewhere.

    Plain autograd, any model.
    """
    losses = _cross_entropies(model, batch)
    return losses if batch.weights is None else losses * batch.weights.to(losses.dtype)


def _cross_entropies(model: Callable[..., Any], batch: Batch) -> Float[Tensor, "example token"]:
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2) if logits.dtype.itemsize < 4 else logits.transpose(1, 2),
        batch.labels[:, 1:],
        ignore_index=NO_TARGET,
        reduction="none",
    )
    return torch.nn.functional.pad(losses, (1, 0))


def _whole_losses(model: nn.Module, batch: Batch, targets: _Targets) -> Float[Tensor, "example"]:
    losses = _cross_entropies(model, batch)[:, 1:][targets.mask]
    losses = losses * targets.weights.to(losses.dtype)
    return losses.new_zeros(len(batch.labels)).index_add(0, targets.example, losses)


def _causal(model: nn.Module) -> Any:
    """Return the transformers causal model inside a PEFT wrapper, or the model itself."""
    return getattr(model, "get_base_model", lambda: model)()


def _find_plain_head(model: nn.Module) -> str | None:
    """Return the path of the head if splitting the model there reproduces its logits on random tokens, else None.

    Random tokens activate no adapter that acts from its invocation on: such a model runs whole.
    """
    if acts_in_forward(model):
        return None
    causal = _causal(model)
    embeddings = getattr(causal, "get_output_embeddings", lambda: None)()
    # Weights that are spread over processes are gathered by the forward of the module that they were spread with.
    if _is_sharded(model) or _is_sharded(causal) or hasattr(getattr(embeddings, "weight", None), "full_tensor"):
        return None
    if not isinstance(embeddings, nn.Linear) or getattr(causal, "base_model", causal) is causal or _caps_logits(causal):
        return None
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    tokens = torch.randint(vocabulary, (2, 5), generator=generator).to(embeddings.weight.device)
    with torch.no_grad(), _evaluating(model):
        whole = model(input_ids=tokens, use_cache=False).logits.float()
        hidden = _causal(model).base_model(input_ids=tokens, use_cache=False).last_hidden_state
        if hidden.shape[-1] != embeddings.in_features:
            return None
        hidden = hidden.to(embeddings.weight.device)
        split = torch.nn.functional.linear(hidden, embeddings.weight, embeddings.bias).float().to(whole.device)
    # A model of NaN is left to the loss to report: it names the examples.
    tolerance = 1e-3 * float(whole.abs().nan_to_num(0.0).max())
    if whole.shape != split.shape or not torch.allclose(whole, split, 1e-3, tolerance, equal_nan=True):
        return None
    return next(path for path, module in model.named_modules() if module is embeddings)


def _caps_logits(model: nn.Module) -> bool:
    """Return whether the configuration names a soft cap of the logits (Gemma 2, xLSTM): small ones hardly show it."""
    config: Any = getattr(model, "config", None)
    parts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    settings = [item for part in parts if part is not None for item in vars(part).items()]
    caps = {name for name, value in settings if re.search(r"logits?_soft_?cap", name) and value}
    return any(not name.startswith("attn") for name in caps)


def _is_sharded(model: nn.Module) -> bool:
    """Return whether `fully_shard` was applied; the import takes a second, which a sharded model has already spent."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Keep the model in evaluation mode: dropout makes two passes differ, checkpointing warns of no gradient."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _HeadLoss(torch.autograd.Function):
    """Losses `[example]` from hidden states; the hidden states' gradient is computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: _Targets,
        step: int,
        head_tap: HeadTap | None,
    ):
        """Compute logits, loss, softmax gradient, and that times the head's weight, `step` positions at a time."""
        states = hidden[:, :-1][targets.mask]
        gradients = torch.empty_like(states)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device)
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            logits = torch.nn.functional.linear(states[part], weight, bias).to(wide)
            rows = torch.arange(len(logits), device=logits.device)
            labels, scale = targets.labels[part], targets.weights[part].to(wide)
            highest = logits.amax(1, keepdim=True)
            picked = logits[rows, labels]
            slope = logits.sub_(highest).exp_()
            total = slope.sum(1)
            losses.index_add_(0, targets.example[part], (total.log() + highest[:, 0] - picked) * scale)
            share = (scale / total)[:, None]
            if weight.dtype == wide and head_tap is None:
                # Dividing the product touches fewer numbers, and without the label's own large term the sum over the
                # vocabulary loses no digits to it, however it is ordered.
                gradients[part] = (slope @ weight).mul_(share) - weight[labels] * scale[:, None]
                continue
            slope = slope.mul_(share)
            slope[rows, labels] -= scale
            slope = slope.to(weight.dtype)
            gradients[part] = slope @ weight
            if head_tap is not None:
                _tap_head(head_tap, slope, states[part], targets.example[part], targets.token[part])
        ctx.mask, ctx.example, ctx.shape = targets.mask, targets.example, hidden.shape
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Scatter the stored gradients to their positions."""
        (gradients,) = ctx.saved_tensors
        full = gradients.new_zeros(ctx.shape)
        full[:, :-1][ctx.mask] = gradients * outer[0].to(gradients.dtype)[ctx.example, None]
        return full, None, None, None, None, None


def _tap_head(head_tap: HeadTap, slope: Tensor, states: Tensor, example: Tensor, token: Tensor) -> None:
    """Pass a flat chunk on as `[example, token, ...]`, padded with zeros to its longest example."""
    first, last = int(example[0]), int(example[-1])
    counts = torch.bincount(example - first, minlength=last - first + 1)
    place = torch.arange(len(example), device=example.device) - (counts.cumsum(0) - counts)[example - first]
    shape = (last - first + 1, int(counts.max()))
    left, right = slope.new_zeros(*shape, slope.shape[1]), states.new_zeros(*shape, states.shape[1])
    left[example - first, place] = slope
    right[example - first, place] = states
    positions = token.new_full(shape, -1)
    positions[example - first, place] = token
    head_tap(left, right, slice(first, last + 1), positions)


class LabelledBatch(NamedTuple):
    """Padded inputs with their mask, and labels: an encoder attends to the right, so padding has to be masked out."""

    rows: Int[Tensor, "example"]
    """Positions of the examples in their data set."""
    input_ids: Int[Tensor, "example token"]
    attention_mask: Int[Tensor, "example token"] | Bool[Tensor, "example token"]
    """One where there is a token, zero where there is padding."""
    labels: Int[Tensor, "example label"]
    """What is to be predicted at each position of the output, `NO_TARGET` where nothing is.

    Masked language model: the original token at masked positions of the input. Encoder-decoder: the answer, padded
    with `NO_TARGET`; the model shifts it itself to make the decoder's input.
    """


class MaskedLoss(FunctionObjective):
    """Cross-entropy in nats of the masked tokens of a `LabelledBatch`, summed or averaged over the example's own."""

    def __init__(self, reduction: Reduction = "sum") -> None:
        super().__init__(partial(self._compute, reduction))

    @staticmethod
    def _compute(reduction: Reduction, model: nn.Module, batch: LabelledBatch) -> Float[Tensor, "example"]:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return _label_losses(logits, batch.labels, reduction)


class Seq2SeqLoss(FunctionObjective):
    """Cross-entropy in nats of the decoder's tokens of a `LabelledBatch`, summed or averaged over the example's own.

    The decoder attends to the left only and its labels are padded on the right, so it needs no mask of its own.
    """

    def __init__(self, reduction: Reduction = "sum") -> None:
        super().__init__(partial(self._compute, reduction))

    @staticmethod
    def _compute(reduction: Reduction, model: nn.Module, batch: LabelledBatch) -> Float[Tensor, "example"]:
        unwrap: Any = getattr(model, "get_base_model", lambda: model)
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=unwrap().prepare_decoder_input_ids_from_labels(batch.labels),
            use_cache=False,
        ).logits
        return _label_losses(logits, batch.labels, reduction)


def _label_losses(
    logits: Float[Tensor, "example label word"], labels: Int[Tensor, "example label"], reduction: Reduction
) -> Float[Tensor, "example"]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
    losses = nn.functional.cross_entropy(wide, labels, ignore_index=NO_TARGET, reduction="none").sum(1)
    if reduction == "mean":
        losses = losses / (labels != NO_TARGET).sum(1).clamp(min=1)
    return losses
