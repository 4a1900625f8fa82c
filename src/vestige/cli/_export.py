"""`vestige export`."""

from vestige.cli._command import command
from vestige.settings import ExportSettings
from vestige.terminal import say


@command(ExportSettings)
def export(settings: ExportSettings) -> None:
    """Copy an index or a run into formats that other programs read."""
    from vestige.index import export as write

    for path in write(**settings.arguments()):
        say(path)
