"""What is measured of single examples, while a model trains and of a trained one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.data import NO_TARGET, TokenizedData, make_batch, plan_batches
from vestige.errors import DataError
from vestige.measures import margin
from vestige.models import batch_sharing
from vestige.online import ID_KEY
from vestige.training._engine import LEARNED, WEIGHT, Losses, example_losses, leave_no_trace

Context = Callable[[], AbstractContextManager[Any]]


@torch.no_grad()
def measure(model: nn.Module, data: TokenizedData, token_budget: int, *, mean: bool) -> dict[str, np.ndarray]:
    """Measure loss, margin, gap and accuracy of each text, float64 [text].

    The loss is the cross-entropy summed over target tokens, or averaged if `mean`. With l the negative mean loss per
    target token, the margin is l - log(1 - e^l), the log-odds of the tokens' geometric mean probability (the output
    that TRAK measures). The gap is the target's logit minus the largest other logit, the accuracy whether it is above
    zero, both averaged over target tokens. Without a target token the loss is 0 and the rest NaN.
    """
    found, counts = np.full((3, len(data)), np.nan), data.target_counts
    for rows in plan_batches(data.lengths, token_budget, sharing=batch_sharing(model)):
        if counts[rows].any():
            batch = make_batch(data, rows).to(next(model.parameters()).device)
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
            measured = example_losses(logits, batch.labels)
            found[:, rows] = measured.loss, measured.gap, measured.accuracy
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
