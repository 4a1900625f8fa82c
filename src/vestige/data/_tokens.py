"""Tokens of a source of any size: in memory while that is small, in Arrow files on disk from there on."""

import hashlib
import json
import os
import pickle
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, final

import numpy as np

from vestige.data._load import announce_replaced, empty_error, example_of, repeat_error
from vestige.data._records import OnBadText, Record, place
from vestige.data._sources import open_source
from vestige.data._stored import FORMAT, StoredExamples, TokenFolder, find_tokens
from vestige.data._tokenize import Encoded, Encoder, Tally
from vestige.data._types import Example, TokenizedData, data_fingerprint
from vestige.errors import CorruptFile, UserError, VestigeError
from vestige.progress import SECONDS_BETWEEN_LINES, announce, format_bytes
from vestige.storage import make_folder, remove_strays, remove_tree

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
    where: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    kept: Path | None = None,
    fingerprint: str | None = None,
    workers: int = 1,
    on_bad_text: OnBadText = "refuse",
    vocabulary: int | None = None,
    held_bytes: int = HELD_BYTES,
    part_rows: int = PART_ROWS,
) -> TokenizedData:
    """Tokenise `load_examples(source)` as `tokenize` does, in little memory for each example.

    A small data set is returned in memory. Of a larger one, tokens and examples are written to a folder of their own
    in `folder`, and read from there, now and whenever the same is requested again; killed before the end, the same call
    goes on where it stopped. Without `folder`, and of what is in a live list, tokens live in a temporary folder as long
    as the result. The source may also be the examples of an index: their data have the `fingerprint`, and their tokens
    may have been left in the folder `kept`.

    A small data set takes at most `held_bytes` of memory. A larger one is read and encoded by `workers` processes, at
    most `part_rows` examples at once. The other arguments are those of `load_examples` and `tokenize`.

    Raises:
        DataError: As for `load_examples` and `tokenize`.
        DiskSpaceError: The tokens do not fit on the disk.
    """
    encoder = Encoder(tokenizer, max_length=max_length, name=name, chat=chat, vocabulary=vocabulary)
    if isinstance(source, StoredExamples):
        found = None if kept is None else find_tokens(kept, str(fingerprint), encoder.identity, name)
        if found is not None:
            return found
        title, items, origin = name, source, fingerprint
    else:
        title, items, origin = open_source(source, split, limit=limit, where=where)
    parts = _Parts(title, encoder, on_bad_text)
    return _Corpus(parts, items, origin, folder, workers, held_bytes, part_rows).read()


def forget_tokens(folder: Path, data: TokenizedData) -> None:
    """Remove all tokens in `folder` but those of `data`."""
    if isinstance(data.examples, StoredExamples) and folder.is_dir():
        for path in folder.iterdir():
            if path != data.examples.folder and _TOKEN_FOLDER.fullmatch(path.name):
                remove_tree(path)


class _Parts(NamedTuple):
    """Makes the parts of one source, in any process with the same bytes."""

    source: str
    encoder: Encoder
    on_bad_text: OnBadText

    def encode(self, items: Sequence[Record | Example]) -> tuple[list[Example], Encoded]:
        """Return consecutive examples and their tokens."""
        examples, replaced = list[Example](), 0
        for item in items:
            if isinstance(item, Record):
                item, _, halves = example_of(self.source, item, self.on_bad_text)
                replaced += halves
            examples.append(item)
        encoded = self.encoder.encode(examples)
        return examples, encoded._replace(tally=encoded.tally._replace(replaced=replaced))

    def write(self, tokens: TokenFolder, number: int, items: Sequence[Record | Example]) -> VestigeError | None:
        """Write a part, or return the error, so that the first one in order is raised."""
        try:
            tokens.write_part(number, *self.encode(items))
        except VestigeError as error:
            return error
        return None


@final
@dataclass
class _Corpus:
    """One source on its way to tokens."""

    parts: _Parts
    items: Iterable[Record | Example]
    origin: str | None
    parent: Path | None
    workers: int
    held_bytes: int
    part_rows: int
    _rows: int = 0
    _seen: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """Hashes of the ids so far, 8 bytes each, sorted."""

    def read(self) -> TokenizedData:
        """Read the data from where it is already or from its source."""
        # The key costs a pass over the whole tokenizer: only where something was written is there something to find.
        folder = self._folder if self.parent is not None and self.parent.is_dir() else None
        found = TokenFolder(folder).open(self.parts.encoder.name) if folder is not None else None
        if found is None:
            begun, held, weight = folder is not None and folder.is_dir(), list[_Chunk](), 0
            chunks = _cut(self.items, self.part_rows)
            for chunk, size in () if begun else chunks:
                held.append(chunk)
                # The text is there as it was read and, about as large, as tokens.
                weight += 2 * size + _EXAMPLE_BYTES * len(chunk)
                if weight > self.held_bytes:
                    break
            is_large = begun or weight > self.held_bytes
            found = self._write(chain(held, (chunk for chunk, _ in chunks))) if is_large else self._encode(held)
        data, tally = found
        announce_replaced(self.parts.encoder.name, tally.replaced)
        self.parts.encoder.announce(tally)
        return data

    @cached_property
    def _folder(self) -> Path | None:
        """The folder where the tokens of just this source, encoded just so, are kept."""
        if self.parent is None or self.origin is None:
            return None
        how = (self.parts.encoder.identity, self.parts.on_bad_text)
        made_of = [FORMAT, self.part_rows, _PART_BYTES, self.origin, *how]
        return self.parent / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]

    def _encode(self, chunks: list[_Chunk]) -> tuple[TokenizedData, Tally]:
        """Return the data in memory."""
        items = [item for chunk in chunks for item in chunk]
        if not items:
            raise empty_error(self.parts.source)
        examples, (ids, targets, truncated, tally) = self.parts.encode(items)
        names = [example.id for example in examples]
        self._refuse_repeats(items, names, lambda: iter(names))
        fingerprint = data_fingerprint(examples, ids, targets)
        return TokenizedData(examples, ids, targets, truncated, fingerprint, self.parts.encoder.name), tally

    def _write(self, chunks: Iterator[_Chunk]) -> tuple[TokenizedData, Tally]:
        """Write the tokens to disk, and return the data there."""
        tokens = TokenFolder(self._folder)
        make_folder(tokens.path)
        remove_strays(tokens.path)
        of = f" by {self.workers} processes" if self.workers > 1 else ""
        least = format_bytes(self.held_bytes)
        announce(f"{self.parts.encoder.name}: more than {least} in memory; its tokens are made{of} in {tokens.path}.")
        digest, last_line, count = hashlib.sha256(), time.monotonic(), 0
        for number, chunk in self._make_parts(tokens, enumerate(chunks)):
            count = number + 1
            self._refuse_repeats(chunk, tokens.hash_part(number, digest), partial(tokens.names, count))
            if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                announce(f"{self.parts.encoder.name}: {self._rows:,} examples are tokens so far.")
        if not self._rows:
            raise empty_error(self.parts.source)
        tokens.finish(self.parts.encoder.identity, digest.hexdigest(), count)
        found = tokens.open(self.parts.encoder.name)
        if found is None:
            raise CorruptFile(f"The tokens in {tokens.path} changed while they were made. Run the same command again.")
        return found

    def _make_parts(self, tokens: TokenFolder, chunks: Iterator[tuple[int, _Chunk]]) -> Iterator[tuple[int, _Chunk]]:
        """Yield the chunks in order, each when its part is on disk; the first error comes after the parts before it."""
        content = pickle.dumps(self.parts, protocol=pickle.HIGHEST_PROTOCOL) if self.workers > 1 else b""

        def write(missing: list[tuple[int, _Chunk]]) -> list[VestigeError | None]:
            if self.workers == 1:
                return [self.parts.write(tokens, *each) for each in missing]
            from joblib import Parallel, delayed

            run = Parallel(n_jobs=self.workers, backend="loky", max_nbytes=None)
            return run(delayed(_write_in_worker)(content, tokens, *each) for each in missing)  # type: ignore[return-value]

        try:
            while group := list(islice(chunks, 2 * self.workers)):
                if self.workers > 1 and group[0][0] == 0:
                    # The choice of columns is announced here, and not where others read.
                    self.parts.encode(group[0][1][:1])
                missing = [each for each in group if not tokens.has_part(each[0])]
                errors = dict(zip([number for number, _ in missing], write(missing), strict=True))
                for number, chunk in group:
                    if (error := errors.get(number)) is not None:
                        raise error
                    yield number, chunk
        except BrokenProcessPool as error:
            found = re.search(r"\{(.+?)\}", str(error))
            status = found[1] if found else "unknown"
            raise UserError(
                f"A process that turns text into tokens ended (exit status {status}), often for lack of memory. "
                "Finished parts are kept: run the same command again, with fewer --workers if memory is short."
            ) from error
        finally:
            if self.workers > 1:
                from joblib.externals.loky import get_reusable_executor

                # They would wait five minutes for more, with their memory.
                get_reusable_executor(reuse=True).shutdown(wait=True)  # pyright: ignore[reportArgumentType]

    def _refuse_repeats(self, chunk: _Chunk, names: Sequence[str], known: Callable[[], Iterator[str]]) -> None:
        """Raise unless the next names are new; `known` yields all so far, and is used where two seem to be equal."""
        joined = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in names)
        codes = np.frombuffer(joined, dtype=np.uint64)
        new, firsts = np.unique(codes, return_index=True)
        again = np.isin(np.arange(len(codes)), firsts, invert=True)
        if len(self._seen):
            again |= self._seen.take(np.searchsorted(self._seen, codes), mode="clip") == codes
        self._seen = np.insert(self._seen, np.searchsorted(self._seen, new), new)
        for position in np.flatnonzero(again).tolist():
            row, item = self._rows + position, chunk[position]
            first = next(number for number, other in enumerate(known()) if other == names[position])
            if first != row:
                record = item if isinstance(item, Record) else Record(None, row=row)
                raise repeat_error(place(self.parts.source, record), names[position], first)
        self._rows += len(names)


def _cut(items: Iterable[Record | Example], most: int) -> Iterator[tuple[_Chunk, int]]:
    """Cut the items into chunks and yield each with its bytes of text, about: the same chunks in every process."""
    held: _Chunk = []
    weight = 0
    for item in items:
        held.append(item)
        value = item.display if isinstance(item, Example) else item.value
        weight += len(value if isinstance(value, str) else str(value))
        if len(held) == most or weight >= _PART_BYTES:
            yield held, weight
            held, weight = [], 0
    if held:
        yield held, weight


def _write_in_worker(content: bytes, tokens: TokenFolder, number: int, chunk: _Chunk) -> VestigeError | None:
    """Write a part in another process."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", VESTIGE_QUIET="1")
    return _unpickle(content).write(tokens, number, chunk)


@lru_cache(maxsize=1)
def _unpickle(content: bytes) -> _Parts:
    """Return the parts of the data that a worker was sent; a tokenizer takes long to read."""
    return pickle.loads(content)
