"""Where the pieces of a heavy job run: settings that every heavy command shares."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from vestige.settings._base import OnlyWith, Settings

Engine = Literal["local", "slurm"]

_SLURM = ("partition", "account", "gres", "time", "mem", "setup", "container", "wait")
_SHARD = re.compile(r"(\d+)/(\d+)")


class LaunchSettings(Settings):
    """Where the work runs."""

    only_with: ClassVar[OnlyWith] = dict.fromkeys(_SLURM, ("engine", ("slurm",)))
    never_repeated: ClassVar[tuple[str, ...]] = ("overwrite",)
    """Settings that only the process that was started by hand obeys: a worker must not delete what others made."""

    workers: PositiveInt = Field(
        default=1, description="Processes that share the work, each with a model of its own; 1 works in this process."
    )
    engine: Engine = Field(
        default="local", description="Where workers run: local processes, or slurm for a batch array."
    )
    shard: str | None = Field(
        default=None,
        description="Do only part i of n of the pieces, written i/n, from 1/n to n/n, under your own scheduler.",
    )
    threads: PositiveInt = Field(default=1, description="Processor threads of each of several workers.")
    retries: NonNegativeInt = Field(
        default=2, description="How often a piece that failed or lost its worker is tried again."
    )
    partition: str | None = Field(default=None, description="slurm: partition of the jobs.")
    account: str | None = Field(default=None, description="slurm: account that the jobs are charged to.")
    gres: str | None = Field(default=None, description="slurm: resources of each worker, such as gpu:1.")
    time: str | None = Field(
        default=None, description="slurm: time limit of each job, such as 4:00:00; unfinished work is queued again."
    )
    mem: str | None = Field(default=None, description="slurm: memory of each worker, such as 32G.")
    setup: str | None = Field(
        default=None, description="slurm: shell line to run before the work, such as 'module load cuda'."
    )
    container: str | None = Field(default=None, description="slurm: Apptainer image that holds Vestige.")
    wait: bool = Field(
        default=True, description="slurm: stay, show progress and finish; --no-wait returns once submitted."
    )

    @field_validator("shard")
    @classmethod
    def _shard_is_a_part(cls, shard: str | None) -> str | None:
        match = None if shard is None else _SHARD.fullmatch(shard)
        if shard is not None and (match is None or not 1 <= int(match[1]) <= int(match[2])):
            raise ValueError("i/n with i from 1 to n, such as 1/4")
        return shard

    @field_validator("partition", "account", "gres", "time", "mem")
    @classmethod
    def _is_one_word(cls, value: Any) -> Any:
        if isinstance(value, str) and (not value.strip() or "\n" in value):
            raise ValueError("a value as sbatch takes it")
        return value

    @property
    def part(self) -> tuple[int, int] | None:
        """`shard` as (zero-based part, number of parts)."""
        if self.shard is None:
            return None
        number, parts = self.shard.split("/")
        return int(number) - 1, int(parts)
