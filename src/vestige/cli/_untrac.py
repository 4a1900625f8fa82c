"""`vestige untrac`."""

from vestige.registry import command
from vestige.settings import UntracSettings
from vestige.terminal import say

SHOWN_SETS, SHOWN_EXAMPLES = 10, 8
"""What fits on a screen; the run holds everything."""


@command("untrac", UntracSettings, function="vestige.unlearn:untrac", order=80, sweepable=True, writes_once=True)
def untrac(settings: UntracSettings) -> None:
    """Rank training sources or examples by unlearning.

    Climbs the loss of one set of examples after another and measures whose loss rises too. The model stays as it is.
    """
    from vestige.unlearn import untrac as unlearn

    scores = unlearn(**settings.arguments())
    for query in scores.queries[:SHOWN_SETS]:
        say(f"{scores.top(query, min(settings.k, SHOWN_EXAMPLES))}\n")
    if len(scores.queries) > SHOWN_SETS:
        say(f"... and {len(scores.queries) - SHOWN_SETS} more test sets.\n")
    for check in scores.run.trust.checks:
        say(f"[{check.verdict}] {check.name}: {check.reading}")
    say(f"Sign: {scores.meaning.sign}\nSee it with: vestige report {settings.out}")
