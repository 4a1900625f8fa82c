"""`vestige untrac`."""

from vestige.cli._attribute import show_scores
from vestige.registry import command
from vestige.settings import UntracSettings

SHOWN_EXAMPLES = 8
"""What fits on a screen; the run holds everything."""


@command("untrac", UntracSettings, function="vestige.methods:untrac", order=80, sweepable=True, writes_once=True)
def untrac(settings: UntracSettings) -> None:
    """Rank training sources or examples by unlearning.

    Climbs the loss of one set of examples after another and measures whose loss rises too. The model stays as it is.
    """
    from vestige.methods import untrac as unlearn

    show_scores(unlearn(**settings.arguments()), settings, SHOWN_EXAMPLES)
