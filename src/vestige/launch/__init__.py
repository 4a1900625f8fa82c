"""Where the pieces of a job run: in this process, in local processes, on SLURM, under torchrun."""

from vestige.launch._command import worker_command as worker_command
from vestige.launch._failures import ranges as ranges
from vestige.launch._follow import follow as follow, is_follower as is_follower
from vestige.launch._nested import own_jobs as own_jobs
from vestige.launch._phase import (
    PROFILE_FILE as PROFILE_FILE,
    phase as phase,
    profile as profile,
    write_profile as write_profile,
)
from vestige.launch._piece_files import PieceFiles as PieceFiles
from vestige.launch._record import JOB_FILES as JOB_FILES
from vestige.launch._role import is_one_of_several as is_one_of_several, is_worker as is_worker
from vestige.launch._run import run_plan as run_plan
from vestige.launch._status import JobStatus as JobStatus, cancel_jobs as cancel_jobs, job_statuses as job_statuses
from vestige.launch._stop import note_kept as note_kept, step_done as step_done
from vestige.launch._submitit import Share as Share, shares as shares
from vestige.launch._types import Compute as Compute, WorkPlan as WorkPlan
