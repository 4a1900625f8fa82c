"""The types of the data package: an example as it was given, a data set as the model receives it, and its batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
from jaxtyping import Float, Int

from vestige.errors import DataError
from vestige.lazy import torch

if TYPE_CHECKING:
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
class Focus:
    """What of a query's last answer is explained, where that is not the loss of the whole."""

    instead: str | None = None
    """Another answer, whose loss is subtracted: why the model gave the one and not the other."""
    spans: tuple[tuple[int, int] | str, ...] = ()
    """Parts of the answer: characters `start` up to `stop`, or the words themselves; none: all of it."""
    weights: tuple[float, ...] = ()
    """What the loss of each part, or of each explained token, is multiplied with; none: 1."""

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of a query that read back as the same."""
        spans = [list(span) if isinstance(span, tuple) else span for span in self.spans]
        return {"instead": self.instead, "span": spans or None, "weights": list(self.weights) or None}


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
    focus: Focus | None = None
    """Of a query alone."""

    @property
    def position(self) -> str:
        """Row number and id, as an error names the example."""
        return f"row {self.row} (id {self.id!r})"

    @property
    def lacks_answer(self) -> bool:
        """True for a prompt, or a conversation, whose answer is still to come."""
        if self.messages:
            return self.messages[-1].role != ASSISTANT
        return self.prompt is not None and self.completion is None

    def without_answer(self) -> "Example":
        """Return the question alone, as one whose answer is still to come; a text has none and stays as it is."""
        if self.messages:
            return replace(self, messages=self.messages[:-1]) if not self.lacks_answer else self
        return replace(self, completion=None) if self.prompt is not None else self

    def with_answer(self, text: str) -> "Example":
        """Return a question that lacks its answer with this one: as its completion, or as the assistant's turn."""
        if self.messages:
            return replace(self, messages=(*self.messages, Message(ASSISTANT, text)))
        return replace(self, completion=text)

    @property
    def answer(self) -> str | None:
        """The completion, or the content of the assistant's last turn; None for a text or a bare question."""
        if self.messages:
            return None if self.lacks_answer else self.messages[-1].content
        return self.completion

    @property
    def columns(self) -> dict[str, Any]:
        """The example as a row that reads back as the same example; columns without a value are left out."""
        found = {"id": self.id, "messages": [turn.columns for turn in self.messages] or None, "text": self.text}
        found |= {"prompt": self.prompt, "completion": self.completion, "source": self.source, "label": self.label}
        found |= {} if self.focus is None else self.focus.columns
        extra = {name: cell for name, cell in self.extra.items() if name not in found}
        return {name: cell for name, cell in (found | extra).items() if cell is not None}

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
    weights: Sequence[np.ndarray] | None = None
    """Of queries: what the loss of each token is multiplied with, float64 [token] for each example; None: 1."""
    contrast: Contrast | None = None
    """Of queries: what they are explained against; None where none is."""

    def __len__(self) -> int:
        return len(self.examples)

    def subset(self, rows: Sequence[int] | np.ndarray) -> TokenizedData:
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
            None if self.weights is None else [self.weights[row] for row in rows],
            None if self.contrast is None else self.contrast.subset(rows),
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per example, int64 [example], or int32 where they are on disk."""
        return _count(self.input_ids, len)

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Positions that enter the loss, per example, int64 [example], or int32 where they are on disk."""
        return _count(self.targets, np.count_nonzero)


class Contrast(NamedTuple):
    """Answers whose losses are subtracted from those of some queries."""

    rows: Int[np.ndarray, "contrast"]
    """Positions of these queries."""
    data: TokenizedData
    """The same questions with the other answers, in this order."""

    def subset(self, rows: Sequence[int]) -> Contrast | None:
        """Return the part for queries at these positions."""
        at = {int(row): place for place, row in enumerate(self.rows)}
        kept = [place for place, row in enumerate(rows) if row in at]
        return Contrast(np.array(kept), self.data.subset([at[rows[place]] for place in kept])) if kept else None


def _count(arrays: Sequence[np.ndarray], count: Callable[[np.ndarray], int]) -> np.ndarray:
    """Return the counts of all arrays; those on disk bring them along, for all would have to be read."""
    known = getattr(arrays, "sizes", None)
    return np.array([count(each) for each in arrays], dtype=np.int64) if known is None else known


class Batch(NamedTuple):
    """Right-padded tensors of a few examples; any causal model may ignore the padding without a mask."""

    rows: Int[Tensor, "example"]
    """Positions of the examples in their data set."""
    input_ids: Int[Tensor, "example token"]
    labels: Int[Tensor, "example token"]
    """The token itself where its prediction enters the loss, `NO_TARGET` elsewhere (unshifted, as in transformers)."""
    weights: Float[Tensor, "example token"] | None = None
    """What the loss of each token is multiplied with; None: 1."""
    host_labels: Int[Tensor, "example token"] | None = None
    """The labels on the CPU, where `labels` are on another device: what is found there waits for no device."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on `device`."""
        host = self.labels if self.labels.device.type == "cpu" else self.host_labels
        ids, labels = send(self.input_ids, device), send(self.labels, device)
        weights = None if self.weights is None else send(self.weights, device)
        return Batch(self.rows, ids, labels, weights, None if labels is host else host)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on `device`; on its way to a CUDA card through pinned memory, so that the CPU need not wait."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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


class Sharing(NamedTuple):
    """The examples that may share a batch: all, unless the model's forward pass depends on the longest of them."""

    switches: tuple[int, ...] = ()
    """Numbers of tokens: an example no longer than one of them shares no batch with a longer one."""
    equal: bool = False
    """Only examples of the same length share a batch, so that there is no padding."""

    def most(self, lengths: np.ndarray) -> np.ndarray:
        """Return the most tokens that examples of these lengths may be padded to; -1 where nothing limits it."""
        if self.equal:
            return lengths
        borders = np.array([*sorted(self.switches), -1])
        return borders[np.searchsorted(borders[:-1], lengths)]


ANY_EXAMPLES = Sharing()
"""Of a model whose results depend on no other example."""


def plan_batches(
    lengths: np.ndarray, token_budget: int, max_examples: int | None = None, *, sharing: Sharing = ANY_EXAMPLES
) -> list[np.ndarray]:
    """Return the rows of each batch, every row in exactly one; longest first, so too large a budget fails early.

    Args:
        lengths: Tokens per example, [example].
        token_budget: Most tokens in a batch, padding included; an example longer than that is a batch by
            itself.
        max_examples: Most examples in a batch.
        sharing: What the model allows.

    Returns:
        int64 arrays of rows, sorted by length, ties by row.

    Raises:
        DataError: The budget or `max_examples` is below 1.
    """
    cut = CutBatches(lengths, token_budget, max_examples, sharing)
    return [cut.rows[one.start : one.stop].astype(np.int64) for one in cut.batches()]


class CutBatch(NamedTuple):
    """A batch, as a range of `CutBatches.rows`."""

    start: int
    stop: int
    longest: int
    """Tokens of its longest example, at least 1."""

    @property
    def tokens(self) -> int:
        """Its tokens, padding included."""
        return (self.stop - self.start) * self.longest


@final
class CutBatches:
    """The batches of `plan_batches` for data of any size: in memory are a row number and a length for each example."""

    def __init__(
        self,
        lengths: Int[np.ndarray, "example"],
        token_budget: int,
        max_examples: int | None = None,
        sharing: Sharing = ANY_EXAMPLES,
    ) -> None:
        """Plan as `plan_batches` does."""
        if token_budget < 1 or (max_examples is not None and max_examples < 1):
            raise DataError(
                f"token_budget={token_budget}, max_examples={max_examples}: both must be above 0, for example 4096."
            )
        self._budget, self._most = token_budget, max_examples or len(lengths)
        order = np.argsort(-lengths.astype(np.int32), kind="stable")
        self.rows = order.astype(np.int32 if len(lengths) <= np.iinfo(np.int32).max else np.int64)
        """Row numbers, longest example first, ties by row, int32 or int64 [example]."""
        self._lengths = lengths[order].astype(np.int32)
        borders = np.flatnonzero(np.diff(sharing.most(self._lengths))) + 1
        self._ends = np.append(borders, len(lengths))
        """Where examples end that may share a batch."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[CutBatch]:
        """Yield the batches of the rows `start:stop`, which begin and end with a batch."""
        stop = len(self) if stop is None else stop
        while start < stop:
            longest = max(int(self._lengths[start]), 1)
            most = min(max(self._budget // longest, 1), self._most)
            end = min(start + most, stop, int(self._ends[np.searchsorted(self._ends, start, side="right")]))
            yield CutBatch(start, end, longest)
            start = end

    def tokens(self, start: int, stop: int) -> int:
        """Return the number of tokens of the examples `start:stop` of `rows`, without padding."""
        return int(self._lengths[start:stop].sum(dtype=np.int64))


def make_batch(data: TokenizedData, rows: Sequence[int] | np.ndarray) -> Batch:
    """Return the rows as right-padded tensors on the CPU; padding is token 0 with `NO_TARGET` as its label.

    A batch is at least one token wide, so that a model can run on an example without tokens.
    """
    numbers = [int(row) for row in rows]
    width = max([1, *(len(data.input_ids[row]) for row in numbers)])
    ids = np.zeros((len(numbers), width), dtype=np.int64)
    labels = np.full((len(numbers), width), NO_TARGET, dtype=np.int64)
    weights = None if data.weights is None else np.zeros((len(numbers), width))
    for place, row in enumerate(numbers):
        tokens, mask = data.input_ids[row], data.targets[row]
        ids[place, : len(tokens)] = tokens
        labels[place, : len(tokens)][mask] = tokens[mask]
        if weights is not None:
            weights[place, : len(tokens)] = data.weights[row]  # type: ignore[index]
    multiplied = None if weights is None else torch.from_numpy(weights)
    return Batch(torch.tensor(numbers, dtype=torch.int64), torch.from_numpy(ids), torch.from_numpy(labels), multiplied)
