"""Loading of a model by any of its names, frozen and in evaluation mode."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from vestige.distributed import FSDP, broadcast_from_rank0, is_helper
from vestige.errors import ModelError
from vestige.models._components import LoadedModel
from vestige.models._pretrained import (
    Reading,
    peft_configs,
    put_on,
    read_model,
    read_tokenizer,
    refuse_virtual_tokens,
    short,
)
from vestige.models._source import find_source, unpack_gguf
from vestige.models._weights import Bits, files_identity, hash_once, quantized_bits
from vestige.parsing import parse_json
from vestige.settings import LaunchSettings
from vestige.terminal import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def spread_over_ranks(read: Callable[[], LoadedModel], device: torch.device) -> LoadedModel:
    """Spread the model that `read`, called in the first process, puts on its CPU: each has its part on its `device`."""
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
    values = {} if whole is None else dict(zip(map(id, _tensors(model)), _tensors(whole), strict=True))

    def fill(part: nn.Module) -> None:
        """Fill everything in the part that has no value, on the device, from rank 0; tied tensors stay tied."""
        for tensor in (one for one in _tensors(part) if one.is_meta):
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if values:
                value.copy_(values[id(tensor)])
            if value.numel():
                distributed.broadcast(value.reshape(-1).view(torch.uint8), 0)
            is_parameter = isinstance(tensor, nn.Parameter)
            torch.utils.swap_tensors(tensor, nn.Parameter(value, requires_grad=False) if is_parameter else value)

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


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return every parameter and buffer of the model, tied ones once."""
    return [*model.parameters(), *model.buffers()]


def _blocks(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """Return the model without its head, and the blocks in it: what the outermost lists of modules hold."""
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


Precision = Literal["auto", "float32", "bfloat16", "float16", "float64"]
_DTYPES: dict[str, torch.dtype | None] = {
    name: None if name == "auto" else getattr(torch, name) for name in get_args(Precision)
}
DEVICE_MAPS = ("balanced", "balanced_low_0", "sequential")
"""Ways to spread the layers of a model over several GPUs, by the names that accelerate gives them."""
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def load_model(
    model: str | Path | nn.Module,
    *,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    precision: Precision = "auto",
    device: str | torch.device = "auto",
    quantize: Bits | None = None,
) -> LoadedModel:
    """Load a causal language model in evaluation mode with every weight frozen, ready for per-example gradients.

    Args:
        model: A hub id, a local folder, a folder with a GGUF file (or the file; unpacked once into a cache),
            a PEFT adapter folder (its base is loaded too), or a live module. A live module is used as it is,
            not copied: it is put into evaluation mode and all its weights are frozen. `attribute`, `untrac` and
            the other functions of settings put both back when they end.
        tokenizer: A live tokenizer or a folder with one; by default the one that lies beside the weights.
        precision: `auto` is the checkpoint's own dtype, but float32 for half-precision checkpoints on a CPU.
        device: `auto` is a GPU if there is one (under torchrun and SLURM each process's own), else the CPU; a live
            module stays where it is. `balanced`, `balanced_low_0` and `sequential` spread the layers over all GPUs
            that this process sees. `fsdp` gives a part of every layer to each process of the group
            (`vestige.distributed`); only the first one needs memory for the whole model, on its CPU.
        quantize: Keep the maps of the base model in 4 bits (NF4) or 8, by bitsandbytes; an adapter on it stays whole.

    Raises:
        ModelError: The model is not found, does not load or is no causal model; the message contains what to type.
        MissingExtra: A GGUF file, or `quantize`, without the package that it needs.
    """
    if precision not in _DTYPES:
        raise ModelError(f"precision={precision!r} is not known; choose one of {', '.join(_DTYPES)}.")
    for name, value in (("model", model), ("tokenizer", tokenizer)):
        if isinstance(value, list | tuple | dict | set):
            raise ModelError(f"{name}={shorten(repr(value))}: expected one folder, file or hub id, as a text.")
    dtype = _DTYPES[precision]
    given_tokenizer = load_tokenizer(tokenizer)
    if isinstance(model, nn.Module):
        _check_live(model, dtype)
        if device in (*DEVICE_MAPS, FSDP):
            raise ModelError(f"device={device!r} is for models that are loaded; a live module stays where it is.")
        if quantize is not None:
            raise ModelError(
                f"quantize={quantize} is for models that are loaded; a live module is used as it is. Load it in "
                f"{quantize} bits yourself: from_pretrained(..., quantization_config=BitsAndBytesConfig(...))."
            )
        module = model if device == "auto" else model.to(_device(device))
        return _freeze(module, given_tokenizer, type(model).__name__)

    def read(place: torch.device | str, *, stay: bool = False) -> LoadedModel:
        module, own_tokenizer, files = _read(model, Reading(dtype, place, stay, quantize))
        identity = files_identity(files, module, quantize)
        return _freeze(module, given_tokenizer or own_tokenizer, str(model), identity)

    if device == FSDP:
        own = _device("auto")
        return spread_over_ranks(lambda: read(own, stay=True), own)
    return read(str(device) if device in DEVICE_MAPS else _device(device))


def context_length(model: nn.Module) -> int | None:
    """Return the maximum number of tokens that the model's config accepts, None if it does not state one."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    lengths = (getattr(config, key, None) for key in _LENGTH_KEYS)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def _read(model: str | Path, reading: Reading) -> tuple[nn.Module, "PreTrainedTokenizerBase | None", list[Path]]:
    """Return the model, its tokenizer, and the files or folders that it was read from, an adapter's base last."""
    source = find_source(model)
    if source.kind == "adapter":
        return _read_adapter(source.folder, reading)
    folder = unpack_gguf(source.gguf) if source.gguf else source.folder
    return read_model(folder, reading), read_tokenizer(folder), [source.gguf or source.folder]


def _read_adapter(folder: Path, reading: Reading) -> tuple[nn.Module, "PreTrainedTokenizerBase | None", list[Path]]:
    place = _adapter_base(folder)
    base, base_tokenizer, files = _read(place, reading)
    model = put_on(base, folder)
    if isinstance(place, Path):
        # Trained further and saved elsewhere, the adapter still finds its base.
        model.active_peft_config.base_model_name_or_path = str(place.resolve())
    if reading.dtype is not None:
        # PEFT keeps adapter weights in float32 beside a half-precision base; an explicit precision is for all.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(reading.dtype)
    return model, read_tokenizer(folder) or base_tokenizer, [folder, *files]


def _adapter_base(folder: Path) -> str | Path:
    """Return the folder or hub id of the model that an adapter was trained on."""
    file = folder / "adapter_config.json"
    try:
        base = parse_json(file.read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(base, str) or not base:
        given = f"says {short(base)}, which is no name" if base else "names no base model"
        raise ModelError(f"{file} {given}. Write its folder or hub id there as base_model_name_or_path.")
    beside = folder / base
    try:
        place = beside if beside.exists() else base
    except OSError:  # longer than a file's name may be
        place = base
    try:
        source = find_source(place)
    except ModelError as error:
        raise ModelError(f"The base model that {file} names (base_model_name_or_path) is not there. {error}") from None
    if source.kind == "adapter":
        raise ModelError(
            f"The base model of the adapter {folder} is itself an adapter, {source.folder}. Merge that one into its "
            f"own base with merge_and_unload(), save the result, and write its folder into {file} as "
            "base_model_name_or_path."
        )
    return place


def load_tokenizer(
    tokenizer: "PreTrainedTokenizerBase | str | Path | None",
) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer of a folder or hub id; a live one, or None, as it is.

    Raises:
        ModelError: None lies there, or it does not load.
    """
    if tokenizer is None or not isinstance(tokenizer, str | Path):
        return tokenizer
    folder = Path(tokenizer).expanduser()
    if not folder.is_dir():
        folder = find_source(tokenizer).folder
    loaded = read_tokenizer(folder)
    if loaded is None:
        raise ModelError(
            f"tokenizer={str(tokenizer)!r}: no tokenizer.json or tokenizer_config.json in it. "
            "Give a folder that has one, or a hub id."
        )
    return loaded


def _check_live(model: nn.Module, dtype: torch.dtype | None) -> None:
    first = next(model.parameters(), None)
    if first is None or first.is_meta:
        raise ModelError(f"The {type(model).__name__} that was given has no weights.")
    compiled = [part for part in model.modules() if part._compiled_call_impl is not None]
    # Norms and activations may be compiled: no map is hidden inside of them.
    if hasattr(model, "_orig_mod") or any(weight.ndim > 1 for part in compiled for weight in part.parameters()):
        raise ModelError(
            f"The live {type(model).__name__} is compiled by torch.compile, which does not run the hooks that "
            "gradients are taken from. Give the module that was compiled (model._orig_mod), or one without compile()."
        )
    for config in peft_configs(model):
        refuse_virtual_tokens(config, f"The live {type(model).__name__}")
    if dtype is not None and first.dtype != dtype:
        name = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"precision={name!r}, but the live model holds {first.dtype} and is used as it is. Leave "
            f"precision at 'auto', or convert it first: model.to(torch.{name})"
        )


def own_gpu(environment: Mapping[str, str], count: int) -> int:
    """Return which of `count` visible GPUs this process uses where several share a host: each has one, round-robin.

    torchrun and accelerate give their number as LOCAL_RANK, SLURM as SLURM_LOCALID. A process with one visible GPU, as
    CUDA_VISIBLE_DEVICES makes it for local workers and `--gres gpu:1` for batch jobs, uses that.
    """
    number = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
    return int(number) % count if number.isdigit() else 0


def _device(device: str | torch.device) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda", own_gpu(os.environ, count)) if count else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device={device!r} is not a device; type cpu, cuda, cuda:1 or balanced.") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ModelError(f"device={str(device)!r}, but PyTorch sees {count} CUDA devices here. Type device cpu.")
    if chosen.type not in ("cpu", "cuda"):
        # `meta` has no numbers, and most builds know few devices.
        try:
            (torch.zeros(1, device=chosen) + 1).item()
        except (RuntimeError, NotImplementedError, ImportError, AssertionError) as error:
            raise ModelError(
                f"device={str(device)!r}: PyTorch cannot compute there. Type device cpu, or cuda."
            ) from error
    return chosen


@contextmanager
def leave_card(model: nn.Module, settings: LaunchSettings) -> Iterator[None]:
    """Keep a driver's model on the CPU while its workers need the cards; one on several cards, or packed, stays."""
    works_here = settings.workers == 1 and settings.engine == "local"
    places = {parameter.device for parameter in model.parameters()}
    card = places.pop() if len(places) == 1 else None
    if works_here or is_helper() or card is None or card.type != "cuda" or quantized_bits(model) is not None:
        yield
        return
    model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        model.to(card)


def _freeze(
    model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None", name: str, identity: str | None = None
) -> LoadedModel:
    """Return the model frozen; `identity` is that of its files, None for a live one."""
    model.eval()
    model.requires_grad_(False)
    return LoadedModel(model, tokenizer, name, hash_once(model, identity), context_length(model))
