"""Functions that read a weight: found wherever they are called, each with a rule for every example's gradient."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vestige.errors import ModelError
from vestige.gradients._factors import OneHot
from vestige.gradients._rule_special import Geometry, watch_convolution
from vestige.gradients._rules import (
    Handle,
    MatrixUse,
    Owner,
    Receive,
    Weight,
    add_gradients,
    keep,
    owner_of,
    per_token,
    watch,
)
from vestige.models import Component

Rule = Callable[["FunctionUses", Any, tuple, dict], Any]
"""Calls the function and watches its output; `NotImplemented` where the rule does not fit the arguments."""


class UncoveredUse(Exception):
    """A use for which a rule cannot distinguish the examples; carries the numbers of the components."""


def _linear(uses: "FunctionUses", func: Any, args: tuple, kwargs: dict) -> Any:
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    states, weight, bias = named["input"], named["weight"], named.get("bias")
    if uses.is_shared(states):
        return NotImplemented
    output = func(states, uses.read(weight), uses.read(bias))
    _watch_product(uses, uses.weight(weight), uses.weight(bias), states, output)
    return output


def _matmul(uses: "FunctionUses", func: Any, args: tuple, kwargs: dict) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    left, right = args
    weight, other = (uses.weight(right), left) if uses.weight(right) is not None else (uses.weight(left), right)
    if weight is None or weight.tensor.ndim != 2 or other.ndim < 2 or uses.is_shared(other):
        return NotImplemented
    output = func(uses.read(left), uses.read(right))
    if other is left:
        _watch_product(uses, weight.transpose(), None, left, output)
    else:
        _watch_product(uses, weight, None, right, output, columns=True)
    return output


def _addmm(uses: "FunctionUses", func: Any, args: tuple, kwargs: dict) -> Any:
    if kwargs or len(args) != 3 or uses.weight(args[2]) is None or uses.is_shared(args[1]) or args[0].ndim != 1:
        return NotImplemented
    output = func(*(uses.read(value) for value in args))
    weight = uses.weight(args[2])
    _watch_product(uses, None if weight is None else weight.transpose(), uses.weight(args[0]), args[1], output)
    return output


def _watch_product(
    uses: "FunctionUses",
    weight: Weight | None,
    bias: Weight | None,
    states: Tensor,
    output: Tensor,
    columns: bool = False,
) -> None:
    """Watch `output = states @ weight.T + bias`; with `columns` the tokens of both are columns, not rows."""
    receive = uses.receive()
    use = right = None
    if weight is not None:
        activation = states.detach().mT if columns else states.detach()
        activation = per_token(activation, receive.examples)
        use = MatrixUse(receive, weight, (weight.tensor.shape[0], weight.tensor.shape[1]))
        right = keep(use.keep("right", activation), activation)

    def backward(gradient: Tensor) -> None:
        gradient = per_token(gradient.mT if columns else gradient, receive.examples)
        if use is not None and right is not None:
            use.add(use.keep("left", gradient), right.get("a product"))
        if bias is not None:
            add_gradients(receive, bias, gradient.sum(1))

    watch(output, backward)


def _convolution(uses: "FunctionUses", func: Any, args: tuple, kwargs: dict) -> Any:
    transposed = "transpose" in func.__name__
    order = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    named = dict(zip(("input", "weight", "bias", "stride", "padding", *order), args, strict=False)) | kwargs
    images, weight, bias = named.pop("input"), named.pop("weight"), named.pop("bias", None)
    if uses.is_shared(images) or images.ndim != weight.ndim:
        return NotImplemented
    output = func(images, uses.read(weight), uses.read(bias), **named)
    geometry = Geometry.of_call(tuple(weight.shape[2:]), transposed, **named)
    watch_convolution(uses.receive(), uses.weight(weight), uses.weight(bias), geometry, images.detach(), output)
    return output


def _embedding(uses: "FunctionUses", func: Any, args: tuple, kwargs: dict) -> Any:
    named = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | kwargs
    ids, table = named.pop("input"), named.pop("weight")
    weight, rest = uses.weight(table), args[3:]
    if weight is None or func is not functional.embedding:
        return NotImplemented
    receive = uses.receive()
    shared, ids = ids, with_batch_axis(ids, receive.examples)
    if weight.training and ids is not shared:
        # A weight in training: adding the rows to those of every example sums their gradients over the batch before
        # the look-up is differentiated. Expanding the rows does the same, bit for bit; expanding the ids does not.
        output = func(shared, weight.read(), named.pop("padding_idx", None), *rest, **named)
        output, padding = output.expand(*ids.shape, -1), args[2] if len(args) > 2 else kwargs.get("padding_idx")
    else:
        padding = named.pop("padding_idx", None)
        output = func(ids, weight.read(), padding, *rest, **named)
    use = MatrixUse(receive, weight, (weight.tensor.shape[0], weight.tensor.shape[1]))
    rows = per_token(ids[..., None], receive.examples)[..., 0]
    left = use.keep("left", OneHot(rows, weight.tensor.shape[0]))

    def backward(gradient: Tensor) -> None:
        if padding is not None:  # the row of `padding_idx` is never trained
            gradient = gradient.masked_fill((ids == padding)[..., None], 0)
        use.add(left, use.keep("right", per_token(gradient, receive.examples)))

    watch(output, backward)
    return output


def _elementwise(uses: "FunctionUses", func: Any, args: tuple, kwargs: dict) -> Any:
    """Call a sum or product of activations and a weight that is spread over them, and watch its output."""
    if kwargs or len(args) != 2 or not all(isinstance(value, Tensor) for value in args):
        return NotImplemented
    first, second = args
    weight, other = (uses.weight(second), first) if uses.weight(second) is not None else (uses.weight(first), second)
    if weight is None or uses.is_shared(other) or other.ndim < weight.tensor.ndim:
        return NotImplemented
    product = "mul" in func.__name__
    receive, values = uses.receive(), other.detach()
    kept = keep(values.clone() if product and func.__name__ == "__imul__" else values, values)
    output = func(uses.read(first), uses.read(second))

    def backward(gradient: Tensor) -> None:
        scaled = gradient * kept.get("a product") if product else gradient
        add_gradients(receive, weight, _sum_spread(scaled, weight, receive.examples))

    watch(output, backward)
    return output


def _sum_spread(gradient: Tensor, weight: Weight, examples: int) -> Tensor:
    """Return `[example, *weight]`: the gradient of a sum or product, summed over all that the weight was spread to."""
    shape = weight.tensor.shape
    flat = per_token(gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None], examples)
    gradient = flat.reshape(examples, -1, *gradient.shape[1:])
    trailing = shape[max(0, len(shape) - gradient.ndim + 2) :]
    if any(size != 1 for size in shape[: len(shape) - len(trailing)]):  # it has an entry for each example
        raise UncoveredUse([owner.component for owners in weight.owners for owner in owners])
    gradient = gradient.flatten(1, gradient.ndim - 1 - len(trailing)).sum(1)
    for axis, size in enumerate(trailing, start=1):
        if size == 1:
            gradient = gradient.sum(axis, keepdim=True)
    return gradient


def with_batch_axis(ids: Tensor, examples: int) -> Tensor:
    """Return ids whose first axis is the batch: those shared by all examples are expanded."""
    if examples == 1 or ids.ndim == 0:
        return ids
    if ids.ndim == 1 and len(ids) != examples:
        return ids.expand(examples, -1)
    if ids.ndim == 1 and torch.equal(ids, torch.arange(examples, device=ids.device)):
        raise ModelError(
            f"An embedding is given the ids 0 to {examples - 1} without a batch axis in a batch of {examples}: "
            "they may be positions or one id per example. Give positions the shape [1, token]."
        )
    return ids.expand(examples, *ids.shape[1:]) if ids.ndim > 1 and ids.shape[0] == 1 else ids


_CONVOLUTIONS = [getattr(functional, f"conv{kind}{rank}d") for kind in ("", "_transpose") for rank in (1, 2, 3)]
PRODUCTS = frozenset((functional.linear, torch.addmm))
"""What the forward of a linear layer calls once."""

RULES: dict[Any, Rule] = (
    {functional.linear: _linear, functional.embedding: _embedding, torch.addmm: _addmm}
    | dict.fromkeys(_CONVOLUTIONS, _convolution)
    | dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul)
    | dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), _elementwise)
    | dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__), _elementwise)
)


_CASTS = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone")


class Table(NamedTuple):
    """The parameters that a mode looks for."""

    owners: Mapping[int, tuple[nn.Parameter, tuple[Owner, ...]]]
    """`id` of the parameter -> the parameter and its components."""
    constants: frozenset[int]
    """`id`s of the model's other parameters and buffers: the same for every example."""


def table_of(model: nn.Module, components: Sequence[Component]) -> Table:
    """Return the table of all parameters of the components and of the constants that the model holds."""
    owners: dict[int, tuple[nn.Parameter, tuple[Owner, ...]]] = {}
    for number, component in enumerate(components):
        parameter, use = model.get_parameter(component.parameter), component.uses[0]
        stacked = bool(getattr(model.get_submodule(use.module), "is_transposed", False)) and use.kind == "experts"
        _, before = owners.get(id(parameter), (parameter, ()))
        owners[id(parameter)] = parameter, (*before, owner_of(number, use.kind, use.role, stacked))
    return Table(owners, frozenset(map(id, (*model.parameters(), *model.buffers()))) - set(owners))


Takes = Literal["product", "module", "function"]
"""What a tap of a module takes: its one product, everything, or nothing, because the function has a rule."""


class Forward(NamedTuple):
    """A module whose forward is running, by the `id`s of its selected parameters."""

    parameters: frozenset[int]
    tap: Takes


class FunctionUses(TorchFunctionMode):
    """Watches every function that is called with a selected parameter, or with a tensor computed from parameters alone.

    A function with a rule delivers each example's gradient. Any other is called with a copy that autograd follows: what
    it makes of parameters alone is a weight like them, whose gradients are pulled back; where it meets activations,
    `find_unexplained` names them. In training (a parameter that requires its gradient) nothing is replaced.
    """

    def __init__(self, table: Table, receive: Callable[[], Receive]) -> None:
        super().__init__()
        self._table, self.receive = table, receive
        self.running: list[Forward] = []
        self._weights: dict[int, Weight] = {}
        self._constants: dict[int, Tensor | None] = dict.fromkeys(table.constants)
        self._active = False
        self.outside = False
        """Whether a rule was needed for a parameter outside the forward of its module."""

    def __enter__(self) -> "FunctionUses":
        """Start to watch functions."""
        self._active = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop watching functions."""
        super().__exit__(*error)
        self._active = False

    def around(self, module: nn.Module) -> list[Handle]:
        """Place hooks that watch the functions of a module's forward wherever it runs: in training, or again."""
        entered: list[bool] = []

        def begin(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001
            entered.append(not self._active)
            if entered[-1]:
                self.__enter__()

        def end(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
            if entered.pop():
                self.__exit__(None, None, None)

        return [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        tensors = list(_tensors(args, kwargs))
        weights = [found for tensor in tensors if (found := self.weight(tensor)) is not None]
        if not weights:
            output = func(*args, **kwargs)
            self._note_constants(func, tensors, _results(output, args, func))
            return output
        if self._belongs_to_a_tap(func, tensors) or _reads_or_writes_a_parameter(func, args):
            return func(*args, **kwargs)
        rule = RULES.get(func)
        output = rule(self, func, args, kwargs) if rule is not None else NotImplemented
        if output is NotImplemented:
            return self._derive(func, args, kwargs, tensors, weights)
        own = {number for forward in self.running for number in forward.parameters}
        self.outside |= any(id(one) not in own for weight in weights for one in weight.parameters)
        return output

    def weight(self, tensor: Any) -> Weight | None:
        """Return what is known of a tensor that is a selected parameter or was computed from parameters alone."""
        found = self._weights.get(id(tensor))
        if found is None and (owned := self._table.owners.get(id(tensor))) is not None:
            found = self._weights[id(tensor)] = Weight.of_parameter(*owned)
        return found

    def read(self, value: Any) -> Any:
        """Return the value as a rule passes it on: a weight cut from its leaves, anything else as it is."""
        weight = self.weight(value)
        return value if weight is None else weight.read()

    def is_shared(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the same for every example of the batch, because no activation entered it."""
        return tensor.ndim == 0 or id(tensor) in self._constants or self.weight(tensor) is not None

    def find_unexplained(self) -> list[int]:
        """Return the components whose parameter reached the loss by a function without a rule; forget the batch."""
        found = {
            owner.component
            for weight in self._weights.values()
            for leaf, owners in zip(weight.leaves, weight.owners, strict=True)
            if not weight.training and leaf.grad is not None
            for owner in owners
        }
        self._weights.clear()
        self._constants = dict.fromkeys(self._table.constants)
        return sorted(found)

    def _belongs_to_a_tap(self, func: Any, tensors: list[Tensor]) -> bool:
        """Return whether the tap of a running module takes this call; the tap of a single product has had it then."""
        for place, forward in reversed(list(enumerate(self.running))):
            if forward.tap == "function" or not any(id(tensor) in forward.parameters for tensor in tensors):
                continue
            if forward.tap == "module":
                return True
            if func in PRODUCTS:
                self.running[place] = forward._replace(tap="function")
                return True
        return False

    def _derive(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], weights: list[Weight]) -> Any:
        output = func(*self._with_leaves(args), **self._with_leaves(kwargs))
        if all(self.is_shared(tensor) for tensor in tensors):
            copied = weights[0] if getattr(func, "__name__", "") in _CASTS and tensors[0] is args[0] else None
            for result in _results(output, args, func):
                self._constants[id(result)] = result
                if result.requires_grad:
                    self._weights[id(result)] = Weight.of_result(result, weights, copied)
        return output

    def _with_leaves(self, values: Any) -> Any:
        """Return the arguments with parameters replaced by their leaves."""
        if isinstance(values, dict):
            return {name: self._with_leaves(value) for name, value in values.items()}
        if isinstance(values, list) or type(values) is tuple:
            return type(values)(self._with_leaves(value) for value in values)
        weight = self.weight(values)
        return values if weight is None else weight.tensor

    def _note_constants(self, func: Any, tensors: list[Tensor], results: Iterable[Tensor]) -> None:
        """Remember what no activation entered: made of constants, or out of nothing."""
        if all(tensor.ndim == 0 or id(tensor) in self._constants for tensor in tensors):
            self._constants.update((id(result), result) for result in results)
        elif _in_place(func):
            self._constants.pop(id(tensors[0]), None)


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _results(output: Any, args: Any, func: Any) -> Iterable[Tensor]:
    """Return the tensors that a function returns, or writes into."""
    found = output if isinstance(output, list | tuple) else (output,)
    written = args[:1] if _in_place(func) else ()
    return [one for one in (*found, *written) if isinstance(one, Tensor)]


def _in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _reads_or_writes_a_parameter(func: Any, args: Any) -> bool:
    """Return whether a function reads a parameter's property (its shape, its flag), or changes the parameter itself."""
    if not (args and isinstance(args[0], nn.Parameter)):
        return False
    return _in_place(func) or (func.__name__ == "__get__" and not isinstance(func(args[0]), Tensor))
