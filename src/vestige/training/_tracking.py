"""Where a training or an evaluation is reported to: wandb, TensorBoard, trackio, or a tracker of another package."""

import contextlib
import importlib.util
import math
import os
import secrets
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, final

from vestige.errors import MissingExtra
from vestige.jobs import is_follower
from vestige.registry import Registry
from vestige.terminal import say

TRACKING = "tracking"
"""Folder, in that of a result, with the id that trackers know it by, and TensorBoard's files."""


class Tracked(NamedTuple):
    """One training or evaluation, as trackers list it."""

    name: str
    group: str | None
    """What its siblings have in common: the bank whose model it is."""
    id: str
    """Of the run at the tracker, the same when it is resumed."""
    folder: Path
    """For files of its own."""
    config: Mapping[str, Any]
    step: int
    """Steps that are done; above 0 for one that is resumed."""


class Tracker(ABC):
    """One run at a tracker, begun or continued when it is made; a subclass is announced in "vestige.trackers"."""

    package: ClassVar[str]
    """What it imports, by the name that pip takes."""

    @abstractmethod
    def __init__(self, run: Tracked) -> None: ...

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Report numbers, such as `train/loss`, of one step."""

    @abstractmethod
    def finish(self) -> None:
        """End the run."""


TRACKERS: Registry[type[Tracker]] = Registry("vestige.trackers", "tracker", Tracker)


@final
class TensorBoard(Tracker):
    """Event files in the folder `tracking` of the result."""

    package = "tensorboard"

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder), purge_step=run.step + 1 if run.step else None)
        rows = [f"| {name} | {value} |" for name, value in run.config.items()]
        self._writer.add_text("config", "\n".join(["| setting | value |", "|---|---|", *rows]), run.step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a scalar for each number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()


class RowTracker(Tracker):
    """A tracker whose run takes the numbers of a step as one row.

    The project is that of `WANDB_PROJECT` or `TRACKIO_PROJECT`, else "vestige".
    """

    def __init__(self, run: Tracked, **settings: Any) -> None:
        self._run: Any = importlib.import_module(self.package).init(
            project=os.environ.get(f"{self.package.upper()}_PROJECT", "vestige"),
            group=run.group,
            config=dict(run.config),
            resume="allow",
            **settings,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log a row."""
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """Send what is left."""
        self._run.finish()


@final
class Wandb(RowTracker):
    """A run of Weights & Biases."""

    package = "wandb"

    def __init__(self, run: Tracked) -> None:
        super().__init__(run, name=run.name, id=run.id, reinit="create_new")


@final
class Trackio(RowTracker):
    """A run of trackio."""

    package = "trackio"

    def __init__(self, run: Tracked) -> None:
        super().__init__(run, name=f"{run.name}-{run.id}", embed=False)


def require_tracker(name: str) -> None:
    """Raise unless the package of a tracker is installed.

    Raises:
        SpecError: There is no such tracker.
        MissingExtra: The package is not there.
    """
    package = TRACKERS.find(name).package
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(
            f"--report-to {name} needs the package {package}, which is not installed.\nType: pip install {package}   "
            "(or pip install 'vestige[tracking]' for all trackers)"
        )


@final
class Tracking:
    """All trackers of one run. What a tracker raises is printed, and the work goes on without that tracker."""

    def __init__(self, names: Sequence[str], run: Tracked) -> None:
        self._trackers: dict[str, Tracker] = {}
        self._begun, self._first = time.monotonic(), run.step
        for name in names:
            self._try(name, lambda name=name: self._trackers.setdefault(name, TRACKERS.find(name)(run)))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Report numbers of one step to every tracker."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(values, step))

    def log_step(self, step: Any, **more: float) -> None:
        """Report one step of a training, as `fit` reports it, and what else is known of it."""
        rate = (step.number - self._first) / max(time.monotonic() - self._begun, 1e-9)
        values = {"loss": step.loss, "learning_rate": step.learning_rate, "steps_per_second": rate, **more}
        self.log({f"train/{name}": value for name, value in values.items()}, step.number)

    def finish(self) -> None:
        """End the run at every tracker."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            # Whatever a client's transport, disk or server does: the training is worth more than its record there.
            self._trackers.pop(name, None)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(f"{name} failed ({reason}): nothing more is reported there. The work goes on.", file=sys.stderr)


@contextmanager
def open_tracking(
    names: Sequence[str],
    out: Path,
    config: Mapping[str, Any],
    *,
    member: str | None = None,
    group: str | None = None,
    step: int = 0,
) -> Iterator[Tracking]:
    """Yield the trackers of a run, which ends with the block; where there are none, nothing is reported.

    Args:
        names: Of registered trackers.
        out: Folder of the result.
        config: What it is made with.
        member: Name of one of several runs with this result, which are a group: of a model of a bank.
        group: As of `Tracked`; not given: of members, the result.
        step: As of `Tracked`.

    Raises:
        MissingExtra: The package of a tracker is not installed.
    """
    parts = [] if member is None else [member]
    group = out.name if parts and group is None else group
    identity = "-".join([begin_tracking(names, out), *parts])
    run = Tracked("/".join([out.name, *parts]), group, identity, Path(out, TRACKING, *parts), config, step)
    found = Tracking(names, run)
    try:
        yield found
    finally:
        found.finish()


def begin_tracking(names: Sequence[str], out: Path) -> str:
    """Return what trackers know the run of a result by: drawn once, so that one that is resumed is the same run."""
    for name in names:
        require_tracker(name)
    if not names:
        return ""
    path = out / TRACKING / "id"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(secrets.token_hex(8))
    return path.read_text()


def report_numbers(names: Sequence[str], out: Path, kind: str, values: Mapping[str, Any]) -> None:
    """Report what of the values of an evaluation is a finite number, under its kind; of several ranks, the first."""
    if names and not is_follower():
        known = {f"{kind}/{name}": each for name, each in values.items() if isinstance(each, float | int)}
        with open_tracking(names, out, {"evaluation": kind}) as tracking:
            tracking.log({name: each for name, each in known.items() if math.isfinite(each)}, 0)
