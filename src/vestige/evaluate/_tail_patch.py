"""`vestige evaluate tail-patch`: does one training step on each top example make the target likelier?"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from vestige.data import TokenizedData, make_batch, plan_batches
from vestige.errors import DataError, NonFinite, SpecError, VestigeError
from vestige.evaluate import (
    Evaluation,
    EvaluationRow,
    Mark,
    Scored,
    Value,
    collect_scores,
    estimate_mean,
    interval_figure,
    write_evaluation,
)
from vestige.gradients import CausalLoss, token_losses
from vestige.indexes import batch_tokens, read_data
from vestige.models import batch_sharing, load_model
from vestige.progress import progress
from vestige.settings import TailPatchSettings, with_settings
from vestige.training import read_questions


@with_settings(TailPatchSettings)
def tail_patch(settings: TailPatchSettings) -> Evaluation:
    """Train one step on each of the top examples of each method; measure the mean rise of the target's probability.

    After every step the weights are what they were, bit for bit. In `settings.out`: `tail-patch.json`, and the figure
    `tail-patch`.

    Raises:
        SpecError: Model, data or queries are missing.
        NonFinite: A step leads to a loss that is not finite.
    """
    if settings.model is None or settings.data is None or settings.queries is None:
        raise SpecError("A step is taken on the model itself. Type --model, --data and --queries, beside the runs too.")
    found = collect_scores(settings, "tail-patch")
    loaded = load_model(settings.model, **settings.loading)
    data = read_data(settings, settings.data, loaded)
    queries = read_questions(settings.arguments()["queries"], settings, loaded, data, "queries")
    tops = {one.name: _read_tops(one, data, queries, settings.k) for one in found.scored}
    before, after = measure_steps(
        loaded.model, data, queries, tops.values(), settings.learning_rate, batch_tokens(settings, loaded)
    )
    rises = {name: _rises(top, before, after) for name, top in tops.items()}
    rows = [EvaluationRow.of(one, _values(rises[one.name], settings)) for one in found.scored]
    result = Evaluation(
        "tail-patch",
        f"One step on each of the top {settings.k} examples of {len(queries)} queries: rise of the target's "
        "probability",
        tuple(rows),
        (
            f"Plain gradient descent on the example's mean token loss, learning rate {settings.learning_rate:g}, "
            "dropout off.",
            "Probability: geometric mean over the target's tokens. Each step starts from the same weights, restored "
            "bit for bit.",
            f"Intervals: 95 %, {settings.draws} bootstrap draws of queries.",
            *found.notes,
        ),
        {
            "k": settings.k,
            "learning_rate": settings.learning_rate,
            "probability_before": np.exp(-before).tolist(),
            "per_query": {name: rise[0].tolist() for name, rise in rises.items()},
        },
    )
    marks = [Mark.of(row, "rise of probability") for row in rows]
    figure = interval_figure("tail-patch", marks, "mean rise of the target's probability (95 % intervals)")
    return write_evaluation(result, settings.out, figure, settings.report_to)


def measure_steps(
    model: nn.Module,
    data: TokenizedData,
    queries: TokenizedData,
    tops: Iterable[Sequence[Sequence[int]]],
    learning_rate: float,
    tokens: int,
) -> tuple[Float[np.ndarray, "query"], dict[tuple[int, int], float]]:
    """Return each query's mean token loss before any step, and, for each pair (row, query), after one step on the row.

    Pairs are the rows in the lists of each query, one list of lists for each method. The model's weights are afterwards
    what they were before, bit for bit.
    """
    pairs: dict[int, set[int]] = {}
    for query, rows in (item for top in tops for item in enumerate(top)):
        for row in rows:
            pairs.setdefault(row, set()).add(query)
    after: dict[tuple[int, int], float] = {}
    model.eval()
    before = _losses(model, queries, range(len(queries)), tokens)
    with train_temporarily(model) as restore, progress(len(pairs), "Patching", "steps") as bar:
        for row, wanted in sorted(pairs.items()):
            _step(model, data, row, learning_rate)
            losses = _losses(model, queries, sorted(wanted), tokens)
            if not np.isfinite(losses).all():
                raise NonFinite(
                    f"After a step of {learning_rate:g} on {data.examples[row].id!r} the losses are not finite. Give a "
                    "smaller --learning-rate."
                )
            after |= {(row, query): float(loss) for query, loss in zip(sorted(wanted), losses, strict=True)}
            restore()
            bar.advance()
    return before, after


@contextmanager
def train_temporarily(model: nn.Module) -> Iterator[Any]:
    """Enable gradients of every floating-point weight while the context lasts; yield a function that restores weights.

    Raises:
        VestigeError: A weight is not, bit for bit, what it was.
    """
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    kept = [(weight, weight.detach().clone(), weight.requires_grad) for weight in weights]

    def restore() -> None:
        with torch.no_grad():
            for weight, values, _ in kept:
                weight.copy_(values)
                weight.grad = None

    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield restore
    finally:
        restore()
        for weight, _, required in kept:
            weight.requires_grad_(required)
    if not all(torch.equal(weight, values) for weight, values, _ in kept):
        raise VestigeError("The weights are not what they were before the steps.")


def _step(model: nn.Module, data: TokenizedData, row: int, learning_rate: float) -> None:
    """Take one step of plain gradient descent; an example without targets has no gradient, and moves nothing."""
    if not data.target_counts[row]:
        return
    device = next(model.parameters()).device
    # Plain autograd through the logits: the objective's own head has no gradient for its weight.
    batch = make_batch(data, np.array([row])).to(device)
    (token_losses(model, batch).sum() / (batch.labels[:, 1:] >= 0).sum()).backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight.sub_(weight.grad, alpha=learning_rate)
                weight.grad = None


def _losses(model: nn.Module, queries: TokenizedData, rows: Sequence[int], tokens: int) -> Float[np.ndarray, "query"]:
    wanted = np.array(rows)
    losses, device = np.zeros(len(wanted)), next(model.parameters()).device
    with torch.no_grad():
        for places in plan_batches(queries.lengths[wanted], tokens, sharing=batch_sharing(model)):
            batch = make_batch(queries, wanted[places]).to(device)
            losses[places] = CausalLoss("mean").losses(model, batch).double().cpu().numpy()
    return losses


def _read_tops(scored: Scored, data: TokenizedData, queries: TokenizedData, k: int) -> list[list[int]]:
    """Return the rows of the `k` top examples of each query, in the order of the queries."""
    run, place = scored.run, {example.id: row for row, example in enumerate(data.examples)}
    known = set(run.queries)
    if missing := [example.id for example in queries.examples if example.id not in known]:
        raise DataError(
            f"{run.folder} has no scores for the query {missing[0]!r}. Give the --queries it was made with."
        )
    tops = [[row.example_id for row in run.top(query.id, k)] for query in queries.examples]
    if absent := [name for top in tops for name in top if name not in place]:
        raise DataError(f"{run.folder} names the example {absent[0]!r}, which the --data do not hold.")
    if any(len(top) < min(k, len(data)) for top in tops):
        raise SpecError(f"{run.folder} keeps fewer than {k} examples of each query. Give a smaller --k.")
    return [[place[name] for name in top] for top in tops]


def _rises(
    tops: Sequence[Sequence[int]], before: np.ndarray, after: Mapping[tuple[int, int], float]
) -> Float[np.ndarray, "2 query"]:
    """Return, per query, the mean rise of the probability, and mean fall of the loss, over the top examples."""
    found = []
    for query, (rows, start) in enumerate(zip(tops, before, strict=True)):
        losses = np.array([after[row, query] for row in rows])
        found.append(((np.exp(-losses) - np.exp(-start)).mean(), (start - losses).mean()))
    return np.array(found).T


def _values(rises: Float[np.ndarray, "2 query"], settings: TailPatchSettings) -> dict[str, Value]:
    rise, fall = (estimate_mean(values, settings.draws, settings.seed) for values in rises)
    share = f"{(rises[0] > 0).mean():.0%}"
    return {"rise of probability": rise, "fall of loss": fall, "queries that rise": share}
