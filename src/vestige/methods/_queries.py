"""The queries: put as the data are, answered by the model, tokenised; and the model's losses on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vestige import gradients, indexes, models
from vestige.data import (
    Batch,
    Example,
    TokenizedData,
    ask,
    find_focus,
    focus_queries,
    make_batch,
    plan_batches,
    require_answers,
    tokenize,
)
from vestige.errors import DataError
from vestige.jobs import step_done
from vestige.lazy import torch
from vestige.methods._protocol import Vectors
from vestige.settings import AttributeSettings, UntracSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

OnAnswers = Callable[[TokenizedData, Sequence[bool]], None]
"""Takes the queries, and whether each answer is the model's own."""
OnAnswer = Callable[[Sequence[Example], int], None]
"""Takes the queries as far as they have answers, and the number of the one whose answer has just ended."""


class Live(NamedTuple):
    """A loaded model that is asked again and again."""

    loaded: models.LoadedModel
    """The model of the index, as `load_model` returns it."""
    on_text: Callable[[str], None]
    """Takes the answer so far after each of its tokens, of a single question."""


def read_queries(
    settings: AttributeSettings | UntracSettings,
    loaded: models.LoadedModel,
    given: list[Example],
    train: Sequence[Example],
    *,
    chat: bool | None,
    name: Any,
    answer: str = "auto",
    on_answer: OnAnswer | None = None,
    on_text: Callable[[str], None] | None = None,
) -> tuple[TokenizedData, list[bool], str]:
    """Put the queries as the data are, or as `chat` says, let the model continue those without an answer, tokenise.

    Returns:
        The queries, whether each answer is the model's own, and how they were put where that is not as they were typed.

    Raises:
        DataError: A query has no answer, and `answer` is "given", or has nothing to explain.
    """
    put, how = ask(given, train, chat=chat, tokenizer=loaded.tokenizer)
    put = choose_answers(put, answer)
    generated = [query.lacks_answer for query in put]
    if any(generated):
        answered = list(put)

        def show(number: int, query: Example) -> None:
            assert on_answer is not None
            answered[number] = query
            on_answer(answered, number)

        put = models.generate_answers(
            loaded,
            put,
            max_new_tokens=settings.max_new_tokens,
            chat=bool(settings.chat),
            on_answer=None if on_answer is None else show,
            on_text=on_text,
        )
    reading: dict[str, Any] = {
        "max_length": indexes.tokens_at_most(settings, loaded),
        "chat": bool(settings.chat),
        "vocabulary": loaded.vocabulary,
    }
    queries = tokenize(put, loaded.tokenizer, name=str(name), **reading)
    require_answers(queries, generated, loaded.tokenizer)
    chosen = focus_queries(queries, loaded.tokenizer, **reading) if find_focus(put) else queries
    return chosen, generated, how


def choose_answers(queries: list[Example], answer: str) -> list[Example]:
    """Return the queries, without their answers where these are to be generated; refuse missing ones where given."""
    if answer == "generate":
        return [query.without_answer() for query in queries]
    missing = [query.id for query in queries if query.lacks_answer]
    if answer == "given" and missing:
        raise DataError(
            f'Query "{missing[0]}" has no answer, and --answer given was requested. Add a `completion`, or drop '
            "--answer."
        )
    return queries


def read_batches(
    model: nn.Module, data: TokenizedData, token_budget: int, rows: Int[np.ndarray, "row"]
) -> Iterator[tuple[Int[np.ndarray, "position"], Batch]]:
    """Yield (positions in `rows`, the batch of these rows on the model's device), longest rows first."""
    device = next(model.parameters()).device
    for positions in plan_batches(data.lengths[rows], token_budget, sharing=models.batch_sharing(model)):
        yield positions, make_batch(data, rows[positions]).to(device)


def compute_losses(
    model: nn.Module,
    data: TokenizedData,
    reduction: gradients.Reduction,
    token_budget: int,
    rows: Int[np.ndarray, "row"] | None = None,
) -> Float[np.ndarray, "row"]:
    """Measure the loss of each of the rows, of all if none are given, in nats, whatever they are batched with.

    Of a contrast it is the loss of the answer less that of the other one.
    """
    wanted = np.arange(len(data)) if rows is None else rows
    losses, objective = np.zeros(len(wanted)), gradients.CausalLoss(reduction)
    device, fitting = next(model.parameters()).device, gradients.FittingBatches(data.lengths)

    def run(rows: Int[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
        return objective.losses(model, make_batch(data, rows).to(device)).double().cpu().numpy()

    with torch.no_grad():
        for positions in plan_batches(data.lengths[wanted], token_budget, sharing=models.batch_sharing(model)):
            losses[positions] = np.concatenate(fitting.run(wanted[positions], run))
            step_done(len(positions))
    if data.contrast is not None:
        others = np.zeros(len(data))
        others[data.contrast.rows] = compute_losses(model, data.contrast.data, reduction, token_budget)
        losses -= others[wanted]
    return losses


def query_loss(model: nn.Module, data: TokenizedData, query: int, reduction: gradients.Reduction) -> Tensor:
    """Return the differentiable loss of one query; of a contrast, that of its answer less that of the other one."""
    batch = make_batch(data, np.array([query])).to(next(model.parameters()).device)
    loss = gradients.token_losses(model, batch).sum()
    loss = loss / max(int(data.target_counts[query]), 1) if reduction == "mean" else loss
    one = data.subset([query]).contrast
    return loss if one is None else loss - query_loss(model, one.data, 0, reduction)


def subtract_contrast(
    data: TokenizedData, measure: Callable[[TokenizedData], tuple[Vectors, Float[Tensor, "example"]]]
) -> tuple[Vectors, Float[Tensor, "example"]]:
    """Return gradients and losses of queries; of a contrast, those of its answer less those of the other one."""
    vectors, losses = measure(data)
    if data.contrast is not None:
        others, other_losses = measure(data.contrast.data)
        places = torch.from_numpy(data.contrast.rows)
        for vector, other in zip(vectors, others, strict=True):
            vector[places] -= other
        losses[places] -= other_losses
    return vectors, losses
