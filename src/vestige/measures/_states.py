"""Hidden states on disk: written by the passes, read layer by layer, gone as soon as they are measured.

A round has as many checkpoints as `ROUND_BYTES` hold, and their layers are measured before the next round. That depends
on nothing but the job, so that every worker, on every machine, has the same rounds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vestige.launch import PieceFiles
from vestige.measures._job import AuditJob
from vestige.measures._pieces import digest
from vestige.storage import check_disk, partial_folder

ROUND_BYTES = 2**33
"""States that lie on disk at once, those of one checkpoint apart, which may be more."""
_NUMBER_BYTES = 4


class Round(NamedTuple):
    """Subjects whose passes and measures are done, and whose states are removed, in one round."""

    number: int
    """From 1."""
    of: int
    first: int
    end: int
    """One past the last subject."""

    def named(self, name: str) -> str:
        """Return a plan's name in this round."""
        return name if self.of == 1 else f"{name} {self.number} of {self.of}"


def rounds(job: AuditJob) -> list[Round]:
    """Return all subjects, in their order; those of a round fit into `ROUND_BYTES`, or there is one alone."""
    total = len(job.subjects)
    each = max(1, ROUND_BYTES // max(subject_bytes(job, len(job.data)), 1))
    count = -(-total // each)
    return [Round(turn + 1, count, turn * each, min((turn + 1) * each, total)) for turn in range(count)]


def subject_bytes(job: AuditJob, examples: int) -> int:
    """Return the size of the states of N examples under one subject."""
    return _NUMBER_BYTES * examples * sum(job.widths)


def state_files(job: AuditJob, number: int, fingerprint: str) -> PieceFiles:
    """Return the files of one subject's states, in the pieces in which the examples are measured."""
    return PieceFiles(partial_folder(job.settings.out) / "states" / f"{number:05d}", fingerprint)


def layer_files(job: AuditJob) -> PieceFiles:
    """Return the files of the measures of states: a piece for each subject and layer."""
    return PieceFiles(partial_folder(job.settings.out) / "layers", digest(job, ["layers", job.settings.choose_layer]))


def layer_pieces(job: AuditJob, first: int, end: int) -> range:
    """Return the numbers of the pieces of these subjects."""
    return range(first * len(job.layers), end * len(job.layers))


def is_measured(job: AuditJob, measured: PieceFiles, number: int) -> bool:
    """Return whether the subject's states are no longer needed: all that `layer_files` shall hold of it is there."""
    return all(measured.is_done(piece) for piece in layer_pieces(job, number, number + 1))


def check_room(job: AuditJob, groups: Sequence[Sequence[np.ndarray]], fingerprint: str) -> None:
    """Raise unless the states of every round fit on the disk, as far as they are not there yet.

    Raises:
        DiskSpaceError: They do not.
    """
    sizes = [subject_bytes(job, sum(map(len, group))) for group in groups]
    most, measured = 0, layer_files(job)
    for part in rounds(job) if job.layers else []:
        needed = 0
        for number in range(part.first, part.end):
            if not is_measured(job, measured, number):
                files = state_files(job, number, fingerprint)
                needed += sum(size for group, size in enumerate(sizes) if not files.is_done(group))
        most = max(most, needed)
    advice = (
        f"These are hidden states of {len(job.data):,} examples at {len(job.layers)} layers, gone once they are "
        "measured. Free space, choose another --out, name fewer --layers, or measure none: --measures loss logit_gap."
    )
    check_disk(partial_folder(job.settings.out), most, advice)
