"""A corpus as blocks of equal length: documents one after another, as language models are pre-trained."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vestige.data._types import Example, TokenizedData


class Block(NamedTuple):
    """A row of tokens from one document or several."""

    input_ids: Int[np.ndarray, "token"]
    targets: Bool[np.ndarray, "token"]
    rows: list[str]
    """Ids of the documents that it holds something of, in order."""
    sources: Counter[str]
    """Tokens from each source; documents without one do not count."""


def pack_blocks(data: TokenizedData, size: int, end: int) -> Iterator[Block]:
    """Yield all tokens of the data in blocks of `size`; the last one may be shorter.

    Behind each document stands the end token. A document that goes beyond the block goes on in the next one. Where all
    of a document is learned, so is its first token, which the end token before it predicts.

    Args:
        data: The documents, none of them cut.
        size: Tokens of a block.
        end: The end token.
    """
    held: list[tuple[Example, np.ndarray, np.ndarray]] = []
    left = size
    for example, ids, mask in zip(data.examples, data.input_ids, data.targets, strict=True):
        targets = np.where(np.arange(len(mask)) == 0, mask[1:].all(), mask)
        if not len(ids) or ids[-1] != end:
            ids, targets = np.append(ids, np.int32(end)), np.append(targets, bool(len(ids)) and targets[-1])
        while len(ids):
            held.append((example, ids[:left], targets[:left]))
            ids, targets, left = ids[left:], targets[left:], left - len(ids[:left])
            if not left:
                yield _join(held)
                held, left = [], size
    if held:
        yield _join(held)


def _join(pieces: Sequence[tuple[Example, np.ndarray, np.ndarray]]) -> Block:
    examples, ids, masks = zip(*pieces, strict=True)
    targets = np.concatenate(masks)
    targets[0] = False  # nothing predicts it
    sources: Counter[str] = Counter()
    for example, part in zip(examples, ids, strict=True):
        sources.update({} if example.source is None else {example.source: len(part)})
    return Block(np.concatenate(ids), targets, [example.id for example in examples], sources)
