"""The source of a model: turns the user's name for it into a folder on disk, and determines its kind."""

import contextlib
import copy
import importlib.util
import io
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from filelock import FileLock

from vestige.errors import DiskSpaceError, MissingExtra, ModelError
from vestige.progress import announce, format_bytes, format_seconds
from vestige.storage import cache_folder, sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SourceKind = Literal["weights", "gguf", "adapter"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_SUFFIXES = {".json", ".safetensors", ".model", ".txt", ".jinja", ".gguf"}
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")


class ModelSource(NamedTuple):
    """Files of a model on disk."""

    kind: SourceKind
    folder: Path
    gguf: Path | None = None
    """The GGUF file, for that kind."""


def find_source(model: str | Path) -> ModelSource:
    """Return the files behind a local folder, a GGUF file or a hub id (fetched, or found in the hub's cache).

    Raises:
        ModelError: There is nothing there, or nothing that is a model; the message contains what was searched for.
    """
    return _local_source(model) or _source_of_folder(_hub_folder(str(model)))


def require_model(model: Any) -> None:
    """Raise if a model is a path at which there is none; a hub id and a live module are taken as they are.

    Raises:
        ModelError: As `find_source`; the hub is not asked.
    """
    if isinstance(model, str | Path):
        _local_source(model)


def require_place(place: Any) -> None:
    """Raise if a path is given at which nothing lies; what may be a hub id, and a live object, are taken as they are.

    Raises:
        ModelError: Nothing lies there; the hub is not asked.
    """
    if isinstance(place, str | Path) and not Path(place).expanduser().is_dir():
        _local_source(place)


def _local_source(model: str | Path) -> ModelSource | None:
    """Return the files behind a folder or a GGUF file; None for a hub id."""
    path = Path(model).expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name longer than the disk allows, a folder that may not be read
        raise ModelError(
            f"No model {str(model)[:80]!r}: {error.args[-1]}. Give a model folder, a GGUF file or a hub id."
        ) from None
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return ModelSource("gguf", path.parent, path)
        raise ModelError(f"{path} is a file; expected a model folder, a .gguf file or a hub id.")
    if path.is_dir():
        return _source_of_folder(path)
    if isinstance(model, Path) or not _HUB_NAME.fullmatch(model) or model.startswith("."):
        raise ModelError(
            f"No model folder {path} (searched in {path.absolute().parent}). "
            "Give a folder with config.json and weights, a GGUF file, an adapter folder, or a hub id "
            "`owner/name`."
        )
    return None


def _source_of_folder(folder: Path) -> ModelSource:
    if (folder / "adapter_config.json").is_file():
        return ModelSource("adapter", folder)
    has_config = (folder / "config.json").is_file()
    if has_config and any(True for pattern in _WEIGHT_PATTERNS for _ in folder.glob(pattern)):
        return ModelSource("weights", folder)
    gguf = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() == ".gguf")
    if len(gguf) == 1:
        return ModelSource("gguf", folder, gguf[0])
    if gguf:
        listed = ", ".join(file.name for file in gguf)
        raise ModelError(f"{folder} holds {len(gguf)} GGUF files ({listed}). Give one of them: {gguf[0]}")
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    missing = "no weights (*.safetensors or pytorch_model*.bin)" if has_config else "no config.json"
    raise ModelError(
        f"{folder} is not a model folder: it has {missing}, no GGUF file and no adapter_config.json. "
        f"It holds: {found}. Save the model there with model.save_pretrained(...) and its tokenizer with "
        "tokenizer.save_pretrained(...)."
    )


def _hub_folder(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    files: list[str] | None = None
    try:
        # Requested first because it fails at once without a network, where a download would retry for most of a
        # minute.
        siblings = huggingface_hub.HfApi().model_info(name, timeout=10).siblings or []
        files = _choose_files([sibling.rfilename for sibling in siblings])
    except HfHubHTTPError as error:
        reason = f"the hub answered: {_first_line(error)}"
    except Exception as error:  # the transport's own errors: which library it is differs between hub versions
        reason = f"the hub was not reached ({_first_line(error)})"
    else:
        reason = "the download failed"
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files, local_files_only=files is None))
    except Exception as error:
        raise ModelError(
            f"No model {name!r}: there is no folder {Path(name).absolute()}, the hub's local cache does not "
            f"hold it, and {reason}. Check the spelling; for a private model type `hf auth login`; without a "
            f"network, fetch it elsewhere with `hf download {name} --local-dir FOLDER` and give --model FOLDER."
        ) from error


def _choose_files(names: list[str]) -> list[str]:
    """Return the files at the top of a hub repository that loading needs, without second copies in other formats."""
    top = [name for name in names if "/" not in name]
    wanted = [name for name in top if Path(name).suffix in _HUB_SUFFIXES]
    if any(name.endswith(".safetensors") for name in top):
        return [name for name in wanted if not name.endswith(".gguf")]
    return wanted + [name for name in top if name.startswith("pytorch_model")]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def unpack_gguf(file: Path) -> Path:
    """Return a folder with the GGUF model as plain float32 safetensors, its config and its tokenizer.

    The file is converted the first time its content occurs. The folder gets its name only when it is whole,
    so a killed conversion is never taken for a finished one; of several processes one converts and the others
    wait.
    """
    parent = cache_folder() / "gguf"
    finished = parent / sha256_of(file)
    if finished.is_dir():
        return finished
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra(
            f"{file} is a GGUF file, and reading it needs the package `gguf`: pip install 'vestige[gguf]'"
        )
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{finished}.lock"):
        if not finished.is_dir():
            _convert(file, finished)
    return finished


def _convert(file: Path, finished: Path) -> None:
    announce(f"Unpacking {file.name} ({format_bytes(file.stat().st_size)}) once, into {finished}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    from vestige.models._pretrained import LOADING_ERRORS, quiet_transformers, short

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


def _fresh_copy(packed: "PreTrainedModel") -> "PreTrainedModel":
    """Return the same weights in a model that nothing marks as quantized: others may refuse to be saved or trained."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(packed.config)
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    return model


def _check_space(model: "PreTrainedModel", folder: Path) -> None:
    needed = sum(parameter.numel() * 4 for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskSpaceError(
            f"Unpacking the GGUF model takes {format_bytes(needed)}, but {folder} has {format_bytes(free)} "
            "free. Set VESTIGE_CACHE to a folder on a larger disk."
        )
