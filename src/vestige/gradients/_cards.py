"""CUDA cards: memory of batches, measured before anything is planned, and kernels that give the same bytes again."""

import gc
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vestige.distributed import in_process_group
from vestige.errors import UserError
from vestige.gradients._objective import CausalLoss, logit_bytes_on
from vestige.progress import announce, format_bytes

SHARE = 0.8
"""Share of the memory that a batch may fill: the probe counts tensors, not the allocator's gaps or the libraries'."""
FEWEST_TOKENS, MOST_TOKENS = 128, 65_536
"""Bounds of a budget that is chosen: below, a pass is mostly overhead; above, a card has work enough."""
_PROBE_TOKENS = 16
"""Tokens of each example of the probe, where attention stores no matrix."""
_PROBE_EXAMPLES = (8, 16)
_LONGEST_EAGER = 2048
_LOGIT_COPIES = 3
"""Chunks of logits alive at once: those of the head, in float32, and their gradient."""

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_NO_KERNEL = "does not have a deterministic implementation"

Result = TypeVar("Result")
Rows = Int[np.ndarray, "example"]


class BatchMemory(NamedTuple):
    """Bytes that a model and a batch take; a batch's grow with its tokens, padding included."""

    weights: int
    fixed: int
    """What every batch takes: above all a chunk of logits."""
    per_token: float

    def peak(self, tokens: int) -> int:
        """Return the estimated peak with a batch of this size."""
        return round(self.weights + self.fixed + self.per_token * tokens)

    def tokens_within(self, memory: int) -> int:
        """Return how many tokens fit into the memory, 0 if not even a small batch does.

        A power of two, or one and a half times one: cards of one kind find the same, whatever little else they hold.
        """
        fitting = int((SHARE * memory - self.weights - self.fixed) // self.per_token)
        if fitting < FEWEST_TOKENS:
            return 0
        power = 1 << (fitting.bit_length() - 1)
        return min(power * 3 // 2 if fitting >= power * 3 // 2 else power, MOST_TOKENS)


class CardMemory(NamedTuple):
    """Bytes of the cards that hold a model."""

    free: int
    """What this process holds, or could take now."""
    total: int


def card_memory(model: nn.Module) -> CardMemory | None:
    """Return the memory of the cards that the model lies on, None where it lies on none."""
    cards = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if not cards:
        return None
    found = [torch.cuda.mem_get_info(card) for card in cards]
    held = sum(torch.cuda.memory_reserved(card) for card in cards)
    return CardMemory(sum(free for free, _ in found) + held, sum(total for _, total in found))


def measure_batch_memory(
    model: nn.Module, *, whole_logits: bool | None = None, logit_bytes: int | None = None
) -> BatchMemory:
    """Measure what a forward and backward pass holds at once, by two small batches of the model.

    Every tensor that is made counts until it is freed, and so do the inputs of all linear maps, as a gradient pass
    keeps them. It runs on the device of the model, also on `meta`, where nothing is computed; weights stay frozen.

    Args:
        model: A causal language model.
        whole_logits: Whether the logits of all positions are alive at once; not given: unless the head is split off.
        logit_bytes: Most bytes of a chunk of logits; not given: as on the model's device.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    whole = CausalLoss().head_module(model) is None if whole_logits is None else whole_logits
    first, second = (_measure_peak(model if whole else base.base_model, count) for count in _PROBE_EXAMPLES)
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    length = _probe_length(base)
    per_token = (second - first) / ((_PROBE_EXAMPLES[1] - _PROBE_EXAMPLES[0]) * length)
    fixed = max(first - per_token * _PROBE_EXAMPLES[0] * length, 0)
    if not whole:
        # Of the positions with a label: their hidden states, the gradients of these, and the same in their places.
        per_token += 3 * weight.shape[1] * weight.itemsize
        fixed += _LOGIT_COPIES * (logit_bytes or logit_bytes_on(weight.device))
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return BatchMemory(sum(held.values()), round(fixed), per_token)


def _probe_length(model: Any) -> int:
    """Return the tokens of an example of the probe: many where attention stores a matrix of tokens by tokens."""
    eager = getattr(model.config, "_attn_implementation", "") == "eager"
    longest = getattr(model.config, "max_position_embeddings", None) or _LONGEST_EAGER
    return min(longest, _LONGEST_EAGER) if eager else _PROBE_TOKENS


def _measure_peak(model: Any, examples: int) -> int:
    embeddings, kept = model.get_input_embeddings(), list[Tensor]()
    # Token 0 may be padding, which has no embedding of its own in some models.
    ids = torch.ones(examples, _probe_length(model), dtype=torch.int64, device=embeddings.weight.device)

    def begin(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    maps = [module for module in model.modules() if getattr(getattr(module, "weight", None), "ndim", 0) > 1]
    handles = [each.register_forward_pre_hook(lambda _, inputs: kept.extend(inputs[:1])) for each in maps]
    handles.append(embeddings.register_forward_hook(begin))
    try:
        with torch.enable_grad(), _Meter() as meter:
            made = model(input_ids=ids, use_cache=False)
            logits = getattr(made, "logits", None)
            loss = made.last_hidden_state.sum() if logits is None else logits.float().logsumexp(-1).sum()
            start = next(tensor for tensor in kept if tensor.requires_grad and tensor.is_leaf)
            torch.autograd.grad(loss, start)
    finally:
        for handle in handles:
            handle.remove()
    return meter.peak


class _Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is entered, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        # What was there before is not counted, nor a view of it.
        self._known.update(one.untyped_storage()._cdata for one in before)
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and (storage := one.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return made

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@final
class FittingBatches:
    """Computes batches in parts where they do not fit into the memory of the card.

    What is computed must belong to each example alone. Its padding may be shorter in a smaller batch, so results are
    equal to rounding, not always bit by bit.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray) -> None:
        """Take the tokens of each example of the data."""
        self._lengths = lengths
        self._most: int | None = None

    def run(self, rows: Rows, compute: Callable[[Rows], Result]) -> list[Result]:
        """Return what `compute` returns for the rows at once or, where they do not fit, for halves, down to one row.

        Raises:
            UserError: One example alone is too large, or a process group holds the model.
        """
        waiting, found = [rows], list[Result]()
        while waiting:
            part = waiting.pop()
            if (tokens := self._tokens(part)) > (self._most or tokens) and len(part) > 1:
                waiting += _halves(part)
                continue
            try:
                found.append(compute(part))
                continue
            except torch.OutOfMemoryError as error:
                cause = str(error)
            # Outside of the handler: the traceback holds the tensors of the batch.
            if len(part) == 1 or in_process_group():
                raise _refuse(len(part), tokens, cause)
            gc.collect()
            torch.cuda.empty_cache()
            self._most = tokens // 2
            announce(
                f"Out of memory with a batch of {len(part):,} examples, {tokens:,} tokens: from here on at most "
                f"{self._most:,} tokens are computed at once. To begin with that, type --token-budget {self._most}."
            )
            waiting += _halves(part)
        return found

    def _tokens(self, rows: Rows) -> int:
        return len(rows) * max(int(np.asarray(self._lengths)[rows].max()), 1) if len(rows) else 0


def _halves(rows: Rows) -> tuple[Int[np.ndarray, "_second"], Int[np.ndarray, "_first"]]:
    """Return the second half, then the first, which is taken from the end."""
    middle = (len(rows) + 1) // 2
    return rows[middle:], rows[:middle]


def _refuse(examples: int, tokens: int, cause: str) -> UserError:
    memory = f" ({format_bytes(torch.cuda.mem_get_info()[1])} of memory)" if torch.cuda.is_available() else ""
    what = f"{examples:,} examples of {tokens:,} tokens" if examples > 1 else f"one example of {tokens:,} tokens"
    advice = (
        f"Type --token-budget {max(tokens // 2, 1)}, or start more processes."
        if examples > 1
        else "Type --max-length with fewer tokens, --precision bfloat16, a smaller --compress, fewer --components, or "
        "--device balanced, which spreads the model over all GPUs."
    )
    return UserError(f"The GPU{memory} is too small for {what}. {advice} PyTorch reports: {cause.splitlines()[0]}")


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Put torch in its deterministic mode while the block runs, on a CUDA card; elsewhere change nothing.

    A CPU, one thread or several, adds up in the same order each time. On a card attention's backward pass and sums into
    computed positions do not otherwise, and products of matrices need a workspace of a fixed size as well. What the
    mode costs was not measured.
    """
    if device.type != "cuda":
        yield
        return
    mode, memory = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    workspace = os.environ.get(_WORKSPACE)
    os.environ[_WORKSPACE] = workspace or ":4096:8"
    torch.set_deterministic_debug_mode("error")
    # Else the mode fills every buffer before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = memory  # type: ignore[attr-defined]
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)


def lacks_kernel(error: RuntimeError) -> bool:
    """Return whether torch refused an operation that has no deterministic kernel."""
    return _NO_KERNEL in str(error)


def describe_device(device: torch.device) -> str:
    """Return what a result's last bits depend on: `cpu`, or the name of the card, with TF32 where it is allowed."""
    if device.type != "cuda":
        return device.type
    rounded = torch.get_float32_matmul_precision() != "highest"
    return torch.cuda.get_device_name(device) + (" with TF32" if rounded else "")
