"""`vestige view`."""

from vestige.cli._command import command
from vestige.settings import ViewSettings


@command(ViewSettings)
def view(settings: ViewSettings) -> None:
    """Serve the report of a run to the browser on this computer, until Ctrl-C."""
    from vestige.report import view as serve

    serve(**settings.arguments())
