"""Rows of the studies' own corpora as the models see them."""

import numpy as np

from vestige.data import TokenizedData, load_examples, tokenize


def tokenized_rows(rows) -> TokenizedData:
    return tokenize(load_examples(rows), None, max_length=64, name="rows")


def flat(parts) -> np.ndarray:
    return np.concatenate([np.asarray(part).ravel() for part in parts])
