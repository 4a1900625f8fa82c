"""`vestige report`."""

from vestige.registry import command
from vestige.settings import ReportSettings
from vestige.terminal import say


@command("report", ReportSettings, function="vestige.reports:report", order=140)
def report(settings: ReportSettings) -> None:
    """Write a run as one HTML file that opens offline."""
    from vestige.reports import report as write

    say(write(**settings.arguments()))
