"""The sets of weights that an audit measures: earlier checkpoints, the model itself, and a reference model."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

from torch import nn

from vestige.errors import ModelError
from vestige.models import LoadedModel, find_source, load_model, model_fingerprint
from vestige.parsing import parse_json
from vestige.progress import announce
from vestige.settings import AuditSettings

_NUMBERED = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*", "*.gguf", "adapter_config.json")
UNKNOWN_STEPS = -1


class Subject(NamedTuple):
    """One set of weights."""

    number: int
    """Its checkpoint number in the evidence: steps trained where all say them, else its position in the list."""
    name: str
    source: Any
    steps: int | None
    fingerprint: str
    """Of the model, for the one that is loaded anyway; of the files, for others."""


def find_subjects(settings: AuditSettings, loaded: LoadedModel) -> tuple[Subject, ...]:
    """Return the checkpoints in their order, and last the model under audit.

    A checkpoint that is the model itself, or holds the same bytes as another, is measured once: the first step of a
    warmup leaves the weights as they were.

    Raises:
        ModelError: One is not there.
    """
    sources = [one for each in _listed(settings.checkpoints) for one in _expanded(each)]
    prints = [weights_fingerprint(source) for source in sources]
    own, steps = weights_fingerprint(settings.model), _steps(settings.model)
    kept: dict[str, tuple[Any, str, int | None]] = {}
    for source, mark in zip(sources, prints, strict=True):
        if mark == own:
            steps = _steps(source) if steps is None else steps
        elif mark in kept:
            announce(f"{_name(source)} holds the same weights as {_name(kept[mark][0])}, and is measured with it.")
        else:
            kept[mark] = (source, mark, _steps(source))
    every = [*kept.values(), (settings.model, loaded.fingerprint, steps)]
    numbers = _numbers([known for _, _, known in every])
    return tuple(
        Subject(number, _name(source), source, known, mark)
        for number, (source, mark, known) in zip(numbers, every, strict=True)
    )


@final
class Models:
    """One loaded model at a time; the one under audit to begin with."""

    def __init__(self, settings: AuditSettings, subject: Subject, loaded: LoadedModel) -> None:
        """Begin with what is loaded."""
        self._settings, self._held, self._loaded = settings, subject.source, loaded

    def of(self, source: Any) -> LoadedModel:
        """Load the model behind `source`; the one before it is freed."""
        if source is not self._held:
            del self._loaded
            self._held = None
            self._loaded = load_model(source, precision=self._settings.precision, device=self._settings.device)
            self._held = source
        return self._loaded


def is_adapter(model: nn.Module) -> bool:
    """Return whether LoRA matrices are what was trained."""
    return any("lora_" in name for name, _ in model.named_parameters())


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _expanded(given: Any) -> list[Any]:
    """Return the checkpoints of a Trainer's run in their order, or what was given."""
    if isinstance(given, nn.Module):
        return [given]
    folder = Path(str(given)).expanduser()
    inside = [each for each in folder.glob("checkpoint-*") if _NUMBERED.fullmatch(each.name)]
    inside.sort(key=lambda each: int(each.name.partition("-")[2]))
    return [str(each) for each in inside] or [given]


def weights_fingerprint(source: Any) -> str:
    """Return the sha256 of a live module's weights, or of the weight files."""
    if isinstance(source, nn.Module):
        return model_fingerprint(source)
    found = find_source(source)
    paths = [found.gguf] if found.gguf else sorted({path for name in _WEIGHTS for path in found.folder.glob(name)})
    if not paths:
        raise ModelError(f"{source} holds no weights. Give folders of checkpoints as --checkpoints.")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name}\n".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _steps(source: Any) -> int | None:
    """Return the optimizer steps trained, from the folder's name or the Trainer's record."""
    if isinstance(source, nn.Module):
        return None
    folder = Path(str(source)).expanduser()
    if match := _NUMBERED.fullmatch(folder.name):
        return int(match[1])
    try:
        return int(parse_json((folder / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _numbers(steps: Sequence[int | None]) -> list[int]:
    known = [each for each in steps if each is not None]
    if len(known) == len(steps) and known == sorted(set(known)):
        return known
    return [UNKNOWN_STEPS] if len(steps) == 1 else list(range(len(steps)))


def _name(source: Any) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)
