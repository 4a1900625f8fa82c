"""An evaluation of another package: `vestige evaluate standout`."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from vestige.registry import make_command
from vestige.settings import Settings, with_settings

if TYPE_CHECKING:
    from vestige.evaluate import Evaluation


class StandoutSettings(Settings):
    """Measure how far the first example of each list stands out: its score over that of the second."""

    run: Path = Field(description="A run directory that `vestige attribute` left.")
    out: Path = Field(description="Folder of the table as JSON.")


@with_settings(StandoutSettings, "evaluate standout")
def measure_standout(settings: StandoutSettings) -> "Evaluation":
    """Return the ratio of the first score to the second, for each query of a run."""
    from vestige import Scores
    from vestige.evaluate import Evaluation, EvaluationRow, write_evaluation

    run = Scores.open(settings.run)
    ratios = {}
    for query in run.queries:
        first, second = (row.score for row in run.top(query, 2))
        ratios[query] = first / second
    row = EvaluationRow(run.run.method, ratios)
    result = Evaluation("standout", "The first score over the second, by query", (row,))
    return write_evaluation(result, settings.out, {})


standout = make_command("evaluate standout", StandoutSettings, function="vestige_standout:measure_standout")
