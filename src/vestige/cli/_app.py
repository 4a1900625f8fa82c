"""The command `vestige`: the registered commands, and what becomes of errors."""

import contextlib
import errno
import inspect
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin

from cyclopts import App, CycloptsError, Group, Parameter, Token, UnknownCommandError, UnusedCliTokensError
from pydantic.fields import FieldInfo

from vestige.distributed import ROLE_VARIABLE
from vestige.errors import SpecError, UserError, WorkElsewhere
from vestige.parsing import parse_yaml
from vestige.registry import COMMANDS, Command, check_inputs, import_object
from vestige.settings import Settings, flag, nearest
from vestige.terminal import say

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
        complete = settings(**(given | {name: _read_words(settings, name, value) for name, value in typed.items()}))
        check_inputs(complete)
        command.run(complete)

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


GROUPS = {
    "evaluate": ("evaluation", "Measure how far scores, and what they are computed from, can be trusted.", 100),
    "data": (
        "kind of data",
        "Make data: paraphrases, answers, multiple-choice prompts, splits, tokens, and rows that are cleaned.",
        120,
    ),
}
"""Groups of commands, such as `vestige data split`: what one of them is called, the group's help, and its position."""

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors for which the disk, not the command, has to change."""
_PANIC = "PanicException"
"""The class, private and no `Exception`, of an error in a library in Rust that its authors had not thought of."""

BUG, USAGE_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
"""Exit statuses; the last is what a shell shows for a program that wrote into a pipe whose reader was gone."""
_SHOWN = 300
"""Most characters of a message of a library."""


def build_app(first: str | None = None) -> App:
    """Return the command-line application with the registered commands.

    Args:
        first: The first word after `vestige`: where it is a command or a group, others are not imported.

    Raises:
        SpecError: A command cannot be imported, or none is registered.
    """
    app = App(
        name="vestige",
        help="Which training examples made a language model behave as it does.",
        version=lambda: version("vestige"),
        suppress_keyboard_interrupt=False,
        result_action="return_value",
        help_format="plaintext",
    )
    names = COMMANDS.names()
    if not names:
        raise SpecError("No command is registered: Vestige is not installed. Type `pip install .` in its folder again.")
    for one in map(COMMANDS.find, [name for name in names if name.split()[0] == first] or names):
        *group, name = one.name.split()
        if group and group[0] not in list(app):
            _, summary, order = GROUPS.get(group[0], ("command", f"Commands of {group[0]}.", one.order))
            app.command(App(name=group[0], help=summary, sort_key=order))
        (app[group[0]] if group else app).command(as_function(one), name=name, sort_key=one.order)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake is printed in words, on stderr, with exit status 2.

    Args:
        arguments: The words after `vestige`; those of the process if None.

    Raises:
        SystemExit: 2 after a user's mistake, 130 after Ctrl-C, 141 when the output has no reader, 1 after a bug.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    with _usable_streams():
        try:
            build_app(words[0] if words else None)(words, exit_on_error=False, print_error=False)
        except CycloptsError as error:
            _fail(_parse_error(error))
        except UserError as error:
            _fail(str(error))
        except WorkElsewhere as note:
            say(note)
        except KeyboardInterrupt:
            print("vestige: interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except OSError as error:
            _flush_output()  # ends here if it was the reader of the output that has left
            _fail(_system_error(error))
        except MemoryError:
            _fail("There is not enough memory. Give less at a time: a smaller --token-budget, --batch-size or --limit.")
        except UnicodeEncodeError as error:  # texts of data are checked where they are read; what is left is a name
            _fail(f"A file or folder has a name that is no text in UTF-8: {_short(error.object)}. Rename it.")
        except Exception as error:
            _fail(_bug(error), BUG)
        except BaseException as error:
            if type(error).__name__ != _PANIC:
                raise
            _fail(
                f"The library that reads tokenizers and weights broke off ({_short(str(error))}). A file of the model "
                "is damaged, or not what its name says: get the model's folder again, or give another --tokenizer."
            )


@contextlib.contextmanager
def _usable_streams() -> Iterator[None]:
    """Make every character printable, also on a terminal that has few; a stream that was closed swallows everything."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        _flush_output()


def _flush_output() -> None:
    """Print the rest now, not when the interpreter ends, which would show a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(BROKEN_PIPE)
        if error.__context__ is None:  # else the command has just printed it
            _fail(f"What was to be printed could not be written ({error.strerror}).")


def _system_error(error: OSError) -> str:
    reason = error.strerror or error
    if error.errno in _OF_THE_DISK:
        path = f" ({error.filename})" if error.filename else ""
        return f"The disk is full or does not let us: {reason}{path}. Free disk space, or choose another place."
    path = f"{error.filename}: " if error.filename else ""
    return f"{path}{reason}. Check the path, or choose another one."


def _bug(error: Exception) -> str:
    """Return the message of an unexpected error; the traceback goes to a file, or into the log of a worker."""
    trace = "".join(traceback.format_exception(error))
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
    message = f"unexpected {reason[:500]}\nThis is a bug in Vestige: what you typed or gave should have been answered. "
    if ROLE_VARIABLE not in os.environ:
        with contextlib.suppress(OSError):
            file, path = tempfile.mkstemp(prefix="vestige-", suffix=".txt")
            with open(file, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(trace)
            return f"{message}Please report it with {path}."
    return f"{message}\n{trace}"


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _parse_error(error: CycloptsError) -> str:
    """Return what the parser did not understand, with what is possible."""
    if isinstance(error, UnusedCliTokensError):
        message = f"Not understood: {' '.join(error.unused_tokens or ())}. A value needs its flag before it."
    elif isinstance(error, UnknownCommandError):
        group, word = " ".join(error.command_chain or ()), (error.unused_tokens or [""])[0]
        names = [name.split() for name in COMMANDS.names()]
        known = sorted({words[1] if group else words[0] for words in names if not group or words[0] == group})
        close = get_close_matches(word, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(known)}."
        message = f"There is no {GROUPS.get(group, ('command',))[0]} {word!r}. {hint}"
        if find_spec("vestige_recipes") is None:
            message += (
                '\nStudies, sweeps, imports and most of `data` come with the recipes: pip install "vestige[recipes]".'
            )
    else:
        error.verbose = False
        message = str(error)
    help_command = " ".join(["vestige", *(error.command_chain or ()), "--help"])
    return f"{message}\nType `{help_command}` for what is possible."


def _fail(message: str, status: int = USAGE_ERROR) -> NoReturn:
    say(f"vestige: {message}", file=sys.stderr)
    sys.exit(status)
