"""Weights that a function reads outside a plain forward of their module: found, and given the rule of that function."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vestige.gradients._function_rules import PRODUCTS, RULES
from vestige.gradients._rules import Handle, Owner, Receive, Weight, owner_of
from vestige.models import Component, layer_kind

_CASTS = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone")


class Table(NamedTuple):
    """The parameters that a mode looks for."""

    owners: Mapping[int, tuple[nn.Parameter, tuple[Owner, ...]]]
    """`id` of the parameter -> the parameter and its components."""
    constants: frozenset[int] = frozenset()
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
    """A module whose forward is running."""

    parameters: frozenset[int]
    """`id`s of its selected parameters."""
    tap: Takes


class FunctionUses(TorchFunctionMode):
    """Watches every function that is called with a selected parameter, or with a tensor computed from parameters alone.

    A function with a rule (`linear`, `matmul`, convolutions, `embedding`, sums and products) delivers each example's
    gradient. Any other is called with a copy that autograd follows: what it makes of parameters alone is a weight
    like them, whose gradients are pulled back; where the copy meets activations, `unexplained` names the components.

    In training (a parameter that requires its gradient) nothing is replaced, so that autograd is not disturbed.
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

    def shared(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the same for every example of the batch, because no activation entered it."""
        return tensor.ndim == 0 or id(tensor) in self._constants or self.weight(tensor) is not None

    def unexplained(self) -> list[int]:
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
        if all(self.shared(tensor) for tensor in tensors):
            copied = weights[0] if getattr(func, "__name__", "") in _CASTS and tensors[0] is args[0] else None
            for result in _results(output, args, func):
                self._constants[id(result)] = result
                if result.requires_grad:
                    self._weights[id(result)] = Weight.computed(result, weights, copied)
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


class FunctionTap:
    """A module whose product or look-up is intercepted where its own forward calls it: embeddings, routers, subclasses.

    Subclasses of Linear return something else (routers), of Embedding shift ids (OPT) or scale the rows (Gemma), of
    convolutions cut or pad: whatever they do around it, the function that reads the weight has a rule.
    """

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        kind = layer_kind(module) or "linear"
        self._owners = {role: (owner_of(number, kind, role),) for role, number in components.items()}
        self._module, self._receive = module, receive
        self._modes: list[FunctionUses] = []

    def attach(self) -> list[Handle]:
        """Place the two hooks between which the calls are intercepted."""
        return [
            self._module.register_forward_pre_hook(self._enter),
            self._module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002
        if not torch.is_grad_enabled():  # the first of two passes of a checkpointed block
            return
        own = {role: value for role, value in module._parameters.items() if value is not None and role in self._owners}
        table = {id(value): (value, self._owners[role]) for role, value in own.items()}
        rest = frozenset(map(id, (*module.buffers(), *module.parameters()))) - set(table)
        mode = FunctionUses(Table(table, rest), self._receive)
        mode.__enter__()
        self._modes.append(mode)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002
        if self._modes:
            self._modes.pop().__exit__(None, None, None)


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
