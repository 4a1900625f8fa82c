"""The words and patterns that select components of a model."""

import fnmatch
import re
from collections.abc import Mapping, Sequence, Set
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from torch import nn

from vestige.errors import SpecError
from vestige.models._components import (
    Component,
    CoverageRow,
    LayerKind,
    Selection,
    components_of,
    layer_kind,
    owners_of_parameters,
)
from vestige.models._pretrained import adapter_kind, adapter_parameters, find_unsupported_adapter
from vestige.models._weights import quantized_bits
from vestige.progress import announce

WORDS = {
    "attention": "weights and biases of the attention blocks",
    "mlp": "weights and biases of the feed-forward blocks",
    "embedding": "token and position embeddings",
    "head": "the output layer, where it is not tied to the embedding",
    "norm": "scales and shifts of LayerNorm and RMSNorm",
    "lora": "the matrices of a PEFT LoRA adapter, and the magnitudes of DoRA",
    "adapter": "all that a PEFT adapter has trained, its modules_to_save and biases too",
    "all": "everything that has a rule",
    "default": "lora for a LoRA adapter, adapter for any other, attention and mlp otherwise",
}
_ATTENTION = re.compile(
    r"(^|\.)(self_)?(attn|attention|selfattention|encdecattention|crossattention)(\.|$)", re.IGNORECASE
)
_MLP = re.compile(r"(^|\.)(mlp|ffn|feed_forward|fc\d|fc_in|fc_out|densereludense|wi(_\d)?|wo)(\.|$)", re.IGNORECASE)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|score|classifier)\.")
_LAYER = re.compile(r"\.(\d+)\.")
_LAYERS_PATTERN = re.compile(r"layers?\s+(\d+)(?:\s*-\s*(\d+))?")


Rules = Set[LayerKind | Literal["adapter"] | None]
"""The layer rules of the modules that own a parameter, and whether an adapter trains it."""


def layer_number(name: str) -> int | None:
    """Return the index of the block that a parameter belongs to: the first number in its dotted name."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def select_components(model: nn.Module, patterns: Sequence[str] = ("default",)) -> Selection:
    """Return the components that `patterns` name, in the model's order, with a coverage row for every parameter.

    A pattern is one of the words in `WORDS`, a glob over parameter names (`model.layers.3.*`), whole parts of such
    names (`mlp.c_fc`, `transformer.h.1`, which is not `transformer.h.10`), `layers 2-5` (keeps only those blocks; alone
    it means `default` within them), any of the former with a leading `!` (leaves those out), or `@FILE`: a text file of
    patterns, one a line, lines that begin with # aside.

    What an adapter has trained and the default leaves out is announced.

    Raises:
        SpecError: a pattern matches nothing, nothing is left, a file is not there, or an adapter's kind has no rule.
    """
    rows: list[CoverageRow] = []
    components: list[Component] = []
    chosen = _matching_names(model, patterns)
    trained, unsupported = adapter_parameters(model), find_unsupported_adapter(model)
    for owned in owners_of_parameters(model):
        found, reason = components_of(model, owned)
        if unsupported and owned.name in trained:
            found, reason = [], f"no rule for what an adapter of the kind {unsupported} trains"
        if found and owned.name not in chosen:
            found, reason = [], "not selected"
        components += found
        rows.append(CoverageRow(owned.name, owned.parameter.numel(), bool(found), reason))
    if tuple(patterns) == ("default",):
        _report_adapter(model, [row for row in rows if row.name in trained and not row.selected], bool(components))
    if not components and (bits := quantized_bits(model)):
        raise SpecError(
            f"The maps of this model are packed in {bits} bits and have no gradient of their own. Give a LoRA adapter "
            "on it as the model, which is attributed to, name what is not packed, such as --components norm, or drop "
            "--quantize."
        )
    if not components:
        raise SpecError(
            f"--components {' '.join(patterns)} selects no parameter that Vestige can attribute to. "
            f"Words: {', '.join(WORDS)}; or a glob over names such as {rows[0].name if rows else 'model.*'!r}."
        )
    return Selection(tuple(components), tuple(rows))


def _report_adapter(model: nn.Module, left: Sequence[CoverageRow], selected: bool) -> None:
    """Announce what the model's adapter has trained and the default leaves out; raise where that is all of it."""
    if not left:
        return
    kind, first = adapter_kind(model), left[0]
    if not selected:
        raise SpecError(
            f"This is a PEFT adapter of the kind {kind}, and Vestige has no rule for what it has trained, such as "
            f"{first.name} ({first.reason}). It takes LoRA, DoRA, activated LoRA and LN_TUNING. To attribute to the "
            "frozen weights beneath the adapter instead, name them: --components attention mlp; or merge it into its "
            "base with merge_and_unload(), and save and give that."
        )
    rule = next((row for row in left if row.reason == "not selected"), None)
    advice = "Select them too with --components adapter." if rule else f"There is {first.reason}."
    announce(
        f"The {kind} adapter has trained {sum(row.parameters for row in left):,} more parameters, such as "
        f"{(rule or first).name}, which are not attributed to. {advice}"
    )


def parameter_words(model: nn.Module) -> dict[str, str]:
    """Return every parameter's name and the one word it falls under, `other` if none.

    A parameter without a rule is named by its name and by the module that holds it, like any other.
    """
    words = ("lora", "adapter", "norm", "embedding", "head", "attention", "mlp")
    return {
        name: next((word for word in words if _has_word(word, name, found)), "other")
        for name, found in _kinds(model).items()
    }


def _kinds(model: nn.Module) -> dict[str, Rules]:
    trained = adapter_parameters(model)
    kinds: dict[str, Rules] = {}
    for owned in owners_of_parameters(model):
        kinds[owned.name] = {layer_kind(module) for _, module, _ in owned.owners}
        if owned.name in trained:
            kinds[owned.name] |= {"adapter"}
    return kinds


def _matching_names(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the names of the parameters that the patterns select, whether or not a rule covers them."""
    kinds = _kinds(model)
    included, excluded, layers = set[str](), set[str](), set[int]()
    named = False
    for pattern in (part.strip() for given in patterns for word in _of_file(given) for part in word.split(",")):
        if found := _LAYERS_PATTERN.fullmatch(pattern):
            layers.update(range(int(found.group(1)), int(found.group(2) or found.group(1)) + 1))
        elif pattern.startswith("!"):
            excluded |= _names_of(pattern[1:], kinds)
        else:
            included |= _names_of(pattern, kinds)
            named = True
    if not named:
        included = _names_of("all" if excluded and not layers else "default", kinds)
    if layers:
        included = {name for name in included if layer_number(name) in layers}
    return included - excluded


def _of_file(pattern: str) -> list[str]:
    """Return the patterns that a file holds, where `@FILE` was given; any other pattern as it is."""
    if not pattern.startswith("@"):
        return [pattern]
    path = Path(pattern[1:]).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"--components {pattern}: {path} does not read as text ({error}). Give the file that `vestige evaluate "
            "components` wrote, or one of your own with a parameter or pattern on each line."
        ) from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise SpecError(f"--components {pattern}: {path} names no parameter. Write one, or a pattern, on each line.")
    return found


def _names_of(pattern: str, kinds: Mapping[str, Rules]) -> set[str]:
    """Return the names that one word, glob or run of dotted parts stands for."""
    if pattern in WORDS:
        words = _default_words(kinds) if pattern == "default" else (pattern,)
        return {name for name, found in kinds.items() if any(_has_word(word, name, found) for word in words)}
    parts, is_glob = f".{pattern}.", any(letter in pattern for letter in "*?[")
    names = {name for name in kinds if parts in f".{name}." or (is_glob and fnmatch.fnmatchcase(name, pattern))}
    if not names:
        near = get_close_matches(pattern, [*WORDS, *kinds], n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SpecError(
            f"Component pattern {pattern!r} matches no parameter.{hint} Use a word ({', '.join(WORDS)}), "
            f"`layers 0-3`, or a glob or whole parts of parameter names such as {next(iter(kinds), 'model.*')!r}."
        )
    return names


def _default_words(kinds: Mapping[str, Rules]) -> tuple[str, ...]:
    if any(".lora_" in name for name in kinds):
        return ("lora",)
    return ("adapter",) if any("adapter" in found for found in kinds.values()) else ("attention", "mlp")


def _has_word(word: str, name: str, found: Rules) -> bool:
    is_lora = ".lora_" in name
    is_norm, is_embedding = "norm" in found and not is_lora, "embedding" in found
    block = not is_norm and not is_embedding
    return {
        "all": True,
        "lora": is_lora,
        "adapter": "adapter" in found,
        "norm": is_norm,
        "embedding": is_embedding,
        "head": block and bool(_HEAD.search(name)) and layer_number(name) is None,
        "attention": block and bool(_ATTENTION.search(name)),
        "mlp": block and bool(_MLP.search(name)) and not _ATTENTION.search(name),
    }[word]
