"""Runs whose scores and texts are written by hand: no model, no training."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from vestige.data import Example, Message, TokenizedData
from vestige.runs import Meaning, RunTables, ScoreBlock, ScoreCollector, Scores, make_run_record, write_run

CAUSAL = Meaning("positive: training on the example lowers the query's loss", "nats", "this model", *["none"] * 4)
ALIKE = Meaning("no causal reading: higher = more alike", "cosine", "this model", *["none"] * 4)


def chat(name: str, question: str, answer: str | None = None, source: str | None = None) -> Example:
    """A row or a query as a conversation."""
    turns = [Message("system", "Be kind."), Message("user", question)]
    turns += [] if answer is None else [Message("assistant", answer)]
    return Example(name, 0, messages=tuple(turns), source=source)


def tokens_of(examples: list[Example]) -> TokenizedData:
    ids = [np.frombuffer(example.display.encode(), dtype=np.uint8).astype(np.int32) for example in examples]
    digest = hashlib.sha256(repr([(example.id, example.display) for example in examples]).encode()).hexdigest()
    return TokenizedData(examples, ids, [np.ones(len(row), bool) for row in ids], np.zeros(len(ids), bool), digest)


def write_by_hand(
    folder: Path,
    scores: list[list[float]],
    examples: list[Example],
    queries: list[Example],
    *,
    meaning: Meaning = CAUSAL,
    k: int = 20,
    dense: bool = False,
    **facts: object,
) -> Scores:
    """Write a run with these scores [query][example] and open it."""
    train, asked = tokens_of(examples), tokens_of(queries)
    collector = ScoreCollector(len(queries), len(examples), k=k, sources=[one.source for one in examples], dense=dense)
    collector.add(ScoreBlock(torch.arange(len(examples)), torch.tensor(scores, dtype=torch.float64)))
    summary = collector.finish()
    given = {"command": "vestige attribute --index idx --queries q.jsonl --out run", "config": {}, "method": "grad-dot"}
    given |= {"meaning": meaning, "data": train, "queries": asked, "summary": summary, "seconds": 1.0}
    tables = RunTables(train, asked, summary.ranked, generated=[False] * len(queries), dense=summary.dense)
    return Scores.open(write_run(folder, make_run_record(**{**given, **facts}), tables))
