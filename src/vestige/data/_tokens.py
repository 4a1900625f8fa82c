"""Tokens of a source of any size: in memory while that is small, in Arrow files on disk from there on."""

import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, final

import numpy as np

from vestige.data._load import announce_replaced, empty_error, example_of, number_records, repeat_error
from vestige.data._records import OnBadText, Record, place
from vestige.data._sources import open_source
from vestige.data._stored import FORMAT, PackedPart, StoredExamples, TokenWriter, find_tokens, open_tokens, pack
from vestige.data._tokenize import Encoded, Encoder, Tally
from vestige.data._types import Example, TokenizedData, data_fingerprint
from vestige.errors import CorruptFile, UserError, VestigeError
from vestige.progress import SECONDS_BETWEEN_LINES, announce, format_bytes
from vestige.storage import remove_tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_BYTES = 16 * 2**20
PART_ROWS = 8192
_PART_BYTES = 8 * 2**20
"""A part ends after this many bytes of text."""
_EXAMPLE_BYTES = 1536
"""What a record, its example and its arrays take besides the text: of short texts, most."""

_Chunk: TypeAlias = list[Record | Example]
_TOKEN_FOLDER = re.compile("[0-9a-f]{16}")


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
    held_bytes: int = HELD_BYTES,
    part_rows: int = PART_ROWS,
) -> TokenizedData:
    """Tokenise `load_examples(source)` as `tokenize` does, in little memory for each example.

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
        held_bytes: What the examples of a data set may take in memory.
        part_rows: Most examples that are encoded at once.

    Raises:
        DataError: As for `load_examples` and `tokenize`.
        DiskSpaceError: The tokens do not fit on the disk.
    """
    opened = open_source(source, split)
    encoder = Encoder(tokenizer, max_length=max_length, name=name, chat=chat, vocabulary=vocabulary)
    records = number_records(opened, limit)
    origin = None if opened.identity is None else f"{opened.identity} limit {limit}"
    if origin is not None and on_bad_text != "refuse":
        origin += f" bad text {on_bad_text}"
    parts = _PartEncoder(opened.name, encoder, on_bad_text)
    return _Corpus(parts, records, origin, name, folder, workers, held_bytes, part_rows).read()


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
    found = find_tokens(kept, fingerprint, encoder.identity, name) if kept.is_dir() else None
    if found is not None:
        return found
    parts = _PartEncoder(name, encoder, "refuse")
    return _Corpus(parts, examples, fingerprint, name, folder, workers, HELD_BYTES, PART_ROWS).read()


def forget_tokens(folder: Path, data: TokenizedData) -> None:
    """Remove all tokens in `folder` but those of `data`."""
    if isinstance(data.examples, StoredExamples) and folder.is_dir():
        for path in folder.iterdir():
            if path != data.examples.folder and _TOKEN_FOLDER.fullmatch(path.name):
                remove_tree(path)


@final
class _PartEncoder:
    """Encodes chunks of one source, in any process with the same bytes."""

    def __init__(self, source: str, encoder: Encoder, on_bad_text: OnBadText) -> None:
        self.source, self.encoder = source, encoder
        self._on_bad_text: OnBadText = on_bad_text

    def encode(self, items: Sequence[Record | Example]) -> tuple[list[Example], Encoded]:
        """Return consecutive examples and their tokens."""
        read = [
            (item, 0) if isinstance(item, Example) else example_of(self.source, item, self._on_bad_text)
            for item in items
        ]
        examples = [example for example, _ in read]
        encoded = self.encoder.encode(examples)
        tally = encoded.tally._replace(replaced=sum(replaced for _, replaced in read))
        return examples, encoded._replace(tally=tally)


@final
class _Corpus:
    """One source on its way to tokens."""

    def __init__(
        self,
        parts: _PartEncoder,
        items: Iterable[Record | Example],
        origin: str | None,
        name: str,
        parent: Path | None,
        workers: int,
        held_bytes: int,
        part_rows: int,
    ) -> None:
        self._parts, self._name, self._workers = parts, name, workers
        self._chunks = _cut(items, part_rows)
        self._origin, self._parent = origin, parent
        self._held_bytes, self._part_rows = held_bytes, part_rows
        self._rows, self._seen = 0, _SeenIds()

    def read(self) -> TokenizedData:
        """Read the data from where it is already or from its source."""
        # The key costs a pass over the whole tokenizer: only where something was written is there something to find.
        folder = self._folder if self._parent is not None and self._parent.is_dir() else None
        found = open_tokens(folder, self._name) if folder is not None else None
        if found is None:
            begun, held, weight = folder is not None and folder.is_dir(), list[_Chunk](), 0
            for chunk, size in () if begun else self._chunks:
                held.append(chunk)
                # The text is there as it was read and, about as large, as tokens.
                weight += 2 * size + _EXAMPLE_BYTES * len(chunk)
                if weight > self._held_bytes:
                    break
            found = self._write(held) if begun or weight > self._held_bytes else self._encode(held)
        data, tally = found
        announce_replaced(self._name, tally.replaced)
        self._parts.encoder.announce(tally)
        return data

    @cached_property
    def _folder(self) -> Path | None:
        """The folder where the tokens of just this source, encoded just so, are kept."""
        if self._parent is None or self._origin is None:
            return None
        made_of = [FORMAT, self._part_rows, _PART_BYTES, self._origin, self._parts.encoder.identity]
        return self._parent / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]

    def _encode(self, chunks: list[_Chunk]) -> tuple[TokenizedData, Tally]:
        """Return the data in memory."""
        items = [item for chunk in chunks for item in chunk]
        if not items:
            raise empty_error(self._parts.source)
        examples, encoded = self._parts.encode(items)
        names = [example.id for example in examples]
        self._check_ids(items, names, lambda: iter(names))
        ids, targets, truncated, tally = encoded
        fingerprint = data_fingerprint(examples, ids, targets)
        return TokenizedData(examples, ids, targets, truncated, fingerprint, self._name), tally

    def _write(self, held: list[_Chunk]) -> tuple[TokenizedData, Tally]:
        """Write the tokens of `held` and of the rest of the data to disk, and return the data there."""
        owner = None
        folder = self._folder
        if folder is None:
            owner = _TemporaryFolder()
            folder = owner.path
        of = f" by {self._workers} processes" if self._workers > 1 else ""
        least = format_bytes(self._held_bytes)
        announce(f"{self._name}: more than {least} in memory; its tokens are made{of} in {folder}.")
        writer, last_line = TokenWriter(folder, self._parts.encoder.identity), time.monotonic()
        rest = enumerate((chunk for chunk, _ in self._chunks), start=len(held))
        # What was held is encoded here, where the choice of columns is announced.
        begin = _pack_all(self._parts, ((chunk, True) for chunk in held), 1)
        requests = ((chunk, not writer.is_done(number)) for number, chunk in rest)
        for chunk, part in chain(begin, _pack_all(self._parts, requests, self._workers)):
            names = writer.add(part) if part is not None else writer.add_finished()
            self._check_ids(chunk, names, writer.names)
            if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                announce(f"{self._name}: {self._rows:,} examples are tokens so far.")
        if not self._rows:
            raise empty_error(self._parts.source)
        writer.finish()
        found = open_tokens(folder, self._name, owner)
        if found is None:
            raise CorruptFile(f"The tokens in {folder} changed while they were made. Run the same command again.")
        return found

    def _check_ids(self, chunk: _Chunk, names: list[str], known: Callable[[], Iterator[str]]) -> None:
        """Raise unless the next names are new; `known` yields all so far, and is used where two seem to be equal."""
        for position in self._seen.add(names):
            row, item = self._rows + position, chunk[position]
            first = next(number for number, other in enumerate(known()) if other == names[position])
            if first != row:
                record = item if isinstance(item, Record) else Record(None, row=row)
                raise repeat_error(place(self._parts.source, record), names[position], first)
        self._rows += len(names)


@final
class _SeenIds:
    """Hashes of the ids so far, 8 bytes each, in sorted arrays of growing size: looking one up reads few of them."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def add(self, names: Sequence[str]) -> list[int]:
        """Add the next ids.

        Returns:
            Positions in `names` of those that came before, or share the hash of one that did: the caller must verify.
        """
        joined = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in names)
        codes = np.frombuffer(joined, dtype=np.uint64)
        new, firsts = np.unique(codes, return_index=True)
        again = np.ones(len(codes), dtype=bool)
        again[firsts] = False
        for known in self._sorted:
            again |= known[np.minimum(np.searchsorted(known, codes), len(known) - 1)] == codes
        # Like carrying when counting: arrays of like size become one, so there are few, and each code moves seldom.
        while self._sorted and len(self._sorted[-1]) <= len(new):
            new = np.sort(np.concatenate([self._sorted.pop(), new]), kind="stable")
        self._sorted.append(new)
        return np.flatnonzero(again).tolist()


class _TemporaryFolder:
    """A folder that is deleted with its last user."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="vestige-tokens-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _cut(items: Iterable[Record | Example], most: int) -> Iterator[tuple[_Chunk, int]]:
    """Cut the items into chunks and yield each with its bytes of text, about: the same chunks in every process."""
    held: _Chunk = []
    weight = 0
    for item in items:
        held.append(item)
        weight += len(item.display) if isinstance(item, Example) else _weigh(item.value)
        if len(held) == most or weight >= _PART_BYTES:
            yield held, weight
            held, weight = [], 0
    if held:
        yield held, weight


def _weigh(value: Any) -> int:
    """Return about how many bytes of text a record holds."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_weigh, value.values()))
    if isinstance(value, list | tuple):
        return 4 * len(value) if value and isinstance(value[0], int) else sum(map(_weigh, value))
    return 8


def _pack_all(
    parts: _PartEncoder, requests: Iterator[tuple[_Chunk, bool]], workers: int
) -> Iterator[tuple[_Chunk, PackedPart | None]]:
    """Yield chunks with their parts, None where one is not wanted; the first error comes after the parts before it."""
    if workers == 1:
        for chunk, wanted in requests:
            yield chunk, pack(*parts.encode(chunk)) if wanted else None
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor

    content = pickle.dumps(parts, protocol=pickle.HIGHEST_PROTOCOL)
    run = Parallel(n_jobs=workers, backend="loky", max_nbytes=None)
    try:
        while group := list(islice(requests, 2 * workers)):
            answers = iter(run(delayed(_pack_in_worker)(content, chunk) for chunk, wanted in group if wanted))
            for chunk, wanted in group:
                part = next(answers) if wanted else None
                if isinstance(part, VestigeError):
                    raise part
                yield chunk, part
    except BrokenProcessPool as error:
        found = re.search(r"\{(.+?)\}", str(error))
        status = found[1] if found else "unknown"
        raise UserError(
            f"A process that turns text into tokens ended (exit status {status}), often for lack of memory. "
            "Finished parts are kept: run the same command again, with fewer --workers if memory is short."
        ) from error
    finally:
        # They would wait five minutes for more, with their memory.
        get_reusable_executor(reuse=True).shutdown(wait=True)  # pyright: ignore[reportArgumentType]


def _pack_in_worker(content: bytes, chunk: _Chunk) -> PackedPart | VestigeError:
    """Encode a chunk in another process; an error is returned, so that the first one in order is raised."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", VESTIGE_QUIET="1")
    try:
        return pack(*_unpickle(content).encode(chunk))
    except VestigeError as error:
        return error


@lru_cache(maxsize=1)
def _unpickle(content: bytes) -> _PartEncoder:
    """Return the encoder that a worker was sent; a tokenizer takes long to read."""
    return pickle.loads(content)
