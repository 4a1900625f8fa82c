"""Logs of inner products with a validation batch, `dot_prod_log_iter_{n}.pt`, added up over a training.

Each file is a list of {dot_product [B], X_train [B, T], Y_train, iter_num, batch_idx}, one entry for each step. The
published software never adds them up, and does not say which row an example is (`batch_idx` counts batches): examples
are known by their tokens.
"""

import time
from typing import Any

import torch
from torch import Tensor

from vestige.data import Example, load_examples
from vestige.errors import DataError, SpecError
from vestige.runs import Meaning, ScoreBlock, ScoreCollector, Scores, check_target
from vestige_recipes.commands import ImportSettings
from vestige_recipes.interop.published import HELPS, Metadata, load_object, stand_ins, write_imported

LOGS = "dot_prod_log_iter"
_MEANING = Meaning(
    sign=HELPS,
    target="this model, over the logged steps of its training",
    normalisation="none",
    unit="inner product with the validation gradient, in the unit of the files, summed over steps",
    estimates="How well the example's gradient agreed with that of the validation batch in the steps that were logged.",
    cost="Reading the files.",
    limits="Rates of the steps are not in the files: early and late steps count alike. Steps between saves may be "
    "lost. Copies are one example: the first of their rows has the sum.",
)
_READING = "The products were computed by other software and taken over as they are, scaled by its batch size."
_Tokens = tuple[int, ...]


def import_logs(settings: ImportSettings) -> Scores:
    """Return the logged products as a run in `out`: one query, the validation batch; an example's steps added up.

    Raises:
        DataError: A file is torn or of another layout, or an example is none of the rows of `data`.
    """
    started = time.perf_counter()
    check_target(settings.out, overwrite=settings.overwrite)
    if settings.against is not None or settings.model is not None:
        raise SpecError(f"--against and --model are for gradients, and {settings.source} holds logs. Leave them out.")
    totals: dict[_Tokens, float] = {}
    paths = sorted(settings.source.glob(f"{LOGS}_*.pt"))
    if not paths:
        raise DataError(f"{settings.source} holds no {LOGS}_*.pt. Give the folder in which they lie.")
    for path in paths:
        for entry in load_object(path, list):
            step = Metadata(entry, path)
            products, rows = step.field("dot_product"), step.field("X_train")
            if not isinstance(products, Tensor) or not isinstance(rows, Tensor) or len(products) != len(rows):
                raise DataError(f"{path}: `dot_product` and `X_train` are no tensors with a row for each example.")
            for tokens, value in zip(map(tuple, rows.tolist()), products.double().reshape(-1).tolist(), strict=True):
                totals[tokens] = totals.get(tokens, 0.0) + value
    train, length = _find_examples(settings, list(totals)), max(map(len, totals), default=0)
    known = {_start(one, length): row for row, one in reversed([*enumerate(train)])}
    values = torch.zeros(1, len(train), dtype=torch.float64)
    for tokens, value in totals.items():
        if tokens not in known:
            raise DataError(
                f"{settings.source}: an example that begins with the tokens {tokens[:8]} is no row of {settings.data}. "
                "Give the rows of tokens that were trained on, with a column `input_ids`."
            )
        values[0, known[tokens]] = value
    collector = ScoreCollector(1, len(train), k=settings.k)
    collector.add(ScoreBlock(torch.arange(len(train)), values))
    asked = stand_ins(["validation"])
    return write_imported(settings, train, asked, collector.finish(), _MEANING, _READING, cosine=False, started=started)


def _find_examples(settings: ImportSettings, logged: list[_Tokens]) -> list[Example]:
    """Return the rows of the data; without data a stand-in for each example that was logged."""
    if settings.data is not None:
        return load_examples(settings.data, on_bad_text=settings.on_bad_text)
    return [
        Example(id=str(row), row=row, text=f"tokens {' '.join(map(str, tokens))}", extra={"input_ids": tokens})
        for row, tokens in enumerate(logged)
    ]


def _start(example: Example, length: int) -> Any:
    """Return the first tokens of an example, of which the last is only predicted."""
    ids = example.extra.get("input_ids")
    if ids is None:
        raise DataError(f"Row {example.row} of --data has no `input_ids`, by which logged examples are known.")
    return tuple(int(token) for token in ids[:length])
