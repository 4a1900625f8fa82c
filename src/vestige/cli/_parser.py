"""The parser of the command line, made from the registered commands: one flag for each setting."""

import inspect
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cyclopts import App, CycloptsError, Parameter, Token, UnknownCommandError, UnusedCliTokensError

from vestige import registry
from vestige.cli._help import EVERYTHING, HELP, SHARED, VERSION, members_of, no_command
from vestige.errors import SpecError
from vestige.parsing import parse_yaml
from vestige.progress import announce, is_verbose, manner
from vestige.registry import COMMANDS, Command, list_names
from vestige.settings import Input, Named, Settings, flag, nearest
from vestige.timing import profile_phases


def as_function(command: Command, *, completing: bool = False) -> Callable[..., None]:
    """Return the function that the parser calls: one flag for each setting, and those that all commands share.

    What is typed wins over what `--config` says, which wins over the default. The parser requires nothing: the settings
    themselves say what is missing, wherever it should have come from.

    Args:
        command: What it runs.
        completing: Give parameters the types that a shell completes, names and files, in place of those that are read.
    """
    settings = command.settings
    signature = _signature(settings, completing)

    def parse(*words: Any, **flags: Any) -> None:
        typed = signature.bind(*words, **flags).arguments
        shared = {name: typed.pop(name, None) for name in SHARED if name not in settings.model_fields}
        config = shared.get("config")
        given = {} if config is None else _read_config(config, settings)
        complete = settings(**(given | {name: _read_words(settings, name, value) for name, value in typed.items()}))
        with manner(quiet=bool(shared.get("quiet")), verbose=bool(shared.get("verbose"))), _log(command, complete):
            registry.check_inputs(complete)
            command.run(complete)
            if command.next_command is not None:
                announce(f"Next: {command.next_command.format_map(_spell_settings(complete))}")

    vars(parse)["__signature__"] = signature
    parse.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    parse.__name__ = command.name.split()[-1].replace("-", "_")
    parse.__doc__ = command.help
    return parse


@contextmanager
def _log(command: Command, settings: Settings) -> Iterator[None]:
    """With --verbose: show the whole command, what libraries log and warn of, and the seconds of each phase."""
    if not is_verbose():
        yield
        return
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    warnings.simplefilter("default")
    announce(f"Vestige {version('vestige')}: {settings.command_line(command.name)}")
    with profile_phases(True) as measured:
        yield
    if measured is not None:
        announce(measured.table())


def _spell_settings(settings: Settings) -> dict[str, str]:
    """Return each setting as a word of a shell; one that holds no word stands as its name in capitals."""
    recorded = settings.record()
    return {
        name: shlex.quote(str(recorded[name])) if isinstance(recorded.get(name), str | int) else name.upper()
        for name in type(settings).model_fields
    }


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
    from vestige.data import exists  # takes longer to import than help should

    return isinstance(word, str) and exists(word)


def _signature(settings: type[Settings], completing: bool) -> inspect.Signature:
    """Return positional settings before flags, as Python demands, and then what all commands share."""
    order = sorted(settings.model_fields, key=lambda name: name not in settings.positional)
    parameters = [_parameter(settings, name, completing) for name in order]
    for name, (value, _) in SHARED.items():
        if name not in settings.model_fields:
            annotation = Annotated[(Path if value else bool) | None, Parameter(name=f"--{name}", negative="")]
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )
    return inspect.Signature(parameters, return_annotation=None)


def _parameter(settings: type[Settings], name: str, completing: bool) -> inspect.Parameter:
    field = settings.model_fields[name]
    # Both spellings of a positional: `vestige report RUN` and `vestige report --run RUN`.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in settings.positional else inspect.Parameter.KEYWORD_ONLY
    typed = list[str] if name in (*settings.repeatable, *settings.files) else _type_of(field.annotation)
    several = typed == list[str]
    if completing:
        typed = _completed_type(settings, name, typed)
    option = Parameter(
        name=flag(name),
        consume_multiple=several,
        converter=_word if Path in (typed, *get_args(typed)) else None,
        negative_iterable=() if several else None,
    )
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[typed | None, option])


def _completed_type(settings: type[Settings], name: str, typed: Any) -> Any:
    """Return the type from which a shell completes: the registered names, files, or what is read."""
    for fact in settings.model_fields[name].metadata:
        if isinstance(fact, Named):
            return Literal[(*fact.others, *list_names(fact.group, fact.kind))]
        if isinstance(fact, Input):
            return list[Path] if typed == list[str] else Path
    return typed


def _word(_: Any, tokens: Sequence[Token]) -> str:
    """Return a path as typed: the parser would turn an empty word into the current folder; the settings refuse it."""
    return tokens[0].value


def _type_of(annotation: Any) -> Any:
    """Return the type that a word is read as; bounds are for the settings to check, who have better words for them."""
    if annotation is Any:  # in Python it may be a live object
        return str
    members = members_of(annotation)
    if any(get_origin(member) in (tuple, dict) for member in members):
        return list[str]
    return Union[tuple(members)]  # noqa: UP007


def build_app(first: str | None = None, *, completing: bool = False) -> App:
    """Return the command-line application with the registered commands.

    Args:
        first: The first word after `vestige`: where it is a command or a group, others are not imported.
        completing: As for `as_function`.

    Raises:
        SpecError: A command cannot be imported, or none is registered.
    """
    app = App(
        name="vestige",
        help_flags=[*HELP, EVERYTHING],
        version_flags=[VERSION],
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    names = COMMANDS.names()
    if not names:
        raise SpecError("No command is registered: Vestige is not installed. Type `pip install .` in its folder again.")
    for one in map(COMMANDS.find, [name for name in names if name.split()[0] == first] or names):
        *group, name = one.name.split()
        if group and group[0] not in list(app):
            app.command(App(name=group[0]))
        (app[group[0]] if group else app).command(as_function(one, completing=completing), name=name)
    return app


def run_words(words: Sequence[str]) -> None:
    """Run the command that the words say.

    Raises:
        SpecError: The parser does not understand them; the message has what is possible.
    """
    try:
        build_app(words[0])(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise SpecError(_explain(error)) from None


def _explain(error: CycloptsError) -> str:
    """Return what the parser did not understand, with what is possible."""
    if isinstance(error, UnusedCliTokensError):
        message = f"Not understood: {' '.join(error.unused_tokens or ())}. A value needs its flag before it."
    elif isinstance(error, UnknownCommandError):
        message = no_command(" ".join(error.command_chain or ()), (error.unused_tokens or [""])[0])
    else:
        error.verbose = False
        message = str(error)
    help_command = " ".join(["vestige", *(error.command_chain or ()), HELP[0]])
    return f"{message}\nType `{help_command}` for what is possible."
