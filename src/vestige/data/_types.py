"""The types of the data package: an example as it was given, and a data set as the model receives it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

NO_TARGET = -100
"""Label of a position whose prediction does not enter the loss (the value PyTorch's cross-entropy ignores)."""

SYSTEM = ("system", "developer")
"""Roles whose turn, standing first, is an instruction that many conversations share."""
ASSISTANT = "assistant"
"""Role of the turns that a model learns."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    """Its other keys, which the chat template is given as they are; `content` among them, None, where it was null."""

    @property
    def columns(self) -> dict[str, Any]:
        """The turn as a row of `messages` that reads back as the same turn."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Example:
    """One row of a data source, before tokenising.

    Exactly one of `text`, `completion` (with `prompt`) and `messages` is filled. A query may have a prompt and no
    completion: the model's own answer is generated later.
    """

    id: str
    row: int
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] = ()
    source: str | None = None
    label: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def lacks_answer(self) -> bool:
        """True for a prompt, or a conversation, whose answer is still to come."""
        if self.messages:
            return self.messages[-1].role != ASSISTANT
        return self.prompt is not None and self.completion is None

    @property
    def display(self) -> str:
        """All text of the example as one string for reading and for lexical search."""
        if self.messages:
            return "\n".join(f"{message.role}: {message.content}" for message in self.messages)
        if self.text is not None:
            return self.text
        return "\n".join(part for part in (self.prompt, self.completion) if part)

    @property
    def passages(self) -> tuple[str, ...]:
        """The texts whose words stand beside each other: of a conversation each turn for itself.

        A leading system turn, which many conversations share, is left out where something follows it.
        """
        if not self.messages:
            return (self.display,)
        turns = self.messages[1:] if self.messages[0].role in SYSTEM and len(self.messages) > 1 else self.messages
        return tuple(turn.content for turn in turns)


@runtime_checkable
class _Sized(Protocol):
    """A sequence of arrays on disk that has the counts for which all of them would have to be read."""

    sizes: np.ndarray
    """Entries per array, of marks the true ones, int32 [example]."""


@dataclass(frozen=True)
class TokenizedData:
    """A data set as the model receives it; row `i` of every sequence is example `i`.

    The sequences are lists where the data is small, and read single items from disk where it is not
    (`tokenize_source`): go through them in row order, or read single rows, and keep neither texts nor tokens.

    `input_ids[i]` is a one-dimensional int32 array. `targets[i]` is a bool array of the same length: True where the
    prediction *of that token* enters the loss (position 0 never does: nothing predicts it).
    """

    examples: Sequence[Example]
    input_ids: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    truncated: np.ndarray
    """bool [example]: True where tokens beyond the context were cut off."""
    fingerprint: str
    """sha256 over ids, tokens and targets, in order."""
    name: str = "data"

    def __len__(self) -> int:
        return len(self.examples)

    def subset(self, rows: Sequence[int] | np.ndarray) -> "TokenizedData":
        """Return just these rows, in this order; its fingerprint names the rows and the data that they come from."""
        rows = [int(row) for row in rows]
        digest = hashlib.sha256(f"{self.fingerprint}:{rows}".encode()).hexdigest()
        return TokenizedData(
            [self.examples[row] for row in rows],
            [self.input_ids[row] for row in rows],
            [self.targets[row] for row in rows],
            self.truncated[rows],
            digest,
            self.name,
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per example, int64 [example], or int32 where they are on disk."""
        if isinstance(self.input_ids, _Sized):
            return self.input_ids.sizes
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Positions that enter the loss, per example, int64 [example], or int32 where they are on disk."""
        if isinstance(self.targets, _Sized):
            return self.targets.sizes
        return np.array([int(mask.sum()) for mask in self.targets], dtype=np.int64)


class Batch(NamedTuple):
    """Right-padded tensors of a few examples; any causal model may ignore the padding without a mask."""

    rows: Int[Tensor, "example"]
    """Positions of the examples in their data set."""
    input_ids: Int[Tensor, "example token"]
    labels: Int[Tensor, "example token"]
    """The token itself where its prediction enters the loss, `NO_TARGET` elsewhere (unshifted, as in transformers)."""

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on `device`."""
        return Batch(self.rows, self.input_ids.to(device), self.labels.to(device))


def data_fingerprint(
    examples: Sequence[Example], input_ids: Sequence[np.ndarray], targets: Sequence[np.ndarray]
) -> str:
    """Return the sha256 of ids, tokens and targets, in order, in hexadecimal.

    The same on every platform: token ids are hashed as little-endian int32 and every part is preceded by its
    length, so that no two data sets run together into the same bytes.
    """
    digest = hashlib.sha256()
    for example, ids, mask in zip(examples, input_ids, targets, strict=True):
        digest.update(hash_example(example.id, ids, mask))
    return digest.hexdigest()


def hash_example(name: str, ids: np.ndarray, targets: np.ndarray) -> bytes:
    """Return what one example adds to the fingerprint: its id, its tokens and its targets."""
    encoded = name.encode()
    about = f"{len(encoded)} {len(ids)} ".encode()
    tokens = np.ascontiguousarray(ids, dtype="<i4").tobytes()
    return about + encoded + tokens + np.packbits(targets.astype(bool)).tobytes()
