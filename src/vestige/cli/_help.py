"""Help in two levels, made from the facts of the commands and of their settings; imports no parser."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from vestige.errors import SpecError
from vestige.registry import COMMANDS, Command, import_object
from vestige.settings import Basic, Input, Named, Settings, flag

GROUPS = {
    "evaluate": ("evaluation", "Measure how far scores, and what they are computed from, can be trusted.", 100),
    "data": (
        "kind of data",
        "Make data: paraphrases, answers, multiple-choice prompts, splits, tokens, and rows that are cleaned.",
        120,
    ),
}
"""Groups of commands, such as `vestige data split`: what one of them is called, the group's help, and its position."""

OWN = "Settings"
SHARED = {
    "config": ("FILE", "YAML file with these settings by name, or the run.json of an earlier run; flags win over it."),
    "quiet": ("", "Print results and errors alone: no progress, no next command. As VESTIGE_QUIET=1."),
    "verbose": ("", "Also print the whole command, the seconds of each phase, and what libraries log and warn of."),
}
"""What every command takes beside its settings: the value that follows, and the meaning."""
HELP = ("--help", "-h")
EVERYTHING, VERSION = "--help-all", "--version"
_WIDEST, _COLUMN = 100, 26


def is_basic(field: FieldInfo) -> bool:
    """Return whether the first level of help shows a setting."""
    return field.is_required() or any(isinstance(fact, Basic) for fact in field.metadata)


def group_of(settings: type[Settings], name: str) -> tuple[int, str]:
    """Return position and name of the group of a setting: shared ones are under the first line of their class."""
    owners = settings.__mro__
    owner = next(each for each in owners if name in vars(each).get("__annotations__", {}))
    if owner is settings:
        return 0, OWN
    return len(owners) - owners.index(owner), (owner.__doc__ or "").split(".")[0]


def members_of(annotation: Any) -> list[Any]:
    """Return the types that a value may have, without their bounds and without None."""
    if get_origin(annotation) is Annotated:
        return members_of(get_args(annotation)[0])
    if get_origin(annotation) in (Literal, tuple, list, dict) or not get_args(annotation):
        return [] if annotation is NoneType else [annotation]
    return [one for member in get_args(annotation) for one in members_of(member)]


def default_of(field: FieldInfo) -> str | None:
    """Return the default as it is typed; None for a setting that has none, or whose description gives it."""
    default = field.default
    if field.is_required() or default is None or isinstance(default, dict):
        return None
    if isinstance(default, bool):
        return "yes" if default else "no"
    return (" ".join(map(str, default)) or None) if isinstance(default, tuple) else str(default)


def value_of(settings: type[Settings], name: str) -> str:
    """Return the words that follow a flag in help: PATH, NAME, N or the choices; none for on or off."""
    field = settings.model_fields[name]
    several = "..." if name in (*settings.repeatable, *settings.files) else ""
    members = members_of(field.annotation)
    if members == [bool]:
        return ""
    if any(isinstance(fact, Named) for fact in field.metadata):
        return "NAME" + several
    choices = [str(word) for member in members if get_origin(member) is Literal for word in get_args(member)]
    if choices:
        return "|".join(choices)
    if Path in members or any(isinstance(fact, Input) for fact in field.metadata):
        return "PATH" + several
    if any(get_origin(member) is tuple for member in members):
        return "VALUE..."
    return {int: "N", float: "X"}.get(members[0] if members else str, "VALUE") + several


def find_help(words: Sequence[str], *, everything: bool) -> str:
    """Return the help of the command or the group that the words begin with, or of all.

    Raises:
        SpecError: There is no such command.
    """
    names = COMMANDS.names()
    for count in (2, 1):
        if (name := " ".join(words[:count])) in names:
            return help_of(COMMANDS.find(name), everything=everything)
    if not words or is_group(words):
        return help_of_group(*words)
    in_group = is_group(words[:1])
    raise SpecError(no_command(words[0] if in_group else "", words[1] if in_group else words[0]))


def is_group(words: Sequence[str]) -> bool:
    """Return whether the words are one, which several commands begin with."""
    return len(words) == 1 and any(name.startswith(f"{words[0]} ") for name in COMMANDS.names())


def no_command(group: str, word: str) -> str:
    """Return the answer to a word that is no command, of the group if one is given."""
    names = [name.split() for name in COMMANDS.names()]
    known = sorted({words[1] if group else words[0] for words in names if not group or words[0] == group})
    close = get_close_matches(word, known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(known)}."
    message = f"There is no {GROUPS.get(group, ('command',))[0]} {word!r}. {hint}"
    if find_spec("vestige_recipes") is None:
        message += (
            '\nStudies, sweeps, imports and most of `data` come with the recipes: pip install "vestige[recipes]".'
        )
    return message


def help_of(command: Command, *, everything: bool) -> str:
    """Return the help of one command: the settings that matter and examples, or `everything` by group."""
    fields = command.settings.model_fields
    names = [name for name in fields if everything or is_basic(fields[name])]
    # What the command alone takes comes first, and of that what it cannot do without.
    names.sort(key=lambda name: (group_of(command.settings, name)[0], not fields[name].is_required()))
    places = [f"[{name.upper()}]" for name in command.settings.positional]
    required = any(fields[name].is_required() for name in names)
    paragraphs = [f"Usage: {' '.join(['vestige', command.name, *places, '[SETTINGS]'])}"]
    paragraphs.append(_fill(inspect.cleandoc(command.help if everything else command.summary)))
    if everything and command.more is not None:
        paragraphs.append(import_object(command.more)())
    groups: dict[tuple[int, str], list[str]] = {}
    for name in names:
        key = group_of(command.settings, name) if everything else (0, OWN)
        groups.setdefault(key, []).extend(_describe(command.settings, name, everything))
    shared = [name for name in SHARED if name not in fields and (everything or name == "config")]
    groups.setdefault((0, OWN), []).extend(line for name in shared for line in _row(" ", f"--{name}", *SHARED[name]))
    paragraphs += ["\n".join([f"{title}:", *groups[order, title]]) for order, title in sorted(groups)]
    if command.examples:
        paragraphs.append("\n".join(["Examples:", *(f"  {line}" for line in command.examples)]))
    notes = ["* is required."] if required else []
    if not everything:
        notes.append(f"All {len(fields)} settings: vestige {command.name} {EVERYTHING}")
    return "\n\n".join([*paragraphs, "  ".join(notes)]).rstrip()


def help_of_group(group: str = "") -> str:
    """Return the list of all commands, or of those of a group."""
    commands: dict[str, tuple[int, str]] = {}
    for name in COMMANDS.names():
        first, _, last = name.partition(" ")
        if group and first == group:
            commands[last] = _place(name)
        elif not group:
            commands[first] = (GROUPS[first][2], GROUPS[first][1]) if last and first in GROUPS else _place(name)
    width = max(map(len, commands))
    rows = [
        line
        for name in sorted(commands, key=lambda name: (commands[name][0], name))
        for line in _wrap(f"  {name:<{width}}  ", commands[name][1])
    ]
    what = GROUPS[group][1] if group in GROUPS else "Which training examples made a language model behave as it does."
    words = f"vestige {group}".strip()
    return "\n".join(
        [
            *(f"Usage: {words} COMMAND", "", what, "", "Commands:", *rows, ""),
            f"Help of one: {words} COMMAND --help. Every command takes --quiet and --verbose. "
            f"This is Vestige {version('vestige')}.",
        ]
    )


def _place(name: str) -> tuple[int, str]:
    found = COMMANDS.find(name)
    return found.order, found.summary


def _describe(settings: type[Settings], name: str, everything: bool) -> list[str]:
    """Return the lines of one setting: of its description all, or the first sentence."""
    field = settings.model_fields[name]
    text = field.description or ""
    default = default_of(field)
    if not everything:
        text = re.split(r"(?<=[.;]) ", text)[0].rstrip(";") if len(text) > _WIDEST else text
    spelling = flag(name)
    if members_of(field.annotation) == [bool] and (everything or field.default is True):
        spelling = f"{spelling}, --no-{spelling[2:]}"
    shown = f"{text} [{default}]" if default is not None and default not in ("no", "default") else text
    return _row("*" if field.is_required() else " ", spelling, value_of(settings, name), shown)


def _row(mark: str, spelling: str, value: str, text: str) -> list[str]:
    head = f"{mark} {spelling} {value}".rstrip()
    if len(head) < _COLUMN:
        return list(_wrap(f"{head:<{_COLUMN}}", text))
    return [head, *_wrap(" " * _COLUMN, text)]


def _wrap(head: str, text: str) -> Iterator[str]:
    rest = " " * len(head)
    yield from textwrap.wrap(text, _width(), initial_indent=head, subsequent_indent=rest, break_on_hyphens=False)


def _fill(text: str) -> str:
    return "\n\n".join(textwrap.fill(part, _width(), break_on_hyphens=False) for part in text.split("\n\n"))


def _width() -> int:
    return shutil.get_terminal_size((_WIDEST, 24)).columns
