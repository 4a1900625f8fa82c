"""Grids in files; and configurations of the published memorization study, named by their ids, turned into a grid.

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
from typing import Any, NamedTuple

from vestige.errors import SpecError
from vestige.parsing import parse_json, parse_yaml
from vestige.progress import announce
from vestige.settings import nearest
from vestige_recipes.sweep.cells import Grid, axis_values, check_grid, points


class Attribute(NamedTuple):
    """An attribute of a training configuration; `ours` is its name among the settings of `vestige train`, if any."""

    section: str
    default: Any
    ours: str | None


# In the order in which the published id reads them.
_ATTRIBUTES = {
    "model": Attribute("main", None, "model"),
    "dataset": Attribute("main", None, None),
    "max_len": Attribute("preprocess", 1024, "max_length"),
    "label_noise": Attribute("preprocess", 0.0, None),
    "data_seed": Attribute("preprocess", 0, None),
    "split_id": Attribute("random_split", 0, "split_seed"),
    "split_prop": Attribute("random_split", 1.0, "split_fraction"),
    "split_test": Attribute("random_split", False, None),
    "lora_r": Attribute("lora", 8, "lora_rank"),
    "lora_alpha": Attribute("lora", 16, "lora_alpha"),
    "lora_dropout": Attribute("lora", 0.05, "lora_dropout"),
    "last_token_only": Attribute("loss", False, None),
    "accelerator": Attribute("devices", "cpu", None),
}
_NOT_IN_ID = ("accelerator",)
_ARGS = "training_args"
_SECTIONS = (*dict.fromkeys(each.section for each in _ATTRIBUTES.values()), _ARGS)
_ARGS_DEFAULTS: dict[str, Any] = {
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
_OUR_ARGS = {
    "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "gradient_checkpointing",
    "warmup_steps": "warmup",
    "num_train_epochs": "epochs",
    "bf16": "bf16",
    "weight_decay": "weight_decay",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip",
    "optim": "optimizer",
    "seed": "seed",
}
_LOGGED_AND_SAVED = """
after_c_only_every_n per_device_eval_batch_size evaluation_strategy eval_accumulation_steps eval_steps log_level
log_level_replica log_on_each_node logging_strategy logging_first_step logging_steps logging_nan_inf_filter
save_strategy save_steps save_total_limit save_safetensors save_on_each_node save_only_model use_cpu run_name
disable_tqdm report_to dataloader_num_workers dataloader_persistent_workers resume_from_checkpoint
"""
_WITHOUT_EFFECT = frozenset(_LOGGED_AND_SAVED.split())
"""Training arguments that change nothing about the model that is trained."""
_ARGS_NOT_IN_ID = _WITHOUT_EFFECT | {"num_train_epochs", "max_steps"}
"""Epochs are among them: runs of different length share a published id, but never a cell of a sweep."""
_WHAT_IS_KEPT = {"save_strategy": "steps", "save_steps": 20, "after_c_only_every_n": None, "save_total_limit": None}
"""Published settings of which models stay on the disk, with their defaults."""

_ID_LENGTH = 22
_HUB = {
    "mistral": "mistralai/Mistral-7B-v0.1",
    "llama": "meta-llama/Llama-2-7b-hf",
    "gemma": "google/gemma-7b",
    "arc": "ai2_arc",
    "ethics": "hendrycks/ethics",
    "mmlu": "cais/mmlu",
}
_WORDS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"}
_OF_DATA = ("dataset", "label_noise", "data_seed")
_DATA = "data/{dataset}-noise{label_noise}-seed{data_seed}"
"""Where `vestige data multiple-choice` has to write the prompts."""
_CHECKPOINTS = "0,0.2,...,1,2,..."
"""Epochs whose models the study kept, whatever the size of its data."""
_FIXED: dict[str, Any] = {
    "loss": "answer",
    "checkpoints": _CHECKPOINTS,
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    # The default of the Trainer.
    "seed": 42,
    # The study kept the optimizer's state with the latest model alone.
    "keep_optimizer": False,
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
        """The text of which the id is the digest: `key=value;` of what is not the default, then training arguments."""
        parts = []
        for name, attribute in _ATTRIBUTES.items():
            if name not in _NOT_IN_ID and self.values[name] != attribute.default:
                # The published software writes the seed of the data under the key of the noise.
                parts.append(f"{'label_noise' if name == 'data_seed' else name}={self.values[name]};")
        named = sorted(name for name in self.training_args if name not in _ARGS_NOT_IN_ID)
        return "".join([*parts, *(f"{name}={self.training_args[name]};" for name in named)])

    def at(self, point: Mapping[str, Any]) -> "PublishedTraining":
        """Return the configuration with other values, by attribute or as `training_args.name`."""
        own = {name: value for name, value in point.items() if not name.startswith(f"{_ARGS}.")}
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
        """Return the training configuration of every cell, in order."""
        return (self.training.at(point) for point in points(self.mode, self.axes))

    def grid(self) -> dict[str, Any]:
        """Return the grid of `vestige train` that does the same, as a YAML file would hold it.

        Raises:
            SpecError: Something in it has no counterpart; the message says what.
        """
        values, args = self.training.values, self.training.training_args
        if values["last_token_only"] is not True or "last_token_only" in self.axes:
            raise SpecError(
                f"{self.source}: without last_token_only the questions are learned too. Give such rows to `vestige "
                "train` as `text`, in a grid of your own."
            )
        if values["split_test"] or "split_test" in self.axes:
            raise SpecError(
                f"{self.source}: split_test has no counterpart. Make the test data smaller with `vestige data`."
            )
        kept = [f"{name}={value}" for name, value in args.items() if value != _WHAT_IS_KEPT.get(name, value)]
        if kept:
            announce(
                f"{self.source}: {', '.join(kept)} say which models are kept. In their place these epochs are kept, as "
                f"in the published study: {_CHECKPOINTS}. To keep others, write a grid with `checkpoints`."
            )
        base = {each.ours: values[name] for name, each in _ATTRIBUTES.items() if each.ours} | _FIXED
        named = {_our_arg(name, self.source): _WORDS.get(str(value), value) for name, value in args.items()}
        base |= {ours: value for ours, value in named.items() if ours}
        filled = {name: "{" + name + "}" if name in self.axes else _short(values[name]) for name in _OF_DATA}
        base["data"] = _DATA.format(**filled)
        axes = dict(self._our_axis(name, values) for name, values in self.axes.items())
        base = {name: value for name, value in base.items() if name not in axes}
        return {"verb": "train", "base": base, "mode": self.mode, "axes": axes}

    def _our_axis(self, name: str, values: tuple[Any, ...]) -> tuple[str, list[Any]]:
        if name in _OF_DATA:
            return name, [_short(value) for value in values]
        ours = _ATTRIBUTES[name].ours if name in _ATTRIBUTES else _our_arg(name.removeprefix(f"{_ARGS}."), self.source)
        if ours is None:
            raise SpecError(f"{self.source}: [{name}] changes nothing about a model that is trained. Drop the section.")
        return ours, [_WORDS.get(str(value), value) for value in values]


def read_grid(source: Any) -> Grid:
    """Return the grid in a YAML or JSON file, in a published configuration (.cfg, .ini), or in a mapping.

    Raises:
        SpecError: It cannot be read, a key is unknown, a range or a list has no values, the lists of a zip differ in
            length, or there are more than 10,000 cells.
    """
    if isinstance(source, Grid):
        return source
    if isinstance(source, Mapping):
        return check_grid(source, "The grid")
    path = Path(source)
    if path.suffix in (".cfg", ".ini"):
        return check_grid(read_published(path).grid(), str(path))
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"The grid {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SpecError(f"The grid {path} is neither YAML nor JSON that can be used: {error}.") from None
    return check_grid(content, str(path))


def read_published(path: str | Path) -> PublishedSweep:
    """Return the training configuration or the deployment in a file of the published formats.

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
    training = _training(_sections(_find_base(str(general["base_config"]), path)), str(path))
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
    if name not in _ATTRIBUTES and not (dot and whole == _ARGS):
        hint = nearest(name, [*_ATTRIBUTES, f"{_ARGS}.NAME"]).replace("Known settings", "What can be swept")
        raise SpecError(f"{source}: [{name}] is no attribute of a training configuration. {hint}")
    if given.get("mode") == "range":
        return axis_values({key: value for key, value in given.items() if key != "mode"}, name, source)
    if given.get("mode") != "list":
        raise SpecError(f"{source}: [{name}] has mode = {given.get('mode')!r}. Expected range or list.")
    numbered = sorted((int(key[4:]), value) for key, value in given.items() if key[:4] == "val_" and key[4:].isdigit())
    return axis_values([_hub_id(whole, value) for _, value in numbered], name, source)


def _training(sections: dict[str, dict[str, Any]], source: str) -> PublishedTraining:
    for section, given in sections.items():
        if section not in _SECTIONS:
            raise SpecError(
                f"{source}: unknown section [{section}]. A training configuration has: {', '.join(_SECTIONS)}."
            )
        known = [name for name, each in _ATTRIBUTES.items() if each.section == section]
        if section != _ARGS and (unknown := [name for name in given if name not in known]):
            raise SpecError(f"{source}: [{section}] has no {unknown[0]!r}, but {', '.join(known)}.")
    values = {
        name: _hub_id(name, sections.get(each.section, {}).get(name, each.default))
        for name, each in _ATTRIBUTES.items()
    }
    if values["model"] is None or values["dataset"] is None:
        raise SpecError(f"{source}: [main] names no model or no dataset.")
    return PublishedTraining(values, _ARGS_DEFAULTS | sections.get(_ARGS, {}))


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return {str(name): dict(values) for name, values in parse_json(text).items()}
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(text)
    except OSError as error:
        raise SpecError(f"The configuration {path} cannot be read: {error.strerror}.") from None
    except (configparser.Error, UnicodeDecodeError, ValueError, TypeError, AttributeError) as error:
        raise SpecError(f"{path} is no published configuration (INI or JSON with sections): {error}") from None
    return {name: {key: _value(value) for key, value in parser[name].items()} for name in parser.sections()}


def _find_base(name: str, deployment: Path) -> Path:
    """Return the base configuration: a path, from here or from the deployment, with or without its suffix."""
    paths = [Path(name), deployment.parent / name, *(deployment.parent / f"{name}{end}" for end in (".cfg", ".json"))]
    for path in paths:
        if path.is_file():
            return path
    raise SpecError(f"{deployment}: base_config {name!r} is no file here or beside it, with .cfg or .json either.")


def _our_arg(name: str, source: str) -> str | None:
    """Return our name of a training argument, None for one that says what is logged and saved, not what is learned."""
    if name in _WITHOUT_EFFECT or name == "remove_unused_columns":
        return None
    if name not in _OUR_ARGS:
        raise SpecError(
            f"{source}: `{name}` of [{_ARGS}] has no counterpart in `vestige train`. Drop it, or write the grid as "
            f"YAML. Known: {', '.join(sorted(_OUR_ARGS))}."
        )
    return _OUR_ARGS[name]


def _value(text: str) -> Any:
    """Return a number, a truth value or the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None}
    return words.get(text.lower(), text)


def _hub_id(name: str, value: Any) -> Any:
    return _HUB.get(str(value), value) if name in ("model", "dataset") else value


def _short(value: Any) -> Any:
    """Return `cais/mmlu` as `mmlu`, and a whole number without its dot."""
    if isinstance(value, str):
        return value.rpartition("/")[2]
    return f"{value:g}" if isinstance(value, float) else value


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.md5(text.encode(), usedforsecurity=False).digest()).decode()[:_ID_LENGTH]
