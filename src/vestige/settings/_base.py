"""What all settings share: they are frozen and checked, and say what is wrong with a value."""

import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vestige.errors import SpecError

OnBadText = Literal["refuse", "replace"]
BAD_TEXT = (
    "Halves of surrogate pairs (cut emoji) in texts, ids and other columns: refuse the row, or replace each with "
    "U+FFFD and say how many."
)

LARGEST = 2**63 - 1
"""The largest whole number that files and arrays hold."""
_LONGEST_NAME, _LONGEST_PATH, _SHOWN = 255, 3500, 100
_LONGEST_OUT = 200
"""What is in the making lies beside its folder, under a name that is a little longer."""
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Return the number of bytes in a size such as "20GB", "1.5 TB" or "512MiB".

    Raises:
        SpecError: `text` is not a number with an optional unit.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise SpecError(f"{text!r} is not a size. Expected a number and a unit, such as 20GB, 500MB or 1.5TB.")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    size = float(number) * base ** " kmgt".index(prefix.lower() or " ")
    if size > LARGEST:
        raise SpecError(f"{text[:30]!r} is larger than any disk. Expected a size such as 20GB, 500MB or 1.5TB.")
    return int(size)


def _require_size(text: str) -> str:
    parse_bytes(text)
    return text


Size = Annotated[str, AfterValidator(_require_size)]
"""A number of bytes as `parse_bytes` reads it."""

_SINGULAR = {"options": "option"}


def flag(name: str) -> str:
    """Return the command line's spelling of a setting; one with several named values is given one by one."""
    return "--" + _SINGULAR.get(name, name).replace("_", "-")


def nearest(name: str, known: list[str]) -> str:
    """Return a sentence that leads from a misspelt `name` to the known names."""
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5)
    return f"Did you mean `{close[0]}`?" if close else "Known settings: " + ", ".join(known) + "."


OnlyWith = Mapping[str, tuple[str, tuple[Any, ...]]]


class Basic:
    """Marks a setting that the first level of help shows, beside those that are required."""


class Input(NamedTuple):
    """Marks a setting that names something that has to be there."""

    check: str
    """The function that raises unless it is there, as "module:name"; it imports nothing heavy."""
    each: bool = True
    """Whether a list holds several of them."""


class Named(NamedTuple):
    """Marks a setting that holds names of registered objects."""

    group: str
    """Of entry points."""
    kind: str
    """What messages call one of them."""
    names_in: Callable[[Any], Iterable[str]] = lambda value: [value]
    """The names in a value."""
    others: tuple[str, ...] = ()
    """Words that are allowed beside names."""


Value = TypeVar("Value")
Common = Annotated[Value, Basic()]
"""The type of a setting that the first level of help shows."""


class Settings(BaseModel):
    """Immutable, complete and checked; an unknown name is refused with the nearest known one."""

    # Help reads fields and checks nothing: the checks of a class are built when it is first called.
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, defer_build=True
    )

    positional: ClassVar[tuple[str, ...]] = ()
    """Settings that the command line also takes without their flag."""
    repeatable: ClassVar[tuple[str, ...]] = ()
    """Settings that the command line takes several of, as a list, beside those of a tuple."""
    files: ClassVar[tuple[str, ...]] = ()
    """Settings of which the command line takes several words, as names of files; in Python these are `Path`s, for a
    list of strings is a list of texts there."""
    added: ClassVar[tuple[str, ...]] = ("on_bad_text", "where", "block_size", "quantize", "report_to")
    """Settings that a record leaves out at their default, because records and identities from before lack them."""

    beside_results: ClassVar[tuple[str, ...]] = ()
    """Settings that name a folder which may lie in `out`, because it is kept there."""

    only_with: ClassVar[OnlyWith] = {}
    """Settings that have an effect only where another has one of these values; without values, where it is given.
    Those of every base class hold too."""

    def arguments(self) -> dict[str, Any]:
        """Return the settings as keyword arguments of the command's Python function."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def record(self) -> dict[str, Any]:
        """Return the settings in JSON terms, for `run.json`; a live object becomes the name of its class in <>."""
        given = self.arguments()
        fields = type(self).model_fields
        kept = (name for name in given if name not in self.added or given[name] != fields[name].default)
        return {name: _plain(given[name]) for name in kept}

    def command_line(self, command: str) -> str:
        """Return the shell command with these settings; defaults are left out."""
        words = ["vestige", *command.split()]
        for name, value in self.record().items():
            field = type(self).model_fields[name]
            if not field.is_required() and getattr(self, name) == field.default:
                continue
            if isinstance(value, bool):
                words.append(flag(name) if value else "--no-" + flag(name)[2:])
            elif isinstance(value, list):
                words += [word for item in value for word in _words_of(name, str(item))]
            elif isinstance(value, dict):
                words += [word for key, item in value.items() for word in _words_of(name, f"{key}={_spell(item)}")]
            elif name in self.positional and isinstance(getattr(self, name), Path) and not str(value).startswith("-"):
                words.append(str(value))
            else:
                words += _words_of(name, str(value))
        return shlex.join(words)

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_empty(cls, values: Any) -> Any:
        """Refuse an empty text: as a path it would be the folder that the command is typed in."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            texts = [one for one in (value if type(value) is list else [value]) if isinstance(one, str)]
            if name in cls.model_fields and not all(map(str.strip, texts)):
                raise SpecError(f"{flag(name)} is empty. Give it a value, or leave it out.")
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _text_is_usable(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        annotation = field.annotation
        is_read = any(isinstance(fact, BeforeValidator) for fact in field.metadata)
        if annotation is Any and not is_read and type(value) in (bool, int, float):
            raise ValueError("a name or a path; write one that looks like a number in quotation marks")
        is_path = Path in (annotation, *get_args(annotation))
        if isinstance(value, str | Path) and (is_path or annotation is Any):
            longest = _LONGEST_OUT if info.field_name == "out" else _LONGEST_NAME
            _check_place(str(value), longest if is_path else None)
        elif isinstance(value, str):
            _check_letters(value)
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _whole_numbers_are_of_a_size(cls, value: Any) -> Any:
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and abs(number) > LARGEST for number in numbers):
            raise ValueError(f"a whole number of at most {LARGEST:,}")
        return value

    @model_validator(mode="after")
    def _nothing_is_without_effect(self) -> Self:
        pairs = [pair for owner in type(self).__mro__ for pair in vars(owner).get("only_with", {}).items()]
        for name, (other, values) in pairs:
            if self.flags_given(name) and not (getattr(self, other) in values if values else self.flags_given(other)):
                words = f"{flag(other)} {' or '.join(map(str, values))}".strip()
                raise SpecError(f"{flag(name)} has no effect without {words}. Give both, or leave it out.")
        return self

    def flags_given(self, *names: str) -> str:
        """Return the flags of those of the settings that are not at their default, with commas."""
        fields = type(self).model_fields
        return ", ".join(flag(name) for name in names if getattr(self, name) != fields[name].default)

    @model_validator(mode="wrap")
    @classmethod
    def _errors_are_instructions(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            problems: dict[Any, list[Mapping[str, Any]]] = {}
            for problem in error.errors(include_url=False):
                problems.setdefault(problem["loc"][:1], []).append(problem)
            raise SpecError("\n".join(_explain(cls, same) for same in problems.values())) from None


def _words_of(name: str, value: str) -> list[str]:
    """Return the words of one value; one that begins as a flag does is tied to its own."""
    return [f"{flag(name)}={value}"] if value.startswith("-") else [flag(name), value]


def _spell(value: Any) -> str:
    """Return a value of an option as it is typed."""
    return "none" if value is None else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return f"<{type(value).__name__}>"


def _check_letters(text: str) -> None:
    if "\0" in text:
        raise ValueError("a text without the character NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text in UTF-8; rename a file or folder that has other bytes in its name") from None


def _check_place(text: str, longest: int | None) -> None:
    """Raise unless a file or folder can have this name, none of its parts longer than `longest` bytes if given."""
    _check_letters(text)
    if longest is None:
        return
    sizes = [len(os.fsencode(part)) for part in Path(text).parts]
    if len(os.fsencode(text)) > _LONGEST_PATH or max(sizes, default=0) > longest:
        raise ValueError(f"a shorter name, of at most {longest} bytes")
    try:
        Path(text).resolve()
    except (OSError, RuntimeError):  # the one from Python 3.13 on
        raise ValueError("a path that symbolic links do not lead in a circle") from None
    if not Path(text).absolute().name:
        raise ValueError("a file or folder with a name of its own")


def _show_value(value: Any) -> str:
    """Shorten the value for a message, which a huge one must not fill."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number beyond all bounds" if value > 0 else "a number below all bounds"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _explain(settings: type[Settings], problems: list[Mapping[str, Any]]) -> str:
    # A union reports one problem per member: the value may be any of what they expected.
    problem = problems[0]
    messages = [str(each["msg"]).removeprefix("Value error, ") for each in problems]
    expected = " or ".join(message.removeprefix("Input should be ") for message in messages)
    if not problem["loc"]:
        return expected
    name, known = str(problem["loc"][0]), settings.model_fields
    if problem["type"] == "extra_forbidden":
        return f"Unknown setting `{name}`. {nearest(name, list(known))}"
    meaning = known[name].description
    if problem["type"] == "missing":
        return f"`{name}` is missing: {meaning} Type {flag(name)} VALUE, or `{name}: VALUE` in a config file."
    return f"`{name}` was {_show_value(problem['input'])}, expected {expected}. {flag(name)}: {meaning}"
