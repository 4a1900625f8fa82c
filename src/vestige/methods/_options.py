"""Options of one method, which others do not have: the fields of its class, as they are typed and described."""

from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from vestige.errors import SpecError


class Option(NamedTuple):
    """An option of one method, which others do not have: a field of its class."""

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
        value = None if given == "none" and _takes_none(self.type) else given
        try:
            return TypeAdapter(self.type).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise SpecError(
                f"--option {self.name}={given} does not fit: expected {self.values} ({reason}). {self.meaning}"
            ) from None


def options_of(found: type) -> tuple[Option, ...]:
    """Return the options of a method's class: its fields whose type is `Annotated` with what they mean."""
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


def _takes_none(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return False
    return annotation is NoneType or any(map(_takes_none, get_args(annotation)))


def _words(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if get_origin(annotation) is Annotated:
        return _words(get_args(annotation)[0])
    if members := get_args(annotation):
        return [word for member in members for word in _words(member)]
    return [{int: "whole number", float: "number", bool: "yes or no", str: "text", NoneType: "none"}[annotation]]
