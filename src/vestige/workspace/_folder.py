"""A folder of results: what lies below it, read once and again only where it changed, and paths that stay inside."""

import os
from pathlib import Path
from threading import Lock
from typing import Any

from vestige.errors import UserError
from vestige.storage import find_holder
from vestige.workspace._kinds import Kind, Summary, describe, find_jobs, find_kind

_LOCK = ".lock"

Json = dict[str, Any]
_Stamp = tuple[int, ...]


class Workspace:
    """All results below a folder.

    What a browser names is a path below the folder, `.` for the folder itself; no other path is ever opened.
    """

    def __init__(self, folder: Path) -> None:
        """Raise unless there is such a folder.

        Args:
            folder: As it was typed: commands that are recorded name results below it in the same words.
        """
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "does not exist"
            raise UserError(f"{folder} {found}. Give a folder with results, or above them: vestige view FOLDER")
        self.folder = folder
        self._root = folder.resolve()
        self._known: dict[Path, tuple[_Stamp, Kind, Summary]] = {}
        self._lock = Lock()

    def find(self, path: str) -> Path:
        """Return the folder at a path that a browser named.

        Raises:
            UserError: It leads out of the workspace, or there is no folder.
        """
        try:
            place = (self._root / path).resolve()
            inside = place.is_relative_to(self._root)
            inside &= place == self._root or place.is_dir() or find_holder(place) is not None
        except (OSError, ValueError, RuntimeError):
            inside = False
        if not inside:
            raise UserError(f"There is no folder {path!r} in this workspace.")
        return self.folder / path

    def require_index(self, folder: Path) -> Path:
        """Return the folder of an index, in the words in which the workspace was typed.

        Raises:
            UserError: It lies outside of the workspace, or is no index that can be asked.
        """
        if not folder.resolve().is_relative_to(self._root):
            raise UserError(f"{folder} lies outside of {self.folder}. Give an index in it, or a folder above both.")
        kind = find_kind(folder)
        if kind is None or not kind.answers:
            raise UserError(f"{folder} is no index, so nothing can be asked of it. Make one with: vestige index")
        return folder

    def results(self) -> list[Json]:
        """Return a line for every result, finished, in the making or damaged, in the order of their paths."""
        with self._lock:
            places, writing = self._walk()
            lines = [self._line(place, kind, writing.pop(place, None)) for place, kind in places]
            begun = [_line(self._path(place), "in the making", command) for place, command in writing.items()]
        return sorted(lines + begun, key=lambda line: line["path"])

    def open(self, path: str) -> Json:
        """Return everything that is shown of one result beside its page: facts, tables, curves.

        Raises:
            UserError: It is none, or is damaged.
        """
        place = self.find(path)
        kind = find_kind(place)
        command = find_holder(place)
        if kind is None and command is not None:
            jobs = (line for job in find_jobs(place) for line in job.lines())
            text = "\n".join([f"{place}: in the making", f"  by  {command}", *jobs])
            return {"text": text, "state": "running", "kind": "in the making"}
        shown: Json = {"text": describe(place)}
        if kind is not None:
            shown |= self._line(place.resolve(), kind, command)
            shown |= kind.show(place)
        return shown

    def _walk(self) -> tuple[list[tuple[Path, Kind]], dict[Path, str]]:
        """Return the folders with results, and the commands at work by the folder that they write."""
        places, writing = [], {}
        for parent, folders, files in os.walk(self._root):
            folder = Path(parent)
            kind = self._kind_of(folder)
            if kind is not None:
                places.append((folder, kind))
            nested = kind is None or kind.nests
            folders[:] = [name for name in folders if nested and not name.startswith((".", "checkpoint-"))]
            for name in files:
                if name.startswith(".") and name.endswith(_LOCK):
                    target = folder / name[1 : -len(_LOCK)]
                    if (command := find_holder(target)) is not None:
                        writing[target] = command
        if (command := find_holder(self._root)) is not None:
            writing[self._root] = command
        return places, writing

    def _kind_of(self, folder: Path) -> Kind | None:
        kept = self._known.get(folder)
        try:
            return kept[1] if kept is not None and kept[1].matches(folder) else find_kind(folder)
        except OSError:  # it may not be read
            return None

    def _line(self, place: Path, kind: Kind, command: str | None) -> Json:
        """Return the line of a result; its records are read again if a file beside them changed or it is unfinished."""
        try:
            stamp = _stamp(place)
            kept = self._known.get(place)
            if kept is None or kept[0] != stamp or kept[2].lacking:
                kept = self._known[place] = stamp, kind, kind.summarise(place)
        except Exception as error:  # of a kind of another package: one damaged folder must not hide the others
            self._known.pop(place, None)
            damaged = {"state": "damaged", "error": str(error) or repr(error)}
            return _line(self._path(place), kind.name, command) | damaged
        summary = kept[2]
        state = "unfinished" if summary.lacking else "finished"
        if command is not None or (summary.lacking and any(job.state == "running" for job in find_jobs(place))):
            state = "running"
        more = {"rows": kind.has_rows, "answers": kind.answers and not summary.lacking}
        return _line(self._path(place), kind.name, command) | summary._asdict() | more | {"state": state}

    def _path(self, place: Path) -> str:
        return place.relative_to(self._root).as_posix()


def _line(path: str, kind: str, command: str | None) -> Json:
    return {"path": path, "kind": kind, "state": "running", "command": command}


def _stamp(folder: Path) -> _Stamp:
    """Return when the files of a folder changed last, and how many there are."""
    stats = [entry.stat() for entry in os.scandir(folder) if entry.is_file()]
    return len(stats), max((stat.st_mtime_ns for stat in stats), default=0), sum(stat.st_size for stat in stats)
