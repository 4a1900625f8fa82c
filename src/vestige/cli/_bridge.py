"""From a registered command to its command line: one flag for each setting, and `--config`."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from cyclopts import Group, Parameter, Token
from pydantic.fields import FieldInfo

from vestige.errors import SpecError
from vestige.parsing import parse_yaml
from vestige.registry import Command, import_object
from vestige.settings import Settings, flag, nearest

_OWN = Group("Settings", sort_key=0)
_CONFIG = "YAML file with these settings by name, or the run.json of an earlier run; flags win over it."


def as_function(command: Command) -> Callable[..., None]:
    """Return the function that the parser calls: one flag for each setting, and `--config`.

    What is typed wins over what `--config` says, which wins over the default. The parser requires nothing: the settings
    themselves say what is missing, wherever it should have come from.
    """
    settings = command.settings
    signature = _signature(settings)

    def parse(*words: Any, **flags: Any) -> None:
        typed = signature.bind(*words, **flags).arguments
        config = typed.pop("config", None)
        given = {} if config is None else _read_config(config, settings)
        command.run(settings(**(given | {name: _read_words(settings, name, value) for name, value in typed.items()})))

    vars(parse)["__signature__"] = signature
    parse.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    parse.__name__ = command.name.split()[-1].replace("-", "_")
    parse.__doc__ = command.help if command.more is None else f"{command.help}\n\n{import_object(command.more)()}"
    return parse


def _read_words(settings: type[Settings], name: str, value: Any) -> Any:
    """Return one value for a repeatable setting that was given once, and paths for several words for files."""
    if not isinstance(value, list) or name not in (*settings.repeatable, *settings.files):
        return value
    if len(value) == 1:
        return value[0]
    return [Path(word) for word in value] if name in settings.files else value


def _read_config(path: Path, settings: type[Settings]) -> dict[str, Any]:
    """Return the settings in a YAML or JSON file; of a `run.json` its `config` part: an earlier run is replayed."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"The config file {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SpecError(f"The config file {path} is neither YAML nor JSON that can be used: {error}.") from None
    if isinstance(content, dict) and {"vestige", "config"} <= content.keys():
        content = content["config"]
    if not isinstance(content, dict):
        raise SpecError(f"{path} holds a {type(content).__name__}. Expected lines such as `model: my-model`.")
    known = list(settings.model_fields)
    unknown = [name for name in content if name not in known]
    if unknown:
        raise SpecError("\n".join(f"{path}: unknown setting `{name}`. {nearest(str(name), known)}" for name in unknown))
    for name, value in content.items():
        if isinstance(value, str) and value.startswith("<") and value.endswith(">"):
            raise SpecError(
                f"{path}: `{name}` was a live {value[1:-1]} in a Python program, which a file cannot hold. "
                f"Type {flag(name)} VALUE beside --config."
            )
        if name in settings.files and isinstance(value, list) and value and all(map(_is_a_file, value)):
            content[name] = [Path(word) for word in value]
    return content


def _is_a_file(word: Any) -> bool:
    """Return whether a word of a config file names a file or folder; else a list of words is a list of texts."""
    try:
        return isinstance(word, str) and Path(word).exists()
    except (OSError, ValueError):  # a text, too long for a file name
        return False


def _signature(settings: type[Settings]) -> inspect.Signature:
    """Return positional settings before flags, as Python demands, and the command's own before shared ones."""
    owners = {name: _owner(settings, name) for name in settings.model_fields}
    order = sorted(owners, key=lambda name: (name not in settings.positional, owners[name] is not settings))
    parameters = [_parameter(settings, name, _group(settings, owners[name])) for name in order]
    annotation = Annotated[Path | None, Parameter(group=_OWN, help=_CONFIG)]
    config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    return inspect.Signature([*parameters, config], return_annotation=None)


def _owner(settings: type[Settings], name: str) -> type:
    return next(owner for owner in settings.__mro__ if name in vars(owner).get("__annotations__", {}))


def _group(settings: type[Settings], owner: type) -> Group:
    """Return the group in the help: settings that commands share stand under the first line of their class."""
    if owner is settings:
        return _OWN
    return Group((owner.__doc__ or "").split(".")[0], sort_key=len(settings.__mro__) - settings.__mro__.index(owner))


def _parameter(settings: type[Settings], name: str, group: Group) -> inspect.Parameter:
    field = settings.model_fields[name]
    # Both spellings of a positional: `vestige report RUN` and `vestige report --run RUN`.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in settings.positional else inspect.Parameter.KEYWORD_ONLY
    typed = list[str] if name in (*settings.repeatable, *settings.files) else _type_of(field.annotation)
    several = typed == list[str]
    option = Parameter(
        name=flag(name),
        help=field.description,
        show_default=_default(field),
        group=group,
        consume_multiple=several,
        converter=_word if Path in (typed, *get_args(typed)) else None,
        negative_iterable=() if several else None,
    )
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[typed | None, option])


def _word(_: Any, tokens: Sequence[Token]) -> str:
    """Return a path as typed: the parser would turn an empty word into the current folder; the settings refuse it."""
    return tokens[0].value


def _type_of(annotation: Any) -> Any:
    """Return the type that a word is read as; bounds are for the settings to check, who have better words for them."""
    if annotation is Any:  # in Python it may be a live object
        return str
    if get_origin(annotation) is tuple:
        return list[str]
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        members = [get_args(each)[0] if get_origin(each) is Annotated else each for each in get_args(annotation)]
        return Union[tuple(members)]  # noqa: UP007
    return annotation


def _default(field: FieldInfo) -> str | bool:
    """Return the default as help shows it; a setting without one says so in its description."""
    default = field.default
    if field.is_required() or default is None or isinstance(default, dict):
        return False
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) or False if isinstance(default, tuple) else str(default)
