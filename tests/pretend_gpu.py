"""A pretended CUDA card on a CPU: tensors that lie in host memory and report `cuda:0`.

Inside `PretendedCard` torch finds one card. What is put there behaves as on a card in three ways that can be checked
without one: an operation over tensors of both devices raises, so does reading a card's tensor without a copy, and what
costs time or bytes is counted, by the line of Vestige that caused it:

- `wait`: the CPU waits for the card, because it needs a number from there;
- `copy`: from the CPU to the card;
- `atomic`: numbers are added in an order that varies;
- `launch`: the start of a kernel.

It has no kernels, no time and no memory of its own, and its backward passes run in the thread that starts them. What
runs inside `torch.func.jvp` (`attribute --tokens`) cannot be pretended: torch takes operations apart there and looks at
the devices itself, below what a tensor can report.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

import vestige

CARD = torch.device("cuda", 0)
HOST = torch.device("cpu")
SOURCE = Path(vestige.__file__).parent

WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero", "repeat_interleave"),
    *("_unique2", "unique_dim", "unique_consecutive"),
    *("_linalg_eigh", "linalg_cholesky_ex", "_linalg_svd", "linalg_inv_ex", "_linalg_solve_ex", "linalg_lu_factor_ex"),
}
"""Operations whose result, or its shape, the CPU reads."""
ATOMICS = {
    *("index_add_", "index_add", "scatter_add_", "scatter_add", "scatter_reduce_", "embedding_dense_backward"),
    *("_scaled_dot_product_flash_attention_for_cpu_backward", "_embedding_bag_dense_backward"),
}
"""Operations that vary for floating-point numbers unless torch is in its deterministic mode."""
NO_KERNEL = {"cumsum", "put_", "histc", "nll_loss2d_forward", "kthvalue", "ctc_loss"}
"""Those that vary in any mode; the deterministic one refuses them."""
FREE = {
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "view_as_real", "view_as_complex", "alias", "detach"),
    *("slice", "select", "split", "split_with_sizes", "unbind", "diagonal", "unfold", "chunk", "narrow"),
    *("t", "transpose", "permute", "movedim", "expand", "unsqueeze", "squeeze", "real", "_conj", "lift_fresh"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_", "set_", "is_same_size"),
}
"""Operations that start no kernel."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class MixedDevices(RuntimeError):
    """What CUDA reports as `Expected all tensors to be on the same device`."""


class CardTensor(Tensor):
    """A tensor of the pretended card; `host` is the memory that it shares."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "CardTensor":
        made = Tensor._make_subclass(cls, host.detach())
        made.host = host.detach()
        return made

    device = property(lambda _: CARD)  # type: ignore[assignment]
    is_cuda = property(lambda _: True)  # type: ignore[assignment]
    is_cpu = property(lambda _: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"card({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = CardTensor(self.host.clone())
        made = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        return memo.setdefault(id(self), made.requires_grad_(self.requires_grad))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be written to a file as a tensor of the CPU."""
        return self.host.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = super().__torch_function__
        return _call(func, args, kwargs or {}, lambda args, kwargs: run(func, types, args, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {}, lambda args, kwargs: func(*args, **kwargs))


def on_card(value: Any) -> bool:
    """Return whether a value is a tensor of the pretended card."""
    return isinstance(value, CardTensor)


class PretendedCard:
    """Counts by kind, and by place in Vestige and operation, of what is done between `__enter__` and `__exit__`."""

    current: "PretendedCard | None" = None

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.reset()
        self._stack = ExitStack()

    def reset(self) -> None:
        """Count from zero."""
        self.counts = {kind: Counter() for kind in ("wait", "copy", "atomic", "launch")}

    def total(self, kind: str, inside: str = "") -> int:
        """Return a count, all or of the files whose path begins with `inside`."""
        return sum(count for place, count in self.counts[kind].items() if place.startswith(inside))

    def table(self, kind: str) -> str:
        """Return where a count comes from, as a message of a failing test."""
        return "\n".join(f"{count:6d}  {place}" for place, count in self.counts[kind].most_common())

    def note(self, kind: str, what: str) -> None:
        """Count one."""
        frame = sys._getframe(1)
        while frame and not (path := Path(frame.f_code.co_filename)).is_relative_to(SOURCE):
            frame = frame.f_back  # type: ignore[assignment]
        where = f"{path.relative_to(SOURCE)}:{frame.f_lineno}" if frame else "outside"
        self.counts[kind][f"{where} {what}"] += 1

    def place(self, module: nn.Module) -> nn.Module:
        """Put a module there, as `module.to("cuda")` does; tied weights stay tied."""
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                made = CardTensor(tensor.detach().clone())
                moved[id(tensor)] = (
                    nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
                )
            return moved[id(tensor)]

        for part in module.modules():
            for held in (part._parameters, part._buffers, vars(part)):
                held |= {
                    key: move(value) for key, value in held.items() if isinstance(value, Tensor) and not on_card(value)
                }
        return module

    def __enter__(self) -> "PretendedCard":
        PretendedCard.current = self
        self._stack.enter_context(_one_card(self.place))
        self._stack.enter_context(_Mode())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        PretendedCard.current = None


class _Event:
    """A mark in the queue of the card."""

    def __init__(self, **_: Any) -> None:
        self.record = lambda *_: None
        self.elapsed_time = lambda _: 1.0

    def synchronize(self) -> None:
        _note(PretendedCard.current, "wait", "event")


@contextmanager
def _one_card(place: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    """Make torch find a card, and its modules and backward passes use it."""
    move, engines = nn.Module.to, (torch.autograd, torch.autograd.graph)
    pretrained = PreTrainedModel.from_pretrained.__func__
    facts = {
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "current_device"), 0),
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device", "_lazy_init", "init")),
        **dict.fromkeys(("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all")),
        "device_count": 1,
        "mem_get_info": (2**36, 2**36),
        "get_device_name": "Pretended Card",
        "get_device_capability": (9, 0),
        "get_device_properties": type("Properties", (), {"total_memory": 2**36, "name": "Pretended Card"})(),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8)],
    }

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device = _device_of((None, *args), kwargs)
        return place(module) if device is not None and device.type == "cuda" else move(module, *args, **kwargs)

    def read(kind: Any, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
        # The threads that read tensors onto a card know nothing of this one.
        made = pretrained(kind, *args, **kwargs)
        if device_map is not None:
            place(made[0] if isinstance(made, tuple) else made)
        return made

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        # torch leaves modes while it handles a function; the hooks of a backward pass belong inside this one.
        def engine(*args: Any, **kwargs: Any) -> Any:
            with _Mode():
                return run(*args, **kwargs)

        return engine

    with ExitStack() as stack:
        for name, value in facts.items():
            for owner in (torch.cuda, torch.cuda.random):
                if hasattr(owner, name):
                    stack.enter_context(patch.object(owner, name, lambda *_, value=value, **__: value))
        stack.enter_context(patch.object(torch.cuda, "Event", _Event))
        stack.enter_context(patch.object(nn.Module, "to", to))
        stack.enter_context(patch.object(PreTrainedModel, "from_pretrained", classmethod(read)))
        for owner in engines:
            stack.enter_context(patch.object(owner, "_engine_run_backward", watched(owner._engine_run_backward)))
        yield


def _call(func: Any, args: Any, kwargs: Any, run: Callable[[Any, Any], Any]) -> Any:
    """Answer a function of torch: what names a device changes sides, the rest runs as it is."""
    name, card = getattr(func, "__name__", ""), PretendedCard.current
    first = args[0] if args and isinstance(args[0], Tensor) else None
    if first is not None and name in ("to", "cpu", "cuda"):
        return _move(first, name, args, kwargs)
    if first is not None and name == "pin_memory":
        return first
    composed = name == "scaled_dot_product_attention" and not torch.backends.cuda.flash_sdp_enabled()
    if composed and on_card(first) and kwargs.get("is_causal"):
        # It makes its mask in C++, which knows of no card.
        mask = torch.ones(args[0].shape[-2], args[1].shape[-2], dtype=torch.bool).tril()
        kwargs = {**kwargs, "attn_mask": CardTensor(mask), "is_causal": False}
    if on_card(first) and name in ("numpy", "__array__"):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")
    if on_card(first) and name == "tolist":
        _note(card, "wait", "tolist")
        return first.detach().host.tolist()
    device = kwargs.get("device")
    if not _names_device(device):
        return run(args, kwargs)
    made = run(args, {**kwargs, "device": HOST})
    if torch.device(device).type == "cuda":
        if name in ("tensor", "as_tensor", "asarray"):
            _note(card, "copy", name)
        return tree_map(lambda each: _enter(each) if isinstance(each, Tensor) and not on_card(each) else each, made)
    return tree_map(lambda each: _leave(each) if on_card(each) else each, made)


def _move(tensor: Tensor, name: str, args: Any, kwargs: Any) -> Tensor:
    """Answer `to`, `cpu` and `cuda`: change the number format, then the side."""
    target = {"cpu": HOST, "cuda": CARD}.get(name) or _device_of(args, kwargs)
    blocking = not kwargs.get("non_blocking")
    others = [each for each in (*args[1:], kwargs.get("other")) if isinstance(each, Tensor)]
    formats = [each for each in (*args[1:], kwargs.get("dtype")) if isinstance(each, torch.dtype)]
    if formats or others:
        tensor = torch.ops.aten.to.dtype(tensor, (formats or [others[0].dtype])[0], False, bool(kwargs.get("copy")))
    if target is None or (target.type == "cuda") == on_card(tensor):
        return tensor
    if target.type == "cuda":
        _note(PretendedCard.current, "copy", "pageable" if blocking else "pinned")
        return _enter(tensor)
    if blocking:
        _note(PretendedCard.current, "wait", "copy to the CPU")
    return _leave(tensor)


def _note(card: PretendedCard | None, kind: str, what: str) -> None:
    if card is not None:
        card.note(kind, what)


def _names_device(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).split(":")[0] in ("cpu", "cuda")


def _device_of(args: Any, kwargs: Any) -> torch.device | None:
    for value in (*args[1:], kwargs.get("device"), kwargs.get("other")):
        if _names_device(value):
            return torch.device(value)
        if isinstance(value, Tensor):
            return CARD if on_card(value) else HOST
    return None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        return CardTensor(tensor.detach().clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _leave(gradient)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        return tensor.host.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _enter(gradient)


def _enter(tensor: Tensor) -> Tensor:
    if tensor.grad_fn is not None and torch.is_grad_enabled():
        return _Enter.apply(tensor)  # type: ignore[return-value]
    return CardTensor(tensor.detach().clone()).requires_grad_(tensor.requires_grad)


def _leave(tensor: Tensor) -> Tensor:
    if tensor.grad_fn is not None and torch.is_grad_enabled():
        return _Leave.apply(tensor)  # type: ignore[return-value]
    return tensor.detach().host.clone()


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation in host memory, after its tensors were compared and it was counted."""
    name, card = func._schema.name.removeprefix("aten::"), PretendedCard.current
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    _compare(name, args, tensors)
    if card is not None:
        _count(card, name, args, tensors)
    if _names_device(kwargs.get("device")):
        kwargs = {**kwargs, "device": HOST}
    if func is torch.ops.aten.bmm.dtype or func is torch.ops.aten.mm.dtype:  # only a card has these
        func, args = func.overloadpacket.default, [each.to(args[2]) for each in map(_host, args[:2])]
    found = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if name == "copy_":
        return args[0]
    for outer in tensors:
        if on_card(outer) and found is outer.host:  # in place
            return outer
    return tree_map(lambda each: CardTensor(each) if isinstance(each, Tensor) and not on_card(each) else each, found)


def _host(value: Any) -> Any:
    return value.host if on_card(value) else value


def _compare(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Raise where CUDA refuses tensors of both devices: it takes numbers, and indices of the CPU, as they are."""
    if name == "copy_":
        return
    there = [each for each in tensors if on_card(each)]
    if name in INDEXED:
        indices = [each for each in args[1] if each is not None]
        mixed = not on_card(args[0]) and any(map(on_card, indices))
        others = [args[2]] if len(args) > 2 and isinstance(args[2], Tensor) and args[2].dim() else []
        mixed |= any(on_card(each) != on_card(args[0]) for each in others)
    else:
        here = [each for each in tensors if not on_card(each) and (each.dim() or name in ("cat", "stack", "gather"))]
        mixed = bool(there and here)
    if mixed:
        shown = ", ".join(f"{'card' if on_card(each) else 'cpu'}{tuple(each.shape)}" for each in tensors)
        raise MixedDevices(f"{name}: {shown}")


def _count(card: PretendedCard, name: str, args: Any, tensors: list[Tensor]) -> None:
    if name == "copy_" and on_card(args[0]) != on_card(args[1]):
        card.note(*(("copy", "copy_") if on_card(args[0]) else ("wait", "copy_ to the CPU")))
    if name in WAITS:
        card.note("wait", name)
    if name in INDEXED:
        indices = [each for each in args[1] if each is not None]
        if any(each.dtype == torch.bool for each in indices):
            card.note("wait", f"{name} by a mask")
        if any(not on_card(each) for each in indices):
            card.note("copy", f"{name} by an index of the CPU")
    ordered = torch.are_deterministic_algorithms_enabled()
    if name in ATOMICS | NO_KERNEL and any(each.is_floating_point() for each in tensors):
        if ordered and name in NO_KERNEL:
            raise RuntimeError(f"{name} does not have a deterministic implementation, but you set the mode for it.")
        if not ordered:
            card.note("atomic", name)
    if name not in FREE:
        card.note("launch", name)
