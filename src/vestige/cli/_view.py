"""`vestige view`."""

from vestige.registry import command
from vestige.settings import ViewSettings


@command("view", ViewSettings, function="vestige.reports:view", order=150)
def view(settings: ViewSettings) -> None:
    """Serve the report of a run to the browser on this computer, until Ctrl-C."""
    from vestige.reports import view as serve

    serve(**settings.arguments())
