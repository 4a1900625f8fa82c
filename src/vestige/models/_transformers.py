"""Reads causal language models and tokenizers that transformers saved, and refuses what would be partly random."""

import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from vestige.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOADING_ERRORS = (Exception,)
"""What reading a broken file raises: the libraries underneath use many classes, tokenizers plain `Exception`."""
_HALF = (torch.bfloat16, torch.float16)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and reports off stderr; what matters in them becomes an error here."""
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


def read_model(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str, *, stay: bool = False
) -> "PreTrainedModel":
    """Read the causal language model saved in `folder`, with every weight from there.

    Args:
        folder: Holds config.json and the weights.
        dtype: None takes the checkpoint's own, except that half precision becomes float32 on a CPU: CPUs are
            slow at it, and gradients lose digits for nothing.
        device: Where the model is put; a word is a way to spread its layers, as accelerate names it.
        stay: Leave it on the CPU, in the number format that it would have on `device`.

    Raises:
        ModelError: It does not load, has no causal head, lacks weights (which would be drawn at random), or is larger
            than all GPUs together.
    """
    spread = isinstance(device, str)
    on_cpu = not torch.cuda.is_available() if spread else device.type == "cpu"
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except LOADING_ERRORS as error:
            _refuse_own_code(error, folder)
            raise ModelError(f"{folder / 'config.json'} is not readable: {short(error)}") from error
        _refuse_foreign_kernels(config, folder)
        _check_causal(config, folder)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or _own_dtype(config, on_cpu=on_cpu),
                device_map=device if spread else None,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except LOADING_ERRORS as error:
            _refuse_own_code(error, folder)
            raise ModelError(f"{folder} does not load as a causal language model: {short(error)}") from error
    model, info = loaded
    _require_all_weights(model, info["missing_keys"], folder, info["unexpected_keys"])
    if dtype is None and on_cpu and next(model.parameters()).dtype in _HALF:
        model = model.float()
    return model if spread or stay else model.to(device)


def _require_all_weights(model: Any, missing: Iterable[str], folder: Path, unexpected: Iterable[str] = ()) -> None:
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
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except LOADING_ERRORS as error:
            _refuse_own_code(error, folder)
            raise ModelError(f"The tokenizer in {folder} does not load: {short(error)}") from error


def _own_dtype(config: Any, *, on_cpu: bool) -> torch.dtype | str:
    if config.dtype is None:
        return "auto"
    return torch.float32 if on_cpu and config.dtype in _HALF else config.dtype


def _check_causal(config: Any, folder: Path) -> None:
    kind = config.model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{folder} holds a {kind!r} model, which predicts no next token. Vestige needs a causal "
            "(decoder-only) language model such as GPT-2, Llama, GPT-NeoX or OPT."
        )
    # transformers gives encoders a causal head on request; without is_decoder their attention still
    # attends to later tokens.
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ModelError(
            f"{folder} holds a {kind!r} encoder without a causal head (its config has no is_decoder). "
            "Vestige needs a causal (decoder-only) language model such as GPT-2, Llama, GPT-NeoX or OPT."
        )


def _refuse_own_code(error: Exception, folder: Path) -> None:
    """Raise a clear error if loading failed because transformers would have to run code of the folder."""
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"{folder} names Python code of its own (`auto_map`), and Vestige never runs code that a model folder "
            "brings. If transformers has the architecture itself, load the weights into that class, save them with "
            "save_pretrained(...) and give that folder; else load the model in Python and give the live module: "
            "vestige.index(model=module, tokenizer=tokenizer, ...)."
        ) from None


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
