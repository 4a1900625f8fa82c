"""Whether a model goes on with a training text word for word once it is given the beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige import models
from vestige.errors import SpecError
from vestige.lazy import torch
from vestige.measures import Continue, Generation, Interval, Predict, measure, share

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
    whole = [row for row, text in enumerate(texts) if len(text) >= start + continuation]
    similarity = np.full((len(prefixes), len(texts)), np.nan)
    for begin in range(0, len(whole), batch):
        rows = whole[begin : begin + batch]
        tokens = torch.as_tensor(np.stack([np.asarray(texts[row])[: start + continuation] for row in rows])).long()
        for number, length in enumerate(prefixes):
            given = generate(tokens[:, start - length : start], continuation)
            for row, answer, text in zip(rows, given.tolist(), tokens[:, start:].tolist(), strict=True):
                similarity[number, row] = 1 - edit_distance(answer, text) / continuation
    return Extraction(tuple(prefixes), similarity)


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
