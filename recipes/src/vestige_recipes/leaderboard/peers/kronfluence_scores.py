"""kronfluence's EK-FAC with labels drawn from the model, its default, at its two dampings; `common.py` says how."""

from functools import partial

import torch
from common import BATCH, Job, run, sum_loss
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import ScoreArguments
from kronfluence.task import Task


class SummedLoss(Task):
    """The loss of the rows, and of the queries."""

    def __init__(self, maps: list[str]) -> None:
        self._maps = maps

    def compute_train_loss(self, batch, model, sample=False):
        """Return the loss, of labels that the model draws if `sample`."""
        (tokens,) = batch
        logits = model(tokens).logits
        if sample:
            drawn = torch.distributions.Categorical(logits=logits[:, :-1].detach()).sample()
            tokens = torch.cat([tokens[:, :1], drawn], dim=1)
        return sum_loss(logits, tokens)

    def compute_measurement(self, batch, model):
        """Return the loss of queries."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        """Return the maps of the blocks."""
        return self._maps


def score(arguments: ScoreArguments, job: Job):
    """Fit the factors, then score."""
    model, maps = job.load_linear()
    task = SummedLoss(maps)
    analyzer = Analyzer("board", prepare_model(model, task), task, cpu=True, output_dir=str(job.out))
    train, queries = map(torch.utils.data.TensorDataset, job.load_rows())
    analyzer.fit_all_factors("factors", train, BATCH, overwrite_output_dir=True)
    analyzer.compute_pairwise_scores(
        "scores", "factors", queries, train, BATCH, BATCH, score_args=arguments, overwrite_output_dir=True
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"]


if __name__ == "__main__":
    mean = ScoreArguments(damping_factor=None)
    run({"ekfac": partial(score, ScoreArguments()), "ekfac damping_factor=None": partial(score, mean)})
