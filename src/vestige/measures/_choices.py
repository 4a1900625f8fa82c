"""Multiple-choice answers: which choices there are, the gap of the right one, whether it was chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige import indexes, models
from vestige.data import Encoder, Example, TokenizedData
from vestige.errors import DataError
from vestige.lazy import torch
from vestige.measures._measure import Batch, PerExample, measure
from vestige.settings import AuditSettings

if TYPE_CHECKING:
    from torch import Tensor

Logits: TypeAlias = "Float[Tensor, 'example choice']"
Right: TypeAlias = "Int[Tensor, 'example']"
Offered: TypeAlias = "Bool[Tensor, 'example choice']"

MOST_CHOICES = 16
"""More different completions than these are answers in words, not choices."""
NO_CHOICES = "no multiple-choice answers: give the possible completions in a column `choices`"


def logit_gap(logits: Logits, right: Right, offered: Offered | None = None) -> PerExample:
    """Return the logit of the right choice minus the largest other one, float64; high speaks for memorization.

        g_i = z_{i,y} - max over k != y of z_{i,k}

    Args:
        logits: Of every choice, or of the whole vocabulary.
        right: Number of the choice that the training label names.
        offered: False for padding where examples have different numbers of choices.

    Returns:
        NaN where there is no other choice.

    Raises:
        DataError: The right choice is not offered.
    """
    values, offered = _mask_logits(logits, right, offered)
    chosen = values.gather(1, right[:, None])[:, 0]
    others = values.scatter(1, right[:, None], -torch.inf).amax(1)
    alone = offered.sum(1) < 2
    return torch.where(alone, torch.nan, chosen - torch.where(alone, 0.0, others))


def accuracy(logits: Logits, right: Right, offered: Offered | None = None) -> PerExample:
    """Return 1 where the right choice's logit is the largest, 0 where not, one half where it is tied with another.

    NaN where there is no other choice. Arguments and errors as in `logit_gap`.
    """
    gap = logit_gap(logits, right, offered)
    return torch.where(gap.isnan(), gap, (gap > 0).double() + 0.5 * (gap == 0).double())


def brier(logits: Logits, right: Right, offered: Offered | None = None) -> PerExample:
    """Return the squared distance of the choices' probabilities from the label's, 0 to 2; low speaks for memorization.

        sum over k of (p_k - [k = y])^2, p the softmax over the choices that are offered

    Brier 1950. Padding has probability 0 and adds nothing. Arguments and errors as in `logit_gap`.
    """
    chances = _mask_logits(logits, right, offered)[0].softmax(1)
    return (chances - torch.nn.functional.one_hot(right, logits.shape[1])).square().sum(1)


def _mask_logits(logits: Logits, right: Right, offered: Offered | None) -> tuple[Logits, Offered]:
    """Return logits in float64, minus infinity where nothing is offered, and what is offered."""
    offered = torch.ones_like(logits, dtype=torch.bool) if offered is None else offered
    inside = (right >= 0) & (right < logits.shape[1])
    known = inside & offered.gather(1, right.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    if not bool(known.all()):
        row = int((~known).nonzero()[0])
        raise DataError(f"Example {row} has choice {int(right[row])} for its label, which is not among those offered.")
    return logits.double().masked_fill(~offered, -torch.inf), offered


class Choices(NamedTuple):
    """The token at which the choices part, and what each of them has there."""

    position: Int[np.ndarray, "example"]
    """Of that token; 0 where there are no choices."""
    tokens: Int[np.ndarray, "example choice"]
    offered: Bool[np.ndarray, "example choice"]
    right: Int[np.ndarray, "example"]
    reasons: Counter[str]
    """Why examples have none, and how many."""

    @property
    def known(self) -> Bool[np.ndarray, "example"]:
        """Examples that have choices."""
        return self.position > 0


def encoding_of(settings: AuditSettings, loaded: models.LoadedModel) -> dict[str, Any]:
    """Return the arguments of `tokenize` that follow from the settings and from the model that reads the tokens."""
    limit = indexes.tokens_at_most(settings, loaded)
    return {"max_length": limit, "chat": bool(settings.chat), "vocabulary": loaded.vocabulary}


def find_choices(data: TokenizedData, settings: AuditSettings, loaded: models.LoadedModel) -> Choices:
    """Find the choices of every example with a prompt and a completion.

    They come from the column `--choices-field`, else, where few different completions recur, from those. Each is
    put after the prompt and tokenised; the first token at which they differ decides.

    Raises:
        DataError: The column does not hold lists of texts.
    """
    encoder, wanted = None, [list[str]() for _ in data.examples]
    if loaded.tokenizer is not None:
        encoder = Encoder(loaded.tokenizer, name="choices", **encoding_of(settings, loaded))
        wanted = [_read_choices(example, settings.choices_field) for example in data.examples]
        pool = [] if any(wanted) else _recurring_completions(data.examples)
        wanted = [
            listed or (pool if example.completion else [])
            for listed, example in zip(wanted, data.examples, strict=True)
        ]
    shape = (len(data), max(map(len, wanted), default=0) or 1)
    position, right = (np.zeros(len(data), dtype=np.int64) for _ in range(2))
    found = Choices(position, np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool), right, Counter())
    for row, choices in enumerate(wanted):
        reason = "the model has no tokenizer" if encoder is None else NO_CHOICES
        if encoder is not None and choices:
            reason = _fill_choices(data, encoder, row, choices, found)
        found.reasons.update([reason] if reason else [])
    return found


def _fill_choices(
    data: TokenizedData, encoder: Encoder, row: int, choices: Sequence[str], found: Choices
) -> str | None:
    """Fill in one row; return the reason where that is not possible."""
    example, own = data.examples[row], data.input_ids[row]
    completion = example.completion or ""
    answer, bare = completion.strip(), [choice.strip() for choice in choices]
    if answer not in bare:
        return "the completion is not among its choices"
    if len(set(bare)) < len(bare) or len(bare) < 2:
        return "fewer than two different choices"
    head, tail = completion.partition(answer)[::2]
    encoded = encoder.encode([replace(example, completion=f"{head}{choice}{tail}") for choice in bare]).input_ids
    position = count_shared_tokens(encoded)
    tokens = [int(ids[position]) if position < len(ids) else -1 for ids in encoded]
    if position < 1 or position >= len(own) or -1 in tokens:
        return "the answer was cut off"
    if len(set(tokens)) < len(tokens):
        return "two choices begin with the same token"
    right = bare.index(answer)
    if int(own[position]) != tokens[right]:
        return "the completion is not tokenised as its choice is"
    found.position[row], found.right[row] = position, right
    found.tokens[row, : len(tokens)], found.offered[row, : len(tokens)] = tokens, True
    return None


def count_shared_tokens(texts: Sequence[np.ndarray]) -> int:
    """Return how many tokens all texts have in common at their beginning."""
    shortest = min(map(len, texts))
    same = np.all(np.stack([ids[:shortest] for ids in texts]) == texts[0][:shortest], axis=0)
    return shortest if same.all() else int(same.argmin())


def _read_choices(example: Example, field: str) -> list[str]:
    value: Any = example.extra.get(field)
    if value is None:
        return []
    if isinstance(value, dict) and isinstance(value.get("text"), list | tuple):
        value = value["text"]
    if not isinstance(value, list | tuple | np.ndarray) or not all(isinstance(each, str) for each in value):
        raise DataError(
            f"Example {example.id!r} has {value!r} in the column {field!r}, expected a list of the completions to "
            "choose from. Name another column with --choices-field."
        )
    return list(value)


def _recurring_completions(examples: Sequence[Example]) -> list[str]:
    """Return the completions if they are few and each occurs twice or more, else none."""
    counts = Counter((example.completion or "").strip() for example in examples)
    counts.pop("", None)
    return sorted(counts) if 1 < len(counts) <= MOST_CHOICES and min(counts.values()) > 1 else []


_FIRST_TOKEN = "of the first token in which the choices differ"


@measure(
    "logit_gap",
    "logit of the label minus the largest of the other choices",
    needs=("choices",),
    sign=1,
    order=90,
    curve=40,
    over_time=True,
    limits=_FIRST_TOKEN,
)
def _logit_gap(batch: Batch) -> Tensor:
    return batch.of_choices(logit_gap)


@measure(
    "accuracy",
    "whether the label is the choice with the largest logit",
    needs=("choices",),
    sign=1,
    order=100,
    limits="0, one half or 1: too coarse to rank examples",
)
def _accuracy(batch: Batch) -> Tensor:
    return batch.of_choices(accuracy)


@measure(
    "brier",
    "squared distance of the choices' probabilities from the label",
    needs=("choices",),
    sign=-1,
    order=110,
    limits=_FIRST_TOKEN,
)
def _brier(batch: Batch) -> Tensor:
    return batch.of_choices(brier)
