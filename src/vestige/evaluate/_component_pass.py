"""What one forward and backward pass over a batch gives: gradients as factors, norms, layer outputs, projections."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.data import Batch
from vestige.errors import NonFinite
from vestige.evaluate._component_projection import Projection
from vestige.gradients import (
    CausalLoss,
    GradientPass,
    Gradients,
    KeepingSink,
    OneHot,
    Piece,
    Reduction,
    count_formed,
    matrices_of,
    numbers,
    square_norms,
)
from vestige.methods import PooledOutputs, Tap, backbone, pooled, tapped, taps_of
from vestige.models import Component, LoadedModel

HIDDEN = "last hidden state"
"""Name of the output that `rep-sim` compares."""


class Passed(NamedTuple):
    """What is known of the examples of a batch after their one pass."""

    gradients: list[Gradients]
    norms: Float[Tensor, "component example"]
    """Squared."""
    outputs: list[Float[Tensor, "example _width"]]
    """Of each module, averaged over the positions that predict a target; the last hidden state at the end."""
    projected: list[Float[Tensor, "example _k"]]
    seconds: Mapping[str, float]


class OnePass:
    """Runs batches; made by `one_pass`."""

    def __init__(
        self,
        loaded: LoadedModel,
        components: Sequence[Component],
        gradient_pass: GradientPass,
        outputs: PooledOutputs,
        hidden: "_HiddenState",
        projections: Sequence[Projection],
    ) -> None:
        self._device = next(loaded.model.parameters()).device
        self._components, self._pass = components, gradient_pass
        self._outputs, self._hidden, self._projections = outputs, hidden, projections

    def run(self, batch: Batch) -> Passed:
        """Run one pass over the batch.

        Raises:
            NonFinite: a gradient is NaN or infinite.
        """
        started = time.perf_counter()
        sink = KeepingSink(self._components)
        sink.begin(len(batch.rows))
        batch = batch.to(self._device)
        self._outputs.begin(batch)
        self._hidden.begin(batch)
        self._pass.run(batch, sink)
        gradients = [smaller_form(one) for one in sink.finish()]
        norms = torch.stack([square_norms(one).cpu() for one in gradients])
        outputs = [one.cpu() for one in [*self._outputs.collected(), self._hidden.state]]
        seconds = {"gradients": time.perf_counter() - started}
        projected = []
        for one in self._projections:
            started = time.perf_counter()
            projected.append(one.apply(gradients))
            seconds[f"projection {one.plan.name}"] = time.perf_counter() - started
        if not bool(norms.isfinite().all()):
            bad = int((~norms.isfinite().all(0)).nonzero()[0, 0])
            raise NonFinite(
                f"The gradient of example {int(batch.rows[bad])} is NaN or infinite. Run `vestige doctor` with the "
                "same --model and --data, which names the cause."
            )
        return Passed(gradients, norms, outputs, projected, seconds)


@contextmanager
def one_pass(
    loaded: LoadedModel, components: Sequence[Component], loss: Reduction, projections: Sequence[Projection]
) -> Iterator[OnePass]:
    """Yield the model, tapped for gradients and outputs while the context lasts."""
    objective = CausalLoss(loss)
    taps = output_taps(loaded.model, components, loss)
    with ExitStack() as stack:
        # Entering it runs the model once, on tokens of no example.
        gradient_pass = stack.enter_context(GradientPass(loaded.model, components, objective))
        outputs = stack.enter_context(tapped(loaded.model, taps, "mean"))
        hidden = _HiddenState()
        handle = backbone(loaded.model).register_forward_hook(hidden)
        stack.callback(handle.remove)
        yield OnePass(loaded, components, gradient_pass, outputs, hidden, projections)


def output_taps(model: nn.Module, components: Sequence[Component], loss: Reduction) -> list[Tap]:
    """Return the modules whose outputs are compared: all with a component, but no head that runs at targets alone."""
    head = CausalLoss(loss).head_module(model)
    return [tap for tap in taps_of(components) if tap.module != head]


class _HiddenState:
    """Pools the last hidden state when the backbone returns it."""

    def __init__(self) -> None:
        self._labels = torch.empty(0, 0, dtype=torch.int64)
        self.state = torch.empty(0, 0)

    def begin(self, batch: Batch) -> None:
        self._labels = batch.labels
        self.state = torch.zeros(len(batch.rows), 0)

    def __call__(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        if state is not None:
            self.state = pooled(state.detach(), self._labels, "mean")


def smaller_form(gradients: Gradients) -> Gradients:
    """Return the same gradients as factors or as matrices, whichever takes fewer numbers."""
    if gradients.zero or numbers(gradients) <= count_formed(gradients):
        return gradients
    return Gradients(gradients.examples, gradients.shape, (), matrices_of(gradients, slice(0, gradients.examples)))


def one_example(gradients: Gradients, place: int) -> Gradients:
    """Return the gradient of one of the examples."""
    part = slice(place, place + 1)
    if gradients.matrices is not None:
        return Gradients(1, gradients.shape, (), gradients.matrices[part])
    inside = [piece.within(part) for piece in gradients.pieces]
    return Gradients(1, gradients.shape, tuple(Piece(found[0], *found[1]) for found in inside if found is not None))


def as_tensors(passed: Passed, name: str) -> dict[str, Tensor]:
    """Return everything as named tensors, for a file; `read_passed` undoes it."""
    tensors = {f"{name}.norms": passed.norms}
    tensors |= {f"{name}.output.{number}": one for number, one in enumerate(passed.outputs)}
    tensors |= {f"{name}.projected.{number}": one for number, one in enumerate(passed.projected)}
    for number, gradients in enumerate(passed.gradients):
        if gradients.matrices is not None:
            tensors[f"{name}.{number}.matrices"] = gradients.matrices
            continue
        for place, piece in enumerate(gradients.pieces):
            key = f"{name}.{number}.{place}"
            side = piece.left.ids if isinstance(piece.left, OneHot) else piece.left
            tensors[f"{key}.{'ids' if isinstance(piece.left, OneHot) else 'left'}"] = side
            tensors[f"{key}.right"] = piece.right
            tensors[f"{key}.examples"] = torch.tensor([piece.examples.start, piece.examples.stop])
    # Tensors that share memory (one input of several layers) are written as what they are: tensors of their own.
    return {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}


def read_passed(
    tensors: Mapping[str, Tensor], name: str, components: Sequence[Component], device: torch.device
) -> Passed:
    """Read the tensors that `as_tensors` made."""
    norms = tensors[f"{name}.norms"]
    gradients = [
        _read_gradients(tensors, f"{name}.{number}", component.shape, norms.shape[1], device)
        for number, component in enumerate(components)
    ]
    return Passed(gradients, norms, _listed(tensors, f"{name}.output"), _listed(tensors, f"{name}.projected"), {})


def _listed(tensors: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    found: list[Tensor] = []
    while (key := f"{prefix}.{len(found)}") in tensors:
        found.append(tensors[key])
    return found


def _read_gradients(
    tensors: Mapping[str, Tensor], prefix: str, shape: tuple[int, int], examples: int, device: torch.device
) -> Gradients:
    if (key := f"{prefix}.matrices") in tensors:
        return Gradients(examples, shape, (), tensors[key].to(device))
    pieces: list[Piece] = []
    while (key := f"{prefix}.{len(pieces)}") + ".right" in tensors:
        start, stop = tensors[f"{key}.examples"].tolist()
        ids = tensors.get(f"{key}.ids")
        left = tensors[f"{key}.left"].to(device) if ids is None else OneHot(ids.to(device), shape[0])
        pieces.append(Piece(slice(start, stop), left, tensors[f"{key}.right"].to(device)))
    return Gradients(examples, shape, tuple(pieces))
