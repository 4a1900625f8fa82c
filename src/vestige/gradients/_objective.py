"""The loss of each example, normalised inside that example, with logits only where a label needs them.

No loss may depend on the rest of the batch, or no gradient is an example's own: `require_independence` measures it.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vestige.data import NO_TARGET, Batch, Sharing, TokenizedData, make_batch, send
from vestige.errors import ModelError
from vestige.gradients._head import HeadLoss, HeadTap, Targets, sum_by_example
from vestige.models import LoadedModel, acts_in_forward, batch_sharing

Reduction = Literal["sum", "mean"]

LOGIT_BYTES, CARD_LOGIT_BYTES = 64 * 2**20, 2**30
"""Most bytes of float32 logits alive at once, and most on a card; the loss is computed in chunks of this size."""
_TILE = 128
"""Positions that a card multiplies at once: a chunk that is no multiple leaves a part of it idle."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Nats per target token, and share of the loss, that rounding explains: kernels sum in another order in a batch."""


def logit_bytes_on(device: torch.device) -> int:
    """Return the most bytes of a chunk of logits on a device: on a card a 64th of its memory, at most 1 GiB.

    Of all its memory, not of what is free: the same work on the same card is cut alike.
    """
    if device.type != "cuda":
        return LOGIT_BYTES
    return min(max(torch.cuda.get_device_properties(device).total_memory // 64, LOGIT_BYTES), CARD_LOGIT_BYTES)


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


def _find_targets(batch: Batch, reduction: Reduction, device: torch.device) -> Targets:
    labels = (batch.labels if batch.host_labels is None else batch.host_labels).cpu()
    shifted = labels[:, 1:]
    mask = shifted != NO_TARGET
    example, token = mask.nonzero().unbind(1)
    counts = mask.sum(1)
    weights = torch.ones(len(example), dtype=torch.float64)
    if reduction == "mean":
        weights = weights / counts.clamp(min=1)[example]
    if batch.weights is not None:
        weights = weights * batch.weights.cpu()[:, 1:][mask]
    place = example * labels.shape[1] + token
    parts = (place, shifted[mask], example, token, counts, weights.view(torch.int64))
    place, wanted, owner, token, counts, weights = send(torch.cat(parts), device).split([len(part) for part in parts])
    return Targets(example, place, wanted, owner, token, counts, weights.view(torch.float64))


class CausalLoss:
    """Next-token cross-entropy in nats, summed or averaged over the example's own target tokens.

    Weights of a batch multiply the tokens' losses; a mean is still divided by the number of target tokens.

    The output head runs only at positions that predict a target, in chunks of at most `logit_bytes`, outside autograd:
    the gradient of a softmax is known. A model whose logits are not simply `head(hidden)` (soft-capping, scaling) is
    found out by comparison on two short sequences and runs whole instead.
    """

    logit_bytes: ClassVar[int | None] = None
    """Most bytes of logits, in float32, that are alive at once; None: as on the device (`logit_bytes_on`)."""

    def __init__(self, reduction: Reduction = "sum") -> None:
        self.reduction: Reduction = reduction
        self._split_heads: dict[int, str | None] = {}

    def head_module(self, model: nn.Module) -> str | None:
        """Return the path of the output head if the model's logits are exactly `head(backbone(tokens))`, else None."""
        if id(model) not in self._split_heads:
            self._split_heads[id(model)] = _find_plain_head(model)
        return self._split_heads[id(model)]

    def _positions_at_once(self, weight: Tensor) -> int:
        step = (self.logit_bytes or logit_bytes_on(weight.device)) // (4 * weight.shape[0])
        return max(step // _TILE * _TILE, _TILE) if weight.device.type == "cuda" else max(step, 1)

    def losses(self, model: nn.Module, batch: Batch, head_tap: HeadTap | None = None) -> Float[Tensor, "example"]:
        """Return the loss of every example: padding is on the right, so a causal model needs no attention mask."""
        path = self.head_module(model)
        if path is None:
            return _whole_losses(model, batch, self.reduction)
        head = model.get_submodule(path)
        assert isinstance(head, nn.Linear)
        # Of a model on several devices, the head may be on another one than the last layer and the tokens.
        targets = _find_targets(batch, self.reduction, head.weight.device)
        hidden = _hidden_states(model, batch).to(head.weight.device)
        step = self._positions_at_once(head.weight)
        return HeadLoss.apply(hidden, head.weight, head.bias, targets, step, head_tap)  # type: ignore[no-any-return]

    def target_logits(self, model: nn.Module, batch: Batch) -> Iterator[tuple[slice, Float[Tensor, "position word"]]]:
        """Yield the logits at the positions that predict a target, examples in order: a chunk of these, and its logits.

        A model whose head cannot be split off gives all at once.
        """
        path = self.head_module(model)
        if path is None:
            states, head, step = model(input_ids=batch.input_ids, use_cache=False).logits, nn.Identity(), None
        else:
            head = model.get_submodule(path)
            states, step = _hidden_states(model, batch), self._positions_at_once(head.weight)  # type: ignore[arg-type]
            states = states.to(head.weight.device)  # type: ignore[arg-type]
        states = states.flatten(0, 1).index_select(0, _find_targets(batch, "sum", states.device).place)
        step = step or max(1, len(states))
        for start in range(0, max(1, len(states)), step):
            part = slice(start, start + step)
            yield part, head(states[part])


def token_losses(model: Callable[..., Any], batch: Batch) -> Float[Tensor, "example token"]:
    """Return every target token's cross-entropy, times its weight, at its own position; zero elsewhere.

    Plain autograd, any model.
    """
    losses = _cross_entropies(model, batch)
    return losses if batch.weights is None else losses * batch.weights.to(losses.dtype)


def _cross_entropies(model: Callable[..., Any], batch: Batch) -> Float[Tensor, "example token"]:
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
    logits, labels = logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.labels[:, 1:]
    if logits.device.type == "cpu":
        logits = logits.transpose(1, 2)
    else:  # with words on the second axis, a CUDA card has no kernel that gives the same bytes again
        logits, labels = logits.flatten(0, 1), labels.flatten()
    losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=NO_TARGET, reduction="none")
    return torch.nn.functional.pad(losses.view(len(batch.labels), -1), (1, 0))


def _whole_losses(model: nn.Module, batch: Batch, reduction: Reduction) -> Float[Tensor, "example"]:
    losses = token_losses(model, batch)[:, 1:]
    if reduction == "mean":
        counts = (batch.labels[:, 1:] != NO_TARGET).sum(1, keepdim=True).clamp(min=1)
        losses = losses * (1 / counts.double()).to(losses)
    counts = torch.full((len(losses),), losses.shape[1], device=losses.device)
    return sum_by_example(losses.flatten(), counts)


def _hidden_states(model: nn.Module, batch: Batch) -> Float[Tensor, "example token width"]:
    """Return what the head is applied to: padding is on the right, so a causal model needs no attention mask."""
    return _causal(model).base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state


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
    with torch.no_grad(), evaluating(model):
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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep the model in evaluation mode: dropout makes two passes differ, checkpointing warns of no gradient."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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


def longest_and_shortest(data: TokenizedData, sharing: Sharing, token_budget: int) -> Int[np.ndarray, "row"]:
    """Return the rows of the longest and the shortest example that can share a batch; fewer if no two can.

    Both have a target and are of different lengths, so that one of them is padded.
    """
    lengths = np.asarray(data.lengths)
    rows = np.flatnonzero((np.asarray(data.target_counts) > 0) & (2 * lengths <= token_budget))
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    groups = sharing.most(lengths[rows])
    for group in [] if sharing.equal else dict.fromkeys(groups[::-1].tolist()):
        members = rows[groups == group]
        if lengths[members[0]] < lengths[members[-1]]:
            return members[[-1, 0]]
    return rows[:0]


def require_independence(loaded: LoadedModel, data: TokenizedData, token_budget: int) -> None:
    """Raise if the longest and the shortest example that can share a batch change each other's loss in one.

    Raises:
        ModelError: They do; the message contains the option that runs every example alone.
    """
    pair = longest_and_shortest(data, batch_sharing(loaded.model), token_budget)
    if not len(pair):
        return
    objective = CausalLoss()
    together = _losses(loaded, objective, data, pair)
    alone = torch.cat([_losses(loaded, objective, data, pair[[place]]) for place in range(len(pair))])
    counts = torch.from_numpy(np.asarray(data.target_counts)[pair])
    formats = {one.dtype for one in loaded.model.parameters() if one.dtype in _TOLERANCE}
    tolerance = max((_TOLERANCE[one] for one in formats), default=_TOLERANCE[torch.bfloat16])
    apart = (together - alone).abs() / (alone.abs() + counts)
    worst = int(apart.nan_to_num(0.0).argmax())
    if apart[worst] > tolerance:
        shown = (pair[worst], pair[1 - worst])
        names = [f'"{data.examples[row].id}" ({int(data.lengths[row])} tokens)' for row in shown]
        raise ModelError(
            f"The loss of {names[0]} is {float(alone[worst]):.4f} alone and {float(together[worst]):.4f} in a batch "
            f"with {names[1]}: the forward pass of {loaded.name} depends on the batch (a mask made from token ids, "
            "experts with a capacity, statistics of the batch). Type --token-budget 1: it runs every example alone."
        )


def _losses(
    loaded: LoadedModel, objective: CausalLoss, data: TokenizedData, rows: Int[np.ndarray, "example"]
) -> Float[Tensor, "example"]:
    with torch.no_grad():
        batch = make_batch(data, rows).to(next(loaded.model.parameters()).device)
        return objective.losses(loaded.model, batch).double().cpu()
