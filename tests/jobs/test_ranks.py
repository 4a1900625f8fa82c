"""torchrun: every rank takes pieces, one after the other reduces, and each has the result."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.jobs.toy import Toy
from vestige.jobs import Role, this_role

IN_ARRAY = Role("worker", "here", of=8, in_array=True)


@pytest.mark.slow
def test_the_ranks_of_torchrun_share_the_pieces(tmp_path):
    plan = Toy(tmp_path, count=12, seconds=0.3)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    fields = json.dumps({"folder": str(tmp_path), "count": 12, "seconds": 0.3})
    run = subprocess.run(
        [*torchrun, "-m", "tests.jobs.toy", fields, "{}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(plan.expected()) == 2
    assert sorted(plan.computed()) == list(range(12))
    journals = list((tmp_path / "launch" / "squaring" / "journal").iterdir())
    shares = [len(re.findall(r"^\[(?!-1)", path.read_text(), re.MULTILINE)) for path in journals]
    assert sum(shares) == 12
    assert len(shares) == 2


@pytest.mark.parametrize(
    ("environment", "role"),
    [
        ({}, Role("driver")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Role("driver")),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Role("rank", number=2, of=4)),
        ({"RANK": "2", "WORLD_SIZE": "4"} | Role("worker", "here").as_environment(), Role("worker", "here")),
        (IN_ARRAY.as_environment() | {"SLURM_ARRAY_TASK_ID": "5"}, IN_ARRAY._replace(number=5)),
        (Role("worker", "here", 1).as_environment() | {"SLURM_ARRAY_TASK_ID": "5"}, Role("worker", "here", 1)),
    ],
)
def test_the_environment_says_what_a_process_is(environment, role):
    assert this_role(environment) == role
