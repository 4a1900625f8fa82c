"""Rows of the leaderboard that other packages compute: each by a script in an environment of its own."""

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from vestige.errors import DataError, SpecError
from vestige.progress import announce
from vestige.storage import make_folder, write_durably
from vestige_recipes.common.texts import read_rows, write_rows

SCRIPTS = Path(__file__).with_name("peers")
PROBES = 4
"""Training rows that are asked about, too: scores in another order, or of the other sign, do not put them first."""
AMONG = 0.1
"""Share of the training data among which a probe finds itself."""


class Peer(NamedTuple):
    """What computes rows."""

    name: str
    script: Path
    """Leaves them as `peers/common.py` says."""
    python: str


class PeerRow(NamedTuple):
    """A row of the table before it is scored."""

    name: str
    scores: np.ndarray
    """[query, example], higher where a training step on the example lowers the query's loss."""
    seconds: float
    memory: int
    """Peak, in bytes."""


def find_peers(given: Mapping[str, str]) -> list[Peer]:
    """Return the peers of `--peer`.

    Raises:
        SpecError: There is no such script or interpreter.
    """
    known = sorted(path.name.removesuffix("_scores.py") for path in SCRIPTS.glob("*_scores.py"))
    found = []
    for name, python in given.items():
        own = name.endswith(".py")
        script = Path(name) if own else SCRIPTS / f"{name}_scores.py"
        if not script.is_file():
            raise SpecError(
                f"There is no script for --peer {name}={python}. Give {', '.join(known)}, or a script of your own as "
                "PATH.py=PYTHON."
            )
        if shutil.which(python) is None:
            raise SpecError(
                f"--peer {name}={python}: {python} cannot be run. Give the python of an environment that has {name}."
            )
        found.append(Peer(script.stem if own else name, script, str(python)))
    return found


def ask_peer(peer: Peer, folder: Path, model: str, train: Path, queries: Path) -> tuple[list[PeerRow], dict[str, str]]:
    """Run a peer's script unless it has ended before; return its rows, and the reasons for those that are not there.

    Args:
        peer: Which.
        folder: For what all peers leave.
        model: Folder of the trained model.
        train: The rows that are scored, as JSON lines.
        queries: Likewise.
    """
    examples, asked = read_rows(train), read_rows(queries)
    probes = list(range(0, len(examples), -(-len(examples) // PROBES)))
    both = write_rows(folder / "asked.jsonl", [*asked, *(examples[row] for row in probes)])
    # Another script of the same name has another folder.
    out = folder / f"{peer.name}-{hashlib.sha256(peer.script.read_bytes()).hexdigest()[:8]}"
    rows, reasons = list[PeerRow](), dict[str, str]()
    if not (out / "ended").exists():
        make_folder(out)
        announce(f"{peer.name} scores with {peer.python}; see {out / 'log'}.")
        with (out / "log").open("wb") as log:
            command = [peer.python, str(peer.script), model, str(train), str(both), str(out)]
            try:
                status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
            except OSError as error:
                return [], {peer.name: f"{peer.python} cannot be run: {error}"}
        if status == 0:
            write_durably(out / "ended", [b""])
        else:
            last = (out / "log").read_text(errors="replace").strip().rpartition("\n")[2]
            reasons[peer.name] = f"its script ended with exit status {status}: {last}"
    for path in sorted(out.glob("*.npz")):
        name = f"{peer.name} {path.stem}"
        try:
            rows.append(_read_row(name, path, len(asked), len(examples), probes))
        except DataError as error:
            reasons[name] = str(error)
    if not rows and not reasons:
        reasons[peer.name] = "its script left no rows"
    return rows, reasons


def _read_row(name: str, path: Path, queries: int, examples: int, probes: list[int]) -> PeerRow:
    """Return what a script left.

    Raises:
        DataError: The script says why there is nothing, or what is there cannot be right.
    """
    try:
        with np.load(path) as content:
            found = {key: content[key] for key in content.files}
        if "reason" in found:
            raise DataError(str(found["reason"]))
        scores = np.asarray(found["scores"], dtype=np.float64)
        seconds, memory = float(found["seconds"]), int(found["memory"])
    except (OSError, ValueError, BadZipFile, KeyError, TypeError) as error:
        raise DataError(f"{path.name} has no scores, seconds and memory: {error}") from None
    shape = (queries + len(probes), examples)
    if scores.shape != shape:
        raise DataError(f"its scores are {scores.shape}, where {shape} were asked for")
    if not np.isfinite(scores).all():
        raise DataError("its scores are not all finite")
    own = scores[queries:]
    before = [(each > each[row]).mean() for each, row in zip(own, probes, strict=True)]
    if np.median(before) > AMONG:
        raise DataError("rows of the training data are not among those that help them most: another order, or sign")
    return PeerRow(name, scores[:queries], seconds, memory)
