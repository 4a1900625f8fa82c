"""Where the pieces of a job run: in this process, in local processes, on SLURM, under torchrun."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.launch._claims import is_alive as is_alive, start_time as start_time
    from vestige.launch._local import (
        Share as Share,
        require_command as require_command,
        shares as shares,
        worker_command as worker_command,
    )
    from vestige.launch._pieces import (
        Compute as Compute,
        PieceFiles as PieceFiles,
        WorkPlan as WorkPlan,
        note_kept as note_kept,
        step_done as step_done,
    )
    from vestige.launch._record import JOB_FILES as JOB_FILES, JobFolder as JobFolder, ranges as ranges
    from vestige.launch._role import (
        PROFILE_FILE as PROFILE_FILE,
        Role as Role,
        follow as follow,
        is_follower as is_follower,
        is_one_of_several as is_one_of_several,
        is_worker as is_worker,
        own_jobs as own_jobs,
        phase as phase,
        profile as profile,
        this_role as this_role,
        write_profile as write_profile,
    )
    from vestige.launch._run import run_plan as run_plan
    from vestige.launch._status import JobStatus as JobStatus, cancel_jobs as cancel_jobs, job_statuses as job_statuses

__getattr__, __dir__, __all__ = lazy_names(__name__)
