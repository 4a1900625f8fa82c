"""`vestige report`."""

from vestige.cli._command import command
from vestige.settings import ReportSettings
from vestige.terminal import say


@command(ReportSettings)
def report(settings: ReportSettings) -> None:
    """Write a run as one HTML file that opens offline."""
    from vestige.report import report as write

    say(write(**settings.arguments()))
