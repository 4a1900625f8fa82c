"""`named/`: a link to every finished cell's result under a name that a person can type, and another grid can build."""

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vestige.files import make_folder, temporary_path

NAMES = "cell"
"""The axis that gives cells their names, and is no setting."""
FOLDER = "named"
_LONGEST = 120


def link_cells(folder: Path, cells: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """`named/NAME` leads to `cells/ID/out` for each of these cells, given by id and values along the axes.

    Where a disk has no links there are none: the table says where everything is.
    """
    home = folder / FOLDER
    make_folder(home)
    taken: set[str] = set()
    for cell, point in cells:
        name = name_of(point)
        name = f"{name}.{cell}" if name in taken else name
        taken.add(name)
        with contextlib.suppress(OSError):
            _link(home / name, Path("..") / "cells" / cell / "out")


def name_of(point: Mapping[str, Any]) -> str:
    """The value of the axis `cell`, or `axis=value` for every axis, in letters that a path may hold."""
    text = str(point[NAMES]) if NAMES in point else ",".join(f"{name}={value}" for name, value in point.items())
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text).strip("-.")[:_LONGEST] or "cell"


def _link(path: Path, target: Path) -> None:
    if path.is_symlink() and Path(os.readlink(path)) == target:
        return
    # Renamed into place: whoever looks finds the old link or the new one.
    temporary = temporary_path(path)
    temporary.symlink_to(target)
    temporary.replace(path)
