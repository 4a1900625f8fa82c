"""One forward and backward pass over a batch that hands the factors of every component to a sink."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vestige.errors import DataError, ModelError
from vestige.gradients._cards import deterministic, lacks_kernel
from vestige.gradients._cross import FormingBudget, Gradients, HeldGradients, numbers
from vestige.gradients._factors import Factor, FactorSink, Side
from vestige.gradients._functions import FunctionUses, UncoveredUse, table_of
from vestige.gradients._objective import Objective, example_count
from vestige.gradients._rules import Handle, Receive, deliver, locate, watch
from vestige.gradients._sinks import KeepingSink
from vestige.gradients._taps import attach_all, keep_examples_apart, modules_of
from vestige.models import Component
from vestige.progress import announce
from vestige.timing import time_phase


class GradientPass:
    """Per-example gradients of the selected components, as factors, streamed while the backward pass runs.

    Use it as a context: hooks are placed on entry and removed on exit. Weights are frozen on entry and their flags
    restored on exit, so autograd computes no weight gradient, and the graph starts at the lowest selected component.

        with GradientPass(model, components, CausalLoss()) as gradient_pass:
            losses = gradient_pass.run(batch, sink)

    Every gradient is that of the example's own loss: no factor depends on the rest of the batch.

    That no use of a parameter is missed is proven, not assumed: until a batch has brought every parameter a gradient
    through its module, each function that the model calls is watched, and a parameter that took part in the loss but
    got no gradient is an error.

    On a CUDA card torch is in its deterministic mode inside the context, so the same batch gives the same bytes again.
    """

    def __init__(self, model: nn.Module, components: Sequence[Component], objective: Objective) -> None:
        self._model = model
        self._components = tuple(components)
        self._objective = objective
        self._handles: list[Handle] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._sink: FactorSink | None = None
        self._examples = 0
        self._head: tuple[int, ...] = ()
        self._uses: FunctionUses | None = None
        self._settled = False
        self._idle: set[str] = set()
        self._mode = ExitStack()

    @property
    def by_function(self) -> bool:
        """Return whether the model reads a parameter outside its module's forward; known after the first batch."""
        return self._uses is not None and self._uses.outside

    def __enter__(self) -> "GradientPass":
        """Freeze the weights and place the hooks."""
        _refuse_batch_statistics(self._model)
        self._flags = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        self._place_hooks()
        devices = {parameter.device.type: parameter.device for parameter, _ in self._flags}
        self._mode.enter_context(deterministic(devices.get("cuda", torch.device("cpu"))))
        return self

    def __exit__(self, *_: object) -> None:
        self._mode.close()
        self._remove_hooks()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._flags.clear()

    def run(self, batch: Any, sink: FactorSink) -> Float[Tensor, "example"]:
        """Return the losses of the batch's examples; the sink has every factor when this returns.

        Raises:
            ModelError: no selected component takes part in the computation of the loss, or the gradient of one is
                missed because no rule covers how the model uses it.
        """
        noting = _Noting(sink)
        self._sink, self._examples = noting, example_count(batch)
        try:
            with torch.enable_grad():
                with time_phase("forward"), self._uses or nullcontext():
                    losses = self._losses(batch)
                if losses.requires_grad:
                    with time_phase("backward"):
                        losses.sum().backward()
            unexplained = self._uses.find_unexplained() if self._uses is not None else []
            self._refuse_missed([self._components[number].name for number in unexplained])
            self._prove(batch, {self._components[number].parameter for number in noting.components})
            if not losses.requires_grad and not self._head:
                raise ModelError("No selected component takes part in the loss: choose other --components.")
        except UncoveredUse as found:
            raise _missing_rule([self._components[number].name for number in found.args[0]]) from None
        except RuntimeError as error:
            if not lacks_kernel(error):
                raise
            # Some factors of the batch have arrived: it cannot run again without the mode.
            raise ModelError(f"{str(error).splitlines()[0]} Type --device cpu.") from None
        finally:
            self._sink = None
            if self._uses is not None:
                self._uses.find_unexplained()  # after an error, this batch must not be held against the next
        return losses.detach()

    def _losses(self, batch: Any) -> Float[Tensor, "example"]:
        head_tap = self._tap_head if self._head else None
        try:
            return self._objective.losses(self._model, batch, head_tap)
        except RuntimeError as error:
            if not lacks_kernel(error):
                raise
            announce(
                f"{str(error).splitlines()[0]} The model runs without it, and gradients of the same example may differ "
                "in their last bits from one run to the next. On --device cpu they do not."
            )
        self._mode.close()
        if self._uses is not None:
            self._uses.find_unexplained()
        return self._objective.losses(self._model, batch, head_tap)

    def _prove(self, batch: Any, delivered: set[str]) -> None:
        """Raise if a parameter that got no factor takes part in the loss; decide how closely the next batch is watched.

        A parameter counts as a whole: an expert that no token was routed to has no gradient, and rightly so.
        """
        missing = {component.parameter for component in self._components} - delivered
        if missing - self._idle:
            self._refuse_missed(self._find_connected(batch, sorted(missing - self._idle)))
            self._idle |= missing
        settled = not missing and not self.by_function
        if settled != self._settled:
            self._settled = settled
            self._remove_hooks()
            self._place_hooks()

    def _find_connected(self, batch: Any, names: Sequence[str]) -> list[str]:
        """Return those of the parameters that autograd finds in the batch's loss, whatever their gradient."""
        parameters = [self._model.get_parameter(name) for name in names]
        if any(hasattr(parameter, "full_tensor") for parameter in parameters):
            return list(names)
        before = [parameter.grad for parameter in parameters]
        self._sink = _Nowhere()
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                losses = self._losses(batch)
                if losses.requires_grad:
                    losses.sum().backward()
            return [name for name, one in zip(names, parameters, strict=True) if one.grad is not None]
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.requires_grad_(False)
                parameter.grad = gradient

    def _refuse_missed(self, names: Sequence[str]) -> None:
        if names:
            raise _missing_rule(names)

    def _place_hooks(self) -> None:
        modules = self._modules()
        sharded = any(hasattr(parameter, "full_tensor") for parameter in self._model.parameters())
        if self._settled or sharded:
            self._uses = None
        elif self._uses is None:
            self._uses = FunctionUses(table_of(self._model, self._components), self._receive)
        self._handles += attach_all(modules.values(), self._receive, self._uses)
        self._handles += keep_examples_apart(self._model)
        uses = self._uses
        for block in _checkpoint_blocks(self._model) if uses is not None else ():
            # The second run calls the block's forward without its hooks, but its children with theirs.
            self._handles += [handle for child in block.children() for handle in uses.around(child)]  # type: ignore[union-attr]
        if _checkpoint_blocks(self._model):
            first: Any = self._model.get_input_embeddings()  # type: ignore[operator]
            self._handles.append(first.register_forward_hook(_begin_graph))

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _modules(self) -> dict[str, Any]:
        """Return the modules that are hooked; the split-off head is kept apart."""
        head = self._objective.head_module(self._model)
        uses = {
            use.role: number for number, part in enumerate(self._components) for use in part.uses if use.module == head
        }
        self._head = tuple(uses.get(role, -1) for role in ("weight", "bias")) if uses else ()
        return modules_of(self._model, self._components, without=head)

    def _receive(self) -> Receive:
        assert self._sink is not None
        return Receive(self._sink, self._examples)

    def _tap_head(self, left: Tensor, right: Tensor, examples: slice, positions: Int[Tensor, "example row"]) -> None:
        assert self._sink is not None
        weight, bias = self._head
        if weight >= 0:
            locate(self._sink, positions)
            deliver(self._sink, weight, examples, left, right)
        if bias >= 0:
            total = left.sum(1, keepdim=True)
            deliver(self._sink, bias, examples, total, torch.ones_like(total[:, :, :1]))


class _Noting:
    """Passes factors on and remembers whose they were."""

    def __init__(self, sink: FactorSink) -> None:
        self._sink = sink
        self.components: set[int] = set()

    def reduce(self, component: int, side: Side, factor: Factor) -> Any:
        """Reduce the factor as the sink does."""
        self.components.add(component)
        return self._sink.reduce(component, side, factor)

    def accumulate(self, component: int, examples: slice, left: Any, right: Any) -> None:
        """Accumulate as the sink does, and note the component."""
        self._sink.accumulate(component, examples, left, right)

    def locate(self, positions: Int[Tensor, "example row"]) -> None:
        """Locate as the sink does, if it counts tokens."""
        locate(self._sink, positions)


class _Nowhere(FactorSink):
    """Forgets what it is given."""

    def accumulate(self, component: int, examples: slice, left: Any, right: Any) -> None:
        """Add nothing."""


def _missing_rule(names: Sequence[str]) -> ModelError:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ModelError(
        f"The model uses {', '.join(names[:5])}{more} in a way that no rule covers, so the gradient would be missed. "
        f"Leave them out: --components {' '.join(repr('!' + name) for name in names[:5])}."
    )


def _refuse_batch_statistics(model: nn.Module) -> None:
    """Raise if a BatchNorm uses the batch's own statistics: every example's loss would depend on the others."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ModelError(
                f"{path} ({type(module).__name__}) normalises with the statistics of the batch, so no example has a "
                "gradient of its own. Call model.eval() first, or build the layer with track_running_stats=True."
            )


def _checkpoint_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks whose forward runs again during the backward pass."""
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    return [block for block in blocks if block.training] if hasattr(model, "get_input_embeddings") else []


def _begin_graph(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
    """Make the input require its gradient: reentrant checkpointing differentiates a block only then."""
    watch(output, lambda gradient: None)  # noqa: ARG005


MEMORY_BYTES = 2**30
"""Most bytes of a block of the second examples: half for their factors, half for matrices formed from them."""


class _Block(NamedTuple):
    """Some batches of the second examples, held while the first stream by."""

    rows: slice
    batches: range
    held: list[HeldGradients]


def pairwise_products(
    model: nn.Module,
    components: Sequence[Component],
    objective: Objective,
    first_batches: Sequence[Any],
    second_batches: Sequence[Any] | None = None,
    *,
    by_component: bool = False,
    memory_bytes: int = MEMORY_BYTES,
) -> Float[Tensor, "*component example example2"]:
    """Return the inner products of the gradients of every first example with those of every second, or of the first.

    `[example, example2]` in the order of the batches, on the CPU; with `by_component`, `[component, example,
    example2]`, whose sum it is. Without `second_batches` the first meet themselves, and each pair of batches once.

    Factors of a block of second batches are kept (at least one batch), and the first run by once for every block; no
    gradient is formed where that is dearer (`cheapest_route`).

    Raises:
        DataError: there is no batch.
    """
    others = first_batches if second_batches is None else second_batches
    if len(first_batches) == 0 or len(others) == 0:
        raise DataError("Products of pairs need examples on both sides, and one side has no batch.")
    rows = _rows(first_batches)
    shape = (len(components) if by_component else 1, rows[-1].stop, _rows(others)[-1].stop)
    total: Tensor | None = None
    with GradientPass(model, components, objective) as gradient_pass:
        for block in _blocks(gradient_pass, components, others, len(first_batches), memory_bytes):
            start = block.batches.start if second_batches is None else 0
            for place in range(start, len(first_batches)):
                gradients = _gradients(gradient_pass, components, first_batches[place])
                pairs = zip(block.held, gradients, strict=True)
                found = torch.stack([held.products(mine).to("cpu", _wide(gradients)) for held, mine in pairs])
                found = found if by_component else found.sum(0, keepdim=True)
                total = found.new_zeros(shape) if total is None else total
                total[:, rows[place], block.rows] = found
                if second_batches is None and place >= block.batches.stop:
                    total[:, block.rows, rows[place]] = found.transpose(1, 2)
    assert total is not None
    return total if by_component else total[0]


def _rows(batches: Sequence[Any]) -> list[slice]:
    """Return the positions of each batch's examples among all."""
    rows, start = [], 0
    for batch in batches:
        rows.append(slice(start, start + example_count(batch)))
        start = rows[-1].stop
    return rows


def _gradients(gradient_pass: GradientPass, components: Sequence[Component], batch: Any) -> list[Gradients]:
    sink = KeepingSink(components)
    sink.begin(example_count(batch))
    gradient_pass.run(batch, sink)
    return sink.finish()


def _wide(gradients: Sequence[Gradients]) -> torch.dtype:
    return next((one.like().dtype for one in gradients if not one.zero), torch.float32)


def _blocks(
    gradient_pass: GradientPass,
    components: Sequence[Component],
    batches: Sequence[Any],
    uses: int,
    memory_bytes: int,
) -> Iterator[_Block]:
    """Yield the batches in order, as many at once as their factors fit into half of the memory."""
    rows, waiting, size, start = _rows(batches), [], 0, 0
    for place, batch in enumerate(batches):
        gradients = _gradients(gradient_pass, components, batch)
        bytes_of_batch = sum(numbers(one) for one in gradients) * torch.empty((), dtype=_wide(gradients)).element_size()
        if waiting and size + bytes_of_batch > memory_bytes // 2:
            yield _block(waiting, rows, range(start, place), uses, memory_bytes)
            waiting, size, start = [], 0, place
        waiting.append(gradients)
        size += bytes_of_batch
    yield _block(waiting, rows, range(start, len(batches)), uses, memory_bytes)


def _block(waiting: list[list[Gradients]], rows: list[slice], batches: range, uses: int, memory_bytes: int) -> _Block:
    budget = FormingBudget(memory_bytes // 2)
    held = [HeldGradients(_join(parts), budget, uses) for parts in zip(*waiting, strict=True)]
    return _Block(slice(rows[batches.start].start, rows[batches.stop - 1].stop), batches, held)


def _join(several: Sequence[Gradients]) -> Gradients:
    """Concatenate the gradients of several batches of one component, one batch after the other."""
    pieces, start = [], 0
    for gradients in several:
        for piece in gradients.pieces:
            moved = slice(piece.examples.start + start, piece.examples.stop + start)
            pieces.append(piece._replace(examples=moved))
        start += gradients.examples
    return Gradients(start, several[0].shape, tuple(pieces))
