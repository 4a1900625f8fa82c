"""JSON and YAML from other programs, plain values of a sane size and depth or one kind of error; words of texts."""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Record = TypeVar("Record", bound=tuple[Any, ...])

_DEEPEST = 50
"""Levels of lists and mappings: Arrow takes 64, and what is far deeper ends the interpreter's stack."""
_MOST_VALUES = 1_000_000
"""Values in a YAML file, in which a few aliases can stand for any number of them."""
_WORD = re.compile(r"\w+")
_PLAIN = (dict, list, str, int, float, bool, type(None))


def parse_json(content: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        json.JSONDecodeError: It is not JSON, not UTF-8, nested too deeply, or holds a whole number of thousands of
            digits. A `ValueError`, as all of these are.
    """
    try:
        text = content if isinstance(content, str) else content.decode(json.detect_encoding(content), "surrogatepass")
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise _broken(f"nested more than {_DEEPEST} levels deep") from None
    except UnicodeDecodeError as error:
        raise _broken(f"not UTF-8 text (byte {error.start})") from None
    except ValueError:
        raise _broken("a whole number of more than 4,300 digits") from None
    if text.count("[") + text.count("{") > _DEEPEST and _is_deep(value):
        raise _broken(f"nested more than {_DEEPEST} levels deep")
    return value


def parse_object(content: str | bytes) -> dict[str, Any]:
    """Return the value of a JSON text that is an object: a record, a marker, a configuration.

    Raises:
        json.JSONDecodeError: As for `parse_json`, or it is something else.
    """
    value = parse_json(content)
    if not isinstance(value, dict):
        raise _broken(f"a {type(value).__name__} where an object of names and values is expected")
    return value


def as_record(kind: type[Record], fields: Any) -> Record:
    """Return what a JSON object says as a named tuple of this kind, every field of the type that it announces.

    Raises:
        ValueError: A field is missing, unknown or of another type.
    """
    try:
        # As JSON, in which half of a surrogate pair is no text.
        return _adapter(kind).validate_json(json.dumps(fields))
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None


def read_record(kind: type[Record], path: Path) -> Record | None:
    """Return what a JSON file says, as `as_record` does; None if there is none, or it does not read as one."""
    try:
        return as_record(kind, parse_object(path.read_bytes()))
    except (OSError, ValueError):
        return None


def parse_finite_json(content: str | bytes) -> Any:
    """Return the value of a JSON text in which every number is finite, as the JSON standard has it.

    Raises:
        json.JSONDecodeError: As for `parse_json`, or a number is NaN or infinite.
    """
    value = parse_json(content)
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise _broken("a number that is NaN or infinite") from None
    return value


def parse_yaml(text: str, *, numbers_as_keys: bool = False) -> Any:
    """Return the value of a YAML (or JSON) text: mappings with texts as keys, lists, texts, numbers, yes/no and null.

    A date stays the text that it is. With `numbers_as_keys`, keys may be whole numbers.

    Raises:
        ValueError: It is not YAML, a key is there twice or is no text, a value is of another kind, or the values are
            too many or nested too deeply (an alias that contains itself, for example).
    """
    import yaml

    try:
        value = yaml.load(text, Loader=_loader())
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A tag such as !!timestamp before what is none.
        raise ValueError(f"a value does not read as what its tag names ({error})") from None
    _require_plain(value, (str, int) if numbers_as_keys else (str,))
    return value


def first_problem(error: ValidationError) -> str:
    """Return the first thing that pydantic has found, in one line: where it is and what is wrong."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"]) or "the file"
    return f"{place}: {problem['msg']}"


@cache
def _adapter(kind: type[Record]) -> TypeAdapter[Record]:
    return TypeAdapter(kind)


def _broken(reason: str) -> json.JSONDecodeError:
    return json.JSONDecodeError(reason, "", 0)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, list | dict)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Values as a user means them: dates are texts, and of two equal keys none is dropped."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
            if repeated := [key for place, key in enumerate(seen) if key in seen[:place]]:
                raise yaml.YAMLError(f"`{repeated[0]}` is there twice{node.start_mark}")
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


_MERGE = "tag:yaml.org,2002:merge"


def _require_plain(value: Any, keys: tuple[type, ...]) -> None:
    level, count = [value], 0
    for _ in range(_DEEPEST):
        count += len(level)
        if count > _MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict) and (odd := [key for key in each if not isinstance(key, keys)]):
                raise ValueError(f"the key {odd[0]!r} is no text: put it in quotation marks")
            if not isinstance(each, _PLAIN):
                raise ValueError(f"{each!r} is of the type {type(each).__name__}: write it as a text, in quotes")
            inner += _inside(each)
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {_DEEPEST} levels deep")


def words_of(text: str) -> list[str]:
    """Return runs of letters and digits, case-folded: no stemming and no stop words, so no language is preferred."""
    return _WORD.findall(text.casefold())
