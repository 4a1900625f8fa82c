import numpy as np
import torch
from scipy import stats

from vestige.methods import Random

from .conftest import all_scores, reordered, text_job, tokenized


def test_scores_follow_the_ids_and_not_the_order(monkeypatch):
    job = text_job(["x"] * 50, ["y"] * 4)
    plain = all_scores(Random(), job)
    order = np.random.default_rng(0).permutation(50)
    turned = type(job)(reordered(job.train, order), reordered(job.queries, [2, 0, 3, 1]), job.settings)
    monkeypatch.setattr(Random, "block_scores", 28)
    assert len(list(Random().blocks(turned))) > 5
    assert (all_scores(Random(), turned) == plain[[2, 0, 3, 1]][:, order]).all()


def test_the_seed_changes_everything():
    one, other = (all_scores(Random(), text_job(["x"] * 400, ["y"], seed=seed)) for seed in (0, 1))
    assert abs(np.corrcoef(one[0], other[0])[0, 1]) < 0.2


def test_scores_are_uniform_and_queries_independent():
    scores = all_scores(Random(), text_job(["x"] * 2000, ["y"] * 5)).numpy()
    assert stats.kstest(scores.ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(scores) - np.eye(5)).max() < 0.1
    # Mixed, not added up: a query's and an example's parts cannot be told apart.
    interaction = scores - scores.mean(0) - scores.mean(1, keepdims=True)
    assert interaction.var() > 0.7 * scores.var()


def test_a_query_with_the_id_of_an_example_is_nothing_special():
    job = text_job(["x"], ["y"])
    same = type(job)(tokenized(5, 0, "q"), tokenized(5, 0, "q"), job.settings)
    assert len(all_scores(Random(), same).diagonal().unique()) == 5
    assert isinstance(next(Random().blocks(same)).scores, torch.Tensor)
