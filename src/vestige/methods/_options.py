"""Options that one method has and others have not: declared as fields of its class, checked against their types."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from vestige.errors import SpecError


class Option(NamedTuple):
    """One option of a method."""

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

    def parsed(self, given: Any) -> Any:
        """Convert `given`, a value or the text of one, to the option's type.

        Raises:
            SpecError: it is none.
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
    meanings = {one.name: _meaning(types[one.name]) for one in fields(found)}
    return tuple(
        Option(one.name, types[one.name], one.default, meaning)
        for one in fields(found)
        if (meaning := meanings[one.name]) is not None
    )


def parsed_options(name: str, found: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options of the method `name` with their types.

    Raises:
        SpecError: the method has no such option, or the value is not of its type.
    """
    known = {one.name: one for one in options_of(found)}
    if unknown := [key for key in given if key not in known]:
        lines = [f"  {one.name}={one.shown_default}  ({one.values}) {one.meaning}" for one in known.values()]
        listed = "\n".join(["Its options, with their defaults:", *lines]) if lines else "It has none."
        raise SpecError(f"The method {name} has no option {unknown[0]!r}. {listed}")
    return {key: known[key].parsed(value) for key, value in given.items()}


def _meaning(annotation: Any) -> str | None:
    return next((one for one in getattr(annotation, "__metadata__", ()) if isinstance(one, str)), None)


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
