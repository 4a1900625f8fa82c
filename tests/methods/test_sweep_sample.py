import numpy as np
import torch

from vestige.methods import _sweep
from vestige.methods._sweep import _Sample
from vestige.runs import ScoreBlock, sample_rows


def test_the_scores_that_are_correlated_are_those_of_the_sampled_rows(monkeypatch):
    monkeypatch.setattr(_sweep, "SAMPLED_NUMBERS", 3 * 200)
    random = np.random.default_rng(0)
    scores, order = random.normal(size=(3, 5000)), random.permutation(5000)
    sample = _Sample(3, 5000)
    for start in range(0, 5000, 70):
        rows = order[start : start + 70]
        sample.add(ScoreBlock(torch.from_numpy(rows), torch.from_numpy(scores[:, rows])))
    assert np.array_equal(sample.scores, scores[:, sample_rows(5000, 200)])
