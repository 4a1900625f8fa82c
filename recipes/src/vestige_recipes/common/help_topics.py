"""Real text that every Python has with it: what `help("topics")` shows, some 460,000 characters on 80 subjects."""

from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

from vestige.errors import DataError
from vestige_recipes.common.texts import Row, byte_rows, drawn, pieces


class Texts(NamedTuple):
    """What the models of a study read."""

    before: list[Row]
    """Of other topics: what the model that all begin with is trained on."""
    train: list[Row]
    queries: list[Row]
    """Other pieces of the topics in `train`."""


def help_topics(seed: int, *, length: int, subjects: int, sequences: int, queries: int, before: int) -> Texts:
    """Pieces of `length` bytes; the text itself is that of the running Python.

    Args:
        seed: Which topics, and which pieces of them.
        length: Bytes in a piece.
        subjects: Topics to train on; each gives the same number of pieces, and of queries.
        sequences: Pieces to train on, all topics together.
        queries: Pieces to ask about, all topics together.
        before: Pieces of the other topics.

    Raises:
        DataError: There is not so much text.
    """
    random = np.random.default_rng([seed, len("help")])
    cut = {name: pieces(topics[name], length) for name in sorted(topics)}
    each, asked = sequences // subjects, queries // subjects
    large = [name for name, found in cut.items() if len(found) >= each + asked]
    if len(large) < subjects:
        raise DataError(
            f"This Python's help has {len(large)} topics of {each + asked} pieces of {length} bytes, and {subjects} "
            "are needed."
        )
    chosen = sorted(str(name) for name in random.permutation(large)[:subjects])
    train, tests = [], []
    for name in chosen:
        places = random.permutation(len(cut[name]))[: each + asked]
        taken = [cut[name][place] for place in places]
        train += byte_rows(taken[asked:], name, asked)
        tests += byte_rows(taken[:asked], name)
    rest = [piece for name, found in cut.items() if name not in chosen for piece in found]
    return Texts(byte_rows(drawn(rest, before, random), "other topics"), train, tests)
