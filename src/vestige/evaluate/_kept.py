"""What a sketch evaluation has computed so far: one file of inner products for each sketch, found again by its name.

Errors are computed from these at the end, so another reference, size or seed computes only what is new.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vestige.errors import CorruptFile, IndexMismatch, UserError
from vestige.evaluate._products import Products
from vestige.parsing import parse_object
from vestige.storage import make_folder, remove_strays, write_durably

_IDENTITY = "compared.json"
_PRODUCTS = "products"


class Computed(NamedTuple):
    """Inner products of the whole gradients, and what they cost."""

    products: Products
    """One component: the sum."""
    seconds: float
    """Of compressing the tests, 0 where nothing was compressed."""


class Kept:
    """The folder of one evaluation."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Open or begin it.

        Args:
            folder: May be absent, empty, or hold an evaluation of the same model and examples.
            identity: What every product depends on.

        Raises:
            IndexMismatch: It holds an evaluation of something else; nothing was changed.
            UserError: It holds other files, or cannot be written to.
        """
        self._folder = folder
        path = folder / _IDENTITY
        if path.exists():
            require_same(path, identity)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} holds other files. Give a new or empty folder as --out.")
        make_folder(folder / _PRODUCTS)
        remove_strays(folder)
        if not path.exists():
            write_durably(path, [json.dumps(identity, indent=1).encode()])

    def has(self, name: str) -> bool:
        """Return whether something was computed under `name`."""
        return self._path(name).exists()

    def read(self, name: str) -> Computed:
        """Read the products computed under `name`.

        Raises:
            CorruptFile: The file is damaged.
        """
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                parts = {part: file.get_tensor(part) for part in Products._fields}
                return Computed(Products(**parts), float(file.metadata()["seconds"]))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CorruptFile(f"{path} is damaged ({error}). Delete it; the same command computes it again.") from error

    def write(self, name: str, computed: Computed) -> None:
        """Keep it under `name`, summed over components."""
        parts = {part: value.contiguous() for part, value in computed.products.summed()._asdict().items()}
        content = save(parts, metadata={"name": name, "seconds": repr(computed.seconds)})
        write_durably(self._path(name), [content])

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:24]
        return self._folder / _PRODUCTS / f"{digest}.safetensors"


def require_same(path: Path, identity: Mapping[str, Any]) -> None:
    """Raise unless the file holds the same.

    Raises:
        IndexMismatch: It does not; the message shows the difference.
        CorruptFile: It does not read.
    """
    try:
        found = parse_object(path.read_bytes())
    except ValueError as error:
        raise CorruptFile(f"{path} does not read as JSON ({error}). Give another --out.") from error
    names = [name for name in {**found, **identity} if found.get(name) != identity.get(name)]
    if names:
        lines = [f"  {name}: {_short(found.get(name))} there, {_short(identity.get(name))} now" for name in names]
        raise IndexMismatch(
            "\n".join([f"{path.parent} evaluated something else; nothing was changed.", *lines, "Give another --out."])
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
