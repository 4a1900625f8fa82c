"""What unlearning costs as models grow, and whether they agree: seconds, memory and rankings for several sizes."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vestige.errors import PieceFailed, SpecError
from vestige.runs import Scores, is_complete
from vestige.settings import UntracSettings
from vestige.storage import make_folder, write_durably

_COLOUR = "#0072B2"


@dataclass(frozen=True)
class SizeReport:
    """One model."""

    model: str
    parameters: int
    seconds: float
    """Wall time of the whole run, choice of the rate included."""
    peak_memory_bytes: int
    """Most resident memory of the run's own process."""
    agreement: float | None
    """Pearson correlation with the scores of the largest model over sources, mean over test sets; None for itself."""


def scaling_experiment(models: Sequence[str | Path], *, out: str | Path, **given: Any) -> list[SizeReport]:
    """Run UnTrac on several models with the same data, smallest first: `scaling.json`, `scaling.png`, `scaling.pdf`.

    Each model runs in a process of its own, so that its peak memory is its own; finished runs are kept.

    Args:
        models: Folders or hub ids.
        out: Folder of the figures and of one run per model.
        given: Settings of `vestige untrac`, such as data, queries and direction.

    Raises:
        SpecError: There are fewer than two models.
        PieceFailed: A model's run failed; the message is its own.
    """
    if len(models) < 2:
        raise SpecError(f"{len(models)} model was given, and sizes are to be compared. Give at least two.")
    folder = Path(out)
    make_folder(folder)
    runs = {str(model): _run(str(model), folder / f"run-{number}", given) for number, model in enumerate(models)}
    sizes = [run.run.model.parameters if run.run.model is not None else 0 for run in runs.values()]
    order = sorted(zip(sizes, runs, strict=True))
    largest = runs[order[-1][1]].dense()
    reports = [
        SizeReport(
            name,
            size,
            runs[name].run.seconds,
            runs[name].run.peak_memory_bytes,
            None if name == order[-1][1] else _agreement(runs[name].dense(), largest),
        )
        for size, name in order
    ]
    content = json.dumps([asdict(report) for report in reports], indent=1) + "\n"
    write_durably(folder / "scaling.json", [content.encode()])
    _draw(reports, folder)
    return reports


def _run(model: str, out: Path, given: dict[str, Any]) -> Scores:
    if not is_complete(out):
        settings = UntracSettings(**{"model": model, "out": out} | given)
        code = "import json, sys; from vestige import untrac; untrac(**json.loads(sys.argv[1]))"
        words = [sys.executable, "-c", code, json.dumps(settings.record())]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PieceFailed(f"{model}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return Scores.open(out)


def _agreement(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(left, right)[0, 1] for left, right in zip(one, other, strict=True)]))


def _draw(reports: Sequence[SizeReport], folder: Path) -> None:
    """Draw three panels over the number of parameters; the same bytes for the same numbers."""
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "seconds": [report.seconds for report in reports],
        "peak memory in GB": [report.peak_memory_bytes / 1e9 for report in reports],
        "correlation with the largest": [np.nan if one.agreement is None else one.agreement for one in reports],
    }
    for axes, (label, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.plot([report.parameters for report in reports], values, marker="o", color=_COLOUR)
        axes.set(xscale="log", xlabel="parameters", ylabel=label)
        axes.grid(visible=True, color="#E4E4E4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        content = BytesIO()
        figure.savefig(content, format=kind, dpi=160, metadata=metadata)  # type: ignore[arg-type]
        write_durably(folder / f"scaling.{kind}", [content.getvalue()])
