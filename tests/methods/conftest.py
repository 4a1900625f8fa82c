import dataclasses
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.architectures import VOCABULARY, build
from vestige.data import Example, TokenizedData
from vestige.methods import Job, Method
from vestige.models import LoadedModel, select_components
from vestige.settings import AttributeSettings

PLACE = tempfile.TemporaryDirectory(prefix="vestige-runs-")
"""Where jobs without a folder of their own leave pieces."""
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**given) -> AttributeSettings:
    out = Path(PLACE.name) / str(next(NUMBERS)) / "run"
    return AttributeSettings(**({"model": "m", "data": "d", "queries": "q", "out": out} | given))


def tokenized(count: int, seed: int, prefix: str) -> TokenizedData:
    """Random tokens of uneven lengths, about a third of the targets masked."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(0, VOCABULARY, 3 + (5 * row) % 13).astype(np.int32) for row in range(count)]
    targets = [generator.random(len(row)) > 0.35 for row in ids]
    for mask in targets:
        mask[0], mask[-1] = False, True
    words = ["sky", "blue", "grass", "green", "why", "because", "water", "wet", "sun", "hot", "moon", "cold"]
    examples = [
        Example(f"{prefix}{row}", row, text=" ".join(generator.choice(words, 3 + row % 5))) for row in range(count)
    ]
    return TokenizedData(examples, ids, targets, np.zeros(count, dtype=bool), f"{prefix}{seed}")


def reordered(data: TokenizedData, order) -> TokenizedData:
    return dataclasses.replace(
        data,
        examples=[dataclasses.replace(data.examples[old], row=new) for new, old in enumerate(order)],
        input_ids=[data.input_ids[old] for old in order],
        targets=[data.targets[old] for old in order],
    )


def model_job(architecture: str, *, dtype=torch.float32, patterns=("all",), train=9, **given) -> Job:
    model = build(architecture, dtype)
    loaded = LoadedModel(model, None, architecture, "f", 32)
    return Job(
        train=tokenized(train, 1, "t"),
        queries=tokenized(3, 2, "q"),
        settings=settings(**given),
        loaded=loaded,
        selection=select_components(model, patterns),
    )


def text_job(train: list[str], queries: list[str], **given) -> Job:
    def data(texts: list[str], prefix: str) -> TokenizedData:
        examples = [Example(f"{prefix}{row}", row, text=text) for row, text in enumerate(texts)]
        ids = [np.zeros(1, dtype=np.int32) for _ in texts]
        return TokenizedData(examples, ids, [row > 0 for row in ids], np.zeros(len(ids), dtype=bool), prefix)

    return Job(data(train, "t"), data(queries, "q"), settings(**given))


def all_scores(method: Method, job: Job) -> torch.Tensor:
    """Every score, [query, row]; fails when a row is scored twice or never."""
    scores = torch.full((len(job.queries), len(job.train)), torch.nan, dtype=torch.float64)
    for block in method.blocks(job):
        rows, found = map(torch.as_tensor, block.arrays())
        assert scores[:, rows].isnan().all()
        scores[:, rows] = found.double()
    assert not scores.isnan().any()
    return scores
