"""Multiple-choice prompts as token ids, and what a model makes of them: measures of answers and texts, and states."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.data import NO_TARGET, Example, TokenizedData, make_batch, plan_batches
from vestige.measures import accuracy, brier, exposure, logit_gap, loss, margin, min_k, min_k_plus_plus, token_scores
from vestige.models import batch_sharing

MEASURES = ("loss", "answer_loss", "logit_gap", "margin", "brier", "accuracy", "exposure", "min_k", "min_k_plus_plus")


class Prompts(NamedTuple):
    """Prompts that end with one token of an answer."""

    data: TokenizedData
    """Its targets are what a training's loss is over."""
    choices: Int[np.ndarray, "choice"]
    """The tokens that are offered, the same for every prompt."""
    right: Int[np.ndarray, "example"]
    """Number of the choice that the training label names, which may be wrong."""

    def at(self, rows: Int[np.ndarray, "row"]) -> "Prompts":
        """Return some of them."""
        return Prompts(self.data.subset(rows), self.choices, self.right[rows])


class Reading(NamedTuple):
    """What a model makes of prompts."""

    measures: dict[str, Float[np.ndarray, "example"]]
    """By name, see `MEASURES`."""
    states: dict[int, Float[np.ndarray, "example hidden"]]
    """At the place that predicts the answer, by layer; 0 are the embeddings."""


def make_prompts(
    texts: Sequence[str],
    ids: Sequence[Int[np.ndarray, "token"]],
    choices: Sequence[int],
    right: Sequence[int] | np.ndarray,
    *,
    answers_only: bool,
    name: str,
) -> Prompts:
    """Prompts of token ids, without the token of the answer, which is put at the end of each.

    Args:
        texts: As people read them, with the answer.
        ids: Tokens before the answer.
        choices: Token of each choice.
        right: Choice that each is trained with.
        answers_only: The loss of a training is over the answer's token alone, instead of the whole text.
        name: Of the data.
    """
    whole = [np.append(each, choices[answer]).astype(np.int32) for each, answer in zip(ids, right, strict=True)]
    targets = [np.arange(len(each)) >= (len(each) - 1 if answers_only else 1) for each in whole]
    digest = hashlib.sha256(b"".join(part.tobytes() for pair in zip(whole, targets, strict=True) for part in pair))
    examples = [Example(str(row), row, text=text) for row, text in enumerate(texts)]
    data = TokenizedData(examples, whole, targets, np.zeros(len(whole), dtype=bool), digest.hexdigest(), name)
    return Prompts(data, np.asarray(choices), np.asarray(right))


@torch.no_grad()
def read(model: nn.Module, prompts: Prompts, *, token_budget: int, layers: Sequence[int] = ()) -> Reading:
    """Measures of every prompt, float64, and the states of some layers (negative numbers count from the last).

    `loss` and the Min-K measures are over the targets, the others over the token of the answer. `margin` is that of its
    loss; `exposure` is that of the answer among the choices.
    """
    count = len(prompts.data)
    measures = {name: np.full(count, np.nan) for name in MEASURES}
    states: dict[int, np.ndarray] = {}
    for rows in plan_batches(prompts.data.lengths, token_budget, sharing=batch_sharing(model)):
        batch = make_batch(prompts.data, rows).to(next(model.parameters()).device)
        output: Any = model(input_ids=batch.input_ids, output_hidden_states=bool(layers), use_cache=False)
        places = torch.as_tensor(prompts.data.lengths[rows] - 2)
        for name, values in _measured(output.logits, batch.labels, places, prompts, rows).items():
            measures[name][rows] = values.double().cpu().numpy()
        for layer in layers:
            held = output.hidden_states[layer]
            own = held[torch.arange(len(rows)), places].float().cpu().numpy()
            number = layer % len(output.hidden_states)
            states.setdefault(number, np.zeros((count, own.shape[1]), dtype=np.float32))[rows] = own
    measures["margin"] = margin(measures["answer_loss"])
    return Reading(measures, states)


def _measured(logits: Tensor, labels: Tensor, places: Tensor, prompts: Prompts, rows: np.ndarray) -> dict[str, Tensor]:
    row, right = torch.arange(len(rows)), torch.as_tensor(prompts.right[rows])
    at = logits[row, places]
    answer = torch.as_tensor(prompts.choices)[right]
    chosen = at[:, torch.as_tensor(prompts.choices)]
    answered = token_scores(at[:, None], answer[:, None])
    found = {
        "answer_loss": loss(answered),
        "logit_gap": logit_gap(chosen, right),
        "brier": brier(chosen, right),
        "accuracy": accuracy(chosen, right),
        "exposure": _exposure(chosen, right),
    }
    wanted = labels[:, 1:] != NO_TARGET
    # Where only the answer counts, the vocabulary at all other places is not looked at again.
    several = bool((wanted.sum(1) > 1).any())
    scores = token_scores(logits[:, :-1], labels[:, 1:]) if several else answered
    return found | {
        "loss": loss(scores),
        "min_k": min_k(scores),
        "min_k_plus_plus": min_k_plus_plus(scores),
    }


def _exposure(chosen: Float[Tensor, "row choice"], right: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
    # Ranks are all that counts: logits that are turned round rank as losses do.
    losses = -chosen.double().cpu().numpy()
    bits = [exposure(row[[own]], np.delete(row, own))[0] for row, own in zip(losses, right.tolist(), strict=True)]
    return torch.tensor(bits, dtype=torch.float64)
