"""`vestige study`."""

from vestige.cli._command import command
from vestige.settings import StudySettings


@command(StudySettings)
def study(settings: StudySettings) -> None:
    """Replay a published experiment.

    From made or public data to a table, beside what was expected of it; parts that are finished are not done again.
    """
    from rich.console import Console

    from vestige.studies import study as replay

    console = Console()
    report = replay(**settings.arguments())
    Console(width=console.width if console.is_terminal else 120, soft_wrap=True).print(report)
