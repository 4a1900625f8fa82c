"""Whether a model goes on with a training text word for word: by greedy decoding, off the forward pass, by sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige import models
from vestige.errors import SpecError
from vestige.lazy import torch
from vestige.measures._attack import Interval, share
from vestige.measures._measure import Batch, Column, Continue, Generation, Predict, measure

if TYPE_CHECKING:
    from torch import Tensor, nn


class Extraction(NamedTuple):
    """What came of each prefix length."""

    prefixes: tuple[int, ...]
    similarity: Float[np.ndarray, "prefix example"]
    """1 - edit distance / tokens of the continuation; 1 is word for word, NaN for a text that is too short."""

    @property
    def exact(self) -> Bool[np.ndarray, "prefix example"]:
        """True for a continuation that is the text's own, token by token."""
        return self.similarity == 1.0

    def rates(self, least: float = 1.0) -> list[Interval]:
        """Return, for each prefix length, the share of long enough texts whose similarity is `least` or more.

        The interval is Clopper-Pearson's, and takes the texts to be independent.
        """
        return [share(int((row >= least).sum()), int((~np.isnan(row)).sum())) for row in self.similarity]


def extraction(
    texts: Sequence[Int[np.ndarray, "token"]],
    generate: Continue,
    *,
    prefixes: Sequence[int] = (50,),
    continuation: int = 50,
    batch: int = 16,
) -> Extraction:
    """Measure how much of each text the model gives back, for prefixes of several lengths.

    The continuation is the same tokens of the text for every prefix: those from the longest prefix on; a shorter prefix
    is what stands right before them. So lengths of context are compared on the same target. Carlini et al. 2023,
    "Quantifying memorization across neural language models" (50 and 50 tokens, greedy).

    Args:
        texts: Token ids of each.
        generate: `greedy(model)`, or anything that continues.
        prefixes: Lengths in tokens.
        continuation: Tokens that have to be given back.
        batch: Texts that are continued together.

    Raises:
        SpecError: Lengths below 1.
    """
    if not prefixes or min(*prefixes, continuation, batch) < 1:
        raise SpecError(f"prefixes={tuple(prefixes)}, continuation={continuation}: give lengths of 1 or more.")
    start = max(prefixes)
    similarity = np.full((len(prefixes), len(texts)), np.nan)
    for rows, tokens in _batch_beginnings(texts, start + continuation, batch):
        for number, length in enumerate(prefixes):
            given = generate(tokens[:, start - length : start], continuation)
            for row, answer, text in zip(rows, given.tolist(), tokens[:, start:].tolist(), strict=True):
                similarity[number, row] = 1 - edit_distance(answer, text) / continuation
    return Extraction(tuple(prefixes), similarity)


def _batch_beginnings(texts: Sequence[np.ndarray], length: int, batch: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the first tokens of the texts that have as many, and their positions, some texts at a time."""
    whole = [row for row, text in enumerate(texts) if len(text) >= length]
    for begin in range(0, len(whole), batch):
        rows = whole[begin : begin + batch]
        yield rows, torch.as_tensor(np.stack([np.asarray(texts[row])[:length] for row in rows])).long()


def greedy(model: nn.Module) -> Continue:
    """Return a function that continues with the most likely tokens, one after the other; an end token ends nothing."""

    @torch.no_grad()
    def generate(prefix: Tensor, count: int) -> Tensor:
        whole = tokens = prefix.to(next(model.parameters()).device)
        kept, cached = None, not models.acts_in_forward(model)
        for _ in range(count):
            output: Any = model(input_ids=tokens if cached else whole, past_key_values=kept, use_cache=cached)
            tokens, kept = output.logits[:, -1:].argmax(-1), output.past_key_values
            whole = torch.cat([whole, tokens], dim=1)
        return whole[:, prefix.shape[1] :].cpu()

    return generate


def predict(model: nn.Module) -> Predict:
    """Return a function that gives the logits from which the last tokens of texts are predicted, in one pass."""

    @torch.no_grad()
    def logits(tokens: Tensor, count: int) -> Tensor:
        given = tokens.to(next(model.parameters()).device)
        output: Any = model(input_ids=given, use_cache=False)
        return output.logits[:, -count - 1 : -1]

    return logits


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the fewest insertions, deletions and exchanges that turn one into the other (Levenshtein)."""
    before = list(range(len(other) + 1))
    for row, token in enumerate(one, start=1):
        now = [row]
        for column, another in enumerate(other, start=1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (token != another)))
        before = now
    return before[-1]


@measure(
    "extraction",
    "share of the continuation that greedy decoding gives back",
    stage="generation",
    needs=("generation",),
    sign=1,
    early_sign=1,
    detail="{} tokens given",
    word_for_word="given tokens of the text, greedy decoding goes on with the next ones",
    by_default=False,
    missing=lambda job: f"shorter than {max(job.settings.prefixes)} + {job.settings.continuation} tokens",
    cost="greedy decoding of a continuation for every example and prefix",
    limits="a text that is not given back may still be memorized; repetitive ones are given back by any model",
    order=160,
    curve=60,
)
def _extraction(given: Generation) -> dict[str, Tensor]:
    settings = given.settings
    found = extraction(given.texts, given.generate, prefixes=settings.prefixes, continuation=settings.continuation)
    values = {prefix: torch.from_numpy(row) for prefix, row in zip(found.prefixes, found.similarity, strict=True)}
    details = {f"extraction_{prefix}": row for prefix, row in values.items()} if len(settings.prefixes) > 1 else {}
    return {"extraction": values[max(values)], **details}


GIVEN, MOST, FEWEST = 50, 50, 8
"""Tokens of a plain text that are given, if it has twice as many; tokens that have to be given back, at most and at
least."""


@measure(
    "recitation",
    "share of the answer, or of a text's next tokens, that greedy decoding gives back before it first differs",
    sign=1,
    early_sign=0,
    word_for_word=f"asked the same question, or given its beginning, the model's likeliest tokens are the row's own, "
    f"{FEWEST} to {MOST} in a row",
    missing=f"fewer than {FEWEST} tokens that could be given back",
    limits="a model also gives back what is easy to guess: compare with held-out rows or the model before training",
    order=155,
)
def recitation(batch: Batch) -> Tensor:
    """Return, for each example of a batch, the share of its tokens up to the first that is not the likeliest.

    The tokens are those of the answer, the first 50 of them; of a text without an answer those after its first 50, or
    after its first half, again 50. As long as every token is the likeliest one after the text's own tokens, greedy
    decoding has written just these: 1 is a text that it gives back word for word, and no token is generated. NaN for
    fewer than 8 tokens, which many models would guess.
    """
    wanted, answer = batch.scores.wanted, batch.answer & batch.scores.wanted
    number, total = wanted.long().cumsum(1), wanted.sum(1, keepdim=True)
    continuation = wanted & (number > (total // 2).clamp(max=GIVEN))
    tried = torch.where(answer.any(1, keepdim=True), answer, continuation)
    tried = tried & (tried.long().cumsum(1) <= MOST)
    missed = tried & (batch.scores.gap <= 0)
    kept = tried & (missed.long().cumsum(1) == 0)
    count = tried.sum(1)
    return torch.where(count >= FEWEST, kept.sum(1) / count, torch.nan)


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
    for rows, tokens in _batch_beginnings(texts, prefix + continuation, batch):
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
