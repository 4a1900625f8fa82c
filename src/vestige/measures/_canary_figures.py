"""The figure of planted secrets: exposure over copies under the model, and while training."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vestige.measures._figures import COLOURS, saved
from vestige.runs import CHANCE_BITS, CanaryRecord, Exposed, mean_exposures

_SPREAD = 0.12
"""Half the width over which the secrets of one number of copies are strewn, so that equal ones are visible."""


def canary_figures(canaries: Sequence[CanaryRecord], checkpoints: Sequence[int]) -> dict[str, bytes]:
    """Draw exposure by number of copies with 95 % intervals, and over checkpoints if there are several; PNG and PDF.

    Args:
        canaries: Every secret under every checkpoint.
        checkpoints: Their numbers; the last is the model under audit.
    """
    groups = mean_exposures(canaries)
    if not groups:
        return {}
    panels = 1 + (len(checkpoints) > 1)
    figure = Figure(figsize=(1.2 + 3.9 * panels, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    over_copies, *rest = figure.subplots(1, panels, squeeze=False)[0]
    last = [each for each in groups if each.checkpoint == checkpoints[-1]]
    _by_copies(over_copies, last, [each for each in canaries if each.checkpoint == checkpoints[-1]])
    for axes in rest:
        _by_checkpoint(axes, groups, checkpoints)
    most = max(each.most for each in canaries)
    for axes in (over_copies, *rest):
        axes.axhline(CHANCE_BITS, color="#777777", linewidth=0.9, linestyle="--", label="never planted, on average")
        axes.axhline(most, color="#BBBBBB", linewidth=0.9, linestyle=":", label="most that can be measured")
        axes.set_ylim(-0.04 * most, 1.06 * most)
    handles, labels = (rest[-1] if rest else over_copies).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return dict(saved("canaries", figure))


def _by_copies(axes: Axes, groups: Sequence[Exposed], canaries: Sequence[CanaryRecord]) -> None:
    """Draw numbers of copies side by side, in order: they are few, and a logarithmic axis has no 0."""
    for place, group in enumerate(groups):
        values = [each.exposure for each in canaries if each.copies == group.copies and each.exposure is not None]
        step = 2 * _SPREAD / max(len(values) - 1, 1)
        places = [place - _SPREAD * (len(values) > 1) + step * number for number in range(len(values))]
        axes.plot(places, values, "o", color="#AAAAAA", markersize=3)
    means = [group.mean for group in groups]
    reach = [[group.mean - group.low for group in groups], [group.high - group.mean for group in groups]]
    axes.errorbar(range(len(groups)), means, reach, fmt="o-", color=COLOURS[0], markersize=5, capsize=3)
    axes.set_xticks(range(len(groups)), [_named(group) for group in groups])
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set(xlabel="copies in the training data", ylabel="exposure, bits", title="under the model")


def _by_checkpoint(axes: Axes, groups: Sequence[Exposed], checkpoints: Sequence[int]) -> None:
    for number, copies in enumerate(dict.fromkeys(group.copies for group in groups)):
        line = {group.checkpoint: group for group in groups if group.copies == copies}
        known = [line[checkpoint] for checkpoint in checkpoints if checkpoint in line]
        colour, steps = COLOURS[number % len(COLOURS)], [group.checkpoint for group in known]
        label = "planted secrets" if copies is None else f"{copies} {'copy' if copies == 1 else 'copies'}"
        axes.plot(steps, [group.mean for group in known], "o-", color=colour, markersize=4, label=label)
        ends = [group.low for group in known], [group.high for group in known]
        axes.fill_between(steps, *ends, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="checkpoint", title="while training")


def _named(group: Exposed) -> str:
    return f"{'unknown' if group.copies is None else group.copies}\n({group.secrets})"
