"""What layouts of gradients have in common: rows with their components, and files that may be broken.

Whatever is missing or torn raises `DataError`, and the message names the file.
"""

import hashlib
import json
import operator
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import Example, TokenizedData, data_fingerprint, repair
from vestige.errors import DataError
from vestige.indexes import WHOLE_MODEL, IndexedComponent, Manifest
from vestige.parsing import parse_json
from vestige.runs import Check, ComponentScores, Meaning, RunTables, Scores, ScoreSummary, make_run_record, write_run
from vestige.storage import sha256_of, write_durably
from vestige.terminal import shorten
from vestige_recipes.commands import ImportSettings

VESTIGE_KEY = "vestige"
"""Key under which our own exports keep the manifest in the metadata of a layout; other readers pass over it."""
ROWS_PER_BATCH = 16
"""Rows of an exported batch."""
_LISTED = 8
"""Numbers that a message lists."""
Held = TypeVar("Held")
_STORED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Published:
    """A layout after its files were checked: what an index can be made from."""

    layout: str
    components: tuple[IndexedComponent, ...]
    dtype: str
    names: list[str]
    """One for each row, in the order of the rows: where the row lies in the files."""
    counts: list[int]
    """Rows of each file of rows."""
    load: Callable[[int, Int[np.ndarray, "row"]], Tensor]
    """Returns rows by file and position in it."""
    places: list[slice]
    """Where the columns of each component lie in the files."""
    files: list[Path]
    notes: list[str]
    """What is missing or not known, in sentences."""
    made_by: Manifest | None = None
    """The manifest of the index that was exported; None when other software wrote the files."""

    def digest(self) -> str:
        """Return the sha256 over the content of all files, in order."""
        return hashlib.sha256("".join(sha256_of(path) for path in self.files).encode()).hexdigest()

    def read(self, rows: Int[np.ndarray, "row"]) -> Float[Tensor, "row column"]:
        """Return rows, ascending, in float32, columns in the order of the components."""
        wanted, ends = np.asarray(rows), np.cumsum(self.counts)
        files = np.searchsorted(ends, wanted, side="right")
        starts = [0, *ends.tolist()]
        pieces = [self.load(file, wanted[files == file] - starts[file]) for file in np.unique(files).tolist()]
        gradients = torch.cat(pieces).float()
        return torch.cat([gradients[:, place] for place in self.places], dim=1)


def stand_ins(names: Iterable[str]) -> list[Example]:
    """Return examples of which nothing but the id is known."""
    return [Example(id=name, row=row, text="") for row, name in enumerate(names)]


def without_tokens(examples: Sequence[Example], name: str) -> TokenizedData:
    """Return examples as data that was never tokenised."""
    count = len(examples)
    lists = [np.zeros(0, dtype=np.int32)] * count, [np.zeros(0, dtype=bool)] * count
    return TokenizedData(examples, *lists, np.zeros(count, dtype=bool), data_fingerprint(examples, *lists), name)


def write_json(path: Path, content: Any, indent: int = 1) -> Path:
    """Write a JSON file, and return its path."""
    write_durably(path, [(json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode()])
    return path


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    try:
        content = path.read_bytes()
        value = parse_json(content)
        if b"\\u" in content and repair(value)[1]:
            raise ValueError("half of a surrogate pair, which is no character")
        return value
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Without it the layout cannot be read; copy it from its source.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} does not read as JSON ({error}): it is torn or broken. Copy it again.") from error


def load_object(path: Path, of: type[Held]) -> Held:
    """Return the object of a type in a `.pt` file, of which nothing but tensors and plain values is ever loaded."""
    try:
        with warnings.catch_warnings():
            # torch warns of an unusual pickle that it then refuses: the refusal is enough.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than tensors and plain values, or is broken, and was not loaded: a pickle can run "
            "code. Save it again with torch.save of tensors, numbers, texts, lists and dictionaries."
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} does not load ({reason}): it is torn or broken. Copy it again, or remove it."
        ) from error
    if not isinstance(content, of):
        raise DataError(f"{path} holds a {type(content).__name__}, expected a {of.__name__}.")
    return content


def read_metadata(path: Path) -> "Metadata":
    """Return the content of a JSON file, to read fields from."""
    return Metadata(read_json(path), path)


class Metadata(NamedTuple):
    """An object out of a file, whose fields are checked when they are read."""

    content: Any
    path: Path

    def field(self, name: str) -> Any:
        """Return the value under `name`."""
        if not isinstance(self.content, dict) or name not in self.content:
            raise DataError(f"{self.path} has no `{name}`: it is not a file of this layout, or is incomplete.")
        return self.content[name]

    def number(self, name: str) -> int:
        """Return the whole number under `name`, from 0."""
        return check_number(self.field(name), f"`{name}`", self.path)

    def entries(self, name: str) -> list[Any]:
        """Return the list under `name`, which has at least one entry."""
        value = self.field(name)
        if not isinstance(value, list) or not value:
            raise DataError(f"{self.path}: `{name}` is {shorten(repr(value))}, expected a list with entries.")
        return value

    def manifest(self) -> Manifest | None:
        """Return the manifest that our own export has left here, None if other software wrote the file."""
        if not isinstance(self.content, dict) or VESTIGE_KEY not in self.content:
            return None
        try:
            return Manifest.model_validate(self.content[VESTIGE_KEY], strict=False)
        except ValueError as error:
            raise DataError(f"{self.path}: `{VESTIGE_KEY}` is no manifest ({str(error).splitlines()[0]}).") from error


def check_number(value: Any, what: str, path: Path) -> int:
    """Return `value` if it is a whole number from 0 that an array can have."""
    try:
        # Of a tensor or a NumPy number too; 12.0 is one.
        number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(cast(Any, value))
    except (TypeError, ValueError, RuntimeError):
        number = -1
    if isinstance(value, bool) or not 0 <= number < 2**63:
        raise DataError(f"{path}: {what} is {shorten(repr(value))}, expected a whole number. Copy the file again.")
    return number


def missing_note(held: Sequence[int], first: int, stop: int, what: str) -> str | None:
    """Return a sentence on the numbers from `first` to before `stop` that are not in `held`; None if all are."""
    own = sorted({number for number in held if first <= number < stop})
    count, lowest = stop - first - len(own), list[int]()
    for before, after in pairwise([first - 1, *own, stop]):
        lowest += range(before + 1, min(after, before + 2 + _LISTED - len(lowest)))
    listed = ", ".join(map(str, lowest[:_LISTED])) + (", ..." if len(lowest) > _LISTED else "")
    return f"{count:,} {what}: {listed}." if count > 0 else None


def name_type(dtype: torch.dtype, path: Path) -> str:
    """Return the number format as an index names it."""
    if dtype not in _STORED:
        raise DataError(f"{path} holds numbers in {dtype}, expected one of: {', '.join(map(str, _STORED))}.")
    return str(dtype).removeprefix("torch.")


def lay_out(
    parts: Sequence[IndexedComponent], width: int, made_by: Manifest | None, path: Path
) -> tuple[tuple[IndexedComponent, ...], list[slice]]:
    """Return the components of the index to be, and where the columns of each lie in the files.

    Columns are those of the slices, whatever the order of the names; an export of ours has its own order back.
    """
    stored = _in_column_order(parts, width, path)
    places = {part.name: slice(part.start, part.stop) for part in stored}
    if len(places) != len(stored):
        raise DataError(f"{path} names a layer twice.")
    if made_by is None:
        return stored, list(places.values())
    if made_by.compression.scope == "model":
        if [(part.name, part.start, part.stop) for part in stored] != [(WHOLE_MODEL, 0, made_by.width)]:
            raise DataError(f"{path}: expected the one layer {WHOLE_MODEL!r} that the manifest speaks of.")
        return made_by.components, [slice(0, made_by.width)]
    sizes = {part.name: part.stop - part.start for part in made_by.components}
    if sizes != {part.name: part.stop - part.start for part in stored}:
        raise DataError(f"{path}: the slices of the layers are not those of the manifest under `{VESTIGE_KEY}`.")
    return made_by.components, [places[part.name] for part in made_by.components]


def _in_column_order(parts: Sequence[IndexedComponent], width: int, path: Path) -> tuple[IndexedComponent, ...]:
    ordered = tuple(sorted(parts, key=lambda part: part.start))
    ends = [0, *(part.stop for part in ordered)]
    for before, part in zip(ends, ordered, strict=False):
        if part.start != before or part.stop <= part.start:
            raise DataError(
                f"{path}: the slice of layer {part.name} is {part.start}:{part.stop}, expected one that begins at "
                f"{before}. Slices must follow one another without gap or overlap."
            )
    if ends[-1] != width:
        raise DataError(f"{path}: the slices end at column {ends[-1]}, and the total is {width}.")
    return ordered


def layers_to_write(manifest: Manifest) -> Sequence[IndexedComponent]:
    """Return what these layouts call layers: the components, or one for the whole model where they were added up."""
    if manifest.compression.scope == "component":
        return manifest.components
    width = manifest.width
    return [IndexedComponent(name=WHOLE_MODEL, kind="model", shape=(1, width), start=0, stop=width)]


HELPS = "positive: a training step on the example lowers the query's loss; negative: it raises it"


def write_imported(
    settings: ImportSettings,
    train: Sequence[Example],
    queries: Sequence[Example],
    summary: ScoreSummary,
    meaning: Meaning,
    reading: str,
    *,
    cosine: bool,
    started: float,
    parameters: Sequence[str] = (),
    components: Sequence[ComponentScores] | None = None,
) -> Scores:
    """Write scores as a run and return it opened; `meaning` is that of products, `reading` says what is not known."""
    texts = without_tokens(train, str(settings.data or settings.source))
    asked = without_tokens(queries, str(settings.queries or settings.source))
    if cosine:
        meaning = replace(meaning, unit="cosine, from -1 to 1", normalisation="length of both gradients")
    record = make_run_record(
        command=settings.command_line("import"),
        config=settings.record(),
        method="grad-cos" if cosine else "grad-dot",
        meaning=meaning,
        data=texts,
        queries=asked,
        summary=summary,
        seconds=time.perf_counter() - started,
        components=list(parameters),
        checks=[Check(name="imported", value=None, reading=reading, verdict="unknown")],
    )
    tables = RunTables(texts, asked, summary.ranked, generated=[False] * len(queries), components=components)
    write_run(settings.out, record, tables, overwrite=settings.overwrite)
    return Scores.open(settings.out)
