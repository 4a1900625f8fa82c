"""Adam's moments of every parameter, read from the checkpoint of a Trainer and matched by name and shape.

`optimizer.pt` numbers the parameters and does not name them. The Trainer puts those with weight decay into one group
and biases and norms into another, each in the model's order, and leaves frozen ones out; so the order is rebuilt from
the model, and every shape has to agree.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.errors import ModelError
from vestige.models import Component, parameter_view

OPTIMIZER_FILE = "optimizer.pt"

_WITHOUT_DECAY = (
    re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)"),
    re.compile(r"bias"),
)
"""Names that the Trainer exempts from weight decay, beside everything inside an `nn.LayerNorm`: of this version, and of
earlier ones, which checked the type of the norm instead of its name."""

Named = list[tuple[str, nn.Parameter]]


class Moments(NamedTuple):
    """Adam's state of one parameter before its next step."""

    first: Float[Tensor, "_out _in"]
    """Running mean of the gradient, `exp_avg`."""
    second: Float[Tensor, "_out _in"]
    """Running mean of its square, `exp_avg_sq`."""
    step: int
    """Steps taken; 0 for a parameter that never had a gradient."""
    betas: tuple[float, float]
    epsilon: float


def read_adam(folder: str | Path, model: nn.Module) -> dict[str, Moments]:
    """Read the moments of every trained parameter of `model` by name, in the layout of the parameter.

    Args:
        folder: A checkpoint of a Trainer that was trained with Adam or AdamW.
        model: The model in the same checkpoint. Tied weights have one name, the first.

    Raises:
        ModelError: There is no state, it is of another optimizer, or it does not fit the model without doubt.
    """
    path = Path(folder) / OPTIMIZER_FILE
    state = _read(path)
    groups: list[dict[str, Any]] = state["param_groups"]
    found: dict[str, Moments] = {}
    for group, parameters in zip(groups, _match(path, state, model), strict=True):
        for number, (name, parameter) in zip(group["params"], parameters, strict=True):
            found[name] = _moments(path, name, parameter, state["state"].get(number), group)
    return found


def component_moments(model: nn.Module, component: Component, moments: dict[str, Moments]) -> Moments:
    """Return the moments of a component as matrices `[out, in]`, in float32 where the model is.

    Raises:
        ModelError: The component's parameter was not trained, or training had diverged.
    """
    found = moments.get(component.parameter)
    if found is None:
        raise ModelError(
            f"{component.parameter} was frozen while this checkpoint was trained: Adam has no moments of it. Select "
            "trained parameters with --components."
        )
    device = next(model.parameters()).device
    first, second = (parameter_view(model, component, part).to(device, torch.float32) for part in found[:2])
    if not (torch.isfinite(first).all() and torch.isfinite(second).all() and (second >= 0).all()):
        raise ModelError(f"Adam's moments of {component.name} are not finite: training had diverged. Give another one.")
    return found._replace(first=first, second=second)


def adam_direction(gradient: Float[Tensor, "example _out _in"], moments: Moments) -> Float[Tensor, "example _out _in"]:
    """Return the step per unit of learning rate that Adam would take if this gradient came next; downhill is minus it.

    `m' / (sqrt(v') + eps)` with `m' = (b1 m + (1 - b1) g) / (1 - b1^t)` and `v' = (b2 v + (1 - b2) g^2) / (1 - b2^t)`,
    t counting this step (Kingma and Ba 2015, arXiv:1412.6980; the gradient of Xia et al. 2024, arXiv:2402.04333).
    """
    (beta1, beta2), step = moments.betas, moments.step + 1
    first = (beta1 * moments.first + (1 - beta1) * gradient) / (1 - beta1**step)
    second = (beta2 * moments.second + (1 - beta2) * gradient.square()) / (1 - beta2**step)
    return first / (second.sqrt() + moments.epsilon)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(
            f"{path.parent} has no {OPTIMIZER_FILE}, and the moments of Adam are in it. The Trainer writes it into "
            "checkpoint-* folders unless save_only_model is set or DeepSpeed or FSDP shards it. Give folders that have "
            "it, or type --method tracin, which needs none."
        )
    try:
        # Mapped, not read: only what is selected will be touched.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise ModelError(f"{path} does not read as the state of an optimizer: {reason}") from error
    if not isinstance(state, dict) or not {"state", "param_groups"} <= set(state):
        raise ModelError(f"{path} holds no `state` and `param_groups`, as the state of a PyTorch optimizer would.")
    held = {key for part in state["state"].values() for key in part}
    if not {"exp_avg", "exp_avg_sq"} <= held:
        raise ModelError(
            f"{path} holds {', '.join(sorted(held)) or 'no state at all'}, expected exp_avg and exp_avg_sq: it is not "
            "of Adam or AdamW in full precision. Train with --optim adamw_torch, or type --method tracin."
        )
    return state


def _match(path: Path, state: dict[str, Any], model: nn.Module) -> list[Named]:
    """Return the model's parameters in the order of each group."""
    groups = state["param_groups"]
    parameters = dict(model.named_parameters())
    if all("param_names" in group for group in groups):
        unknown = [name for group in groups for name in group["param_names"] if name not in parameters]
        if unknown:
            raise ModelError(f"{path} names the parameter {unknown[0]}, which the model does not have.")
        return [[(name, parameters[name]) for name in group["param_names"]] for group in groups]
    held = state["state"]
    shapes = [
        [tuple(held[number]["exp_avg"].shape) if number in held else None for number in group["params"]]
        for group in groups
    ]
    ambiguous = False
    for offered in _orders(model, len(groups)):
        ways = [_alignments(wanted, given) for wanted, given in zip(shapes, offered, strict=True)]
        if all(len(way) == 1 for way in ways):
            return [[given[place] for place in way[0]] for way, given in zip(ways, offered, strict=True)]
        ambiguous = ambiguous or all(ways)
    counts = " and ".join(str(len(group["params"])) for group in groups)
    reason = (
        "and which of the model's parameters were frozen does not follow from their shapes"
        if ambiguous
        else f"which do not fit, in shape and order, the {len(parameters)} of the model"
    )
    raise ModelError(
        f"{path} holds moments of {counts} parameters, {reason}. Expected is what the Trainer writes for this model; "
        "type --method tracin to do without."
    )


def _orders(model: nn.Module, groups: int) -> Iterator[list[Named]]:
    """Yield the possible orders of parameters in the groups: all, or an adapter's alone; later rules are older ones."""
    everything = list(model.named_parameters())
    adapter = [(name, each) for name, each in everything if "lora_" in name or "modules_to_save" in name]
    for named in [adapter, everything] if adapter else [everything]:
        if groups == 1:
            yield [named]
        elif groups == 2:
            for pattern in _WITHOUT_DECAY:
                exempt = {name for name, _ in named if pattern.search(name.lower())} | _in_layer_norms(model)
                yield [[each for each in named if (each[0] in exempt) == chosen] for chosen in (False, True)]


def _in_layer_norms(model: nn.Module) -> set[str]:
    norms = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    }
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in norms}


def _alignments(wanted: Sequence[tuple[int, ...] | None], given: Named) -> list[list[int]]:
    """Return positions in `given` of parameters with the wanted shapes, in order; at most two ways are searched for.

    Frozen parameters may be left out between them. No shape is wanted of a parameter that never took a step.
    """
    shapes = [tuple(parameter.shape) for _, parameter in given]
    if len(wanted) == len(given):
        fits = all(shape in (None, own) for shape, own in zip(wanted, shapes, strict=True))
        return [list(range(len(given)))] if fits else []
    first, last = _greedy(wanted, shapes), _greedy(wanted[::-1], shapes[::-1])
    if first is None or last is None:
        return []
    mirrored = [len(given) - 1 - place for place in reversed(last)]
    # The earliest positions and the latest: if they agree, there is no third way between them.
    return [first] if first == mirrored else [first, mirrored]


def _greedy(wanted: Sequence[tuple[int, ...] | None], shapes: Sequence[tuple[int, ...]]) -> list[int] | None:
    places, start = [], 0
    for shape in wanted:
        place = next((place for place in range(start, len(shapes)) if shape in (None, shapes[place])), None)
        if place is None:
            return None
        places.append(place)
        start = place + 1
    return places


def _moments(path: Path, name: str, parameter: nn.Parameter, held: Any, group: dict[str, Any]) -> Moments:
    betas, epsilon = tuple(group["betas"]), float(group["eps"])
    if held is None:
        zeros = torch.zeros(parameter.shape)
        return Moments(zeros, zeros, 0, betas, epsilon)
    first, second = held["exp_avg"], held["exp_avg_sq"]
    if first.shape != parameter.shape or second.shape != parameter.shape:
        raise ModelError(
            f"{path}: the moments of {name} are {tuple(first.shape)} and {tuple(second.shape)}, and the parameter is "
            f"{tuple(parameter.shape)}."
        )
    return Moments(first, second, int(held["step"]), betas, epsilon)
