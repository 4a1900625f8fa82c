"""What this process is in a job: the one a person started, one of its workers, a batch job, or a rank of torchrun."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from vestige.lockstep import ROLE_VARIABLE, in_step, is_first


class Role(NamedTuple):
    """A process's part in a job."""

    kind: Literal["driver", "worker", "reduce", "rank", "mirror"]
    """A mirror does what the driver does, in the same process group (`vestige.lockstep`)."""
    job: str = ""
    """The job folder that a worker works on; of another plan, it only takes the result."""
    number: int = 0
    of: int = 1
    """Which of how many: decides where it begins, never what it may do."""
    parent: int | None = None
    """Process of the driver on this host, whose end ends the worker."""
    attempt: int = 0
    waited_for: bool = False
    """Whether a driver waits for the job and goes on by itself."""

    def as_environment(self) -> dict[str, str]:
        """Return the variable that makes a child process play this role."""
        return {ROLE_VARIABLE: json.dumps(self._asdict())}

    def is_for(self, job: Path) -> bool:
        """Return whether the role is one in this job."""
        return Path(self.job) == job.resolve()


def this_role(environment: Mapping[str, str] = os.environ) -> Role:
    """Return the role that the environment gives this process: Vestige's own variable, else that of torchrun."""
    told = environment.get(ROLE_VARIABLE)
    if told:
        role = Role(**json.loads(told))
        # The tasks of a batch array have the same environment but for their number.
        task = environment.get("SLURM_ARRAY_TASK_ID")
        return role._replace(number=int(task)) if role.kind == "worker" and task else role
    if in_step():
        return Role("driver" if is_first() else "mirror")
    rank, ranks = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    if rank.isdigit() and ranks.isdigit() and int(ranks) > 1:
        return Role("rank", number=int(rank), of=int(ranks))
    return Role("driver")


def is_worker() -> bool:
    """Return whether a driver started this process to do a part of its job, and has prepared everything."""
    return this_role().kind in ("worker", "reduce")


def is_one_of_several() -> bool:
    """Return whether torchrun or accelerate started this process as one of several that run the same program."""
    return this_role().kind == "rank"
