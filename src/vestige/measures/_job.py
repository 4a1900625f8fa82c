"""What an audit measures: the models, and the examples with their answers, classes and marks."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
from jaxtyping import Bool, Int

from vestige import banks, indexes, models
from vestige.data import (
    Example,
    TokenizedData,
    ask,
    load_queries,
    read_row_list,
    rows_named,
    token_groups,
    tokenize,
)
from vestige.errors import DataError, ModelError, SpecError
from vestige.lazy import torch
from vestige.measures._choices import Choices, encoding_of, find_choices
from vestige.measures._measure import Measure, Need, Stage, choose_measures
from vestige.parsing import parse_json
from vestige.progress import announce
from vestige.settings import AuditSettings
from vestige.terminal import shorten

if TYPE_CHECKING:
    from torch import nn

Mask = Bool[np.ndarray, "example"]
Numbers = Int[np.ndarray, "example"]

MOST_CLASSES = 64
"""More different labels than these are ids or texts, not classes."""
UNKNOWN_STEPS = -1
_NUMBERED = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*", "*.gguf", "adapter_config.json")


class Subject(NamedTuple):
    """One set of weights."""

    number: int
    """Its checkpoint number in the evidence: steps trained where all say them, else its position in the list."""
    name: str
    source: Any
    steps: int | None
    fingerprint: str
    """Of the model, for the one that is loaded anyway; of the files, for others."""


@final
class Models:
    """One loaded model at a time; the one under audit to begin with."""

    def __init__(self, settings: AuditSettings, source: Any, loaded: models.LoadedModel) -> None:
        """Begin with what is loaded."""
        self._settings, self._held, self._loaded = settings, source, loaded

    def of(self, source: Any) -> models.LoadedModel:
        """Load the model behind `source`; the one before it is freed."""
        if source is not self._held:
            del self._loaded
            self._held = None
            self._loaded = models.load_model(source, **{**self._settings.loading, "tokenizer": None})
            self._held = source
        return self._loaded


@final
class AuditJob:
    """Everything that the pieces of an audit are computed from; rows are the data's, then the holdout's."""

    def __init__(self, settings: AuditSettings) -> None:
        """Load the model under audit and the examples.

        Raises:
            UserError: Something about the model, the data or the settings needs the caller.
        """
        self.settings, self.measures = settings, choose_measures(settings)
        loaded = models.load_model(settings.model, **settings.loading)
        model, self.tokenizer = loaded.model, loaded.tokenizer
        self.subjects = find_subjects(settings, loaded)
        self.main = self.subjects[-1]
        self.models = Models(settings, self.main.source, loaded)
        self.parameters = sum(each.numel() for each in model.parameters())
        self.is_adapter = is_adapter(model)
        self.token_budget, self.sharing = indexes.batch_tokens(settings, loaded), models.batch_sharing(model)
        own = indexes.read_data(settings, settings.data, loaded)
        self.own_fingerprint = own.fingerprint  # a bank of the data without the holdout is recognised by it
        self.data = _add_holdout(own, settings, loaded)
        self.count = len(own)
        self.held_out: Mask = np.arange(len(self.data)) >= self.count
        self.own: Mask = ~self.held_out
        self.texts = [example.display for example in self.data.examples]
        self.answers = find_answers(self.data, getattr(self.tokenizer, "eos_token_id", None))
        self.choices = find_choices(self.data, settings, loaded)
        self.pairs = None if settings.pair_field is None else _find_pairs(self.data, settings.pair_field, self.held_out)
        """Rows of the data, each with that of its twin in the holdout, [pair, 2]."""
        of_states = any("hidden states" in each.needs for each in self.measures)
        self.layers, self.widths = _find_layers(model, settings) if of_states else ((), ())
        self.classes, self.class_names, self.no_classes = _find_classes(self.data.examples, self.choices, settings)

    def at(self, stage: Stage) -> list[Measure]:
        """Return the measures that are computed at a stage."""
        return [each for each in self.measures if each.stage == stage]

    def needs(self, need: Need) -> bool:
        """Return whether a measure takes something."""
        return any(need in each.needs for each in self.measures)

    @cached_property
    def flagged(self) -> Mask | None:
        """The examples that `--flag` marks; None without it."""
        flag = self.settings.flag
        return None if flag is None else _find_marks(self.data.examples, flag, self.count)

    @cached_property
    def groups(self) -> Numbers:
        """The text of each example: copies have the same number."""
        return token_groups(self.data)

    @cached_property
    def reference_fingerprint(self) -> str | None:
        """The fingerprint of the reference model's weights."""
        reference = self.settings.reference_model
        return None if reference is None else _fingerprint_weights(reference)

    @cached_property
    def bank(self) -> banks.Bank | None:
        """The bank that was given."""
        return None if self.settings.bank is None else banks.Bank.open(self.settings.bank)


def is_adapter(model: nn.Module) -> bool:
    """Return whether LoRA matrices are what was trained."""
    return any("lora_" in name for name, _ in model.named_parameters())


def find_subjects(settings: AuditSettings, loaded: models.LoadedModel) -> tuple[Subject, ...]:
    """Return the checkpoints in their order, and last the model under audit.

    A checkpoint that is the model itself, or holds the same bytes as another, is measured once: the first step of a
    warmup leaves the weights as they were.

    Raises:
        ModelError: One is not there.
    """
    given = settings.checkpoints
    listed = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    sources = [source for one in listed for source in _list_checkpoints(one)]
    prints = [_fingerprint_weights(source) for source in sources]
    own, steps = _fingerprint_weights(settings.model), _find_steps(settings.model)
    kept: dict[str, tuple[Any, str, int | None]] = {}
    for source, mark in zip(sources, prints, strict=True):
        if mark == own:
            steps = _find_steps(source) if steps is None else steps
        elif mark in kept:
            announce(f"{_name(source)} holds the same weights as {_name(kept[mark][0])}, and is measured with it.")
        else:
            kept[mark] = (source, mark, _find_steps(source))
    every = [*kept.values(), (settings.model, loaded.fingerprint, steps)]
    numbers = [known for _, _, known in every if known is not None]
    if len(numbers) < len(every) or numbers != sorted(set(numbers)):
        numbers = [UNKNOWN_STEPS] if len(every) == 1 else list(range(len(every)))
    return tuple(
        Subject(number, _name(source), source, known, mark)
        for number, (source, mark, known) in zip(numbers, every, strict=True)
    )


def _list_checkpoints(given: Any) -> list[Any]:
    """Return the checkpoints of a Trainer's run in their order, or what was given."""
    if isinstance(given, torch.nn.Module):
        return [given]
    folder = Path(str(given)).expanduser()
    inside = [each for each in folder.glob("checkpoint-*") if _NUMBERED.fullmatch(each.name)]
    inside.sort(key=lambda each: int(each.name.partition("-")[2]))
    return [str(each) for each in inside] or [given]


def _fingerprint_weights(source: Any) -> str:
    """Return the sha256 of a live module's weights, or of the weight files."""
    if isinstance(source, torch.nn.Module):
        return models.model_fingerprint(source)
    found = models.find_source(source)
    paths = [found.gguf] if found.gguf else sorted({path for name in _WEIGHTS for path in found.folder.glob(name)})
    if not paths:
        raise ModelError(f"{source} holds no weights. Give folders of checkpoints as --checkpoints.")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name}\n".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _find_steps(source: Any) -> int | None:
    """Return the optimizer steps trained, from the folder's name or the Trainer's record."""
    if isinstance(source, torch.nn.Module):
        return None
    folder = Path(str(source)).expanduser()
    if match := _NUMBERED.fullmatch(folder.name):
        return int(match[1])
    try:
        return int(parse_json((folder / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _name(source: Any) -> str:
    return type(source).__name__ if isinstance(source, torch.nn.Module) else str(source)


def _find_layers(model: nn.Module, settings: AuditSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the layers whose states are measured, and their widths; none where they do not exist."""
    one = torch.zeros((1, 1), dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        output: Any = model(input_ids=one, output_hidden_states=True, use_cache=False)
    states = getattr(output, "hidden_states", None) or ()
    last = len(states) - 1
    found: set[int] = set()
    for word in settings.layers:
        found |= set(range(1, last + 1)) if word == "all" else {last if word == "last" else int(word)}
    if last < 0:
        return (), ()
    if max(found) > last:
        raise SpecError(f"--layers {max(found)}: the model has layers 0 (embeddings) to {last}.")
    layers = tuple(sorted(found))
    return layers, tuple(states[layer].shape[-1] for layer in layers)


def _add_holdout(data: TokenizedData, settings: AuditSettings, loaded: models.LoadedModel) -> TokenizedData:
    """Return the data with the holdout behind them."""
    if settings.holdout is None:
        return data
    given = load_queries(settings.holdout, may_be_prompts=False, focus="keep", on_bad_text=settings.on_bad_text)
    questions = ask(given, data.examples, chat=settings.chat, tokenizer=loaded.tokenizer, name="Prompts of --holdout")
    held = tokenize(questions.queries, loaded.tokenizer, name="holdout", **encoding_of(settings, loaded))
    return TokenizedData(
        [*data.examples, *held.examples],
        [*data.input_ids, *held.input_ids],
        [*data.targets, *held.targets],
        np.concatenate([data.truncated, held.truncated]),
        hashlib.sha256(f"{data.fingerprint}+{held.fingerprint}".encode()).hexdigest(),
        data.name,
    )


def _find_pairs(data: TokenizedData, field: str, held_out: Mask) -> Int[np.ndarray, "pair side"]:
    """Return the rows of the data and of the holdout that have the same value in a column.

    Raises:
        DataError: A side lacks the column, a value repeats within a side, or none is in both.
    """
    names = [None if (cell := example.extra.get(field)) is None else str(cell) for example in data.examples]
    sides: list[dict[str | None, int]] = []
    for side, place in ((~held_out, "the data"), (held_out, "--holdout")):
        rows = [int(row) for row in np.flatnonzero(side) if names[row] is not None]
        sides.append({names[row]: row for row in rows})
        if not rows:
            raise DataError(f"--pair-field {field}: no example of {place} has that column.")
        if len(sides[-1]) < len(rows):
            repeated = Counter(names[row] for row in rows).most_common(1)[0][0]
            raise DataError(f"--pair-field {field}: {repeated!r} repeats in {place}; each example has one twin.")
    pairs = [(row, sides[1][name]) for name, row in sides[0].items() if name in sides[1]]
    if not pairs:
        raise DataError(f"--pair-field {field}: no value of the data is in --holdout too.")
    return np.array(pairs, dtype=np.int64)


def _find_marks(examples: Sequence[Example], flag: str, count: int) -> Mask:
    """Return where a column is true, or equal to the value that is requested; or the rows that a file lists.

    The first `count` examples are the data's.

    Raises:
        DataError: No example of the data has the column or the value, or the file names other rows.
    """
    own = examples[:count]
    if Path(flag).expanduser().is_file():
        names = [entry.name for entry in read_row_list(flag)]
        named = rows_named(names, [example.id for example in own], place=flag, data="the data")
        return np.isin(np.arange(len(examples)), list(named.values()))
    name, equals, value = (part.strip() for part in flag.partition("="))
    cells = [_cell(example, name) for example in examples]
    held_cells = {str(cell) for cell in (_cell(example, name) for example in own) if cell is not None}
    if not held_cells:
        columns = sorted({"source", "label", *(key for example in examples[:100] for key in example.extra)})
        raise DataError(f"--flag {flag}: no example has a column {name!r}. There are: {', '.join(columns)}.")
    if not equals:  # a column of nothing but false says that nothing is to be found, which the run notes
        return np.array([str(cell).lower() not in ("none", "", "0", "0.0", "false", "no") for cell in cells])
    found = np.array([cell is not None and str(cell) == value for cell in cells])
    if not found[:count].any():
        raise DataError(
            f"--flag {flag} marks no example of the data. Column {name!r} holds "
            f"{shorten(', '.join(sorted(held_cells)), 200)}. Type --flag COLUMN=VALUE, or leave it out."
        )
    return found


def _cell(example: Example, name: str) -> Any:
    return getattr(example, name) if name in ("source", "label") else example.extra.get(name)


def _find_classes(
    examples: Sequence[Example], choices: Choices, settings: AuditSettings
) -> tuple[Numbers, tuple[str, ...], str]:
    """Return the class of each example, -1 for none; names of the classes; and the reason where there are none."""
    field = settings.label_field
    cells: list[str | None]
    if field is not None:
        cells = [None if (cell := _cell(example, field)) is None else str(cell) for example in examples]
        if all(cell is None for cell in cells):
            raise DataError(f"--label-field {field}: no example has that column.")
    else:
        known = choices.known
        cells = [(one.completion or "").strip() if has else None for one, has in zip(examples, known, strict=True)]
        if not known.any() and any(example.label is not None for example in examples):
            announce("The column `label` is not used as classes. Where it holds them, type --label-field label.")
    names = sorted({cell for cell in cells if cell is not None})
    nothing = np.full(len(cells), -1, dtype=np.int64)
    if len(names) < 2:
        return nothing, (), "free text has no classes: name a column with labels as --label-field"
    if len(names) > MOST_CLASSES:
        return nothing, (), f"{len(names)} different labels are no classes (at most {MOST_CLASSES})"
    codes = {name: code for code, name in enumerate(names)}
    return np.array([-1 if cell is None else codes[cell] for cell in cells], dtype=np.int64), tuple(names), ""


def find_answers(data: TokenizedData, end_token: int | None) -> tuple[Numbers, Numbers]:
    """Return first and one past the last position of the last run of target tokens, an end token not counted.

    Both are 0 where an example is all text and has no answer of its own.
    """
    first, last = (np.zeros(len(data), dtype=np.int64) for _ in range(2))
    for row, (ids, targets) in enumerate(zip(data.input_ids, data.targets, strict=True)):
        positions = np.flatnonzero(targets)
        if not len(positions) or bool(targets[1:].all()):
            continue
        breaks = np.flatnonzero(np.diff(positions) > 1)
        begin, end = positions[breaks[-1] + 1 if len(breaks) else 0], positions[-1] + 1
        if end - begin > 1 and end_token is not None and ids[end - 1] == end_token:
            end -= 1
        first[row], last[row] = begin, end
    return first, last
