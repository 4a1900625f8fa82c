"""Checks of the tokenised examples, without running the model, and of what the model is; a few examples to try."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from vestige.checks._report import Check, Coverage, Verdict
from vestige.data import Sharing, TokenizedData
from vestige.gradients import CausalLoss, Knowledge
from vestige.models import CoverageRow, LoadedModel, Selection, adapter_kind, adapter_parameters, parameter_words
from vestige.parsing import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES, PROBE_TOKENS = 4, 64
EXTRA_PADDING = 7
_NAMED = 3
_EXACT_ATTENTION = ("eager", "sdpa")


def check_data(data: TokenizedData, loaded: LoadedModel, *, max_length: int | None, chat: bool) -> list[Check]:
    """Check everything that the tokens alone show."""
    return [
        _check_vocabulary(data, loaded.model),
        _check_beginnings(data, loaded.tokenizer),
        _check_template(data, loaded.tokenizer, chat),
        _check_targets(data),
        _check_lengths(data, max_length),
        _check_empty(data),
        _check_duplicates(data),
    ]


def _check_vocabulary(data: TokenizedData, model: nn.Module) -> Check:
    name = "vocabulary"
    largest = np.array([int(ids.max()) if len(ids) else 0 for ids in data.input_ids])
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(getattr(embeddings, "weight", None), "shape", (None,))[0]
    if size is None:
        return Check(name, "good", f"largest token is {largest.max()}", "The model's vocabulary size is not known.")
    beyond = largest >= size
    value = f"largest token is {largest.max()}, the model has {size:,}"
    if not beyond.any():
        return Check(name, "good", value, "Every token has an embedding.", 0)
    advice = f"{_ids(data, beyond)}: the tokenizer is not this model's. Give the right one with --tokenizer."
    return Check(name, "bad", value, advice, int(beyond.sum()))


def _check_beginnings(data: TokenizedData, tokenizer: "PreTrainedTokenizerBase | None") -> Check:
    name = "beginning token"
    beginning: Any = getattr(tokenizer, "bos_token_id", None)
    if tokenizer is None or beginning is None:
        return Check(name, "good", "the tokenizer has none", "Nothing can be doubled.")
    token = tokenizer.convert_ids_to_tokens(beginning)
    once = np.array([len(ids) > 0 and ids[0] == beginning for ids in data.input_ids])
    twice = np.array([len(ids) > 1 and ids[0] == ids[1] == beginning for ids in data.input_ids])
    if twice.any():
        value = f"{token} stands twice before {int(twice.sum()):,} of {len(data):,} examples"
        advice = (
            f"{_ids(data, twice)}. Take it out of the texts, the chat template or the tokenizer's settings; a model "
            "that was not trained on it twice answers differently."
        )
        return Check(name, "bad", value, advice, int(twice.sum()))
    plain: Any = tokenizer("a", verbose=False)["input_ids"]
    if list(plain[:2]) == [beginning, beginning]:
        advice = (
            "The tokenizer itself writes it twice, and Vestige removes one. If the model was trained with both, "
            "give rows with `input_ids`."
        )
        return Check(name, "warn", f"{token} twice from the tokenizer, once here", advice, 0)
    value = f"{token} before {once.sum():,} of {len(data):,} examples"
    if 0 < once.sum() < len(data):
        advice = "Some examples begin with it and some do not; train and trace with one way of writing them."
        return Check(name, "warn", value, advice, 0)
    return Check(name, "good", value, "It stands nowhere twice.", 0)


def _check_template(data: TokenizedData, tokenizer: "PreTrainedTokenizerBase | None", chat: bool) -> Check:
    name = "chat template"
    template = bool(getattr(tokenizer, "chat_template", None))
    pairs = any(example.prompt is not None and "input_ids" not in example.extra for example in data.examples)
    if not template:
        return Check(name, "good", "the tokenizer has none", "Texts are used as they are written.")
    if pairs and not chat:
        advice = "If the model was trained on prompts in its chat template, add --chat, or nothing here is what it saw."
        return Check(name, "warn", "there is one, and prompts are not put into it", advice)
    used = chat or any(example.messages for example in data.examples)
    return Check(name, "good", "used" if used else "not needed", "Examples are written as the settings say.")


def _check_targets(data: TokenizedData) -> Check:
    name, without = "targets", data.target_counts == 0
    value = f"{int(data.target_counts.sum()):,} of {int(data.lengths.sum()):,} tokens are learned"
    if not without.any():
        return Check(name, "good", value, "Every example has something to learn.", 0)
    value += f"; {int(without.sum()):,} of {len(data):,} examples have none"
    advice = f"{_ids(data, without)}: they score zero. Give them a completion, or raise --max-length if it was cut off."
    return Check(name, "warn", value, advice, int(without.sum()))


def _check_lengths(data: TokenizedData, max_length: int | None) -> Check:
    lengths, cut = data.lengths, data.truncated
    value = f"{lengths.min()} to {lengths.max()} tokens, median {np.median(lengths):.0f}"
    if not cut.any():
        return Check("length", "good", value, "Nothing is cut off.", 0)
    value += f"; {int(cut.sum()):,} of {len(data):,} examples were cut at {max_length}"
    advice = (
        f"{_ids(data, cut)}: what lies behind is not attributed to. Split them, or raise --max-length if the model's "
        "context allows."
    )
    return Check("length", "warn", value, advice, int(cut.sum()))


def _check_empty(data: TokenizedData) -> Check:
    empty = data.lengths < 2
    if not empty.any():
        return Check("empty examples", "good", "none", "Every example has at least two tokens.", 0)
    advice = f"{_ids(data, empty)}: nothing can be predicted from fewer than two tokens. Leave them out."
    return Check("empty examples", "warn", f"{int(empty.sum()):,} of {len(data):,}", advice, int(empty.sum()))


def _check_duplicates(data: TokenizedData) -> Check:
    firsts: dict[tuple[bytes, bytes], int] = {}
    keys = ((ids.tobytes(), mask.tobytes()) for ids, mask in zip(data.input_ids, data.targets, strict=True))
    repeats = np.array([firsts.setdefault(key, row) != row for row, key in enumerate(keys)])
    count = int(repeats.sum())
    if not count:
        return Check("duplicates", "good", "none", "No two examples are the same to the model.", 0)
    advice = f"{_ids(data, repeats)}: copies get equal scores and fill the ranks together. Leave them out to see more."
    return Check("duplicates", "warn", f"{count:,} of {len(data):,} repeat an earlier one", advice, count)


def _ids(data: TokenizedData, chosen: np.ndarray) -> str:
    """Return the first few ids where `chosen` is true, and how many more there are."""
    rows = np.flatnonzero(chosen)
    shown = ", ".join(repr(data.examples[int(row)].id) for row in rows[:_NAMED])
    return f"{shown} and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else shown


def check_model(loaded: LoadedModel, selection: Selection, loss: CausalLoss) -> list[Check]:
    """Check precision, device, attention, output head, tied weights and coverage."""
    return [
        _check_precision(loaded),
        _check_device(loaded.model),
        _check_attention(loaded.model),
        _check_head(loaded.model, loss),
        _check_ties(loaded.model, selection),
        _check_coverage(selection),
    ]


def check_adapter(model: nn.Module, selection: Selection, data: TokenizedData) -> list[Check]:
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
    """Return whether the tokens contain others, one after another."""
    if len(ids) < len(wanted):
        return False
    return bool((np.lib.stride_tricks.sliding_window_view(ids, len(wanted)) == wanted).all(1).any())


def count_by_kind(model: nn.Module, selection: Selection) -> tuple[Coverage, ...]:
    """Count the parameters of every kind: how many, how many are attributed to, and why not the rest."""
    words = parameter_words(model)
    rows = []
    for kind in dict.fromkeys(words.values()):
        members = [row for row in selection.coverage if words[row.name] == kind]
        reasons = "; ".join(dict.fromkeys(row.reason for row in members if not row.selected))
        of_kind = sum(row.parameters for row in members)
        selected = sum(row.parameters for row in members if row.selected)
        rows.append(Coverage(kind, of_kind, selected, sum(map(_without_rule, members)), reasons))
    return tuple(rows)


def run_precision(model: nn.Module) -> torch.dtype:
    """Return the coarsest number format among the weights."""
    formats = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(formats, key=lambda dtype: torch.finfo(dtype).eps)


def _without_rule(row: CoverageRow) -> int:
    """Return the parameters of a tensor that no setting can select."""
    return row.parameters if row.reason not in ("", "not selected") else 0


def _check_precision(loaded: LoadedModel) -> Check:
    run = str(run_precision(loaded.model)).removeprefix("torch.")
    stored = _read_stored_precision(loaded.name)
    value = run if stored in (None, run) else f"{run}, from a {stored} checkpoint"
    if run in ("float32", "float64"):
        return Check("precision", "good", value, "Gradients keep their digits.")
    range_warning = " and may overflow" if run == "float16" else ""
    advice = f"Gradients keep 2 to 3 digits{range_warning}; --precision float32 is exact and takes twice the memory."
    return Check("precision", "warn", value, advice)


def _read_stored_precision(name: str) -> str | None:
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
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [found for found in names.values() if len(found) > 1]
    if not tied:
        ends: list[Any] = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
        wanted = getattr(getattr(model, "config", None), "tie_word_embeddings", False) and None not in ends
        if wanted and ends[0].weight is not ends[1].weight:
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
    missing = [row for row in selection.coverage if _without_rule(row)]
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


def explain_sharing(check: Check, sharing: Sharing, lengths: Int[np.ndarray, "example"]) -> Check:
    """Add to the check of batches which examples the model keeps apart."""
    if sharing.equal:
        advice = "The adapter's invocation holds the padding token: only examples of one length share a batch."
        return dataclasses.replace(check, advice=f"{check.advice} {advice}")
    groups = [int((np.asarray(lengths) > switch).sum()) for switch in sharing.switches]
    if not groups:
        return check
    switches = ", ".join(f"{switch:,}" for switch in sharing.switches)
    advice = (
        f"The model's rotary positions take other factors beyond {switches} tokens, for the whole batch at once: "
        f"{max(groups):,} of {len(lengths):,} examples are longer. Vestige never puts examples from both sides into "
        "one batch, so every score is that of the example alone; other software may not."
    )
    mixed = any(0 < count < len(lengths) for count in groups)
    verdict: Verdict = "warn" if mixed and check.verdict == "good" else check.verdict
    return dataclasses.replace(check, verdict=verdict, advice=f"{check.advice} {advice}")


def choose_probes(data: TokenizedData, context: int | None) -> TokenizedData:
    """Choose up to four examples with targets, of different lengths, cut to 64 tokens around their first target.

    A lone example gets its own tokens in reverse as company: something to be independent of.
    """
    tokens = PROBE_TOKENS if context is None else max(2, min(PROBE_TOKENS, context - EXTRA_PADDING))
    rows = rows_by_length(data)
    short = rows[data.lengths[rows] <= tokens]
    pool = short if len(short) >= PROBES else rows[:PROBES]
    picked = pool[np.linspace(0, len(pool) - 1, min(PROBES, len(pool))).astype(int)]
    probes = cut_examples(data.subset(picked), tokens)
    if len(probes) > 1:
        return probes
    twice = probes.subset([0, 0])
    return dataclasses.replace(twice, input_ids=[twice.input_ids[0], twice.input_ids[1][::-1].copy()])


def rows_by_length(data: TokenizedData) -> Int[np.ndarray, "kept"]:
    """Return the rows with targets, the shortest first."""
    rows = np.flatnonzero(data.target_counts > 0)
    return rows[np.argsort(data.lengths[rows], kind="stable")]


def cut_examples(data: TokenizedData, tokens: int) -> TokenizedData:
    """Cut each example to at most `tokens` tokens, beginning at most half a window before its first target."""
    ids, targets = [], []
    for row_ids, row_targets in zip(data.input_ids, data.targets, strict=True):
        first = int(row_targets.argmax()) if row_targets.any() else 0
        start = max(0, min(first - tokens // 2, len(row_ids) - tokens))
        ids.append(row_ids[start : start + tokens])
        window = row_targets[start : start + tokens].copy()
        window[:1] = False
        targets.append(window)
    return dataclasses.replace(data, input_ids=ids, targets=targets)


def pad_examples(data: TokenizedData, widths: Int[np.ndarray, "example"]) -> TokenizedData:
    """Fill each example up on the right to its width, with tokens that are no targets."""
    more = np.maximum(0, np.asarray(widths) - data.lengths)
    return dataclasses.replace(
        data,
        input_ids=[np.pad(ids, (0, count)) for ids, count in zip(data.input_ids, more, strict=True)],
        targets=[np.pad(mask, (0, count)) for mask, count in zip(data.targets, more, strict=True)],
    )
