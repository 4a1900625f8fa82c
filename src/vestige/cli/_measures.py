"""`vestige measures`."""

from vestige.registry import command
from vestige.settings import MeasuresSettings
from vestige.terminal import say, show


@command("measures", MeasuresSettings, order=210)
def measures(settings: MeasuresSettings) -> None:
    """List the memorization measures of an audit, or print what one means, needs and costs.

    Those of installed packages stand among the built-in ones.
    """
    from vestige.measures import describe_measure, measure_table

    if settings.name is None:
        show(measure_table(), file_width=160)
    else:
        say(describe_measure(settings.name))
