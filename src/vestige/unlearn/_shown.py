"""What a run shows for a set of examples: a line for it, or the example itself where it has only one."""

from collections.abc import Sequence

import numpy as np

from vestige.data import Example, TokenizedData
from vestige.unlearn._job import Side, UntracJob
from vestige.unlearn._sets import ExampleSet

_EXCERPT = 400
"""Characters of the first example."""


def shown_columns(job: UntracJob) -> TokenizedData:
    """Return a row for each column of the scores: training examples, or one for each source."""
    return job.train.data if job.settings.level == "example" else _rows(job.train)


def shown_tests(job: UntracJob) -> TokenizedData:
    """Return a row for each test set."""
    return _rows(job.tests)


def _rows(side: Side) -> TokenizedData:
    data, sets = side
    examples = [_example(data, each, number) for number, each in enumerate(sets)]
    alone = [int(each.rows[0]) if len(each.rows) == 1 else None for each in sets]
    return TokenizedData(
        examples,
        _of_the_only(data.input_ids, alone, np.zeros(0, dtype=np.int32)),
        _of_the_only(data.targets, alone, np.zeros(0, dtype=bool)),
        np.array([row is not None and bool(data.truncated[row]) for row in alone]),
        data.fingerprint,
        data.name,
    )


def _of_the_only(values: Sequence[np.ndarray], rows: list[int | None], empty: np.ndarray) -> list[np.ndarray]:
    return [empty if row is None else values[row] for row in rows]


def _example(data: TokenizedData, group: ExampleSet, number: int) -> Example:
    first = data.examples[int(group.rows[0])]
    if len(group.rows) == 1:
        fields = {name: getattr(first, name) for name in ("text", "prompt", "completion", "messages", "label")}
        return Example(group.name, number, source=first.source, **fields)
    tokens = int(data.target_counts[group.rows].sum())
    excerpt = first.display[:_EXCERPT]
    text = f"{len(group.rows):,} examples, {tokens:,} tokens to learn. The first: {excerpt}"
    return Example(group.name, number, text=text, source=group.name)
