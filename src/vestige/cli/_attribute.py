"""`vestige attribute`."""

from typing import TYPE_CHECKING

from vestige.registry import command
from vestige.settings import AttributeSettings, UntracSettings
from vestige.terminal import say

if TYPE_CHECKING:
    from vestige.runs import Scores

SHOWN_QUERIES, SHOWN_EXAMPLES = 10, 5
"""What fits on a screen; the run holds everything."""


@command(
    "attribute", AttributeSettings, function="vestige.methods:attribute", order=60, sweepable=True, writes_once=True
)
def attribute(settings: AttributeSettings) -> None:
    """Rank the training examples behind an answer.

    Writes a run: scores of proponents and opponents of every query, their texts, and how far to trust them.
    """
    from vestige.methods import attribute as score

    show_scores(score(**settings.arguments()), settings, SHOWN_EXAMPLES)


def show_scores(scores: "Scores", settings: AttributeSettings | UntracSettings, examples: int) -> None:
    """Print the first `examples` proponents of the first queries, the checks, and what the sign means."""
    for query in scores.queries[:SHOWN_QUERIES]:
        say(f"{scores.top(query, min(settings.k, examples))}\n")
    if len(scores.queries) > SHOWN_QUERIES:
        say(f"... and {len(scores.queries) - SHOWN_QUERIES} more queries.\n")
    for check in scores.run.trust.checks:
        say(f"[{check.verdict}] {check.name}: {check.reading}")
    say(f"Sign: {scores.meaning.sign}\nSee it with: vestige report {settings.out}")
