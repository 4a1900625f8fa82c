"""Finished pieces of a run that is not written yet, kept beside it."""

import shutil
from pathlib import Path

from vestige.settings import AttributeSettings


def partial_folder(settings: AttributeSettings) -> Path:
    """Where finished pieces of the work are kept until the run is written."""
    out = Path(settings.out).absolute()
    return out.with_name(f".{out.name}.partial")


def remove_partial(settings: AttributeSettings) -> None:
    """The run is written: what was kept for it is not needed any more."""
    shutil.rmtree(partial_folder(settings), ignore_errors=True)
