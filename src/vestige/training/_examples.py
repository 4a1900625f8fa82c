"""The examples of a training: what it reads, which are drawn, how much each counts, and what is measured of them."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vestige.data import NO_TARGET, Example, TokenizedData, ask, load_queries, make_batch, plan_batches, tokenize
from vestige.errors import DataError, IndexMismatch, SpecError, differences
from vestige.gradients import FittingBatches
from vestige.indexes import read_data, tokens_at_most
from vestige.measures import margin
from vestige.models import LoadedModel, batch_sharing, load_model
from vestige.online import ID_KEY
from vestige.progress import announce
from vestige.settings import AttributeSettings, ReadingSettings, TrainedOn, TrainSettings
from vestige.training._engine import LEARNED, WEIGHT, Losses, example_losses, leave_no_trace
from vestige.training._store import TrainingRun

Context = Callable[[], AbstractContextManager[Any]]
ALARM_OFF = {name: one.default for name, one in TrainSettings.model_fields.items() if name.startswith("alarm")}
"""Settings of a training without an alarm; without `alarm` the others are refused at any other value."""
_SPLIT = 0x5EED
"""Sets the draw of the members apart from every other use of the same seed."""
_SHOWN = 3
_SMALLEST, _LARGEST = 1e-30, 1e30
"""Sums over a batch of weights in between, and what is divided by them, stay finite in float32."""


class TrainInputs(NamedTuple):
    """What a training begins with."""

    loaded: LoadedModel
    data: TokenizedData
    weights: np.ndarray | None
    """How much each example counts, float32 [example]; None where all count alike."""
    validation: TokenizedData | None = None
    """Whose loss the training examples are scored by."""


def repeat_settings(training: TrainingRun, **changed: Any) -> TrainSettings:
    """Return the settings of a recorded training.

    Args:
        training: Of `vestige train`.
        changed: Settings in place of recorded ones, such as `model` and `data` where they were objects in a Python
            program; None stands for the recorded one.

    Raises:
        SpecError: They were not recorded, or something was a live object and is not given.
    """
    config = training.record.get("config")
    if training.id is None or not isinstance(config, Mapping):
        raise SpecError(
            f"{training.folder} was recorded from a Trainer of your own, whose settings the record does not hold. "
            "Give a training that `vestige train` made."
        )
    given = {**config, **{name: value for name, value in changed.items() if value is not None}}
    for name in ("model", "data", "tokenizer"):
        if isinstance(given.get(name), str) and given[name].startswith("<"):
            raise SpecError(
                f"{training.folder}: `{name}` was a live {given[name][1:-1]} in a Python program. Give the same again "
                f"in Python, as {name}=..."
            )
    if isinstance(given["data"], list) and all(isinstance(one, str) for one in given["data"]):
        given["data"] = [Path(one) for one in given["data"]]  # files: a list of strings is a list of texts in Python
    return TrainSettings(**given)


def adopt_settings(
    settings: AttributeSettings, last: Path, trained: TrainSettings | None, **changed: Any
) -> AttributeSettings:
    """Return the settings of a question about a recorded training, whose last checkpoint and own settings these are."""
    changed |= {"data": None, "components": ("adapter",) if (last / "adapter_config.json").is_file() else ("all",)}
    if trained is not None:
        changed |= {"max_length": trained.max_length, "chat": trained.chat if settings.chat is None else settings.chat}
    return settings.model_copy(update=changed)


def require_inputs(training: TrainingRun, loaded: LoadedModel, data: TokenizedData) -> None:
    """Raise unless model and data are those of a recorded training.

    Raises:
        IndexMismatch: They are not; the message says what was trained with.
    """
    now = {"model": loaded.fingerprint, "data": data.fingerprint}
    old = {name: training.record["identity"][name] for name in now}
    if found := differences(old, now, training.record["names"], {"model": loaded.name, "data": data.name}):
        raise IndexMismatch(
            f"{training.folder} was trained with another {' and another '.join(one.field for one in found)} than there "
            f"is now: {'; '.join(f'{one.old} then, {one.new} now' for one in found)}. Put back what was trained with, "
            "or name it."
        )


def read_inputs(settings: TrainSettings) -> TrainInputs:
    """Read the model and the data as a training takes them.

    Raises:
        UserError: Something about the model or the data needs the caller.
    """
    loaded = load_model(settings.model, **settings.loading)
    data, weights = read_learned(settings, loaded)
    given = settings.validation
    validation = None if given is None else read_questions(given, settings, loaded, data, "validation")
    return TrainInputs(loaded, data, weights, validation)


def read_learned(
    settings: TrainSettings, loaded: LoadedModel
) -> tuple[TokenizedData, Float[np.ndarray, "example"] | None]:
    """Read the data as a training with these settings learns them, with their weights; None if all are 1."""
    return as_learned(read_data(settings, settings.data, loaded), settings.loss, loaded)


def as_learned(
    data: TokenizedData, learn: TrainedOn, loaded: LoadedModel
) -> tuple[TokenizedData, Float[np.ndarray, "example"] | None]:
    """Return the data with what is learned as their targets, and their weights; None if all are 1."""
    if learn == "answer":
        data = only_answers(data, getattr(loaded.tokenizer, "eos_token_id", None))
    weights = read_weights(data)
    if weights is None:
        return data, None
    none = int((weights == 0).sum())
    announce(
        f"{data.name}: {int((weights != 1).sum()):,} of {len(data):,} examples have a `weight` other than 1 "
        f"({weights.min():g} to {weights.max():g}); the loss of a step is the weighted mean over its target tokens."
        + (f" {none:,} with weight 0 are left out." if none else "")
    )
    return with_weights(data, weights), weights


def members_of(groups: Int[np.ndarray, "example"], fraction: float, seed: int) -> Bool[np.ndarray, "example"]:
    """Draw the examples to train on: a share of the groups, without replacement, each with all its examples.

    Raises:
        DataError: The share is less than one group.
    """
    distinct = int(groups.max(initial=-1)) + 1
    count = round(distinct * fraction)
    if count < 1:
        raise DataError(f"--split-fraction {fraction:g} of {distinct} distinct examples is none. Give a larger share.")
    return np.isin(groups, np.random.default_rng([_SPLIT, seed]).permutation(distinct)[:count])


def read_questions(
    given: Any,
    settings: ReadingSettings,
    loaded: LoadedModel,
    data: TokenizedData,
    name: str,
    limit: int | None = None,
) -> TokenizedData:
    """Read texts that are not trained on, the first `limit` of them, put to the model as the data are.

    Raises:
        DataError: One has no target token: a prompt without an answer has no loss.
    """
    found = load_queries(given, on_bad_text=settings.on_bad_text, limit=limit)
    texts = tokenize(
        ask(found, data.examples, chat=settings.chat, tokenizer=loaded.tokenizer).queries,
        loaded.tokenizer,
        max_length=tokens_at_most(settings, loaded),
        name=name,
        chat=bool(settings.chat),
        vocabulary=loaded.vocabulary,
    )
    empty = np.flatnonzero(texts.target_counts == 0)
    if empty.size:
        raise DataError(
            f"Query {texts.examples[empty[0]].id!r} has no token whose loss could be measured ({empty.size} such "
            "queries). Give each a `text`, or an answer (`completion`, or an assistant's turn) that is not cut off; "
            "`vestige data generate` writes answers."
        )
    return texts


def only_answers(data: TokenizedData, end_token: int | None) -> TokenizedData:
    """Return the same examples with the answer as their only target: the completion without the end token.

    Raises:
        DataError: An example is no prompt with a completion, or its answer was cut off.
    """
    rows = zip(data.examples, data.targets, data.truncated, strict=True)
    lost = [example.id for example, mask, truncated in rows if truncated and not mask.any()]
    if lost:
        named = ", ".join(map(repr, lost[:_SHOWN])) + (", ..." if len(lost) > _SHOWN else "")
        raise DataError(
            f"{data.name}: {len(lost):,} examples ({named}) are so long that their answer was cut off. Give a larger "
            "--max-length, or shorten them: `vestige data multiple-choice` with --tokenizer and --max-length does."
        )
    targets = [mask.copy() for mask in data.targets]
    for example, ids, kept in zip(data.examples, data.input_ids, targets, strict=True):
        if example.completion is None and "input_ids" not in example.extra:
            raise DataError(
                f"{data.name}, example {example.id!r}: --loss answer needs a `prompt` and a `completion`, and it has "
                "neither. Leave --loss out to learn the whole text."
            )
        learned = np.flatnonzero(kept)
        if len(learned) > 1 and ids[learned[-1]] == end_token:
            kept[learned[-1]] = False
    return dataclasses.replace(data, targets=targets, fingerprint=f"{data.fingerprint}:answer")


def read_weights(data: TokenizedData) -> Float[np.ndarray, "example"] | None:
    """Return the field `weight` of every example as float32, 1 where there is none; None if all are 1.

    Raises:
        DataError: One is negative, NaN, infinite or no number; the message names the row.
    """
    found = np.array([_weight(example, data.name) for example in data.examples], dtype=np.float32)
    return None if (found == 1).all() else found


def with_weights(data: TokenizedData, weights: Float[np.ndarray, "example"]) -> TokenizedData:
    """Return the same data under a fingerprint that depends on the weights."""
    digest = hashlib.sha256(f"{data.fingerprint}:weights:".encode() + weights.astype("<f4").tobytes()).hexdigest()
    return dataclasses.replace(data, fingerprint=digest)


def _weight(example: Example, name: str) -> float:
    given = example.extra.get(WEIGHT)
    # Tables hold texts: an empty cell is no weight.
    if given is None or (isinstance(given, str) and not given.strip()):
        return 1.0
    try:
        number = float("nan") if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        number = float("nan")
    if number == 0 or _SMALLEST <= number <= _LARGEST:
        return number
    raise DataError(
        f"{name}, row {example.row} (id {example.id!r}): its `weight` is {given!r}, expected 0 or a positive number "
        f"({_SMALLEST:g} to {_LARGEST:g}). Correct it, or rename the column if it is no weight."
    )


@torch.no_grad()
def measure(model: nn.Module, data: TokenizedData, token_budget: int, *, mean: bool) -> dict[str, np.ndarray]:
    """Measure loss, margin, gap and accuracy of each text, float64 [text].

    The loss is the cross-entropy summed over target tokens, or averaged if `mean`. With l the negative mean loss per
    target token, the margin is l - log(1 - e^l), the log-odds of the tokens' geometric mean probability (the output
    that TRAK measures). The gap is the target's logit minus the largest other logit, the accuracy whether it is above
    zero, both averaged over target tokens. Without a target token the loss is 0 and the rest NaN.
    """
    found, counts = np.full((3, len(data)), np.nan), data.target_counts
    device, fitting = next(model.parameters()).device, FittingBatches(data.lengths)

    def run(rows: np.ndarray) -> None:
        batch = make_batch(data, rows).to(device)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        measured = example_losses(logits, batch.labels)
        found[:, rows] = measured.loss, measured.gap, measured.accuracy

    for batch in plan_batches(data.lengths, token_budget, sharing=batch_sharing(model)):
        if counts[batch].any():
            fitting.run(batch, run)
    loss, gap, accuracy = found
    whole = np.where(counts > 0, loss * (1 if mean else counts), 0.0)
    return {"loss": whole, "margin": margin(loss), "gap": gap, "accuracy": accuracy}


class Watched:
    """Examples that are measured from outside while a model trains on them, or on others.

    Args:
        rows: Dictionaries as the collator takes them, each with its id.
        collate: From rows to the model's keyword inputs, with `labels`, and the ids of the rows.
        size: Rows in a batch.
    """

    def __init__(self, rows: Any, collate: Callable[[list[Any]], Mapping[str, Any]], size: int) -> None:
        self._rows, self._collate, self._size = rows, collate, size
        self.ids: list[str] = []
        """The ids of the rows, once they have been measured."""

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield the inputs of each batch, in the order of the rows.

        Raises:
            DataError: A batch has no labels.
        """
        for begin in range(0, len(self._rows), self._size):
            rows = range(begin, min(begin + self._size, len(self._rows)))
            batch = dict(self._collate([self._rows[row] for row in rows]))
            if not isinstance(batch.get("labels"), Tensor):
                raise DataError(f"The collator makes {', '.join(batch) or 'nothing'}, no `labels`: no loss is known.")
            self.ids[begin : begin + len(rows)] = batch.pop(ID_KEY)
            # How much an example counts in training is no business of the model, nor of a measurement.
            yield {name: value for name, value in batch.items() if name not in (WEIGHT, LEARNED)}

    def losses(self, model: nn.Module, context: Context) -> Losses:
        """Measure losses and gaps of all rows at the present weights."""
        with leave_no_trace(model), context():
            passes = (_run(model, batch) for batch in self.batches())
            parts = [example_losses(output.logits, labels) for output, labels in passes]
        return Losses(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def states(
        self, model: nn.Module, context: Context, layers: Sequence[int] | None
    ) -> dict[int, Float[np.ndarray, "example hidden"]]:
        """Return hidden states where the answer is predicted, float32, of the layers requested; None: of all.

        Layer 0 is the embedding, the last one (also -1) stands behind the final norm.

        Raises:
            DataError: There is no such layer.
        """
        found: dict[int, list[np.ndarray]] = {}
        with leave_no_trace(model), context():
            for batch in self.batches():
                output, labels = _run(model, batch, output_hidden_states=True)
                states = output.hidden_states
                place = torch.as_tensor(_answers(labels)[0])
                for layer in _resolve_layers(len(states), layers):
                    state = states[layer].cpu()
                    found.setdefault(layer, []).append(state[torch.arange(len(state)), place].float().numpy())
        return {layer: np.concatenate(parts) for layer, parts in found.items()}

    def answers(self, model: nn.Module) -> list[tuple[int, ...]]:
        """Return the target tokens of every row; empty where there is none."""
        with leave_no_trace(model):
            return [answer for batch in self.batches() for answer in _answers(batch["labels"])[1]]


def _answers(labels: Int[Tensor, "example token"]) -> tuple[Int[np.ndarray, "example"], list[tuple[int, ...]]]:
    """Return the position that predicts each row's first target token (0 without one), and all its target tokens."""
    rows = labels.cpu().numpy()
    mask = rows != NO_TARGET
    mask[:, :1] = False
    place = np.where(mask.any(1), mask.argmax(1) - 1, 0)
    return place, [tuple(row[kept].tolist()) for row, kept in zip(rows, mask, strict=True)]


def _resolve_layers(count: int, layers: Sequence[int] | None) -> list[int]:
    if layers is None:
        return list(range(1, count))
    chosen = [layer + count if layer < 0 else layer for layer in layers]
    if any(not 0 <= layer < count for layer in chosen):
        raise DataError(f"The model has layers 0 to {count - 1}, and {', '.join(map(str, layers))} was requested.")
    return chosen


def _run(model: nn.Module, batch: dict[str, Any], **extra: Any) -> tuple[Any, Tensor]:
    """Return the output of the model and the labels of a batch."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    labels = inputs.pop("labels")
    return model(**inputs, use_cache=False, return_dict=True, **extra), labels
