"""One pass of a model over one batch: everything that is measured of each example, nothing of it kept but numbers."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.data import NO_TARGET, TokenizedData, make_batch
from vestige.measures._extraction import greedy
from vestige.measures._inputs import Batch, ChoiceLogits, Generation
from vestige.measures._job import AuditJob
from vestige.measures._tokens import TokenScores, token_scores

Tensors = dict[str, Tensor]

TOTAL_LOSS = "total_loss"
CHUNK_NUMBERS = 2**24
"""Logits that are measured in float64 at once."""


@torch.no_grad()
def look(model: nn.Module, job: AuditJob, rows: Int[np.ndarray, "row"]) -> Tensors:
    """Compute measures of some examples, float64 [row], and their states at the layers, float32 [row hidden].

    Loss summed over target tokens is always among them.

    NaN where an example has no target, no answer or no choices.
    """
    batch = make_batch(job.data, rows).to(next(model.parameters()).device)
    output: Any = model(input_ids=batch.input_ids, output_hidden_states=bool(job.layers), use_cache=False)
    # Position t of these predicts the token at position t + 1.
    logits, labels = output.logits[:, :-1], batch.labels[:, 1:]
    scores = _scored(logits, labels)
    first, last = (torch.from_numpy(each[rows]).to(labels.device)[:, None] for each in job.answers)
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)[None]
    given = Batch(scores, (places >= first) & (places < last), _choices(logits, job, rows))
    found = {TOTAL_LOSS: -scores.log_probability.sum(1)}
    for each in job.at("pass"):
        found |= each.columns(each.compute(given))
    texts = [job.data.input_ids[row] for row in rows]
    for each in job.at("generation"):
        found |= each.columns(each.compute(Generation(texts, greedy(model), job.settings)))
    found = {name: values.double().cpu() for name, values in found.items()}
    predicting = torch.from_numpy(predicting_places(job, rows))
    for layer in job.layers:
        states = output.hidden_states[layer]
        found[f"states_{layer}"] = states[torch.arange(len(rows)), predicting.to(states.device)].float().cpu()
    return found


@torch.no_grad()
def total_losses(model: nn.Module, data: TokenizedData, rows: Int[np.ndarray, "row"]) -> Float[Tensor, "row"]:
    """Return the loss of each example summed over its target tokens, nats, float64."""
    batch = make_batch(data, rows).to(next(model.parameters()).device)
    logits: Any = model(input_ids=batch.input_ids, use_cache=False).logits
    return -_scored(logits[:, :-1], batch.labels[:, 1:]).log_probability.sum(1).cpu()


def predicting_places(job: AuditJob, rows: Int[np.ndarray, "row"]) -> Int[np.ndarray, "row"]:
    """Return the position whose state is measured: before the deciding token, the answer, or a text's last token."""
    first = job.answers.first[rows]
    ends = np.array(
        [int(np.flatnonzero(job.data.targets[row])[-1]) if job.data.targets[row].any() else 1 for row in rows]
    )
    places = np.where(job.choices.known[rows], job.choices.place[rows], np.where(first > 0, first, ends))
    return places - 1


def joined(parts: Iterable[Tensors]) -> Tensors:
    """Join the tensors of several batches into those of one."""
    listed = list(parts)
    return {name: torch.cat([part[name] for part in listed]) for name in listed[0]}


def _scored(logits: Float[Tensor, "example token vocabulary"], labels: Int[Tensor, "example token"]) -> TokenScores:
    """Score the targets, few of them in float64 at once."""
    wanted = labels != NO_TARGET
    chosen, targets = logits[wanted], labels[wanted]
    filled = [torch.zeros(labels.shape, dtype=torch.float64, device=labels.device) for _ in range(3)]
    step = max(1, CHUNK_NUMBERS // logits.shape[-1])
    parts = [
        token_scores(chosen[None, begin : begin + step], targets[None, begin : begin + step])[:3]
        for begin in range(0, len(targets), step)
    ]
    if parts:
        for values, found in zip(filled, zip(*parts, strict=True), strict=True):
            values[wanted] = torch.cat(found, dim=1)[0]
    log_probability, standardised, gap = filled
    return TokenScores(log_probability, standardised, gap, wanted)


def _choices(logits: Tensor, job: AuditJob, rows: np.ndarray) -> ChoiceLogits:
    """Return the logits of the choices of the rows that have some."""
    choices = job.choices
    known = np.flatnonzero(choices.known[rows])
    chosen = rows[known]
    places = torch.from_numpy(choices.place[chosen] - 1)
    at = logits[torch.from_numpy(known).to(logits.device), places.to(logits.device)].double().cpu()
    values = at.gather(1, torch.from_numpy(choices.tokens[chosen]))
    return ChoiceLogits(
        known, values, torch.from_numpy(choices.right[chosen]), torch.from_numpy(choices.offered[chosen])
    )
