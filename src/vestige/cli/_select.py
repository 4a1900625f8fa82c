"""`vestige select`."""

from vestige.registry import command
from vestige.settings import SelectSettings
from vestige.terminal import show


@command("select", SelectSettings, function="vestige.selection:select", order=90, sweepable=True)
def select(settings: SelectSettings) -> None:
    """Choose which examples to train on.

    By the scores of a run, by gradients, or at random: a smaller data set with a reason for every example in it.
    """
    from vestige.selection import select as choose

    show(choose(**settings.arguments()))
