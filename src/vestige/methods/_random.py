"""Scores that know nothing: the floor that every other method has to beat."""

import hashlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt64

from vestige.methods._protocol import Job, Method, method
from vestige.runs import Meaning, ScoreBlock


@method("random")
class Random(Method):
    """A hash of (seed, query id, example id): the same for any order of queries, data and blocks."""

    block_scores: ClassVar[int] = 2**22
    """Scores made at once, over all queries."""
    at_random = True
    reads_focus = ("instead", "span", "weights")
    baseline = 0
    meaning = Meaning(
        sign="none: the scores are drawn at random, and positive means nothing",
        unit="uniform between -1 and 1",
        target="nothing",
        normalisation="none",
        estimates="Nothing: it shows a ranking that uses neither the model nor the text.",
        cost="No pass through the model.",
        limits="Never to be believed; a method that does not beat it on a test has learned nothing.",
    )

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield random scores of all rows, in order."""
        seed = job.settings.seed
        queries = _codes("query", seed, [example.id for example in job.queries.examples])
        step = max(1, self.block_scores // max(len(queries), 1))
        for start in range(0, len(job.train), step):
            ids = [example.id for example in job.train.examples[start : start + step]]
            scores = _uniform(queries[:, None] ^ _codes("example", seed, ids)[None, :])
            yield ScoreBlock(torch.arange(start, start + len(ids)), torch.from_numpy(scores))


def _codes(kind: str, seed: int, ids: list[str]) -> UInt64[np.ndarray, "id"]:
    """Return 64 random bits per id; `kind` keeps a query and an example of the same id apart."""
    digests = (hashlib.blake2b(f"{kind}:{seed}:{name}".encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _uniform(codes: UInt64[np.ndarray, "query row"]) -> Float[np.ndarray, "query row"]:
    """Return numbers in [-1, 1) from the upper bits of the codes, mixed by the finaliser of splitmix64."""
    # The exclusive or of two hashes is linear in each; without mixing, four pairs would determine one another.
    codes = (codes ^ (codes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    codes = (codes ^ (codes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    codes ^= codes >> np.uint64(31)
    # 24 bits: what a float32 holds exactly.
    return ((codes >> np.uint64(40)).astype(np.float32) / np.float32(2**23)) - np.float32(1)
