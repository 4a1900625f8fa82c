"""A run made of scores that this process did not derive from a model: what it says of itself, and how it is written."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from vestige.data import Example, TokenizedData, data_fingerprint
from vestige.runs import (
    Check,
    ComponentScores,
    DataRecord,
    DistributionRecord,
    GroupRecord,
    Meaning,
    RankedScore,
    RunRecord,
    RunTables,
    Scores,
    TrustRecord,
    environment,
    write_run,
)
from vestige.settings import ImportSettings
from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes

HELPS = "positive: a training step on the example lowers the query's loss; negative: it raises it"


class ImportedScores(NamedTuple):
    """Scores, and what they are about."""

    train: Sequence[Example]
    queries: list[Example]
    ranked: list[RankedScore]
    distribution: list[DistributionRecord]
    method: str
    meaning: Meaning
    groups: list[list[GroupRecord]] | None = None
    """Per query; None where the scores do not cover all examples."""
    component_names: Sequence[str] = ()
    components: list[ComponentScores] | None = None
    dense: np.ndarray | None = None


def write_imported(settings: ImportSettings, scores: ImportedScores, reading: str, seconds: float) -> Scores:
    """The run directory, opened; `reading` is the sentence in it that says what cannot be checked.

    Raises:
        UserError: The folder holds something else.
    """
    train = _text(scores.train, str(settings.data or settings.source))
    queries = _text(scores.queries, str(settings.queries or settings.source))
    ids = [example.id for example in scores.queries]
    record = RunRecord(
        vestige=version("vestige"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=settings.command_line("import"),
        config=settings.record(),
        versions=environment(),
        model=None,
        data=_described(train),
        queries=_described(queries),
        method=scores.method,
        meaning=scores.meaning,
        coverage=None,
        components=list(scores.component_names),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_memory_bytes=peak_gpu_memory_bytes(),
        trust=TrustRecord(checks=[Check(name="imported", value=None, reading=reading, verdict="unknown")]),
        distribution=dict(zip(ids, scores.distribution, strict=True)),
        groups=dict(zip(ids, scores.groups or [[] for _ in ids], strict=True)),
    )
    tables = RunTables(
        train=train,
        queries=queries,
        ranked=scores.ranked,
        generated=[False] * len(ids),
        components=scores.components,
        dense=scores.dense,
    )
    write_run(settings.out, record, tables, overwrite=settings.overwrite)
    return Scores.open(settings.out)


def _text(examples: Sequence[Example], name: str) -> TokenizedData:
    """Examples without tokens."""
    ids, mask, count = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool), len(examples)
    lists = [ids] * count, [mask] * count
    return TokenizedData(examples, *lists, np.zeros(count, dtype=bool), data_fingerprint(examples, *lists), name)


def _described(data: TokenizedData) -> DataRecord:
    return DataRecord(name=data.name, fingerprint=data.fingerprint, examples=len(data))
