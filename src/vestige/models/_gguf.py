"""GGUF files, unpacked once: weights that can be differentiated, kept in a cache addressed by the file's content."""

import contextlib
import copy
import hashlib
import importlib.util
import io
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.quantization_config import GgufConfig

from vestige.errors import DiskSpaceError, MissingExtra, ModelError
from vestige.models._transformers import LOADING_ERRORS, quiet_transformers, short
from vestige.progress import announce, format_bytes, format_seconds


def cache_folder() -> Path:
    """Return the folder for what Vestige can make again: `$VESTIGE_CACHE`, else the user's cache for programs."""
    given = os.environ.get("VESTIGE_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vestige"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "vestige"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vestige"


def unpacked_gguf(file: Path) -> Path:
    """Return a folder with the GGUF model as plain float32 safetensors, its config and its tokenizer.

    The file is converted the first time its content occurs. The folder gets its name only when it is whole,
    so a killed conversion is never taken for a finished one; of several processes one converts and the others
    wait.

    Raises:
        MissingExtra: The `gguf` package is not installed.
        ModelError: transformers cannot read the file.
        DiskSpaceError: The float32 copy does not fit into the cache.
    """
    parent = cache_folder() / "gguf"
    finished = parent / _sha256(file)
    if finished.is_dir():
        return finished
    _require_reader(file)
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{finished}.lock"):
        if not finished.is_dir():
            _convert(file, finished)
    return finished


def _convert(file: Path, finished: Path) -> None:
    announce(f"Unpacking {file.name} ({format_bytes(file.stat().st_size)}) once, into {finished}")
    start = time.monotonic()
    unfinished = finished.with_name(f"{finished.name}.part")
    # The lock is held, so what lies here was left by a process that was killed.
    shutil.rmtree(unfinished, ignore_errors=True)
    # transformers draws a bar for the tensors on stderr that no setting turns off.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
            # Left in GGUF blocks the weights could be used, but neither differentiated nor saved.
            packed = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
            )
        except LOADING_ERRORS as error:
            raise ModelError(f"{file} cannot be read as a GGUF causal language model: {short(error)}") from error
        _check_space(packed, finished.parent)
        _fresh_copy(packed).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    unfinished.rename(finished)
    announce(f"Unpacked in {format_seconds(time.monotonic() - start)}; the next start reads the copy.")


def _fresh_copy(packed: PreTrainedModel) -> PreTrainedModel:
    """Return the same weights in a model that nothing marks as quantized: others may refuse to be saved or trained."""
    config = copy.deepcopy(packed.config)
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    return model


def _check_space(model: PreTrainedModel, folder: Path) -> None:
    needed = sum(parameter.numel() * 4 for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskSpaceError(
            f"Unpacking the GGUF model takes {format_bytes(needed)}, but {folder} has {format_bytes(free)} "
            "free. Set VESTIGE_CACHE to a folder on a larger disk."
        )


def _require_reader(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra(
            f"{file} is a GGUF file, and reading it needs the package `gguf`: pip install 'vestige[gguf]'"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
