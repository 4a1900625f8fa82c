"""`vestige select`."""

from vestige.cli._command import command
from vestige.settings import SelectSettings


@command(SelectSettings)
def select(settings: SelectSettings) -> None:
    """Choose which examples to train on.

    By the scores of a run, by gradients, or at random: a smaller data set with a reason for every example in it.
    """
    from rich.console import Console

    from vestige.select import select as choose

    console = Console()
    chosen = choose(**settings.arguments())
    Console(width=console.width if console.is_terminal else 120, soft_wrap=True).print(chosen)
