"""Where the pieces of a job run: in this process, in local processes, on SLURM."""

from vestige.launch._types import Compute as Compute
from vestige.launch._types import WorkPlan as WorkPlan
