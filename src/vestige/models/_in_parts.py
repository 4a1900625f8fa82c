"""A model that a process group holds: each process has a part of every layer (FSDP2, `fully_shard`).

The first process reads the model into its CPU memory, by whatever way it is read; the others get its skeleton, without
a weight. Then block by block every weight is sent to all, onto their devices, and each keeps its part: no device ever
holds more than its parts, one whole block, and what is not in a block. That is the embeddings, the last norm and the
output head, which every process holds whole, so that the loss is computed as it is for a model in one process.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from vestige.distributed import broadcast_from_rank0
from vestige.errors import ModelError
from vestige.models._components import LoadedModel


def spread_over_ranks(read: Callable[[], LoadedModel], device: torch.device) -> LoadedModel:
    """Spread the model that `read` gives on the CPU of the first process over all processes.

    Args:
        read: Called in the first process alone.
        device: Where this process keeps its part.

    Raises:
        ModelError: The model has no blocks to spread, or FSDP2 does not take it.
    """
    whole: list[nn.Module] = []

    def skeleton() -> LoadedModel:
        loaded = read()
        whole.append(loaded.model)
        return replace(loaded, model=_without_weights(loaded.model))

    loaded = broadcast_from_rank0(skeleton)
    _spread(loaded.model, whole[0] if whole else None, device)
    return loaded


def everything_of(parameter: Tensor) -> Tensor:
    """Return a parameter's whole value, gathered from all processes if they hold it in parts."""
    gather = getattr(parameter.detach(), "full_tensor", None)
    return parameter.detach() if gather is None else gather()


def own_part(parameter: Tensor) -> Tensor:
    """Return what this process holds of a parameter, all of it if it is not spread: what is written into it is kept."""
    local = getattr(parameter.detach(), "to_local", None)
    return parameter.detach() if local is None else local()


def write_own_part(parameter: Tensor, values: Tensor) -> None:
    """Write values to a parameter; each process that holds a part of it passes all of them."""
    part = own_part(parameter)
    if part.shape == values.shape:
        part.copy_(values)
        return
    # FSDP2 cuts along the first axis, as `chunk` does.
    pieces = values.chunk(distributed.get_world_size())
    number = distributed.get_rank()
    if number < len(pieces):
        part.copy_(pieces[number])


def _without_weights(model: nn.Module) -> nn.Module:
    """Copy the model with shapes and no values in parameters and buffers; tied ones stay tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return deepcopy(model, memo)


def _spread(model: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backbone, blocks = _blocks(model)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    values = {} if whole is None else {place: held[place[1]] for place, held in _places(whole)}
    skeleton = list(_places(model))

    def fill(part: nn.Module) -> None:
        """Fill everything in the part that has no value, on the device, from rank 0; tied tensors stay tied."""
        empty = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers()) if tensor.is_meta}
        owners: dict[int, list[tuple[tuple[str, str], dict[str, Any]]]] = {}
        for place, held in skeleton:
            owners.setdefault(id(held.get(place[1])), []).append((place, held))
        for key, tensor in empty.items():
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if values:
                value.copy_(values[owners[key][0][0]])
            if value.numel():
                distributed.broadcast(value.reshape(-1).view(torch.uint8), 0)
            filled = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
            for (_, attribute), held in owners[key]:
                held[attribute] = filled

    try:
        for block in blocks:
            fill(block)
            fully_shard(block, mesh=mesh)
        fill(model)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        outside = {parameter for parameter in model.parameters() if id(parameter) not in inside}
        # The backbone has no part of its own: it only lets the next block be gathered while one is at work.
        fully_shard(backbone, mesh=mesh, ignored_params=outside)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise ModelError(f"FSDP2 does not take {type(model).__name__}: {error}") from error


def _places(model: nn.Module) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Yield path and attribute of every parameter and buffer, with the dictionary of its module that holds it."""
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            yield from (((path, attribute), held) for attribute, tensor in held.items() if tensor is not None)


def _blocks(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """Return the model without its head, and the blocks in it: what the outermost lists of modules hold.

    Raises:
        ModelError: There are none.
    """
    unwrap = getattr(model, "get_base_model", None)
    causal = unwrap() if unwrap is not None else model
    backbone = getattr(causal, "base_model", causal)
    blocks: list[nn.Module] = []
    lists: list[str] = []
    for path, module in backbone.named_modules():
        inner = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inner:
            lists.append(path)
            blocks += [block for block in module if any(True for _ in block.parameters())]
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no list of layers that could be spread. Type --device balanced.")
    return backbone, blocks
