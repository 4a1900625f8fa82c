"""How likely sampling gives back a training text, from token probabilities: no text is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from vestige.errors import SpecError
from vestige.lazy import torch
from vestige.measures import Generation, Predict, measure, share

if TYPE_CHECKING:
    from torch import Tensor

Column = Float[np.ndarray, "example"]


def sampling_log_probability(
    logits: Float[Tensor, "*shape vocabulary"],
    tokens: Int[Tensor, "*shape"],
    *,
    top_k: int = 40,
    temperature: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Return the log-probability with which sampling draws each token, nats, float64; minus infinity if never.

        log softmax(logits / temperature), over the `top_k` likeliest tokens and those tied with the last of them

    Args:
        logits: Of the next token.
        tokens: The token that follows.
        top_k: 0 for the whole vocabulary.
        temperature: Above 0.

    Raises:
        SpecError: A temperature of 0 or less, or a negative number of tokens.
    """
    if temperature <= 0 or top_k < 0:
        raise SpecError(f"temperature={temperature}, top_k={top_k}: give one above 0, and 0 or more.")
    scaled = logits.double() / temperature
    if 0 < top_k < scaled.shape[-1]:
        least = scaled.topk(top_k).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    return torch.log_softmax(scaled, dim=-1).gather(-1, tokens[..., None])[..., 0]


def continuation_log_probability(
    texts: Sequence[Int[np.ndarray, "token"]],
    predict: Predict,
    *,
    prefix: int = 50,
    continuation: int = 50,
    top_k: int = 40,
    temperature: float = 1.0,
    batch: int = 8,
) -> Column:
    """Return the log-probability that sampling continues the beginning of each text with the text itself, nats.

    The sum over the tokens of the continuation of the log-probability of each after all before it, in one pass. Hayes
    et al. 2025, "Measuring memorization in language models via probabilistic extraction".

    Args:
        texts: Token ids of each.
        predict: `predict(model)`: from token ids to logits.
        prefix: Tokens that are given.
        continuation: Tokens that have to be given back.
        top_k: As in `sampling_log_probability`.
        temperature: As in `sampling_log_probability`.
        batch: Texts of one pass.

    Returns:
        NaN for a text that is too short, minus infinity for one that sampling never gives back.

    Raises:
        SpecError: Lengths below 1, or settings of sampling that do not fit.
    """
    if min(prefix, continuation, batch) < 1:
        raise SpecError(f"prefix={prefix}, continuation={continuation}: give lengths of 1 or more.")
    found = np.full(len(texts), np.nan)
    whole = [row for row, text in enumerate(texts) if len(text) >= prefix + continuation]
    for begin in range(0, len(whole), batch):
        rows = whole[begin : begin + batch]
        tokens = torch.as_tensor(np.stack([np.asarray(texts[row])[: prefix + continuation] for row in rows])).long()
        logits = predict(tokens, continuation)
        targets = tokens[:, prefix:].to(logits.device)
        each = sampling_log_probability(logits, targets, top_k=top_k, temperature=temperature)
        found[rows] = each.sum(1).cpu().numpy()
    return found


def chance_within(log_probability: Column, tries: int) -> Column:
    """Return the chance that one of `tries` samples is the text: 1 - (1 - p)^tries, from log p.

    A text is (n, p)-discoverable if `chance_within(log_probability, n)` is p or more (Hayes et al. 2025).
    NaN stays NaN.
    """
    with np.errstate(divide="ignore"):
        return -np.expm1(tries * np.log1p(-np.exp(np.asarray(log_probability, dtype=np.float64))))


def tries_needed(log_probability: Column, chance: float = 0.5) -> Column:
    """Return the fewest samples of which one is the text with `chance`; infinity if sampling never gives it back.

    Raises:
        SpecError: A chance outside (0, 1).
    """
    if not 0 < chance < 1:
        raise SpecError(f"chance={chance}: give a number between 0 and 1.")
    with np.errstate(divide="ignore"):
        found = np.log1p(-chance) / np.log1p(-np.exp(np.asarray(log_probability, dtype=np.float64)))
    return np.maximum(np.ceil(found), 1)


def _count_discoverable(columns: dict[str, Column], settings: Any) -> list[str]:
    """Return how many examples are (n, p)-discoverable, in words."""
    known = columns["sampled_extraction"][~np.isnan(columns["sampled_extraction"])]
    if not len(known):
        return []
    with np.errstate(divide="ignore"):
        found = chance_within(np.log(known), settings.tries) >= settings.chance
    rate = share(int(found.sum()), len(found))
    top = "" if settings.top_k == 0 else f"top-{settings.top_k} "
    return [
        f"({settings.tries}, {settings.chance:g})-discoverable, {top}sampling at temperature {settings.temperature:g}: "
        f"{int(found.sum()):,} of {len(found):,} examples ({rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}])."
    ]


@measure(
    "sampled_extraction",
    "probability that one sample gives back the continuation",
    stage="generation",
    needs=("generation",),
    sign=1,
    early_sign=1,
    by_default=False,
    missing=lambda job: f"shorter than {max(job.settings.prefixes)} + {job.settings.continuation} tokens",
    cost="a forward pass over the first tokens of every example; nothing is generated",
    limits="a text that any model would write is as likely: compare with a holdout or a reference",
    summary=_count_discoverable,
    order=163,
    curve=65,
)
def _sampled_extraction(given: Generation) -> Tensor:
    settings = given.settings
    found = continuation_log_probability(
        given.texts,
        given.predict,
        prefix=max(settings.prefixes),
        continuation=settings.continuation,
        top_k=settings.top_k,
        temperature=settings.temperature,
    )
    return torch.from_numpy(np.exp(found))
