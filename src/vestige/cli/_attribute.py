"""`vestige attribute`, `vestige untrac` and `vestige methods`."""

from typing import TYPE_CHECKING

from vestige.registry import command
from vestige.settings import AttributeSettings, MethodsSettings, UntracSettings
from vestige.terminal import say, show

if TYPE_CHECKING:
    from vestige.runs import Scores

SHOWN_QUERIES, SHOWN_EXAMPLES, SHOWN_SOURCES = 10, 5, 8
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


@command("untrac", UntracSettings, function="vestige.methods:untrac", order=80, sweepable=True, writes_once=True)
def untrac(settings: UntracSettings) -> None:
    """Rank training sources or examples by unlearning.

    Climbs the loss of one set of examples after another and measures whose loss rises too. The model stays as it is.
    """
    from vestige.methods import untrac as unlearn

    show_scores(unlearn(**settings.arguments()), settings, SHOWN_SOURCES)


@command("methods", MethodsSettings, order=200)
def methods(settings: MethodsSettings) -> None:
    """List the attribution methods, or print what one estimates, costs and takes.

    Those of installed packages stand among the built-in ones.
    """
    from vestige.methods import describe_method, method_table

    if settings.name is None:
        show(method_table(), file_width=160)
    else:
        say(describe_method(settings.name))


def show_scores(scores: "Scores", settings: AttributeSettings | UntracSettings, examples: int) -> None:
    """Print the first `examples` proponents of the first queries, the checks, and what the sign means."""
    for query in scores.queries[:SHOWN_QUERIES]:
        say(f"{scores.top(query, min(settings.k, examples))}\n")
    if len(scores.queries) > SHOWN_QUERIES:
        say(f"... and {len(scores.queries) - SHOWN_QUERIES} more queries.\n")
    for check in scores.run.trust.checks:
        say(f"[{check.verdict}] {check.name}: {check.reading}")
    say(f"Sign: {scores.meaning.sign}\nSee it with: vestige report {settings.out}")
