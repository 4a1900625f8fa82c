"""What an audit measures: the examples with their answers, classes and marks, and the models."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import nn

from vestige.banks import Bank
from vestige.data import (
    Encoder,
    Example,
    Sharing,
    TokenizedData,
    ask,
    load_queries,
    read_row_list,
    rows_named,
    token_groups,
    tokenize,
)
from vestige.errors import DataError, SpecError
from vestige.indexes import batch_tokens, read_data, tokens_at_most
from vestige.measures._answers import Answers, Choices, find_answers, find_choices
from vestige.measures._registry import Measure, Need, Stage, requested_measures
from vestige.measures._subjects import Models, Subject, find_subjects, is_adapter, weights_fingerprint
from vestige.models import batch_sharing, load_model
from vestige.progress import announce
from vestige.settings import AuditSettings
from vestige.terminal import shorten

MOST_CLASSES = 64
"""More different labels than these are ids or texts, not classes."""


@dataclass(frozen=True)
class AuditJob:
    """Everything that pieces are computed from; rows are the data's, then the holdout's."""

    settings: AuditSettings
    measures: tuple[Measure, ...]
    """What is measured, in their order; what others are made of is among them."""
    subjects: tuple[Subject, ...]
    models: Models
    tokenizer: Any
    data: TokenizedData
    own_fingerprint: str
    """Fingerprint of the data without the holdout, by which a bank of it is recognised."""
    held_out: Bool[np.ndarray, "example"]
    answers: Answers
    choices: Choices
    classes: Int[np.ndarray, "example"]
    """Number of the class of each example, -1 for one that has none."""
    class_names: tuple[str, ...]
    no_classes: str
    """Why there are none; empty where there are."""
    layers: tuple[int, ...]
    widths: tuple[int, ...]
    """Of the hidden states at each of these layers."""
    token_budget: int
    sharing: Sharing
    """Which examples may share a batch."""
    parameters: int
    is_adapter: bool

    @property
    def main(self) -> Subject:
        """The model under audit."""
        return self.subjects[-1]

    def at(self, stage: Stage) -> list[Measure]:
        """Return the measures that are computed at a stage."""
        return [each for each in self.measures if each.stage == stage]

    def needs(self, need: Need) -> bool:
        """Return whether a measure takes something."""
        return any(need in each.needs for each in self.measures)

    @property
    def texts(self) -> list[str]:
        """The text of each example as it is shown to a reader."""
        return [example.display for example in self.data.examples]

    @cached_property
    def flagged(self) -> Bool[np.ndarray, "example"] | None:
        """The examples that `--flag` marks; None without it."""
        return None if self.settings.flag is None else marks(self.data.examples, self.settings.flag, self.held_out)

    @cached_property
    def groups(self) -> Int[np.ndarray, "example"]:
        """The text of each example: copies have the same number."""
        return token_groups(self.data)

    @cached_property
    def reference_fingerprint(self) -> str | None:
        """The fingerprint of the reference model's weights."""
        reference = self.settings.reference_model
        return None if reference is None else weights_fingerprint(reference)

    @cached_property
    def bank(self) -> Bank | None:
        """The bank that was given."""
        return None if self.settings.bank is None else Bank.open(self.settings.bank)


def open_job(settings: AuditSettings) -> AuditJob:
    """Load the model under audit and the examples.

    Raises:
        UserError: Something about the model, the data or the settings needs the caller.
    """
    measures = requested_measures(settings)
    loaded = load_model(
        settings.model, tokenizer=settings.tokenizer, precision=settings.precision, device=settings.device
    )
    subjects = find_subjects(settings, loaded)
    data = read_data(settings, settings.data, loaded)
    limit = tokens_at_most(settings, loaded)
    held = None
    if settings.holdout is not None:
        given = load_queries(settings.holdout, may_be_prompts=False, on_bad_text=settings.on_bad_text)
        asked = ask(given, data.examples, chat=settings.chat, tokenizer=loaded.tokenizer, name="Prompts of --holdout")
        held = tokenize(
            asked.queries,
            loaded.tokenizer,
            max_length=limit,
            name="holdout",
            chat=bool(settings.chat),
            vocabulary=loaded.vocabulary,
        )
    whole = data if held is None else _joined(data, held)
    held_out = np.arange(len(whole)) >= len(data)
    if loaded.tokenizer is None:
        encoder = None
    else:
        encoder = Encoder(loaded.tokenizer, max_length=limit, name="choices", chat=bool(settings.chat))
    end_token = getattr(loaded.tokenizer, "eos_token_id", None)
    choices = _choices(whole, encoder, settings)
    of_states = any("hidden states" in each.needs for each in measures)
    layers, widths = _layers(loaded.model, settings) if of_states else ((), ())
    classes, names, reason = _classes(whole.examples, choices, settings)
    parameters = sum(each.numel() for each in loaded.model.parameters())
    return AuditJob(
        settings=settings,
        measures=measures,
        subjects=subjects,
        models=Models(settings, subjects[-1], loaded),
        tokenizer=loaded.tokenizer,
        data=whole,
        own_fingerprint=data.fingerprint,
        held_out=held_out,
        answers=find_answers(whole, end_token),
        choices=choices,
        classes=classes,
        class_names=names,
        no_classes=reason,
        layers=layers,
        widths=widths,
        token_budget=batch_tokens(settings, loaded),
        sharing=batch_sharing(loaded.model),
        parameters=parameters,
        is_adapter=is_adapter(loaded.model),
    )


def marks(examples: Sequence[Example], flag: str, held_out: np.ndarray) -> Bool[np.ndarray, "example"]:
    """Return where a column is true, or equal to the value that is requested; or the rows that a file lists.

    Raises:
        DataError: No example of the data has the column or the value, or the file names other rows.
    """
    if Path(flag).expanduser().is_file():
        ids = [example.id for example in examples]
        own = [name for name, held in zip(ids, held_out, strict=True) if not held]
        named = rows_named([entry.name for entry in read_row_list(flag)], own, place=flag, data="the data")
        return np.isin(np.arange(len(ids)), np.flatnonzero(~held_out)[list(named.values())])
    name, equals, value = (part.strip() for part in flag.partition("="))
    cells = [_cell(example, name) for example in examples]
    if all(cell is None for cell, held in zip(cells, held_out, strict=True) if not held):
        columns = sorted({"source", "label", *(key for example in examples[:100] for key in example.extra)})
        raise DataError(f"--flag {flag}: no example has a column {name!r}. There are: {', '.join(columns)}.")
    if not equals:  # a column of nothing but false says that nothing is to be found, which the run notes
        return np.array([str(cell).lower() not in ("none", "", "0", "0.0", "false", "no") for cell in cells])
    found = np.array([cell is not None and str(cell) == value for cell in cells])
    if not found[~held_out].any():
        there = sorted({str(cell) for cell, held in zip(cells, held_out, strict=True) if not held and cell is not None})
        held = shorten(", ".join(there) or "nothing", 200)
        raise DataError(
            f"--flag {flag} marks no example of the data. Column {name!r} holds {held}. "
            "Type --flag COLUMN=VALUE, or leave it out."
        )
    return found


def _cell(example: Example, name: str) -> Any:
    return getattr(example, name) if name in ("source", "label") else example.extra.get(name)


def _joined(data: TokenizedData, held: TokenizedData) -> TokenizedData:
    digest = hashlib.sha256(f"{data.fingerprint}+{held.fingerprint}".encode()).hexdigest()
    return TokenizedData(
        [*data.examples, *held.examples],
        [*data.input_ids, *held.input_ids],
        [*data.targets, *held.targets],
        np.concatenate([data.truncated, held.truncated]),
        digest,
        data.name,
    )


def _choices(data: TokenizedData, encoder: Encoder | None, settings: AuditSettings) -> Choices:
    if encoder is None:
        nothing = np.zeros((len(data), 1), dtype=np.int64)
        reasons = {"the model has no tokenizer": len(data)}
        return Choices(nothing[:, 0], nothing, nothing.astype(bool), nothing[:, 0].copy(), reasons)
    return find_choices(data, encoder, settings.choices_field)


def _classes(
    examples: Sequence[Example], choices: Choices, settings: AuditSettings
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Return the class of each example, names of the classes, and the reason where there are none."""
    field = settings.label_field
    cells: list[str | None]
    if field is not None:
        cells = [None if (cell := _cell(example, field)) is None else str(cell) for example in examples]
        if all(cell is None for cell in cells):
            raise DataError(f"--label-field {field}: no example has that column.")
    elif choices.known.any():
        cells = [
            (example.completion or "").strip() if known else None
            for example, known in zip(examples, choices.known, strict=True)
        ]
    else:
        if any(example.label is not None for example in examples):
            announce("The column `label` is not used as classes. Where it holds them, type --label-field label.")
        cells = [None] * len(examples)
    names = sorted({cell for cell in cells if cell is not None})
    nothing = np.full(len(cells), -1, dtype=np.int64)
    if len(names) < 2:
        return nothing, (), "free text has no classes: name a column with labels as --label-field"
    if len(names) > MOST_CLASSES:
        return nothing, (), f"{len(names)} different labels are no classes (at most {MOST_CLASSES})"
    codes = {name: code for code, name in enumerate(names)}
    return np.array([-1 if cell is None else codes[cell] for cell in cells], dtype=np.int64), tuple(names), ""


def _layers(model: nn.Module, settings: AuditSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
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
