"""What unlearning costs as models grow, and whether they agree: seconds, memory and rankings for several sizes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vestige.errors import PieceFailed, SpecError
from vestige.runs import Scores, is_run
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
    names = [str(model) for model in models]
    runs = [_run(name, folder / f"run-{number}", given) for number, name in enumerate(names)]
    order = sorted(range(len(runs)), key=lambda place: _parameters(runs[place]))
    largest = runs[order[-1]].dense()
    reports = [
        SizeReport(
            names[place],
            _parameters(runs[place]),
            runs[place].run.seconds,
            runs[place].run.peak_memory_bytes,
            None if place == order[-1] else _agreement(runs[place].dense(), largest),
        )
        for place in order
    ]
    content = json.dumps([asdict(report) for report in reports], indent=1) + "\n"
    write_durably(folder / "scaling.json", [content.encode()])
    for name, picture in _figures(reports):
        write_durably(folder / name, [picture])
    return reports


def _run(model: str, out: Path, given: dict[str, Any]) -> Scores:
    if not is_run(out):
        settings = UntracSettings(**{"model": model, "out": out} | given)
        words = json.dumps(settings.record())
        code = "import json, sys; from vestige import untrac; untrac(**json.loads(sys.argv[1]))"
        done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise PieceFailed(
                f"{model}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no output'}"
            )
    return Scores.open(out)


def _parameters(scores: Scores) -> int:
    return scores.run.model.parameters if scores.run.model is not None else 0


def _agreement(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(left, right)[0, 1] for left, right in zip(one, other, strict=True)]))


def _figures(reports: Sequence[SizeReport]) -> Iterator[tuple[str, bytes]]:
    """Yield three panels over the number of parameters, as PNG and PDF; the same bytes for the same numbers."""
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    sizes = [report.parameters for report in reports]
    panels = [
        ("seconds", [report.seconds for report in reports]),
        ("peak memory in GB", [report.peak_memory_bytes / 1e9 for report in reports]),
        ("correlation with the largest", [_known(report.agreement) for report in reports]),
    ]
    for axes, (label, values) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.plot(sizes, values, marker="o", color=_COLOUR)
        axes.set_xscale("log")
        axes.set_xlabel("parameters")
        axes.set_ylabel(label)
        axes.grid(visible=True, color="#E4E4E4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        content = BytesIO()
        figure.savefig(content, format=kind, dpi=160, metadata=metadata)  # type: ignore[arg-type]
        yield f"scaling.{kind}", content.getvalue()


def _known(value: float | None) -> float:
    return float("nan") if value is None else value
