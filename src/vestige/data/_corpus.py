"""Tokens of a source of any size: in memory while that is small, on disk from there on, in constant memory."""

import hashlib
import json
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, reduce
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from vestige.data._bad_text import OnBadText
from vestige.data._crew import Answer, in_processes, in_this_process
from vestige.data._fingerprint import data_fingerprint
from vestige.data._load import Numbered, announce_replaced, no_rows, number_records, open_source, repeated_id
from vestige.data._origin import place
from vestige.data._parts import PART_BYTES, PART_ROWS, Chunk, Part, PartEncoder, chunks, pack
from vestige.data._seen import SeenIds
from vestige.data._stored import StoredExamples
from vestige.data._token_folder import FORMAT, StoredData, TokenWriter, find_tokens, open_tokens
from vestige.data._tokenize import Encoder, Tally
from vestige.data._types import Example, TokenizedData
from vestige.errors import CorruptFile
from vestige.progress import SECONDS_BETWEEN_LINES, announce, format_bytes
from vestige.storage import remove_tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKEN_FOLDER = re.compile("[0-9a-f]{16}")
HELD_BYTES = 16 * 2**20
"""What the examples of a data set may take in memory; of one that takes more, some parts are, whatever its size."""
_EXAMPLE_BYTES = 1536
"""What a record, its example and its arrays take besides the text: of short texts, most."""


def tokenize_source(
    source: Any,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    max_length: int | None,
    name: str,
    chat: bool = False,
    limit: int | None = None,
    split: str | None = None,
    folder: Path | None = None,
    workers: int = 1,
    on_bad_text: OnBadText = "refuse",
    vocabulary: int | None = None,
) -> TokenizedData:
    """Tokenise `load_examples(source)` as `tokenize` does, in memory that does not grow with the data.

    A small data set is returned in memory. Of a larger one, tokens and examples are written to a folder of their own
    in `folder`, and read from there, now and whenever the same is requested again; killed before the end, the same call
    goes on where it stopped.

    Args:
        source: As for `load_examples`.
        tokenizer: As for `tokenize`.
        max_length: As for `tokenize`.
        name: As for `tokenize`.
        chat: As for `tokenize`.
        limit: As for `load_examples`.
        split: As for `load_examples`.
        folder: Where tokens are kept; None, and what is in a live list, lives in a temporary folder as long as the
            result.
        workers: Processes that read and encode a large data set.
        on_bad_text: As for `load_examples`.
        vocabulary: As for `tokenize`.

    Raises:
        DataError: As for `load_examples` and `tokenize`.
        DiskSpaceError: The tokens do not fit on the disk.
    """
    opened = open_source(source, split)
    encoder = Encoder(tokenizer, max_length=max_length, name=name, chat=chat, vocabulary=vocabulary)
    items = number_records(opened, limit)
    origin = None if opened.identity is None else f"{opened.identity} limit {limit}"
    if origin is not None and on_bad_text != "refuse":
        origin += f" bad text {on_bad_text}"
    parts = PartEncoder(opened.name, encoder, on_bad_text)
    return _Corpus(opened.name, items, origin, encoder, parts, name, folder, workers).read()


def tokenize_stored(
    examples: StoredExamples,
    fingerprint: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    max_length: int | None,
    name: str,
    chat: bool,
    kept: Path,
    folder: Path,
    workers: int = 1,
) -> TokenizedData:
    """Return the tokens of examples on disk: those in a folder of `kept` if they were made alike, else new ones.

    Args:
        examples: As the files of an index hold them.
        fingerprint: That of the data whose examples they are.
        tokenizer: As for `tokenize`.
        max_length: As for `tokenize`.
        name: As for `tokenize`.
        chat: As for `tokenize`.
        kept: Where tokens may have been left.
        folder: Where they are written otherwise.
        workers: Processes that encode a large data set.
    """
    encoder = Encoder(tokenizer, max_length=max_length, name=name, chat=chat)
    path = find_tokens(kept, fingerprint, encoder.identity) if kept.is_dir() else None
    found = open_tokens(path, name) if path is not None else None
    if found is not None:
        return found.data
    parts = PartEncoder(name, encoder, "refuse")
    return _Corpus(name, examples, fingerprint, encoder, parts, name, folder, workers).read()


def forget_tokens(folder: Path, data: TokenizedData) -> None:
    """Remove all tokens in `folder` but those of `data`."""
    if isinstance(data.examples, StoredExamples) and folder.is_dir():
        for path in folder.iterdir():
            if path != data.examples.folder and _TOKEN_FOLDER.fullmatch(path.name):
                remove_tree(path)


@final
class _Corpus:
    """One source on its way to tokens."""

    def __init__(
        self,
        source: str,
        items: Iterable[Numbered | Example],
        origin: str | None,
        encoder: Encoder,
        parts: PartEncoder,
        name: str,
        folder: Path | None,
        workers: int,
    ) -> None:
        self._source, self._name, self._workers = source, name, workers
        self._chunks = chunks(items)
        self._encoder, self._parts = encoder, parts
        self._origin, self._parent = origin, folder
        self._rows = 0

    def read(self) -> TokenizedData:
        """Read the data from where it is already or from its source."""
        # The key costs a pass over the whole tokenizer: only where something was written is there something to find.
        folder = self._folder if self._parent is not None and self._parent.is_dir() else None
        found = open_tokens(folder, self._name) if folder is not None else None
        if found is None:
            begun = folder is not None and folder.is_dir()
            found = self._on_disk([]) if begun else self._from_source()
        announce_replaced(self._name, found.tally.replaced)
        self._encoder.announce(found.tally)
        return found.data

    @cached_property
    def _folder(self) -> Path | None:
        """Return the folder where the tokens of just this source, encoded just so, are kept."""
        if self._parent is None or self._origin is None:
            return None
        made_of = [FORMAT, PART_ROWS, PART_BYTES, self._origin, self._encoder.identity]
        return self._parent / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]

    def _from_source(self) -> StoredData:
        """Read the data from its source: in memory if it is small."""
        held: list[_Held] = []
        seen, weight = SeenIds(), 0
        for chunk in self._chunks:
            part = self._parts.encode(chunk)
            held.append(_Held(chunk, part))
            names = [example.id for example in part.examples]
            self._check_ids(chunk, names, seen.add(names), lambda name: _row_in(held, name))
            # The text is there as it was read and, about as large, as tokens.
            weight += 2 * chunk.weight + _EXAMPLE_BYTES * len(chunk.items)
            if weight > HELD_BYTES:
                return self._on_disk(held)
        if not held:
            raise no_rows(self._source)
        return _in_memory(held, self._name)

    def _on_disk(self, held: "list[_Held]") -> StoredData:
        """Write `held` and the rest of the data to disk, and return the data there."""
        owner = None
        folder = self._folder
        if folder is None:
            owner = _Scratch()
            folder = owner.folder
        of = f" by {self._workers} processes" if self._workers > 1 else ""
        announce(f"{self._name}: more than {format_bytes(HELD_BYTES)} in memory; its tokens are made{of} in {folder}.")
        writer, last_line = TokenWriter(folder, self._encoder.identity), time.monotonic()
        self._rows = 0
        rest = self._rest(len(held), writer)
        for chunk, part in chain(_packed(held), rest):
            names, suspects = writer.add(part) if part is not None else writer.add_finished()
            self._check_ids(chunk, names, suspects, writer.row_of)
            if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                announce(f"{self._name}: {self._rows:,} examples are tokens so far.")
        if not self._rows:
            raise no_rows(self._source)
        writer.finish()
        found = open_tokens(folder, self._name, owner)
        if found is None:
            raise CorruptFile(f"The tokens in {folder} changed while they were made. Run the same command again.")
        return found

    def _rest(self, first: int, writer: TokenWriter) -> Iterator[Answer]:
        """Yield answers for the chunks that are still to come; the number of the next one is `first`."""
        requests = ((chunk, not writer.is_done(number)) for number, chunk in enumerate(self._chunks, start=first))
        if self._workers == 1:
            return in_this_process(self._parts, requests)
        return in_processes(self._parts, requests, self._workers)

    def _check_ids(self, chunk: Chunk, names: list[str], suspects: list[int], row_of: Callable[[str], int]) -> None:
        for position in suspects:
            row, first, item = self._rows + position, row_of(names[position]), chunk.items[position]
            if first != row:
                record = item.record if isinstance(item, Numbered) else None
                raise repeated_id(place(self._source, row, record), names[position], first)
        self._rows += len(names)


class _Held(NamedTuple):
    chunk: Chunk
    part: Part


class _Scratch:
    """A folder that is deleted with its last user."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vestige-tokens-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def _packed(held: list[_Held]) -> Iterator[Answer]:
    """Yield what was held, in order; each leaves memory when the next one is requested."""
    held.reverse()
    while held:
        chunk, part = held.pop()
        yield Answer(chunk, pack(part))


def _row_in(held: list[_Held], name: str) -> int:
    examples = chain.from_iterable(one.part.examples for one in held)
    return next(row for row, example in enumerate(examples) if example.id == name)


def _in_memory(held: list[_Held], name: str) -> StoredData:
    examples = [example for one in held for example in one.part.examples]
    encoded = [one.part.encoded for one in held]
    input_ids = [ids for each in encoded for ids in each.input_ids]
    targets = [mask for each in encoded for mask in each.targets]
    truncated = np.concatenate([each.truncated for each in encoded])
    fingerprint = data_fingerprint(examples, input_ids, targets)
    tally = reduce(Tally.joined, (each.tally for each in encoded))
    return StoredData(TokenizedData(examples, input_ids, targets, truncated, fingerprint, name), tally)
