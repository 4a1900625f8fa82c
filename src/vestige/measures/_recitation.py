"""Whether greedy decoding gives back an answer, or how a text goes on, word for word: read off the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vestige.lazy import torch
from vestige.measures import Batch, measure

if TYPE_CHECKING:
    from torch import Tensor

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
