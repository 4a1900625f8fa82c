"""Which GPU `--device auto` takes, told by the environment alone."""

import pytest

from vestige.models import own_gpu


@pytest.mark.parametrize(
    ("environment", "count", "expected"),
    [
        ({}, 4, 0),
        ({"LOCAL_RANK": "3"}, 4, 3),
        ({"LOCAL_RANK": "5"}, 4, 1),
        ({"SLURM_LOCALID": "2"}, 4, 2),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 2, 1),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "1"}, 1, 0),
        ({"LOCAL_RANK": ""}, 4, 0),
    ],
)
def test_processes_of_one_host_take_a_gpu_each_in_turn(environment, count, expected):
    assert own_gpu(environment, count) == expected
