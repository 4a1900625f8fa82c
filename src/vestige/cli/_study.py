"""`vestige study`."""

from vestige.registry import command
from vestige.settings import StudySettings
from vestige.terminal import show


@command("study", StudySettings, function="vestige.studies:study", order=110, sweepable=True)
def study(settings: StudySettings) -> None:
    """Replay a published experiment.

    From made or public data to a table, beside what was expected of it; parts that are finished are not done again.
    """
    from vestige.studies import study as replay

    show(replay(**settings.arguments()))
