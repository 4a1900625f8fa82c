"""One pass of a model over one batch: everything that is measured of each example, nothing of it kept but numbers."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.audit._answer_loss import answer_loss
from vestige.audit._choices import accuracy, brier
from vestige.audit._job import AuditJob
from vestige.audit._logit_gap import logit_gap
from vestige.audit._loss import loss
from vestige.audit._min_k import min_k, min_k_plus_plus
from vestige.audit._tokens import TokenScores, mean_where, token_scores
from vestige.data import NO_TARGET, TokenizedData, make_batch

Tensors = dict[str, Tensor]

CHUNK_NUMBERS = 2**24
"""Logits that are measured in float64 at once."""


@torch.no_grad()
def look(model: nn.Module, job: AuditJob, rows: Int[np.ndarray, "row"]) -> Tensors:
    """Compute measures of some examples, float64 [row], and their states at the layers, float32 [row hidden].

    NaN where an example has no target, no answer or no choices.
    """
    batch = make_batch(job.data, rows).to(next(model.parameters()).device)
    output: Any = model(input_ids=batch.input_ids, output_hidden_states=bool(job.layers), use_cache=False)
    # Position t of these predicts the token at position t + 1.
    logits, labels = output.logits[:, :-1], batch.labels[:, 1:]
    scores, gaps = _scored(logits, labels)
    first, last = (torch.from_numpy(each[rows]).to(labels.device)[:, None] for each in job.answers)
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)[None]
    found = {
        "loss": loss(scores),
        "total_loss": -scores.log_probability.sum(1),
        "answer_loss": answer_loss(scores, (places >= first) & (places < last)),
        "token_gap": mean_where(gaps, scores.wanted),
        "min_k": min_k(scores),
        "min_k_plus_plus": min_k_plus_plus(scores),
        **_chosen(logits, job, rows),
    }
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
    scores, _ = _scored(logits[:, :-1], batch.labels[:, 1:])
    return -scores.log_probability.sum(1).cpu()


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


def _scored(
    logits: Float[Tensor, "example token vocabulary"], labels: Int[Tensor, "example token"]
) -> tuple[TokenScores, Float[Tensor, "example token"]]:
    """Score the targets, and how far each one's logit is above every other's; few targets in float64 at once."""
    wanted = labels != NO_TARGET
    chosen, targets = logits[wanted], labels[wanted]
    empty = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    filled = [empty.clone() for _ in range(3)]
    parts: list[list[Tensor]] = [[], [], []]
    step = max(1, CHUNK_NUMBERS // logits.shape[-1])
    for begin in range(0, len(targets), step):
        some, target = chosen[begin : begin + step], targets[begin : begin + step]
        scores = token_scores(some[None], target[None])
        values = some.double()
        others = values.scatter(1, target[:, None], -torch.inf).amax(1)
        gap = values.gather(1, target[:, None])[:, 0] - others
        for part, new in zip(parts, (scores.log_probability[0], scores.standardised[0], gap), strict=True):
            part.append(new)
    if len(targets):
        for values, part in zip(filled, parts, strict=True):
            values[wanted] = torch.cat(part)
    return TokenScores(filled[0], filled[1], wanted), filled[2]


def _chosen(logits: Tensor, job: AuditJob, rows: np.ndarray) -> Tensors:
    """Return gap, accuracy and Brier score of the rows that have choices."""
    found = {
        name: torch.full((len(rows),), torch.nan, dtype=torch.float64) for name in ("logit_gap", "accuracy", "brier")
    }
    choices = job.choices
    known = np.flatnonzero(choices.known[rows])
    if not len(known):
        return found
    chosen = rows[known]
    places = torch.from_numpy(choices.place[chosen] - 1)
    at = logits[torch.from_numpy(known).to(logits.device), places.to(logits.device)].double().cpu()
    values = at.gather(1, torch.from_numpy(choices.tokens[chosen]))
    right, offered = torch.from_numpy(choices.right[chosen]), torch.from_numpy(choices.offered[chosen])
    for name, measure in (("logit_gap", logit_gap), ("accuracy", accuracy), ("brier", brier)):
        found[name][known] = measure(values, right, offered)
    return found
