"""`vestige index`."""

from vestige.registry import command
from vestige.settings import IndexSettings
from vestige.terminal import say


@command("index", IndexSettings, function="vestige.indexes:index", order=30, sweepable=True)
def index(settings: IndexSettings) -> None:
    """Store the compressed gradient of every training example.

    The estimate of time, memory and disk comes before the work. Interrupted at any moment, the same command
    continues; with other settings it is refused, with the difference shown.
    """
    from vestige.cli._status import describe_index
    from vestige.indexes import index as build

    build(**settings.arguments())
    say(describe_index(settings.out))
