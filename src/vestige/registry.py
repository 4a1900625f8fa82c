"""One registry for what can be added to Vestige: what is built in, and what other packages bring.

An object is announced as an entry point, such as

    [project.entry-points."vestige.commands"]
    count = "my_package.commands:count"

in the `pyproject.toml` of its package, and carries its own facts. Nothing outside its file names it: the command line,
the help and the tables of the documentation are loops over the registry.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from inspect import getdoc
from pathlib import Path
from types import FunctionType, NoneType
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from vestige.errors import SpecError
from vestige.settings import Input, Named, Settings
from vestige.terminal import WIDE, show

Entry = TypeVar("Entry")
Run = Callable[[Any], None]

_ADDED: dict[str, dict[str, Any]] = {}
"""What this process registered, by group and name: names are checked before the package of a group is imported."""


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
        self._added = _ADDED.setdefault(group, {})

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
        return list_names(self._group, self._kind)

    def find(self, name: str) -> Entry:
        """Return the object of this name.

        Raises:
            SpecError: There is none, its package cannot be imported, or it is of another kind.
        """
        if name in self._added:
            return self._added[name]
        require_name(self._group, self._kind, name)
        point = _find_announced(self._group, self._kind)[name]
        origin = f"The {self._kind} {name!r} of {_package(point)}"
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            raise SpecError(f"{origin} cannot be imported: {error}. Update or uninstall it.") from error
        # The module of a decorated object may be announced in its place: importing it has registered the object.
        found = self._added.get(name, loaded)
        if not (issubclass(found, self._of) if isinstance(found, type) else isinstance(found, self._of)):
            raise SpecError(f"{origin} is no {_origin(self._of)}. Update or uninstall it.")
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


def list_names(group: str, kind: str) -> list[str]:
    """Return the names that are registered in a group of entry points, sorted; nothing is imported.

    Raises:
        SpecError: Two packages bring the same name.
    """
    return sorted({*_ADDED.get(group, ()), *_find_announced(group, kind)})


def require_name(group: str, kind: str, name: str, others: Sequence[str] = ()) -> None:
    """Raise unless something of this name is registered in a group; nothing is imported.

    Args:
        group: Of entry points, such as "vestige.methods".
        kind: What messages call one of them.
        name: Which one.
        others: Names that are allowed beside those.

    Raises:
        SpecError: There is none; the message has the nearest name and lists all.
    """
    known = [*others, *list_names(group, kind)]
    if name not in known:
        close = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise SpecError(f"There is no {kind} {name!r}. {hint}There are: {', '.join(known)}.")


def check_inputs(settings: Settings) -> None:
    """Raise unless every name among the settings is registered and every input is there, before anything is imported.

    The types of the fields say what to check: `Named` and `Input`.

    Raises:
        UserError: One is not; the message says what to type.
    """
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        for fact in field.metadata if value is not None and value != field.default else ():
            if isinstance(fact, Named):
                for word in fact.names_in(value):
                    require_name(fact.group, fact.kind, word, fact.others)
            elif isinstance(fact, Input):
                for each in value if isinstance(value, list | tuple) and fact.each else [value]:
                    import_object(fact.check)(each)


def forget_entry_points() -> None:
    """Read the entry points again when they are next needed: packages came or went."""
    _read_entry_points.cache_clear()
    _find_announced.cache_clear()


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
    examples: tuple[str, ...] = ()
    """Command lines that can be typed as they are, in an order in which each finds what it needs."""
    next_command: str | None = None
    """What to type after it, with fields of its settings in braces, such as "vestige report {out}"."""

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
        show(made.call(given), file_width=WIDE)

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


class Option(NamedTuple):
    """An option of one registered object, which others do not have: a field of its class."""

    name: str
    type: Any
    default: Any
    meaning: str

    @property
    def values(self) -> str:
        """The values that may follow `name=`, in words."""
        return " or ".join(_words(self.type))

    @property
    def shown_default(self) -> str:
        """The default as it would be typed."""
        return "none" if self.default is None else str(self.default)

    @property
    def line(self) -> str:
        """The option with its default, values and meaning, as help prints it."""
        return f"  {self.name}={self.shown_default}  ({self.values}) {self.meaning}"

    def parse(self, given: Any) -> Any:
        """Convert `given`, a value or the text of one, to the option's type.

        Raises:
            SpecError: It is none.
        """
        takes_none = any(NoneType in get_args(part) for part in (self.type, *get_args(self.type)))
        try:
            return TypeAdapter(self.type).validate_python(None if given == "none" and takes_none else given)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise SpecError(
                f"--option {self.name}={given} does not fit: expected {self.values} ({reason}). {self.meaning}"
            ) from None


def options_of(found: type) -> tuple[Option, ...]:
    """Return the options of a class: its fields whose type is `Annotated` with what they mean."""
    if not is_dataclass(found):
        return ()
    types = get_type_hints(found, include_extras=True)
    notes = {one: getattr(types[one.name], "__metadata__", ()) for one in fields(found)}
    return tuple(
        Option(one.name, types[one.name], one.default, note)
        for one, noted in notes.items()
        for note in noted
        if isinstance(note, str)
    )


def _words(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if get_origin(annotation) is Annotated:
        return _words(get_args(annotation)[0])
    if members := get_args(annotation):
        return [word for member in members for word in _words(member)]
    return [{int: "whole number", float: "number", bool: "yes or no", str: "text", NoneType: "none"}[annotation]]
