"""What the model is and how it runs, before it has computed anything but its head."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from vestige.checks._types import Check, Coverage, Verdict
from vestige.data import TokenizedData
from vestige.gradients import CausalLoss, Knowledge
from vestige.models import LoadedModel, Selection, adapter_kind, adapter_parameters, parameter_words
from vestige.parsing import parse_json

_EXACT_ATTENTION = ("eager", "sdpa")


def model_checks(loaded: LoadedModel, selection: Selection, loss: CausalLoss) -> list[Check]:
    """Check precision, device, attention, output head, tied weights and coverage."""
    return [
        _check_precision(loaded),
        _check_device(loaded.model),
        _check_attention(loaded.model),
        _check_head(loaded.model, loss),
        _check_ties(loaded.model, selection),
        _check_coverage(selection),
    ]


def adapter_checks(model: nn.Module, selection: Selection, data: TokenizedData) -> list[Check]:
    """Check what a PEFT adapter has trained and what of it is attributed to; nothing for any other model."""
    trained = adapter_parameters(model)
    if not trained:
        return []
    configs: Any = model.peft_config
    left = [row.name for row in selection.coverage if row.name in trained and not row.selected]
    value = f"{adapter_kind(model)}, {len(trained) - len(left)} of {len(trained)} trained tensors are attributed to"
    verdict: Verdict = "good"
    advice = ["Scores are those of the model with its adapter."]
    if left:
        verdict = "warn"
        advice.append(f"Left out is {left[0]}: --components adapter takes all that have a rule.")
    for tokens in filter(None, (getattr(config, "alora_invocation_tokens", None) for config in configs.values())):
        silent = sum(not _holds(ids, np.array(tokens)) for ids in data.input_ids)
        value += f"; activated in {len(data) - silent:,} of {len(data):,} examples"
        if silent:
            verdict = "warn"
            advice.append(f"Examples without its invocation, the tokens {tokens}, have the gradient 0.")
    if any(getattr(config, "use_dora", False) for config in configs.values()):
        advice.append(
            "DoRA's training counts the norm of the weights as a constant, and so do the gradients: finite differences "
            "of the loss are others, as the gradient check may show."
        )
    return [Check("adapter", verdict, value, " ".join(advice), len(left))]


def _holds(ids: Int[np.ndarray, "token"], wanted: Int[np.ndarray, "token"]) -> bool:
    if len(ids) < len(wanted):
        return False
    return bool((np.lib.stride_tricks.sliding_window_view(ids, len(wanted)) == wanted).all(1).any())


def coverage_by_kind(model: nn.Module, selection: Selection) -> tuple[Coverage, ...]:
    """Count the parameters of every kind: how many, how many are attributed to, and why not the rest."""
    words = parameter_words(model)
    rows = []
    for kind in dict.fromkeys(words.values()):
        members = [row for row in selection.coverage if words[row.name] == kind]
        reasons = dict.fromkeys(row.reason for row in members if not row.selected)
        rows.append(
            Coverage(
                kind,
                sum(row.parameters for row in members),
                sum(row.parameters for row in members if row.selected),
                sum(row.parameters for row in members if _has_no_rule(row.reason)),
                "; ".join(reasons),
            )
        )
    return tuple(rows)


def run_precision(model: nn.Module) -> torch.dtype:
    """Return the coarsest number format among the weights."""
    formats = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(formats, key=lambda dtype: torch.finfo(dtype).eps)


def _has_no_rule(reason: str) -> bool:
    return reason not in ("", "not selected")


def _check_precision(loaded: LoadedModel) -> Check:
    run, stored = _short(run_precision(loaded.model)), _stored_precision(loaded.name)
    value = run if stored in (None, run) else f"{run}, from a {stored} checkpoint"
    if run in ("float32", "float64"):
        return Check("precision", "good", value, "Gradients keep their digits.")
    range_warning = " and may overflow" if run == "float16" else ""
    advice = f"Gradients keep 2 to 3 digits{range_warning}; --precision float32 is exact and takes twice the memory."
    return Check("precision", "warn", value, advice)


def _stored_precision(name: str) -> str | None:
    """Return the number format in a checkpoint's config.json; None for a live module or where it is missing."""
    try:
        config = parse_json((Path(name).expanduser() / "config.json").read_text())
    except (OSError, ValueError):
        return None
    stored = config.get("dtype", config.get("torch_dtype")) if isinstance(config, dict) else None
    return stored if isinstance(stored, str) else None


def _check_device(model: nn.Module) -> Check:
    device = next(model.parameters()).device
    if device.type == "cpu" and torch.cuda.is_available():
        return Check("device", "warn", "cpu", "There is a GPU: --device cuda is faster.")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {torch.get_num_threads()}"
    return Check("device", "good", f"{device}, {name}", "The estimates below were measured on it.")


def _check_attention(model: nn.Module) -> Check:
    kind = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if kind is None or kind in _EXACT_ATTENTION:
        return Check("attention", "good", kind or "the model's own", "Nothing to do.")
    advice = "This kernel may depend on the batch: see batch invariance, or load with attn_implementation='sdpa'."
    return Check("attention", "warn", str(kind), advice)


def _check_head(model: nn.Module, loss: CausalLoss) -> Check:
    path = loss.head_module(model)
    if path is not None:
        return Check("output head", "good", f"{path}, split off", "It runs only where a token is learned.")
    advice = (
        "Logits are computed at every position, which is right but slower; lower --token-budget if memory is short."
    )
    return Check("output head", "warn", "not separable, the model runs whole", advice)


def _check_ties(model: nn.Module, selection: Selection) -> Check:
    tied = list(_tied_names(model))
    config: Any = getattr(model, "config", None)
    if not tied:
        if getattr(config, "tie_word_embeddings", False) and _unequal_ends(model):
            advice = "The config ties the embedding to the head, the weights do not: call tie_weights() or reload."
            return Check("tied weights", "warn", "none, though the config ties them", advice)
        return Check("tied weights", "good", "none", "Every component is used once.", 0)
    selected = {component.name for component in selection.components}
    value = "; ".join(" = ".join(names) for names in tied[:3])
    taken = [names[0] for names in tied if names[0] in selected]
    advice = (
        f"One component, {', '.join(taken)}, whose gradient is the sum over its uses."
        if taken
        else "Not selected; selected, it is one component whose gradient is the sum over its uses."
    )
    return Check("tied weights", "good", value, advice, len(tied))


def _tied_names(model: nn.Module) -> Iterator[list[str]]:
    """Return all names of every parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return (found for found in names.values() if len(found) > 1)


def _unequal_ends(model: nn.Module) -> bool:
    ends: list[Any] = [getattr(model, get, lambda: None)() for get in ("get_input_embeddings", "get_output_embeddings")]
    return None not in ends and ends[0].weight is not ends[1].weight


def check_knowledge(known: Knowledge | None) -> Check:
    """Check that the model predicts the data better than a guess."""
    name = "learned by the model"
    if known is None:
        return Check(name, "warn", "not tried", "None of the examples that were tried has a token to learn.")
    if known.learned:
        return Check(name, "good", known.reading, "It has learned something that scores can speak of.", known.model)
    advice = (
        "It predicts these texts no better than a guess: its weights are random, or were trained on something else. "
        "Scores will show no influence. Check that the right weights and the right tokenizer were given."
    )
    return Check(name, "warn", known.reading, advice, known.model)


def _check_coverage(selection: Selection) -> Check:
    missing = [row for row in selection.coverage if _has_no_rule(row.reason)]
    value = (
        f"{selection.fraction:.0%} of {selection.total_parameters:,} parameters in "
        f"{len(selection.components)} components"
    )
    if not missing:
        return Check("coverage", "good", value, "Every parameter could be selected with --components all.", 0)
    count = sum(row.parameters for row in missing)
    kinds = "; ".join(dict.fromkeys(row.reason for row in missing))
    advice = f"{count:,} parameters cannot be attributed to ({kinds}), such as {missing[0].name}."
    return Check("coverage", "warn", value, advice, count)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
