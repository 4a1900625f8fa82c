import numpy as np
import pytest
import torch

from vestige.data import Example, Message, TokenizedData
from vestige.runs import (
    Check,
    ComponentScores,
    CoverageRecord,
    DataRecord,
    Meaning,
    ModelRecord,
    RunRecord,
    RunTables,
    ScoreBlock,
    ScoreCollector,
    SkippedRecord,
    TokenScores,
    TrustRecord,
)


class Letters:
    """A tokenizer whose tokens are the characters of the text."""

    def decode(self, token_ids, **options) -> str:
        return "".join(chr(number) for number in token_ids)


def tokenized(examples: list[Example], prompt: int = 0) -> TokenizedData:
    ids = [np.array([ord(letter) for letter in example.display], dtype=np.int32) for example in examples]
    targets = [np.arange(len(row)) > prompt for row in ids]
    return TokenizedData(examples, ids, targets, np.zeros(len(ids), dtype=bool), "f00d")


@pytest.fixture
def train() -> TokenizedData:
    examples = [
        Example("a", 0, text="the sky is blue", source="books"),
        Example("b", 1, prompt="why?", completion="because", source="books", label="x"),
        Example("c", 2, messages=(Message("user", "hé"), Message("assistant", "ho")), source="web"),
        Example("d", 3, text="the sky is blue", source="web"),
        Example("e", 4, text="unrelated", source="web"),
    ]
    return tokenized(examples)


@pytest.fixture
def queries() -> TokenizedData:
    return tokenized([Example("q0", 0, prompt="sky", completion="blue"), Example("q1", 1, text="why")], prompt=1)


@pytest.fixture
def all_scores() -> np.ndarray:
    return np.array([[3.0, -1.0, 0.5, 3.0, 0.0], [0.0, 9.0, 1.0, -2.0, -2.0]], dtype=np.float32)


@pytest.fixture
def content(train, queries, all_scores) -> RunTables:
    collector = ScoreCollector(2, 5, k=3, sources=[example.source for example in train.examples], dense=True)
    collector.add(ScoreBlock(torch.arange(5), torch.tensor(all_scores)))
    summary = collector.finish()
    pairs = sorted({(entry.query, entry.row) for entry in summary.ranked})
    parts = [ComponentScores(q, r, all_scores[q, r] * np.array([0.25, 0.75])) for q, r in pairs]
    tokens = []
    for query, row in pairs:
        weights = train.targets[row] / train.targets[row].sum()
        tokens.append(TokenScores(query, row, all_scores[query, row] * weights))
    return RunTables(
        train=train,
        queries=queries,
        ranked=summary.ranked,
        generated=[True, False],
        losses=[1.5, 2.5],
        tokenizer=Letters(),
        components=parts,
        tokens=tokens,
        dense=summary.dense,
    )


@pytest.fixture
def record(train, queries, all_scores) -> RunRecord:
    collector = ScoreCollector(2, 5, k=3, sources=[example.source for example in train.examples])
    collector.add(ScoreBlock(torch.arange(5), torch.tensor(all_scores)))
    summary = collector.finish()
    names = [example.id for example in queries.examples]
    return RunRecord(
        vestige="0.1.0",
        created="2025-01-01T00:00:00+00:00",
        command="vestige attribute --out run",
        config={"method": "grad-dot", "components": ["default"]},
        versions={"torch": "2"},
        model=ModelRecord(name="m", fingerprint="f", parameters=10),
        data=DataRecord(name="d", fingerprint="f", examples=5),
        queries=DataRecord(name="q", fingerprint="f", examples=2),
        method="grad-dot",
        meaning=Meaning(*("positive: good", "nats", "this model", "none", "an effect", "one pass", "often")),
        coverage=CoverageRecord(
            selected=6, total=10, fraction=0.6, skipped=[SkippedRecord(name="n", parameters=4, reason="asked")]
        ),
        components=["one", "two"],
        seconds=1.25,
        peak_memory_bytes=1000,
        trust=TrustRecord(checks=[Check(name="hub rate", value=None, reading="too few", verdict="unknown")]),
        distribution=dict(zip(names, summary.distribution, strict=True)),
        groups=dict(zip(names, summary.groups, strict=True)),
    )
