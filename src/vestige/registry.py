"""One registry for what can be added to Vestige: what is built in, and what other packages bring.

An object is announced as an entry point, such as

    [project.entry-points."vestige.commands"]
    count = "my_package.commands:count"

in the `pyproject.toml` of its package, and carries its own facts. Nothing outside its file names it: the command line,
the help and the tables of the documentation are loops over the registry.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from inspect import getdoc
from pathlib import Path
from types import FunctionType
from typing import Any, Generic, TypeVar, cast

from vestige.errors import SpecError
from vestige.settings import Settings
from vestige.terminal import show

Entry = TypeVar("Entry")
Run = Callable[[Any], None]

_FILE_WIDTH = 160
"""Columns of a table that is printed into a file."""


class Registry(Generic[Entry]):
    """Objects of one kind by name, announced by installed packages and imported on first use."""

    def __init__(self, group: str, kind: str, of: type) -> None:
        """Make the registry of the entry points of `group`.

        Args:
            group: Of entry points, such as "vestige.commands".
            kind: What messages call one of them.
            of: The class that each is an instance or a subclass of.
        """
        self._group, self._kind, self._of = group, kind, of
        self._added: dict[str, Any] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Register an object of this process; one that a worker or a later command has to find needs an entry point.

        Raises:
            SpecError: Another object has that name.
        """
        known = self._added.setdefault(name, entry)
        if _origin(known) != _origin(entry):
            raise SpecError(f"Two objects are called {name!r}: {_origin(known)} and {_origin(entry)}. Rename one.")

    def names(self) -> list[str]:
        """Return every name, sorted; nothing is imported.

        Raises:
            SpecError: Two packages bring the same name.
        """
        return sorted({*self._added, *_find_announced(self._group, self._kind)})

    def find(self, name: str) -> Entry:
        """Return the object of this name.

        Raises:
            SpecError: There is none, its package cannot be imported, or it is of another kind.
        """
        if name in self._added:
            return self._added[name]
        points = _find_announced(self._group, self._kind)
        if name not in points:
            known = self.names()
            close = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise SpecError(f"There is no {self._kind} {name!r}. {hint}There are: {', '.join(known)}.")
        found = _load(points[name], self._kind)
        # The module of a decorated object may be announced in its place: importing it has registered the object.
        found = self._added.get(name, found)
        if not (issubclass(found, self._of) if isinstance(found, type) else isinstance(found, self._of)):
            raise SpecError(
                f"The {self._kind} {name!r} of {_package(points[name])} is no {self._of.__module__}."
                f"{self._of.__qualname__}. Update or uninstall it."
            )
        return cast(Entry, found)

    def __iter__(self) -> Iterator[Entry]:
        return map(self.find, self.names())


@cache
def _read_entry_points() -> EntryPoints:
    """Return all entry points, read once for all groups: that takes 30 ms."""
    return cast(EntryPoints, entry_points())


@cache
def _find_announced(group: str, kind: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in _read_entry_points().select(group=group):
        known = found.setdefault(point.name, point)
        if known.value != point.value:
            packages = " and ".join(_package(one) for one in (known, point))
            raise SpecError(f"Two packages bring the {kind} {point.name!r}: {packages}. Uninstall one of them.")
    return found


def forget_entry_points() -> None:
    """Read the entry points again when they are next needed: packages came or went."""
    _read_entry_points.cache_clear()
    _find_announced.cache_clear()


def _load(point: EntryPoint, kind: str) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"The {kind} {point.name!r} of {_package(point)} cannot be imported: {error}. Update or uninstall it."
        ) from error


def _origin(entry: Any) -> str:
    """Return where an object is defined, the same for one that was imported twice."""
    return f"{entry.__module__}.{entry.__qualname__}" if hasattr(entry, "__qualname__") else repr(entry)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


@dataclass(frozen=True)
class Command:
    """A command of the command line, and the Python function behind it."""

    name: str
    """As it is typed after `vestige`; two words where it belongs to a group, such as "data split"."""
    settings: type[Settings]
    function: str | None
    """The Python function, as "module:name", imported when it is called; its arguments are the settings."""
    run: Run
    """Call the function with complete settings and print the result."""
    help: str
    """What it does; the first line stands in the list of commands."""
    order: int = 1000
    """Position in the list of commands."""
    sweepable: bool = False
    """Whether it leaves a folder, `out`, so that a sweep can run it."""
    writes_once: bool = False
    """Whether it writes its result in one step at the end, and refuses a folder that holds one."""
    more: str | None = None
    """A function as "module:name" that returns what the help ends with."""
    status: str | None = None
    """A function as "module:name", from a folder to the text of `vestige status`; None for a folder of others."""

    @property
    def summary(self) -> str:
        """The first line of its help."""
        return self.help.splitlines()[0]

    def call(self, settings: Settings, **more: Any) -> Any:
        """Return what the Python function makes of complete settings.

        Args:
            settings: All that a user may set.
            **more: What it takes from the command line beside them, such as where to show results that come early.
        """
        if self.function is None:
            raise SpecError(f"`vestige {self.name}` is no Python function. Type it on the command line.")
        function = import_object(self.function)
        run: Callable[..., Any] | None = getattr(function, "run", None)
        return function(**settings.arguments()) if run is None else run(settings, **more)


def command(
    name: str, settings: type[Settings], *, function: str | None = None, **facts: Any
) -> Callable[[Run], Command]:
    """Turn a function that runs complete settings and prints the result into a command; its docstring is the help."""

    def decorate(run: Run) -> Command:
        return Command(name, settings, function, run, getdoc(run) or "", **facts)

    return decorate


def make_command(name: str, settings: type[Settings], *, function: str, **facts: Any) -> Command:
    """Return a command that prints the table of its function's result; the docstring of the settings is its help."""

    def run(given: Settings) -> None:
        show(made.call(given), file_width=_FILE_WIDTH)

    made = Command(name, settings, function, run, getdoc(settings) or "", **facts)
    return made


def import_object(address: str) -> Any:
    """Return the object at "module:name".

    Nothing that is imported is garbage, and looking for it takes a fifth of the time that torch and transformers need.
    """
    module, _, name = address.partition(":")
    collects = gc.isenabled()
    gc.disable()
    try:
        return getattr(import_module(module), name)
    finally:
        if collects:
            gc.enable()


COMMANDS: Registry[Command] = Registry("vestige.commands", "command", Command)

ExportFormat = Callable[[Any, Path], list[Path]]
"""Writes an opened index, run or audit into a folder that is there, and returns the files."""

EXPORT_FORMATS: Registry[ExportFormat] = Registry("vestige.export_formats", "export format", FunctionType)
"""What `vestige export` writes; an entry point is named after what is exported and the format: "index numpy"."""
