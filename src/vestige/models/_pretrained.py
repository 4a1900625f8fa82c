"""Reads models and tokenizers that transformers saved, and PEFT adapters; refuses what would be partly random."""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from vestige.data import Sharing
from vestige.errors import ModelError, UserError
from vestige.models._weights import Bits, keep_as_read, quantization_of
from vestige.progress import is_verbose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LOADING_ERRORS = (Exception,)
"""What reading a broken file raises: the libraries underneath use many classes, tokenizers plain `Exception`."""
_HALF = (torch.bfloat16, torch.float16)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and reports off stderr, but for --verbose; what matters in them becomes an error."""
    if is_verbose():
        yield
        return
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # A user cannot fix what one library deprecates in another.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", ".*missing adapter keys")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class Reading(NamedTuple):
    """How the weights of a model are read."""

    dtype: torch.dtype | None
    """None takes the checkpoint's own, except that half precision becomes float32 on a CPU: CPUs are slow at it, and
    gradients lose digits for nothing."""
    device: torch.device | str
    """Where the model is put; a word is a way to spread its layers, as accelerate names it."""
    stay: bool = False
    """Leave it on the CPU, in the number format that it would have on `device`."""
    quantize: Bits | None = None
    """Bits in which its maps are kept."""


def read_model(folder: Path, reading: Reading) -> "PreTrainedModel":
    """Read the causal language model saved in `folder`, with every weight from there: none is drawn at random."""
    dtype, device, stay, quantize = reading
    spread = isinstance(device, str)
    on_cpu = not torch.cuda.is_available() if spread else device.type == "cpu"
    with _loading(folder, f"{folder / 'config.json'} is not readable"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    _refuse_foreign_kernels(config, folder)
    _require_causal(config, folder)
    own = torch.float32 if on_cpu and config.dtype in _HALF else config.dtype
    kind = dtype or own or "auto"
    # Tensor by tensor onto a card: the host never holds all of them.
    direct = quantize is not None or (not on_cpu and not stay)
    with _loading(folder, f"{folder} does not load as a causal language model"):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=kind,
                device_map=device if spread else {"": device} if direct else None,
                quantization_config=None if quantize is None else quantization_of(quantize, kind, config, folder),
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{folder} is larger than the memory of {device}. Type --precision bfloat16, --quantize 4 if it has a "
                "LoRA adapter, or --device balanced, which spreads it over all GPUs."
            ) from error
    model, info = loaded
    keep_as_read(model)
    _require_all_weights(model, info["missing_keys"], folder, info["unexpected_keys"])
    if dtype is None and on_cpu and quantize is None and next(model.parameters()).dtype in _HALF:
        model = model.float()
    return model if spread or stay or direct else model.to(device)


@contextmanager
def _loading(folder: Path, failure: str) -> Iterator[None]:
    """Keep transformers quiet inside the block, and turn what reading broken files raises into a `ModelError`."""
    with quiet_transformers():
        try:
            yield
        except UserError:
            raise
        except LOADING_ERRORS as error:
            if "trust_remote_code" in str(error):
                raise ModelError(
                    f"{folder} names Python code of its own (`auto_map`), and Vestige never runs code that a model "
                    "folder brings. If transformers has the architecture itself, load the weights into that class, "
                    "save them with save_pretrained(...) and give that folder; else load the model in Python and give "
                    "the live module: vestige.index(model=module, tokenizer=tokenizer, ...)."
                ) from None
            raise ModelError(f"{failure}: {short(error)}") from error


def _require_all_weights(model: Any, missing: Iterable[str], folder: Path, unexpected: Iterable[str]) -> None:
    if missing := sorted(missing):
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}; they "
            "would be drawn at random."
            + (
                renaming_advice(sorted(unexpected), missing, folder)
                or " Give a checkpoint that was saved from a model with its causal (next-token) head."
            )
        )
    # Where the GPUs are too small, accelerate leaves weights on the CPU or on the disk and fetches them for each pass.
    if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(
            f"{folder}: {len(absent)} weights, such as {absent[0]}, do not fit on the GPUs that PyTorch sees here. "
            "Take more GPUs, or --precision bfloat16."
        )


def renaming_advice(unexpected: Collection[str], missing: Collection[str], folder: Path) -> str:
    """Return how to rename a checkpoint's keys that a wrapper has lengthened; empty where that is not what is wrong.

    torch.compile puts `_orig_mod.` into them, data-parallel wrappers `module.`.
    """
    given = min(unexpected, default="")
    parts = given.split(".")
    # One part, or two in a row, that are too many.
    spans = [".".join(parts[at : at + count]) + "." for count in (1, 2) for at in range(len(parts) - count)]
    extra = next((span for span in spans if given.replace(span, "") in missing), "")
    if not extra:
        return ""
    return (
        f" Its keys have {extra!r} in them, such as {given}: a wrapper (torch.compile, DataParallel, FSDP) put it "
        "there. Save it again from the model inside the wrapper, or strip it: "
        'python -c "import pathlib, safetensors.torch as s; '
        f"[s.save_file({{k.replace('{extra}', ''): v for k, v in s.load_file(f).items()}}, f, {{'format': 'pt'}}) "
        f"for f in pathlib.Path('{folder}').glob('*.safetensors')]\""
    )


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    """Read the tokenizer saved in `folder`, None if no tokenizer file lies there.

    Without this check, transformers would invent an empty tokenizer for some architectures, without a warning.

    Raises:
        ModelError: There are tokenizer files, but they do not load.
    """
    if not any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern)):
        return None
    with _loading(folder, f"The tokenizer in {folder} does not load"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _require_causal(config: Any, folder: Path) -> None:
    kind, fault = config.model_type, ""
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        fault = "model, which predicts no next token"
    # transformers gives encoders a causal head on request; without is_decoder their attention still
    # attends to later tokens.
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        fault = "encoder without a causal head (its config has no is_decoder)"
    if fault:
        raise ModelError(
            f"{folder} holds a {kind!r} {fault}. Vestige needs a causal (decoder-only) language model such as GPT-2, "
            "Llama, GPT-NeoX or OPT."
        )


def _refuse_foreign_kernels(config: Any, folder: Path) -> None:
    """Raise an error if the config names a kernel of a hub repository: transformers would fetch it and run it."""
    for setting in ("attn_implementation", "experts_implementation"):
        named = str(getattr(config, f"_{setting}", ""))
        if "/" in named:
            raise ModelError(
                f"{folder / 'config.json'} names the kernel {named!r} from the hub as its {setting}, and Vestige "
                f"never runs code that a model folder names. Delete {setting} from that file; PyTorch's own is used."
            )


def short(error: object) -> str:
    """Return the text of an error, or of another thing, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "weights_only" in text:  # the library advises to load it all the same, and so to run what is in it
        return "its weights are a pickle of more than tensors, which can run code. Save them as safetensors"
    return text if len(text) <= 300 else f"{text[:300]}..."


_PADDING = 0
"""The token that `make_batch` fills up with."""
_SUPPORTED = ("LORA", "LN_TUNING", "TRAINABLE_TOKENS")
_UNSUPPORTED_VARIANTS = ("monteclora_config", "arrow_config")
"""Of LoRA: the first draws its matrices at random, the second mixes several adapters by their inputs."""
_SHAPES = re.compile(
    r"shape torch\.Size\(\[([\d, ]+)\]\) from checkpoint, the shape in current model is torch\.Size\(\[([\d, ]+)\]\)"
)


def put_on(base: nn.Module, folder: Path) -> Any:
    """Return the base model with the adapter of `folder` on it, every trained tensor read from there."""
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    try:
        with quiet_transformers():
            config = PeftConfig.from_pretrained(str(folder))
            refuse_virtual_tokens(config, str(folder))
            _refuse_random_start(config, folder)
            model = PeftModel.from_pretrained(base, str(folder))  # pyright: ignore[reportArgumentType]
            # What PEFT only warns of, and the modules that were saved whole, which it does not mention.
            result: Any = set_peft_model_state_dict(
                model, load_peft_weights(str(folder), device="cpu"), adapter_name=str(model.active_adapter)
            )
    except ModelError:
        raise
    except LOADING_ERRORS as error:
        why = f"it lacks {error}." if isinstance(error, KeyError) else short(error)
        advice = _vocabulary_advice(error, base)
        raise ModelError(f"The adapter {folder} does not fit its base model: {why}{advice}") from error
    _require_all_keys(model, folder, result.missing_keys, result.unexpected_keys)
    return model


def peft_configs(model: nn.Module) -> list[Any]:
    """Return the PEFT configs of the model's adapters, none for any other model."""
    configs: Any = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


def refuse_virtual_tokens(config: Any, name: str) -> None:
    """Raise unless an adapter of this PEFT config changes weights."""
    if config.is_prompt_learning:
        raise ModelError(
            f"{name} is a {_kind_of(config)} adapter, which puts virtual tokens before the input. Vestige supports "
            "adapters that change weights, such as LoRA."
        )


def batch_sharing(model: nn.Module) -> Sharing:
    """Return which examples may share a batch without changing each other's results.

    LongRoPE (Phi-3, Phi-3.5, Phi-4, Phi-MoE) takes one set of factors for the whole batch, by its longest example. An
    activated LoRA whose invocation holds the padding token may find it in the padding.
    """
    switches = sorted({switch for module in model.modules() for switch in _rope_switches(module)})
    invocations = (getattr(config, "alora_invocation_tokens", None) or () for config in peft_configs(model))
    return Sharing(tuple(switches), any(_PADDING in tokens for tokens in invocations))


def _rope_switches(module: nn.Module) -> Iterator[int]:
    """Yield the lengths at which a rotary embedding changes its frequencies for all of the batch."""
    config: Any = getattr(module, "config", None)
    if not hasattr(module, "rope_type") or not isinstance(getattr(config, "rope_parameters", None), dict):
        return
    # Some models have a set of parameters for each kind of layer.
    for found in (config.rope_parameters, *config.rope_parameters.values()):
        if isinstance(found, dict) and found.get("rope_type", found.get("type")) == "longrope":
            yield int(found.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def adapter_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that the model's PEFT adapter trains; empty for any other model."""
    if not (configs := peft_configs(model)):
        return frozenset()
    biases = any(getattr(config, "bias", "none") != "none" for config in configs)
    return _own_parameters(model) | {name for name, _ in model.named_parameters() if biases and name.endswith(".bias")}


def acts_in_forward(model: nn.Module) -> bool:
    """Return whether the adapter needs PEFT's own forward pass: the layers of the model alone would not apply it."""
    configs = peft_configs(model)
    if not configs:
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    own = isinstance(model, PeftModel) and type(model.base_model).forward is not BaseTuner.forward
    return own or any(getattr(config, "alora_invocation_tokens", None) for config in configs)


def adapter_kind(model: nn.Module) -> str:
    """Return what PEFT calls the kind of the model's adapter, for a message."""
    return "/".join(dict.fromkeys(map(_kind_of, peft_configs(model))))


def find_unsupported_adapter(model: nn.Module) -> str:
    """Return the kind of the model's adapter if gradients of its own weights cannot be computed, else an empty text."""
    for config in peft_configs(model):
        variant = next((name for name in _UNSUPPORTED_VARIANTS if getattr(config, name, None)), "")
        if variant or _kind_of(config) not in _SUPPORTED:
            return f"{_kind_of(config)} with {variant}" if variant else _kind_of(config)
    return ""


def _kind_of(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _refuse_random_start(config: Any, folder: Path) -> None:
    start = str(getattr(config, "init_lora_weights", ""))
    if start.startswith("pissa_niter"):
        raise ModelError(
            f"{folder} begins with {start}: PEFT takes a random decomposition off the base model whenever it loads "
            "such an adapter, so the model would be another one each time. Save the trained model as plain LoRA: "
            "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START)."
        )


def _own_parameters(model: nn.Module) -> frozenset[str]:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    kinds = {config.peft_type for config in peft_configs(model)}
    prefixes = {PEFT_TYPE_TO_PREFIX_MAPPING.get(kind, str(kind).lower()).rstrip("_") for kind in kinds}
    own = re.compile(rf"[._]({'|'.join(map(re.escape, prefixes))})|\.modules_to_save\.|\.trainable_tokens_")
    return frozenset(name for name, _ in model.named_parameters() if own.search(name))


def _require_all_keys(model: Any, folder: Path, missing: Collection[str], unexpected: Collection[str]) -> None:
    parameters, missing = dict(model.named_parameters(remove_duplicate=False)), set(missing)
    # A tensor that several layers share lies in the file once.
    read = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    untrained = {name for name in _own_parameters(model) & missing if id(parameters[name]) not in read}
    # In the file, names do not hold that of the adapter.
    untrained = sorted(name.replace(f".{model.active_adapter}", "") for name in untrained)
    faults = []
    if unexpected:
        faults.append(f"it holds {len(unexpected)} tensors that the model does not have, such as {min(unexpected)}")
    if untrained:
        faults.append(f"it lacks {len(untrained)} of the adapter's, such as {untrained[0]}, which would stay untrained")
    if not faults:
        return
    raise ModelError(
        f"The adapter {folder} does not fit its base model: {', and '.join(faults)}."
        + (
            renaming_advice(unexpected, untrained, folder)
            or " Give the base model and the adapter_config.json that it was trained with, or save it again with "
            "model.save_pretrained(...) from the PeftModel that was trained, outside any wrapper."
        )
    )


def _vocabulary_advice(error: Exception, base: nn.Module) -> str:
    """Return what to do where tensors differ by the size of the vocabulary; empty where they do not."""
    embeddings: Any = getattr(base, "get_input_embeddings", lambda: None)()
    size = getattr(getattr(embeddings, "weight", None), "shape", (0,))[0]
    for shapes in _SHAPES.findall(str(error)):
        for saved, here in zip(*(map(int, shape.split(",")) for shape in shapes), strict=False):
            if here == size != saved:
                return (
                    f" The adapter was trained with a vocabulary of {saved:,} tokens, its base model has {here:,}. "
                    f"Resize the base as before that training (model.resize_token_embeddings({saved})), save it and "
                    "the tokenizer with save_pretrained(...), and write that folder into adapter_config.json as "
                    "base_model_name_or_path."
                )
    return ""
