"""Pieces of work and the engines that run them: local processes, a SLURM cluster, shares of a command."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.jobs._engine import ENGINES as ENGINES, Engine as Engine, Work as Work, Worker as Worker
    from vestige.jobs._pieces import (
        Compute as Compute,
        PieceFiles as PieceFiles,
        Pieces as Pieces,
        Tensors as Tensors,
        cut_ranges as cut_ranges,
        group_items as group_items,
        tensor_pieces as tensor_pieces,
    )
    from vestige.jobs._record import JOB_FILES as JOB_FILES, JobFolder as JobFolder, ranges as ranges
    from vestige.jobs._run import run_pieces as run_pieces, run_with_rate as run_with_rate
    from vestige.jobs._status import JobStatus as JobStatus, cancel_jobs as cancel_jobs, job_statuses as job_statuses
    from vestige.jobs._steps import (
        PROFILE_FILE as PROFILE_FILE,
        count_steps as count_steps,
        note_kept as note_kept,
        phase as phase,
        profile as profile,
        step_done as step_done,
        write_profile as write_profile,
    )
    from vestige.jobs._worker import (
        Role as Role,
        Share as Share,
        follow as follow,
        is_alive as is_alive,
        is_follower as is_follower,
        is_worker as is_worker,
        own_jobs as own_jobs,
        refuse_overwrite_by_ranks as refuse_overwrite_by_ranks,
        shares as shares,
        start_time as start_time,
        this_role as this_role,
        worker_command as worker_command,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
