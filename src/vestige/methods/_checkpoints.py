"""Which checkpoints a method works on, in which order, and how much each counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from vestige import indexes
from vestige.errors import IndexMismatch, ModelError, SpecError
from vestige.lazy import torch
from vestige.methods._protocol import Checkpoint, Weighting
from vestige.parsing import parse_json
from vestige.settings import AttributeSettings

if TYPE_CHECKING:
    from torch import nn

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_checkpoints(settings: AttributeSettings, weighting: Weighting) -> tuple[Checkpoint, ...]:
    """Return the checkpoints in their order, each with its weight and, if indexes were given, its index.

    Raises:
        SpecError: Settings contradict each other, or are of different number.
        ModelError: A folder holds no checkpoint, or none of them says its learning rate.
        IndexMismatch: The indexes are not of the same data and components.
    """
    opened = [indexes.Index.open(folder) for folder in _as_list(settings.index)]
    sources = _find_sources(settings, opened)
    if opened and len(opened) != len(sources):
        raise SpecError(
            f"{len(opened)} indexes were given for {len(sources)} checkpoints. Give one --index for each checkpoint, "
            "in the same order, or leave --index out."
        )
    _check_alike(opened)
    weights = _weigh(settings, sources, weighting)
    found = zip(sources, weights, opened or [None] * len(sources), strict=True)
    return tuple(Checkpoint(*each) for each in found)


def settings_of_last(settings: AttributeSettings, checkpoints: Sequence[Checkpoint]) -> AttributeSettings:
    """Return the settings of a job about the last checkpoint: the model that the queries are put to.

    The tokenizer is looked for beside the checkpoint and, as the Trainer saves it at the end, in the folder above.
    """
    last = checkpoints[-1]
    changed: dict[str, Any] = {"model": last.source, "index": last.index.folder if last.index else None}
    if settings.tokenizer is None and not isinstance(last.source, torch.nn.Module):
        folder = Path(last.source)
        files = ("tokenizer.json", "tokenizer_config.json")
        if not any((folder / file).exists() for file in files) and any((folder.parent / f).exists() for f in files):
            changed["tokenizer"] = str(folder.parent)
    return settings.model_copy(update=changed)


def refuse_checkpoints(settings: AttributeSettings) -> None:
    """Raise if several checkpoints were given to a method that works on one model.

    Raises:
        SpecError: Several were given.
    """
    given = [name for name in ("checkpoints", "checkpoint_weights") if getattr(settings, name) is not None]
    if not isinstance(settings.index, str | Path | None):
        given.append("several --index")
    if given:
        raise SpecError(
            f"The method {settings.method} works on one model, and {' and '.join(given)} were given. Type --method "
            "tracin, less or trak, or give one --model or one --index."
        )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _find_sources(settings: AttributeSettings, opened: Sequence[indexes.Index]) -> list[str | Path | nn.Module]:
    if settings.checkpoints is None:
        if settings.model is not None and len(opened) < 2:
            return [settings.model]
        return [index.manifest.model.name for index in opened]
    if settings.model is not None:
        raise SpecError("`model` and `checkpoints` were both given, but the checkpoints are the models. Drop --model.")
    found = [one for each in _as_list(settings.checkpoints) for one in _expand(each)]
    if not found:
        raise SpecError("`checkpoints` is empty. Give the folder of a Trainer run, or one folder for each checkpoint.")
    return found


def _expand(given: Any) -> list[str | Path | nn.Module]:
    """Return the checkpoints of a run after its first step, those that a pattern names, or the argument itself."""
    if isinstance(given, torch.nn.Module):
        return [given]
    text = str(given)
    if any(sign in text for sign in "*?["):
        path = Path(text)
        start = Path(path.anchor) if path.anchor else Path()
        folders = [each for each in start.glob(str(path.relative_to(path.anchor))) if each.is_dir()]
        if not folders:
            raise ModelError(f"No folder has a name like {text!r}. Give a pattern such as 'run/checkpoint-*'.")
        return [str(each) for each in sorted(folders, key=_order)]
    folder = Path(text).expanduser()
    found = [(each, _CHECKPOINT.fullmatch(each.name)) for each in folder.glob("checkpoint-*")]
    # No step led to checkpoint-0: it has neither a learning rate nor an optimizer's state.
    inside = [each for each, match in found if match is not None and int(match[1]) > 0]
    return [str(each) for each in sorted(inside, key=_order)] or [given]


def _order(folder: Path) -> tuple[list[int | str], str]:
    """Return a sort key in which numbers inside names count as numbers: checkpoint-1000 comes after checkpoint-200."""
    parts = re.split(r"(\d+)", folder.name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], str(folder)


def _check_alike(opened: Sequence[indexes.Index]) -> None:
    for index in opened[1:]:
        one, other = opened[0].manifest, index.manifest
        pairs = {
            "training data": (one.data.fingerprint, other.data.fingerprint),
            "--loss": (one.loss, other.loss),
            "--chat": (one.chat, other.chat),
            "--max-length": (one.max_length, other.max_length),
            "--components": tuple([part.name for part in each.components] for each in (one, other)),
        }
        for name, (before, after) in pairs.items():
            if before != after:
                raise IndexMismatch(
                    f"The indexes {opened[0].folder} and {index.folder} differ in their {name}: scores of different "
                    "checkpoints can only be added up for the same examples and parameters. Make them alike."
                )


def _weigh(settings: AttributeSettings, sources: Sequence[Any], weighting: Weighting) -> list[float]:
    if settings.checkpoint_weights is not None:
        weights = list(settings.checkpoint_weights)
        if len(weights) != len(sources):
            raise SpecError(
                f"{len(weights)} checkpoint-weights were given for {len(sources)} checkpoints: "
                f"{', '.join(str(source) for source in sources)}. Give one number for each."
            )
    elif weighting == "equal":
        weights = [1.0] * len(sources)
    else:
        weights = learning_rates(sources)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise SpecError(
            f"The weights of the checkpoints are {weights}; expected finite numbers of at least 0, and one above it. "
            "Give them with --checkpoint-weights."
        )
    return weights


def learning_rates(sources: Sequence[str | Path | nn.Module]) -> list[float]:
    """Return the learning rate with which training went from the checkpoint before to each checkpoint.

    The mean of what `trainer_state.json` logged in between; where nothing was, the mean of the scheduler's rate at both
    ends, which is exact for a rate that changes linearly.

    Raises:
        ModelError: A checkpoint has neither.
    """
    rates, before, earlier = [], 0, None
    for source in sources:
        folder = Path("." if isinstance(source, torch.nn.Module) else source)
        state = {} if isinstance(source, torch.nn.Module) else _trainer_state(folder)
        step = int(state.get("global_step", 0))
        if step <= before:  # another run, or an older checkpoint: its interval begins at its own start
            before, earlier = 0, None
        logged = [
            float(entry["learning_rate"])
            for entry in state.get("log_history", [])
            if "learning_rate" in entry and before < entry.get("step", 0) <= step
        ]
        now, start = (None, None) if isinstance(source, torch.nn.Module) else _read_schedule(folder / "scheduler.pt")
        if logged:
            rates.append(sum(logged) / len(logged))
        elif now is not None and start is not None:
            rates.append(((start if earlier is None else earlier) + now) / 2)
        else:
            raise ModelError(
                f"{source if isinstance(source, str | Path) else type(source).__name__} does not say its learning "
                "rate: expected trainer_state.json with logged rates, or scheduler.pt, as the Trainer writes them. "
                "Give one number for each checkpoint with --checkpoint-weights."
            )
        before, earlier = step, now
    return rates


def _trainer_state(folder: Path) -> dict[str, Any]:
    path = folder / "trainer_state.json"
    if not path.is_file():
        return {}
    try:
        state = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from error
    return state if isinstance(state, dict) else {}


def _read_schedule(path: Path) -> tuple[float | None, float | None]:
    """Return the scheduler's rate at the checkpoint, and the one it was given at the start."""
    if not path.is_file():
        return None, None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return float(state["_last_lr"][0]), float(state["base_lrs"][0])
    except (RuntimeError, UnpicklingError, EOFError, OSError, KeyError, IndexError, TypeError):
        return None, None
