"""Work inside a rank of torchrun that is a job of its own, such as a cell of a sweep."""

import os

import pytest
import torch

from vestige.jobs import own_jobs
from vestige.models import own_gpu


@pytest.mark.parametrize(
    ("visible", "cards", "place", "card"), [(None, 4, "1", "1"), ("4,5", 2, "1", "5"), ("6", 1, "3", "6")]
)
def test_a_cell_in_a_rank_sees_the_card_of_its_rank_and_no_other(monkeypatch, visible, cards, place, card):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = {"RANK": place, "WORLD_SIZE": "4", "LOCAL_RANK": place, "MASTER_PORT": "1"}
    given |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with own_jobs():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == card
        assert own_gpu(os.environ, 1) == 0
        # Should CUDA have been asked before, it shows as many as it did then.
        assert own_gpu(os.environ, 4) == int(place)
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & set(os.environ)
    assert {name: os.environ.get(name) for name in given} == given
    assert ("CUDA_VISIBLE_DEVICES" in os.environ) == (visible is not None)
    assert "SLURM_LOCALID" not in os.environ
