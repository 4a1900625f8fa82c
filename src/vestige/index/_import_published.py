"""What the readers of published layouts have in common: rows with their components, and files that may be broken."""

import hashlib
import operator
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import repair
from vestige.errors import DataError
from vestige.files import sha256_of
from vestige.index._manifest import WHOLE_MODEL, IndexedComponent, Manifest, StoredType
from vestige.parsing import parse_json
from vestige.terminal import shorten

VESTIGE_KEY = "vestige"
"""Key under which an export of ours puts the manifest into the metadata of a published layout."""
_LISTED = 9
"""One more number than `listed` shows."""
_STORED: dict[torch.dtype, StoredType] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}


class RowReader(Protocol):
    """Gradients of a published layout, by position in its order."""

    def read(self, rows: Int[np.ndarray, "row"]) -> Float[Tensor, "row column"]:
        """The rows, float32, columns in the order of the components."""
        ...


@dataclass(frozen=True)
class Published:
    """A published layout after its files were looked at: what an index can be made from."""

    layout: str
    components: tuple[IndexedComponent, ...]
    dtype: StoredType
    names: list[str]
    """One per row, in the order of the rows: where the row lies in the files."""
    reader: RowReader
    files: list[Path]
    notes: list[str]
    """What is missing or not known, in sentences."""
    made_by: Manifest | None = None
    """The manifest of the index that was exported; None when other software wrote the files."""

    def digest(self) -> str:
        """sha256 over the content of all files, in order."""
        return hashlib.sha256("".join(sha256_of(path) for path in self.files).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: It is missing, or torn; the message names it.
    """
    try:
        content = path.read_bytes()
        value = parse_json(content)
        if b"\\u" in content and repair(value).fields:
            raise ValueError("half of a surrogate pair, which is no character")
        return value
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Without it the layout cannot be read; copy it from its source.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} does not read as JSON ({error}): it is torn or broken. Copy it again.") from error


def read_partitions(folder: Path, stem: str, *, shared: bool = False) -> dict[str, Any] | None:
    """Return the object in `STEM.json` or `STEM`, or the union of its partitions `STEM_part_*.json`; None without any.

    Args:
        folder: Where the files lie.
        stem: Their name.
        shared: Whether partitions may hold a key twice, with the same content.

    Raises:
        DataError: A file is torn or no object, or two partitions hold the same key.
    """
    paths = [path for path in (folder / f"{stem}.json", folder / stem) if path.is_file()]
    paths = paths[:1] or sorted(folder.glob(f"{stem}_part_*.json"))
    if not paths:
        return None
    joined: dict[str, Any] = {}
    for path in paths:
        content = read_json(path)
        if not isinstance(content, dict) or not all(isinstance(one, dict) for one in content.values()):
            raise DataError(f"{path} is not {{id: {{...}}}} with numbers.")
        twice = sorted(joined.keys() & content.keys())
        if twice and not shared:
            raise DataError(f"{path} holds queries that another partition has too: {', '.join(twice[:5])}.")
        joined |= content
    return joined


def load_tensors(path: Path) -> dict[str, Any]:
    """The dictionary in a `.pt` file, of which nothing but tensors and plain values is ever loaded.

    Raises:
        DataError: It is torn, holds code, or no dictionary.
    """
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
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected a dictionary.")
    return content


def field(content: Any, name: str, path: Path) -> Any:
    """The value under `name`.

    Raises:
        DataError: There is none; the message names the file.
    """
    if not isinstance(content, dict) or name not in content:
        raise DataError(f"{path} has no `{name}`: it is not a file of this layout, or is incomplete.")
    return content[name]


def whole_number(content: Any, name: str, path: Path) -> int:
    """The number under `name`, from 0.

    Raises:
        DataError: There is none; the message names the file.
    """
    return checked_number(field(content, name, path), f"`{name}`", path)


def checked_number(value: Any, what: str, path: Path) -> int:
    """`value` if it is a whole number from 0 that an array can have.

    Raises:
        DataError: It is none; the message names the file.
    """
    try:
        # Of a tensor or a NumPy number too; 12.0 is one.
        number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(cast(Any, value))
    except (TypeError, ValueError, RuntimeError):
        number = -1
    if isinstance(value, bool) or not 0 <= number < 2**63:
        raise DataError(f"{path}: {what} is {shorten(repr(value))}, expected a whole number. Copy the file again.")
    return number


def entries(content: Any, name: str, path: Path) -> list[Any]:
    """The list under `name`, which has at least one entry.

    Raises:
        DataError: There is none; the message names the file.
    """
    value = field(content, name, path)
    if not isinstance(value, list) or not value:
        raise DataError(f"{path}: `{name}` is {shorten(repr(value))}, expected a list with entries.")
    return value


def missing_numbers(held: Sequence[int], first: int, stop: int) -> tuple[int, list[int]]:
    """How many of the numbers from `first` to `stop` (not included) are not in `held`, and the lowest of them."""
    own = sorted({number for number in held if first <= number < stop})
    lowest: list[int] = []
    for before, after in pairwise([first - 1, *own, stop]):
        lowest += range(before + 1, min(after, before + 1 + _LISTED - len(lowest)))
    return stop - first - len(own), lowest


def stored_type(dtype: torch.dtype, path: Path) -> StoredType:
    """The number format as an index names it.

    Raises:
        DataError: An index cannot hold it.
    """
    if dtype not in _STORED:
        raise DataError(f"{path} holds numbers in {dtype}, expected one of: {', '.join(map(str, _STORED))}.")
    return _STORED[dtype]


def in_column_order(components: Sequence[IndexedComponent], width: int, path: Path) -> tuple[IndexedComponent, ...]:
    """The components in the order of their columns, whatever the order of their names.

    Raises:
        DataError: Their slices do not cover the columns 0 to `width` once each.
    """
    ordered = tuple(sorted(components, key=lambda part: part.start))
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


def embedded_manifest(content: Any, path: Path) -> Manifest | None:
    """The manifest that our own export has left in the metadata, None if other software wrote them.

    Raises:
        DataError: It is there and does not read.
    """
    if not isinstance(content, dict) or VESTIGE_KEY not in content:
        return None
    try:
        return Manifest.model_validate(content[VESTIGE_KEY], strict=False)
    except ValueError as error:
        raise DataError(f"{path}: `{VESTIGE_KEY}` is no manifest ({str(error).splitlines()[0]}).") from error


def restored_order(
    stored: tuple[IndexedComponent, ...], made_by: Manifest | None, path: Path
) -> tuple[tuple[IndexedComponent, ...], list[slice]]:
    """The components of the index to be, and where each one's columns lie in the files.

    Raises:
        DataError: The manifest speaks of other layers than the slices.
    """
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


def listed(numbers: Sequence[int], most: int = 8) -> str:
    """Numbers for a message, the first few of them."""
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
