"""Corpora whose influence is known beforehand: mixtures of a few Markov chains, with noise of their own."""

import string
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

VOCABULARY, LENGTH = 24, 25
UNRELATED = "unrelated"


class MarkovCorpora(NamedTuple):
    """Training corpora, test sets, and the recipe of the former."""

    train: list[dict[str, Any]]
    """Rows with `id`, `input_ids`, `source`, and a `text` that has a word for each transition."""
    tests: list[dict[str, Any]]
    mixing: Float[np.ndarray, "corpus chain"]
    """Share of each corpus that comes from each test chain; the rest is its own."""
    names: list[str]
    """Of the corpora, in the order in which sources are sorted."""


def markov_corpora(
    seed: int, *, corpora: int = 8, sequences: int = 320, chains: int = 4, test_sequences: int = 64
) -> MarkovCorpora:
    """`corpora` sources that mix `chains` test chains with a chain of their own; the last has nothing of the tests.

    A chain is a table of transition probabilities with few likely successors. Which chain a sequence is from is hidden.
    """
    random = np.random.default_rng([seed, 24])
    tables = [_table(random) for _ in range(chains)]
    mixing = random.dirichlet(np.full(chains, 0.5), corpora) * random.uniform(0.3, 0.9, (corpora, 1))
    mixing[-1] = 0
    names = [*(f"corpus-{number}" for number in range(corpora - 1)), UNRELATED]
    train = []
    for name, shares in zip(names, mixing, strict=True):
        own = _table(random)
        picks = random.choice(chains + 1, sequences, p=[*shares, 1 - shares.sum()])
        train += [
            _row(f"{name}/{place}", name, _walk(random, [*tables, own][pick])) for place, pick in enumerate(picks)
        ]
    tests = [
        _row(f"chain-{number}/{place}", f"chain-{number}", _walk(random, table))
        for number, table in enumerate(tables)
        for place in range(test_sequences)
    ]
    return MarkovCorpora(train, tests, mixing, names)


def _row(name: str, source: str, walked: list[int]) -> dict[str, Any]:
    states = string.ascii_lowercase
    text = " ".join(states[one] + states[two] for one, two in pairwise(walked))
    return {"id": name, "source": source, "text": text, "input_ids": walked}


def _table(random: np.random.Generator) -> np.ndarray:
    return random.dirichlet(np.full(VOCABULARY, 0.1), VOCABULARY)


def _walk(random: np.random.Generator, table: np.ndarray) -> list[int]:
    steps = table.cumsum(1)
    state = int(random.integers(VOCABULARY))
    walked = [state]
    for draw in random.random(LENGTH - 1):
        state = min(int(np.searchsorted(steps[state], draw)), VOCABULARY - 1)
        walked.append(state)
    return walked
