"""Where the pieces of a job run: in this process, in local processes, on SLURM, under torchrun."""

from vestige.launch._command import worker_command as worker_command
from vestige.launch._failures import ranges as ranges
from vestige.launch._follow import follow as follow
from vestige.launch._follow import is_follower as is_follower
from vestige.launch._nested import own_jobs as own_jobs
from vestige.launch._phase import PROFILE_FILE as PROFILE_FILE
from vestige.launch._phase import phase as phase
from vestige.launch._phase import profile as profile
from vestige.launch._phase import write_profile as write_profile
from vestige.launch._piece_files import PieceFiles as PieceFiles
from vestige.launch._record import JOB_FILES as JOB_FILES
from vestige.launch._role import is_one_of_several as is_one_of_several
from vestige.launch._role import is_worker as is_worker
from vestige.launch._run import run_plan as run_plan
from vestige.launch._status import JobStatus as JobStatus
from vestige.launch._status import cancel_jobs as cancel_jobs
from vestige.launch._status import job_statuses as job_statuses
from vestige.launch._stop import note_kept as note_kept
from vestige.launch._stop import step_done as step_done
from vestige.launch._submitit import Share as Share
from vestige.launch._submitit import shares as shares
from vestige.launch._types import Compute as Compute
from vestige.launch._types import WorkPlan as WorkPlan
