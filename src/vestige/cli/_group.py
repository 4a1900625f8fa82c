"""A verb that is a group, `vestige evaluate WHAT`: a command for every row of a table of settings."""

from collections.abc import Mapping
from importlib import import_module

from cyclopts import App

from vestige.cli._app import VERBS
from vestige.cli._command import Run, command
from vestige.settings import Settings
from vestige.terminal import show


def group(verb: str, room: str, kinds: Mapping[str, type[Settings]]) -> App:
    """A command for each of `kinds`, which calls the function of that name in `vestige.<room>` and prints its result.

    Args:
        verb: The word after `vestige`.
        room: Where the functions live; imported when one is called.
        kinds: Settings by the word after the verb; their docstring is the command's help.
    """
    app = App(name=verb, help=VERBS[verb])
    for kind, settings in kinds.items():
        run = _run(room, kind)
        run.__name__, run.__doc__, run.__module__ = kind.replace("-", "_"), settings.__doc__, __name__
        app.command(command(settings)(run), name=kind)
    return app


def _run(room: str, kind: str) -> Run:
    def run(settings: Settings) -> None:
        show(getattr(import_module(f"vestige.{room}"), kind.replace("-", "_"))(**settings.arguments()), file_width=160)

    return run
