"""A published configuration in our own words: the settings of `vestige train` that do the same."""

from collections.abc import Mapping
from typing import Any

from vestige.errors import SpecError
from vestige.progress import announce
from vestige.sweep._published import TRAINING_ARGS, TRAINING_NOT_IN_ID, PublishedTraining

PUBLISHED_CHECKPOINTS = "0,0.2,...,1,2,..."
"""Epochs whose models the study kept, whatever the size of its data."""
PUBLISHED_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
DATA = "data/{dataset}-noise{label_noise}-seed{data_seed}"
"""Where `vestige data multiple-choice` is to have put the prompts."""

_WHAT_IS_KEPT = {"save_strategy": "steps", "save_steps": 20, "after_c_only_every_n": None, "save_total_limit": None}
"""Published settings of which models stay on the disk, with the values that they have where nothing is said."""
_TRAINER_SEED = 42
"""What the Trainer takes where nothing is said."""
_ATTRIBUTES = {
    "model": "model",
    "max_len": "max_length",
    "split_id": "split_seed",
    "split_prop": "split_fraction",
    "lora_r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
}
_OF_DATA = ("dataset", "label_noise", "data_seed")
_TRAINING = {
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
_WORDS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"}


def as_grid(training: PublishedTraining, mode: str, axes: Mapping[str, tuple[Any, ...]], source: str) -> dict[str, Any]:
    """The grid for `vestige train`, as a YAML file would hold it.

    Raises:
        SpecError: Something in it has no counterpart; the message says what.
    """
    _require_answers_alone(training, axes, source)
    base = {ours: training.values[theirs] for theirs, ours in _ATTRIBUTES.items()}
    base |= {"loss": "answer", "checkpoints": PUBLISHED_CHECKPOINTS, "lora_targets": list(PUBLISHED_TARGETS)}
    # The study kept the optimizer's state with the latest model alone.
    base |= {"seed": _TRAINER_SEED, "keep_optimizer": False}
    kept = {name: value for name, value in training.training_args.items() if name in _WHAT_IS_KEPT}
    if changed := [f"{name}={value}" for name, value in kept.items() if value != _WHAT_IS_KEPT[name]]:
        announce(
            f"{source}: {', '.join(changed)} say which models are kept. In their place these epochs are kept, as in "
            f"the published study: {PUBLISHED_CHECKPOINTS}. To keep others, write a grid with `checkpoints`."
        )
    for name, value in training.training_args.items():
        if (ours := _of_training(name, source)) is not None:
            base[ours] = _word(value)
    filled = {name: "{" + name + "}" if name in axes else _short(training.values[name]) for name in _OF_DATA}
    base["data"] = DATA.format(**filled)
    swept = dict(_axis(name, values, source) for name, values in axes.items())
    base = {name: value for name, value in base.items() if name not in swept}
    return {"verb": "train", "base": base, "mode": mode, "axes": {name: list(each) for name, each in swept.items()}}


def _axis(name: str, values: tuple[Any, ...], source: str) -> tuple[str, tuple[Any, ...]]:
    if name in _OF_DATA:
        return name, tuple(map(_short, values))
    if name in _ATTRIBUTES:
        return _ATTRIBUTES[name], values
    ours = _of_training(name.removeprefix(f"{TRAINING_ARGS}."), source)
    if ours is None:
        raise SpecError(f"{source}: [{name}] changes nothing about a model that is trained. Drop the section.")
    return ours, tuple(map(_word, values))


def _of_training(name: str, source: str) -> str | None:
    """Our name of a training argument, None for one that says what is logged and saved, and not what is learned."""
    if name in _TRAINING:
        return _TRAINING[name]
    if (name in TRAINING_NOT_IN_ID and name != "max_steps") or name == "remove_unused_columns":
        return None
    raise SpecError(
        f"{source}: `{name}` of [{TRAINING_ARGS}] has no counterpart in `vestige train`. Drop it, or write the grid as "
        f"YAML. Known: {', '.join(sorted(_TRAINING))}."
    )


def _require_answers_alone(training: PublishedTraining, axes: Mapping[str, tuple[Any, ...]], source: str) -> None:
    if training.values["last_token_only"] is not True or "last_token_only" in axes:
        raise SpecError(
            f"{source}: without last_token_only the questions are learned too. Give such rows to `vestige train` as "
            "`text`, in a grid of your own."
        )
    if training.values["split_test"] or "split_test" in axes:
        raise SpecError(f"{source}: split_test has no counterpart. Make the test data smaller with `vestige data`.")


def _short(value: Any) -> Any:
    """`cais/mmlu` as `mmlu`; a whole number without its dot."""
    if isinstance(value, str):
        return value.rpartition("/")[2]
    return f"{value:g}" if isinstance(value, float) else value


def _word(value: Any) -> Any:
    return _WORDS.get(value, value) if isinstance(value, str) else value
