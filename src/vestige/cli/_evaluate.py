"""`vestige evaluate WHAT`: a command for every row of `EVALUATIONS`, which calls the function of that name."""

from importlib import import_module

from cyclopts import App

from vestige.cli._command import Run, command
from vestige.settings import EVALUATIONS, Settings

evaluate = App(name="evaluate", help="Measure how far scores, and what they are computed from, can be trusted.")


def _run(what: str) -> Run:
    def run(settings: Settings) -> None:
        from rich.console import Console

        room = import_module("vestige.evaluate")
        result = getattr(room, what.replace("-", "_"))(**settings.arguments())
        console = Console()
        # A file or a pipe has no width, and a table that is folded into 80 columns cannot be read.
        Console(width=console.width if console.is_terminal else _FILE_WIDTH, soft_wrap=True).print(result)

    return run


_FILE_WIDTH = 160

for _what, _settings in EVALUATIONS.items():
    _run_it = _run(_what)
    _run_it.__name__, _run_it.__doc__, _run_it.__module__ = _what.replace("-", "_"), _settings.__doc__, __name__
    evaluate.command(command(_settings)(_run_it), name=_what)
