"""From a registered command to its command line: one flag per setting, and `--config`."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from cyclopts import Group, Parameter, Token
from pydantic.fields import FieldInfo

from vestige.cli._config import read_config
from vestige.registry import Command
from vestige.settings import Settings, flag

_OWN = Group("Settings", sort_key=0)
_CONFIG = Parameter(
    group=_OWN,
    help="YAML file with these settings by name, or the run.json of an earlier run; flags win over it.",
)


def as_function(command: Command) -> Callable[..., None]:
    """Return the function that the parser calls: one flag for each setting, and `--config`.

    What is typed wins over what `--config` says, which wins over the default. The parser requires nothing: the settings
    themselves say what is missing, wherever it should have come from.
    """
    settings = command.settings
    signature = _signature(settings)

    def parsed(*words: Any, **flags: Any) -> None:
        typed = signature.bind(*words, **flags).arguments
        config = typed.pop("config", None)
        from_file = read_config(config, settings) if config is not None else {}
        read = {name: _replayed(settings, name, value) for name, value in from_file.items()}
        command.run(settings(**(read | {name: _typed_in(settings, name, value) for name, value in typed.items()})))

    vars(parsed)["__signature__"] = signature
    parsed.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    parsed.__name__, parsed.__doc__ = command.name.split()[-1].replace("-", "_"), command.help
    return parsed


def _typed_in(settings: type[Settings], name: str, value: Any) -> Any:
    """Return one value for a repeatable setting that was given once, and paths for several words for files."""
    if not isinstance(value, list) or name not in (*settings.repeatable, *settings.files):
        return value
    if len(value) == 1:
        return value[0]
    return [Path(word) for word in value] if name in settings.files else value


def _replayed(settings: type[Settings], name: str, value: Any) -> Any:
    """Return a value of a config file; a list of strings for files becomes paths if they exist, else it stays texts."""
    if name not in settings.files or not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        return value
    paths = [Path(word) for word in value]
    return paths if paths and all(_exists(path) for path in paths) else value


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text, too long for a file name
        return False


def _signature(settings: type[Settings]) -> inspect.Signature:
    parameters = [_parameter(settings, name, field) for name, field in _in_help_order(settings)]
    annotation = Annotated[Path | None, _CONFIG]
    config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    return inspect.Signature([*parameters, config], return_annotation=None)


def _in_help_order(settings: type[Settings]) -> list[tuple[str, FieldInfo]]:
    """Return the command's own settings before shared ones, and positional ones before flags, as Python demands."""
    rank = {
        name: (name not in settings.positional, _owner(settings, name) is not settings)
        for name in settings.model_fields
    }
    return sorted(settings.model_fields.items(), key=lambda item: rank[item[0]])


def _owner(settings: type[Settings], name: str) -> type:
    return next(owner for owner in settings.__mro__ if name in vars(owner).get("__annotations__", {}))


def _group(settings: type[Settings], name: str) -> Group:
    """Return the group of help for a setting: shared ones stand under the first line of their class."""
    owner = _owner(settings, name)
    if owner is settings:
        return _OWN
    return Group((owner.__doc__ or "").split(".")[0], sort_key=-settings.__mro__.index(owner) + len(settings.__mro__))


def _parameter(settings: type[Settings], name: str, field: FieldInfo) -> inspect.Parameter:
    # Both spellings of a positional: `vestige report RUN` and `vestige report --run RUN`.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in settings.positional else inspect.Parameter.KEYWORD_ONLY
    typed = list[str] if name in (*settings.repeatable, *settings.files) else _typed(field)
    several = typed == list[str]
    option = Parameter(
        name=flag(name),
        help=field.description,
        show_default=_default(field),
        group=_group(settings, name),
        consume_multiple=several,
        converter=_word if Path in (typed, *get_args(typed)) else None,
        negative_iterable=() if several else None,
    )
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[typed | None, option])


def _word(_: Any, tokens: Sequence[Token]) -> str:
    """Return a path as typed: the parser would turn an empty word into the current folder; the settings refuse it."""
    return tokens[0].value


def _typed(field: FieldInfo) -> Any:
    """Return the type that a word is read as; a string where Python may pass a live object."""
    annotation = _without_bounds(field.annotation)
    if annotation is Any:
        return str
    return list[str] if get_origin(annotation) is tuple else annotation


def _without_bounds(annotation: Any) -> Any:
    """`PositiveInt | None` as `int | None`: bounds are for the settings to check, who have better words for them."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return Union[tuple(_without_bounds(member) for member in get_args(annotation))]  # noqa: UP007
    return annotation


def _default(field: FieldInfo) -> str | bool:
    """Return the default as help shows it; a setting without one says so in its description."""
    if field.is_required():
        return False
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default)) or False
    if isinstance(field.default, dict):
        return False
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    return False if field.default is None else str(field.default)
