"""The drawings of planted secrets on an audit's page: exposure over copies, and while training."""

from collections.abc import Sequence

from vestige.reports._audit_panels import Chart
from vestige.reports._curves import Line, curves
from vestige.runs import CHANCE_BITS, Audit, Exposed, mean_exposures


def canary_charts(audit: Audit) -> list[Chart]:
    """Draw exposure by number of copies where that is known, and over checkpoints if there are several."""
    groups = mean_exposures(audit.run.canaries)
    last = [each for each in groups if each.checkpoint == audit.checkpoints[-1]]
    found = [_over_copies(last)] if len(last) > 1 else []
    return found + ([_over_checkpoints(audit, groups)] if groups and len(audit.checkpoints) > 1 else [])


def _over_copies(groups: Sequence[Exposed]) -> Chart:
    # Side by side in order: there are few numbers, and a logarithmic axis has no 0.
    places = list(range(len(groups)))
    ticks = [
        (float(place), f"{'unknown' if group.copies is None else group.copies} ({group.secrets})")
        for place, group in enumerate(groups)
    ]
    line = _line("mean exposure, bits", places, groups)
    svg = curves([line], "copies in the training data (secrets)", side="bits", ticks=ticks, rule=CHANCE_BITS)
    note = "Mean over the secrets with its 95 % interval, under the model. The line: secrets that were never planted."
    return Chart("Exposure of planted secrets", note, svg)


def _over_checkpoints(audit: Audit, groups: Sequence[Exposed]) -> Chart:
    lines = []
    for copies in dict.fromkeys(group.copies for group in groups):
        course = [group for group in groups if group.copies == copies]
        name = "planted" if copies is None else f"{copies} {'copy' if copies == 1 else 'copies'}"
        lines.append(_line(name, [each.checkpoint for each in course], course))
    stepped = all(each.steps is not None for each in audit.run.checkpoints)
    label = "optimizer steps" if stepped else "checkpoint, in order"
    legend = tuple(line.name for line in lines)
    note = "Mean exposure by copies in the training data, with its 95 % interval, at each checkpoint."
    return Chart("Exposure while training", note, curves(lines, label, side="bits", rule=CHANCE_BITS), legend)


def _line(name: str, places: Sequence[float], groups: Sequence[Exposed]) -> Line:
    low, high = [each.low for each in groups], [each.high for each in groups]
    return Line(name, places, [each.mean for each in groups], low, high)
