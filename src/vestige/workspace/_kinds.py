"""What commands leave in folders: a registered kind of result finds its own, sums one up, and describes it in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vestige import jobs
from vestige.errors import UserError
from vestige.registry import Registry
from vestige.storage import find_replaced_result, partial_folder


class Summary(NamedTuple):
    """What a list says of one result; what it has not is empty."""

    about: str
    """What it holds, in a few words."""
    model: str = ""
    data: str = ""
    method: str = ""
    created: str = ""
    """ISO 8601; empty where the record does not say."""
    seconds: float | None = None
    memory: int | None = None
    """Peak memory of the process, in bytes."""
    lacking: str = ""
    """What is not there yet; empty for a finished result."""
    page: bool = False
    """Whether `vestige report` makes a page of it."""


@dataclass(frozen=True)
class Kind:
    """A kind of result; announced in "vestige.kinds"."""

    name: str
    """In one or two words, such as "training"."""
    matches: Callable[[Path], bool]
    """Whether a folder is of this kind, by its marker file; True also for one that is damaged."""
    summarise: Callable[[Path], Summary]
    """From the folder to its line in a list; reads records alone, and raises `UserError` for a damaged one."""
    describe: Callable[[Path], str]
    """From the folder to the text of `vestige status`: a line, then indented facts."""
    show: Callable[[Path], dict[str, Any]] = lambda _: {}
    """What is shown beside that text: a `curve`, pairs of step and value; a `table`, `columns` and `rows`."""
    nests: bool = False
    """Whether folders inside may be results of their own."""
    has_rows: bool = False
    """Whether training data stand behind it that can be searched."""
    answers: bool = False
    """Whether questions can be asked of it."""


KINDS: Registry[Kind] = Registry("vestige.kinds", "kind of result", Kind)


def find_kind(folder: Path) -> Kind | None:
    """Return the kind of result in a folder; None for any other folder."""
    return next((kind for kind in KINDS if kind.matches(folder)), None)


def describe(folder: Path) -> str:
    """Describe what is in the folder, and the state of its jobs.

    Raises:
        UserError: No result is there, nor the beginning of one.
    """
    parts = [kind.describe(folder) for kind in KINDS if kind.matches(folder)]
    parts += ["\n".join(job.lines()) for job in find_jobs(folder)]
    if (aside := find_replaced_result(folder)) is not None:
        parts.append(
            f"{folder} was being replaced when the command was stopped. The earlier result lies in {aside}: the next "
            "command with this --out puts it back."
        )
    if not parts:
        raise UserError(
            f"{folder} is neither an index nor a run. Give the folder that `vestige index` or "
            "`vestige attribute` got as --out, or that of a sweep."
        )
    return "\n".join(parts)


def find_jobs(folder: Path) -> list[jobs.JobStatus]:
    """Return the jobs that have worked on a folder, or on what is written there when it is whole."""
    return [job for place in (folder, partial_folder(folder)) for job in jobs.job_statuses(place)]
