"""Pieces that are small numbers, slow or failing as a test wants; also a program, for worker processes."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vestige.distributed import is_helper
from vestige.errors import CorruptFile, DataError
from vestige.jobs import Compute, Pieces, ranges, run_pieces, step_done
from vestige.settings import LaunchSettings
from vestige.storage import hold_folder, make_folder, write_durably


@dataclass(frozen=True)
class Toy:
    """Piece p is the text of p squared; the reduce joins them."""

    folder: Path
    count: int = 12
    seconds: float = 0.0
    steps: int = 1
    fail: tuple[int, ...] = ()
    """Pieces that raise, always."""
    fail_once: tuple[int, ...] = ()
    refuse: tuple[int, ...] = ()
    """Pieces that raise an error that the user has to mend."""
    deadly: tuple[int, ...] = ()
    """Pieces that kill the process that computes them."""
    name: str = "Squaring"
    opened: list[int] = field(default_factory=list)

    @property
    def pieces(self) -> Pieces[str]:
        return Pieces(
            name=self.name,
            unit="numbers",
            folder=self.folder,
            weights=[2.0] * self.count,
            is_done=self.is_done,
            open=self.open,
            reduce=self.reduce,
        )

    def is_done(self, piece: int) -> bool:
        return (self.folder / f"{piece:05d}.json").exists()

    @contextmanager
    def open(self) -> Iterator[Compute]:
        self.opened.append(1)
        make_folder(self.folder)
        yield self._compute

    def reduce(self) -> str:
        missing = [piece for piece in range(self.count) if not self.is_done(piece)]
        if missing:
            raise CorruptFile(f"pieces {ranges(missing)} are missing")
        joined = " ".join((self.folder / f"{piece:05d}.txt").read_text() for piece in range(self.count))
        write_durably(self.folder / "result.txt", [joined.encode()])
        return joined

    def _compute(self, piece: int) -> None:
        with (self.folder / "computed.log").open("a") as log:
            log.write(f"{piece}\n")
        for _ in range(self.steps):
            time.sleep(self.seconds / self.steps)
            step_done(2 / self.steps)
        self._misbehave(piece)
        write_durably(self.folder / f"{piece:05d}.txt", [str(piece * piece).encode()])
        write_durably(self.folder / f"{piece:05d}.json", [b"{}"])

    def _misbehave(self, piece: int) -> None:
        if piece in self.deadly:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)
        if piece in self.refuse:
            raise DataError(f"example e{piece} is not a number")
        first = [int(line) for line in (self.folder / "computed.log").read_text().split()].count(piece) == 1
        if piece in self.fail or (piece in self.fail_once and first):
            raise ArithmeticError(f"cannot square {piece}")

    def computed(self) -> list[int]:
        return [int(line) for line in (self.folder / "computed.log").read_text().split()]

    def expected(self) -> str:
        return " ".join(str(piece * piece) for piece in range(self.count))

    def command(self, settings: LaunchSettings) -> list[str]:
        fields = {name: getattr(self, name) for name in ("count", "seconds", "steps", "fail", "fail_once")}
        fields |= {"refuse": self.refuse, "deadly": self.deadly, "folder": str(self.folder)}
        given = settings.model_dump(exclude_defaults=True, mode="json")
        return [sys.executable, "-m", "tests.jobs.toy", json.dumps(fields), json.dumps(given)]

    def run(self, **settings) -> str:
        chosen = LaunchSettings(**settings)
        return run_pieces(self.pieces, chosen, self.command(chosen))


def main() -> None:
    fields, settings = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    plan = Toy(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    plan = Toy(**(vars(plan) | {"folder": Path(plan.folder), "opened": []}))
    with hold_folder(plan.folder, "toy", shared="toy", lock=not is_helper()):
        print(plan.run(**settings))


if __name__ == "__main__":
    main()
