"""`vestige evaluate scaling`: what unlearning costs as models grow, and whether they agree."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from vestige.errors import IndexMismatch, PieceFailed, SpecError
from vestige.evaluate import Evaluation, EvaluationRow, mean_of_known, pearson, require_own_files, write_evaluation
from vestige.figures import COLOURS, finish_axes, make_figure, render_figure
from vestige.progress import Progress, format_bytes, progress
from vestige.runs import Scores, is_complete
from vestige.settings import UntracSettings, with_settings
from vestige_recipes.commands import ScalingSettings

_GIB = 2**30


@with_settings(ScalingSettings, "evaluate scaling")
def scaling_experiment(settings: ScalingSettings) -> Evaluation:
    """Run UnTrac on several models with the same data; write `scaling.json`, with the published keys, and a figure.

    Raises:
        SpecError: There are fewer than two models.
        PieceFailed: Every model failed.
        IndexMismatch: A run in the folder was made with other settings.
    """
    models = [str(one) for one in settings.model] if isinstance(settings.model, list | tuple) else [settings.model]
    if len(set(models)) < 2:
        raise SpecError("Sizes are to be compared: give two or more models, such as --model gpt2 --model gpt2-medium.")
    require_own_files(settings, "scaling")
    with progress(len(models), "Unlearning", unit="models") as bar:
        found = {model: _run(settings, model, number, bar) for number, model in enumerate(models)}
    runs = {model: one for model, one in found.items() if isinstance(one, Scores)}
    if not runs:
        raise PieceFailed("Every model failed. " + " ".join(f"{model}: {one}." for model, one in found.items()))
    order = sorted(runs, key=lambda model: _parameters(runs[model]))
    largest = runs[order[-1]]
    reports = {model: _report(runs[model], largest) for model in order}
    failed = {model: {"success": False, "error": one} for model, one in found.items() if model not in runs}
    compared = ("parameters", "runtime_seconds", "memory_gb", "avg_influence_score")
    summary = {
        "total_models_tested": len(found),
        "successful_models": len(runs),
        "comparison": [{"model": model, **{name: one[name] for name in compared}} for model, one in reports.items()],
    }
    result = Evaluation(
        "scaling",
        f"Unlearning in {len(runs)} of {len(found)} models",
        tuple(_row(model, runs[model], one) for model, one in reports.items()),
        (
            "Memory is the most of the run's own process; agreement the Pearson correlation with the largest model's "
            "scores, mean over test sets.",
            *(f"{model} failed: {one['error']}" for model, one in failed.items()),
        ),
        {"models": reports | failed, "summary": summary},
    )
    return write_evaluation(result, settings.out, _draw(reports))


def _run(settings: ScalingSettings, model: str, number: int, bar: Progress) -> Scores | str:
    """Return a model's run, or why there is none."""
    given = {name: getattr(settings, name) for name in UntracSettings.model_fields}
    own = UntracSettings(**given | {"model": model, "out": settings.out / f"run-{number}"})
    if not is_complete(own.out):
        words = [sys.executable, "-m", "vestige", *shlex.split(own.command_line("untrac"))[1:], "--quiet"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            bar.advance()
            if done.returncode == -signal.SIGKILL:
                return "it was killed: often too little memory"
            return " ".join(done.stderr.split()) or f"it ended with status {done.returncode}"
    bar.advance()
    run = Scores.open(own.out)
    if run.run.command != own.command_line("untrac"):
        raise IndexMismatch(f"{own.out} was made by another command, {run.run.command}. Give another --out.")
    return run


def _parameters(run: Scores) -> int:
    return 0 if run.run.model is None else run.run.model.parameters


def _report(run: Scores, largest: Scores) -> dict[str, Any]:
    scores, right = run.dense(), largest.dense()
    alike = None
    if run.folder != largest.folder:
        alike = mean_of_known(pearson(scores.T, right.T))
    return {
        "success": True,
        "parameters": _parameters(run),
        "runtime_seconds": run.run.seconds,
        "memory_gb": run.run.peak_memory_bytes / _GIB,
        "gpu_memory_gb": run.run.peak_gpu_memory_bytes / _GIB if run.run.peak_gpu_memory_bytes else None,
        "avg_influence_score": float(np.nanmean(scores)),
        "agreement": alike,
        "run": str(run.folder),
    }


def _row(model: str, run: Scores, report: Mapping[str, Any]) -> EvaluationRow:
    values = {
        "parameters": f"{report['parameters']:,}",
        "mean score": report["avg_influence_score"],
        "agreement": report["agreement"],
        "memory of the GPU": format_bytes(run.run.peak_gpu_memory_bytes) if run.run.peak_gpu_memory_bytes else None,
    }
    return EvaluationRow(model, values, run.run.seconds, run.run.peak_memory_bytes)


def _draw(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """Draw three panels over the number of parameters."""
    figure, axes_of = make_figure(9.6, 3.0, columns=3)
    panels = {"runtime_seconds": "seconds", "memory_gb": "peak memory in GiB", "agreement": "agreement"}
    for axes, (name, label) in zip(axes_of, panels.items(), strict=True):
        heights = [np.nan if one[name] is None else one[name] for one in reports.values()]
        axes.plot([one["parameters"] for one in reports.values()], heights, marker="o", color=COLOURS[0])
        axes.set_xscale("log")
        finish_axes(axes, "parameters", label)
    return render_figure(figure, "scaling")
