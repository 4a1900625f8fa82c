"""Configurations of the published memorization study: read, named by their published ids, turned into a grid.

A training configuration has sections `main`, `preprocess`, `random_split`, `lora`, `devices`, `loss` and
`training_args`, as INI or JSON. A deployment is an INI with `[general]` (`mode`, `base_config`) and a section for each
attribute that is swept, with `mode = range` (`start`, `stop`, `step`) or `mode = list` (`val_1`, `val_2`, ...).
"""

import base64
import configparser
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vestige.errors import SpecError
from vestige.parsing import parse_json
from vestige.settings import nearest
from vestige.sweep._grid import Grid, axis_values

_ID_LENGTH = 22

# Section of every attribute, in the order in which the id reads them, with its default.
_ATTRIBUTES: dict[str, tuple[str, Any]] = {
    "model": ("main", None),
    "dataset": ("main", None),
    "max_len": ("preprocess", 1024),
    "label_noise": ("preprocess", 0.0),
    "data_seed": ("preprocess", 0),
    "split_id": ("random_split", 0),
    "split_prop": ("random_split", 1.0),
    "split_test": ("random_split", False),
    "lora_r": ("lora", 8),
    "lora_alpha": ("lora", 16),
    "lora_dropout": ("lora", 0.05),
    "last_token_only": ("loss", False),
    "accelerator": ("devices", "cpu"),
}
_NOT_IN_ID = ("accelerator",)
TRAINING_ARGS = "training_args"
_SECTIONS = (*dict.fromkeys(section for section, _ in _ATTRIBUTES.values()), TRAINING_ARGS)

_TRAINING_DEFAULTS: dict[str, Any] = {
    "warmup_steps": 5,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": False,
    "learning_rate": 2.5e-5,
    "logging_steps": 50,
    "bf16": True,
    "optim": "adamw_torch",
    "save_strategy": "steps",
    "save_steps": 20,
    "evaluation_strategy": "no",
    "remove_unused_columns": False,
    "resume_from_checkpoint": True,
    "num_train_epochs": 1,
}
TRAINING_NOT_IN_ID = frozenset(
    [
        "after_c_only_every_n",
        "num_train_epochs",
        "max_steps",
        "per_device_eval_batch_size",
        "evaluation_strategy",
        "eval_accumulation_steps",
        "eval_steps",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_strategy",
        "logging_first_step",
        "logging_steps",
        "logging_nan_inf_filter",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_safetensors",
        "save_on_each_node",
        "save_only_model",
        "use_cpu",
        "run_name",
        "disable_tqdm",
        "report_to",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "resume_from_checkpoint",
    ]
)
"""Epochs are among them: runs of different length share a published id, though never a cell of ours."""

_HUB = {
    "mistral": "mistralai/Mistral-7B-v0.1",
    "llama": "meta-llama/Llama-2-7b-hf",
    "gemma": "google/gemma-7b",
    "arc": "ai2_arc",
    "ethics": "hendrycks/ethics",
    "mmlu": "cais/mmlu",
}


@dataclass(frozen=True)
class PublishedTraining:
    """A published training configuration, complete."""

    values: dict[str, Any]
    """By attribute, defaults included."""
    training_args: dict[str, Any]

    @property
    def config_id(self) -> str:
        """Its published id: 22 characters of the URL-safe base64 of the MD5 of `id_text`."""
        return _digest(self.id_text)

    @property
    def id_text(self) -> str:
        """What the id is the digest of: `key=value;` of what differs from the defaults, then the training arguments."""
        parts = []
        for name, (_, default) in _ATTRIBUTES.items():
            if name not in _NOT_IN_ID and self.values[name] != default:
                # The published software writes the seed of the data under the key of the noise.
                parts.append(f"{'label_noise' if name == 'data_seed' else name}={self.values[name]};")
        named = {name: value for name, value in self.training_args.items() if name not in TRAINING_NOT_IN_ID}
        return "".join([*parts, *(f"{name}={named[name]};" for name in sorted(named))])

    def at(self, point: Mapping[str, Any]) -> "PublishedTraining":
        """The configuration with other values, by attribute or as `training_args.name`."""
        own = {name: value for name, value in point.items() if not name.startswith(f"{TRAINING_ARGS}.")}
        args = {name.partition(".")[2]: value for name, value in point.items() if name not in own}
        return replace(self, values=self.values | own, training_args=self.training_args | args)


@dataclass(frozen=True)
class PublishedSweep:
    """A published deployment: a training configuration, and what is swept."""

    training: PublishedTraining
    mode: str
    axes: dict[str, tuple[Any, ...]]
    id_text: str
    source: str

    @property
    def deployment_id(self) -> str:
        """Its published id; that of a training configuration alone is its own."""
        return _digest(self.id_text) if self.id_text else self.training.config_id

    def trainings(self) -> Iterator[PublishedTraining]:
        """The training configuration of every cell, in order."""
        grid = Grid("train", {}, self.mode, self.axes, self.source)
        return (self.training.at(point) for point in grid.points())

    def grid(self) -> dict[str, Any]:
        """The same as a grid for `vestige train`."""
        from vestige.sweep._published_grid import as_grid

        return as_grid(self.training, self.mode, self.axes, self.source)


def read_published(path: str | Path) -> PublishedSweep:
    """The training configuration or the deployment in a file of the published formats.

    Raises:
        SpecError: It cannot be read, or is neither.
    """
    path = Path(path)
    sections = _sections(path)
    if "general" not in sections:
        return PublishedSweep(_training(sections, str(path)), "product", {}, "", str(path))
    general = sections["general"]
    unknown = set(general) - {"mode", "base_config"}
    if unknown or general.get("mode") not in ("product", "zip") or "base_config" not in general:
        raise SpecError(f"{path}: [general] has mode = product or zip, and base_config = the training configuration.")
    training = _training(_sections(_found(str(general["base_config"]), path)), str(path))
    swept = {name: values for name, values in sections.items() if name != "general"}
    axes = {name: _axis(name, values, str(path)) for name, values in swept.items()}
    # The deployment's id holds that of the training configuration, wherever that lies.
    named = sections | {"general": general | {"base_config": training.config_id}}
    lines = [
        line
        for section in sorted(named)
        for line in (f"[{section}]", *(f"{name} = {named[section][name]}" for name in sorted(named[section])))
    ]
    return PublishedSweep(training, str(general["mode"]), axes, "\n".join(lines) + "\n", str(path))


def _axis(name: str, given: dict[str, Any], source: str) -> tuple[Any, ...]:
    whole, dot, _ = name.partition(".")
    if name not in _ATTRIBUTES and not (dot and whole == TRAINING_ARGS):
        hint = nearest(name, [*_ATTRIBUTES, f"{TRAINING_ARGS}.NAME"]).replace("Known settings", "What can be swept")
        raise SpecError(f"{source}: [{name}] is no attribute of a training configuration. {hint}")
    if given.get("mode") == "range":
        return axis_values({key: value for key, value in given.items() if key != "mode"}, name, source)
    if given.get("mode") != "list":
        raise SpecError(f"{source}: [{name}] has mode = {given.get('mode')!r}. Expected range or list.")
    numbered = sorted((int(key[4:]), value) for key, value in given.items() if key[:4] == "val_" and key[4:].isdigit())
    values = [value for _, value in numbered]
    return axis_values(
        [_HUB.get(str(value), value) for value in values] if whole in ("model", "dataset") else values, name, source
    )


def _training(sections: dict[str, dict[str, Any]], source: str) -> PublishedTraining:
    for section in sections:
        if section not in _SECTIONS:
            raise SpecError(
                f"{source}: unknown section [{section}]. A training configuration has: {', '.join(_SECTIONS)}."
            )
    values = {}
    for name, (section, default) in _ATTRIBUTES.items():
        values[name] = sections.get(section, {}).get(name, default)
    for section, given in sections.items():
        known = [name for name, (home, _) in _ATTRIBUTES.items() if home == section]
        if section != TRAINING_ARGS and (unknown := [name for name in given if name not in known]):
            raise SpecError(f"{source}: [{section}] has no {unknown[0]!r}, but {', '.join(known)}.")
    if values["model"] is None or values["dataset"] is None:
        raise SpecError(f"{source}: [main] names no model or no dataset.")
    values |= {name: _HUB.get(str(values[name]), values[name]) for name in ("model", "dataset")}
    return PublishedTraining(values, _TRAINING_DEFAULTS | sections.get(TRAINING_ARGS, {}))


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = parse_json(text)
            return {str(name): dict(values) for name, values in content.items()}
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(text)
    except OSError as error:
        raise SpecError(f"The configuration {path} cannot be read: {error.strerror}.") from None
    except (configparser.Error, UnicodeDecodeError, ValueError, TypeError, AttributeError) as error:
        raise SpecError(f"{path} is no published configuration (INI or JSON with sections): {error}") from None
    return {name: {key: _value(value) for key, value in parser[name].items()} for name in parser.sections()}


def _found(name: str, deployment: Path) -> Path:
    """The base configuration: a path, from here or from the deployment, with or without its suffix."""
    places = [Path(name), deployment.parent / name, *(deployment.parent / f"{name}{end}" for end in (".cfg", ".json"))]
    for place in places:
        if place.is_file():
            return place
    raise SpecError(f"{deployment}: base_config {name!r} is no file here or beside it, with .cfg or .json either.")


def _value(text: str) -> Any:
    """A number, a truth value or the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None}
    return words.get(text.lower(), text)


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.md5(text.encode(), usedforsecurity=False).digest()).decode()[:_ID_LENGTH]
