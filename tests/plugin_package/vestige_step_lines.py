"""A tracker of another package: the numbers of every step as lines of JSON, beside the result."""

import json
from collections.abc import Mapping

from vestige.training import Tracked, Tracker


class StepLines(Tracker):
    """A file in the folder `tracking` of the result."""

    package = "json"

    def __init__(self, run: Tracked) -> None:
        """Open the file; that of a training which is resumed holds the steps before."""
        run.folder.mkdir(parents=True, exist_ok=True)
        self._file = (run.folder / "steps.jsonl").open("a")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def finish(self) -> None:
        """Close the file."""
        self._file.close()
