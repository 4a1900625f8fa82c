"""`vestige export`."""

from vestige.registry import command
from vestige.settings import ExportSettings
from vestige.terminal import say


@command("export", ExportSettings, function="vestige.index:export", order=180)
def export(settings: ExportSettings) -> None:
    """Copy an index or a run into formats that other programs read."""
    from vestige.index import export as write

    for path in write(**settings.arguments()):
        say(path)
