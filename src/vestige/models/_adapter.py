"""PEFT adapters: what they belong to, whether their file fits it, and which parameters are theirs."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from vestige.errors import ModelError
from vestige.models._source import find_source
from vestige.models._transformers import LOADING_ERRORS, quiet_transformers, renaming_advice, short
from vestige.parsing import parse_json

_SUPPORTED = ("LORA", "LN_TUNING", "TRAINABLE_TOKENS")
_UNSUPPORTED_VARIANTS = ("monteclora_config", "arrow_config")
"""Of LoRA: the first draws its matrices at random, the second mixes several adapters by their inputs."""
_SHAPES = re.compile(
    r"shape torch\.Size\(\[([\d, ]+)\]\) from checkpoint, the shape in current model is torch\.Size\(\[([\d, ]+)\]\)"
)


def adapter_base(folder: Path) -> str | Path:
    """Return the folder or hub id of the model that an adapter was trained on.

    Raises:
        ModelError: adapter_config.json names none, or an adapter.
    """
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


def put_on(base: nn.Module, folder: Path) -> Any:
    """Return the base model with the adapter of `folder` on it, every trained tensor read from there.

    Raises:
        ModelError: It does not fit, holds a part only, or puts virtual tokens before the input.
    """
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


def refuse_virtual_tokens(config: Any, name: str) -> None:
    """Raise unless an adapter of this PEFT config changes weights.

    Raises:
        ModelError: It puts virtual tokens before the input.
    """
    if config.is_prompt_learning:
        raise ModelError(
            f"{name} is a {_kind_of(config)} adapter, which puts virtual tokens before the input. Vestige supports "
            "adapters that change weights, such as LoRA."
        )


def adapter_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that the model's PEFT adapter trains; empty for any other model."""
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return frozenset()
    own = _own_parameters(model)
    biases = any(getattr(config, "bias", "none") != "none" for config in configs.values())
    return own | {name for name, _ in model.named_parameters() if biases and name.endswith(".bias")}


def acts_in_forward(model: nn.Module) -> bool:
    """Return whether the adapter needs PEFT's own forward pass: the layers of the model alone would not apply it."""
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    own = isinstance(model, PeftModel) and type(model.base_model).forward is not BaseTuner.forward
    return own or any(getattr(config, "alora_invocation_tokens", None) for config in configs.values())


def adapter_kind(model: nn.Module) -> str:
    """Return what PEFT calls the kind of the model's adapter, for a message."""
    return "/".join(dict.fromkeys(map(_kind_of, model.peft_config.values())))  # type: ignore[union-attr]


def unsupported_adapter(model: nn.Module) -> str:
    """Return the kind of the model's adapter if gradients of its own weights cannot be computed, else an empty text."""
    configs: Any = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
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

    configs: Any = model.peft_config
    kinds = {config.peft_type for config in configs.values()}
    prefixes = {PEFT_TYPE_TO_PREFIX_MAPPING.get(kind, str(kind).lower()).rstrip("_") for kind in kinds}
    own = re.compile(rf"[._]({'|'.join(map(re.escape, prefixes))})|\.modules_to_save\.|\.trainable_tokens_")
    return frozenset(name for name, _ in model.named_parameters() if own.search(name))


def _require_all_keys(model: Any, folder: Path, missing: Collection[str], unexpected: Collection[str]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = set(missing)
    # A tensor that several layers share lies in the file once.
    read = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    untrained = {name for name in _own_parameters(model) & missing if id(parameters[name]) not in read}
    # In the file, names do not hold that of the adapter.
    untrained = sorted(name.replace(f".{model.active_adapter}", "") for name in untrained)
    if not untrained and not unexpected:
        return
    faults = []
    if unexpected:
        faults.append(f"it holds {len(unexpected)} tensors that the model does not have, such as {min(unexpected)}")
    if untrained:
        faults.append(f"it lacks {len(untrained)} of the adapter's, such as {untrained[0]}, which would stay untrained")
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
