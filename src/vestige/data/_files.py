"""Files and folders, on this computer or behind an address of fsspec (`s3://`, `gs://`, `hf://`), unpacked as read."""

import codecs
import difflib
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import has_magic
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO

import fsspec
import pyarrow as pa

from vestige.errors import DataError, VestigeError

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)
_COLLAPSED = re.compile(r"([a-z][a-z0-9+.-]+):/(?=[^/])", re.IGNORECASE)
"""How an address begins that was a `Path` in between."""
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zip": "zip", ".zst": "zstd", ".lz4": "lz4"}
"""Last extensions of packed files, and what their format is called."""
_BROKEN = (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile, zlib.error, pa.ArrowException)


def is_address(source: object) -> bool:
    """Return whether a source is a text such as s3://bucket/train.jsonl."""
    return isinstance(source, str) and _ADDRESS.fullmatch(source) is not None


class Place(NamedTuple):
    """A path or an address; whether a file or a folder is there is for `kind` to say."""

    shown: str
    """As it was given, for messages."""
    system: Any
    """The file system of fsspec that it is in."""
    path: str
    """Its path there."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def kind(self) -> str | None:
        """`file`, `directory` or `other`; None where there is nothing."""
        if not self.shown.strip():
            return None
        try:
            return self.system.info(self.path)["type"]
        except FileNotFoundError:
            return None
        except Exception as error:
            # Too long for a file name, a null byte; of an address, whatever its transport raises.
            if not is_address(self.shown):
                return None
            raise DataError(f"{self.shown}: the address does not answer ({error}).") from error

    @property
    def identity(self) -> str:
        """Name, size and time of the last change, which identify the state of a file without reading it."""
        if is_address(self.shown):
            return f"{self.name} {self.system.ukey(self.path)}"
        state = Path(self.path).stat()
        return f"{self.name} {state.st_size} {state.st_mtime_ns}"

    def inside(self) -> list["Place"]:
        """Return what a folder holds, by name; hidden files are left out."""
        return self._visible(path.rstrip("/") for path in self.system.ls(self.path, detail=False))

    def matches(self) -> list["Place"]:
        """Return the files that a pattern such as `parts/*.jsonl` stands for, by name; none if it is no pattern."""
        try:
            found = self._visible(self.system.glob(self.path)) if has_magic(self.path) else []
        except (OSError, ValueError):  # too long for a file name, a null byte
            return []
        return [place for place in found if place.kind == "file"]

    def _visible(self, paths: Iterable[str]) -> list["Place"]:
        whole = self.system.unstrip_protocol if is_address(self.shown) else str
        found = (Place(whole(path), self.system, path) for path in sorted(paths))
        return [place for place in found if not place.name.startswith(".")]

    def open(self) -> IO[bytes]:
        """Open the file to read its bytes, unpacked where its name says that it is packed."""
        file, kind = self.system.open(self.path, "rb"), _PACKED.get(Path(self.name).suffix.lower())
        if kind in ("zstd", "lz4"):
            return pa.CompressedInputStream(file, kind)
        if kind == "zip" and len(names := zipfile.ZipFile(file).namelist()) != 1:
            raise DataError(f"{self.shown}: holds {len(names)} files, expected one. Unpack it, and give its files.")
        unpackers: Any = fsspec.compression.compr
        return unpackers[kind](file, mode="rb")

    def open_text(self) -> TextIO:
        """Open the file as text; a byte order mark at its start is dropped."""
        return TextIOWrapper(self.open(), encoding="utf-8-sig", newline="")

    def absent(self) -> str:
        """Return the message for a place where there is nothing, with the nearest name that there is."""
        beyond = is_address(self.shown)
        parent = locate(self.shown.rpartition("/")[0] if beyond else Path(self.shown).parent)
        if parent.kind is None:
            return f"{self.shown}: no such file; the folder {parent.shown} does not exist either."
        try:
            names = [each.name for each in parent.inside()]
        except OSError:
            names = []
        near = difflib.get_close_matches(self.name, names, n=1)
        if near:
            return f"{self.shown}: no such file. Did you mean {self.shown.removesuffix(self.name)}{near[0]}?"
        folder = parent.shown if beyond else Path(parent.path).resolve()
        return f"{self.shown}: no such file. The folder {folder} holds nothing of a similar name."

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn errors of the operating system, the transport or the decoder inside the block into a DataError."""
        try:
            yield
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.shown}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}). "
                f"Save it again as UTF-8, for example: iconv -f {_encoding(error.object)} -t utf-8 {self.name}"
            ) from error
        except Exception as error:
            if isinstance(error, VestigeError) or not (isinstance(error, _BROKEN) or is_address(self.shown)):
                raise
            raise DataError(f"{self.shown}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def locate(source: str | Path) -> Place:
    """Return the place that a path or an address names."""
    if (match := _COLLAPSED.match(str(source))) is not None:
        source = f"{match[1]}://{str(source)[match.end() :]}"
    if is_address(source):
        try:
            return Place(str(source), *fsspec.core.url_to_fs(str(source)))
        except (ImportError, ValueError) as error:
            raise DataError(f"{source}: such addresses cannot be read here: {error}.") from error
    try:
        path = str(Path(source).expanduser())
    except RuntimeError:  # an unknown home
        path = str(source)
    return Place(path if str(source).strip() else "", fsspec.filesystem("file"), path)


def extension_of(name: str) -> str:
    """Return the extension that names the format of a file, in lower case and without that of a packed file."""
    path = Path(name.lower())
    return Path(path.stem if path.suffix in _PACKED else path.name).suffix


def exists(text: str) -> bool:
    """Return whether a text is a path, or an address, where there is something."""
    return locate(text).kind is not None


def _encoding(content: bytes) -> str:
    """Return the encoding of text that is not UTF-8, by its first bytes, if it is UTF-16 or UTF-32."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "latin1"
