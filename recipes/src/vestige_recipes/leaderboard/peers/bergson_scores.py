"""Five pipelines of bergson with the defaults of its commands; `common.py` says how.

It takes no batch of more tokens than the model's context, here one row.
"""

from copy import deepcopy
from functools import partial
from typing import Any

from bergson.build import build_query
from bergson.cli.trackstar import trackstar
from bergson.cli.trak import trak
from bergson.config import config
from bergson.data import load_scores
from bergson.hessians.pipeline import hessian_pipeline
from bergson.score.score import score_dataset
from common import Job, run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def score(pipeline, options: dict[str, Any], job: Job):
    """Return what a pipeline leaves, whose index has these options."""
    length = job.load_rows()[0].shape[1]
    # It loads a tokenizer even where the rows are tokens.
    names = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=names, model_max_length=length).save_pretrained(job.out / "names")
    index = config.IndexConfig(str(job.out / "run"), overwrite=True, token_batch_size=length, **options)
    index.model, index.tokenizer, index.data = job.model, str(job.out / "names"), config.DataConfig(job.train)
    pipeline(index, config.QuerySetConfig(job.queries))
    return load_scores(job.out / "run" / "scores")[:].T


def inner_products(index: config.IndexConfig, queries: config.QuerySetConfig) -> None:
    """Score by gradients as they are, or as they are projected."""
    asked = deepcopy(index)
    asked.run_path, index.run_path = f"{index.run_path}/query", f"{index.run_path}/scores"
    path = build_query(asked, queries, config.PreprocessConfig())
    score_dataset(index, config.ScoreConfig(path), config.PreprocessConfig())


def ekfac(index: config.IndexConfig, queries: config.QuerySetConfig, **refined: Any) -> None:
    """Fit with labels drawn from the model, as its command does."""
    hessian = config.HessianConfig("kfac", ev_correction=True)
    pipeline = config.HessianPipelineConfig(query=queries, astra=config.AstraConfig(**refined))
    hessian_pipeline(index, hessian, config.ScoreConfig(), config.PreprocessConfig(), pipeline)


def by_trackstar(index: config.IndexConfig, queries: config.QuerySetConfig) -> None:
    """Run the command of this name."""
    trackstar(index, config.TrackstarConfig(query=queries))


def by_trak(index: config.IndexConfig, queries: config.QuerySetConfig) -> None:
    """Run the command of this name, with one model."""
    trak(index, config.TrakConfig(query=queries))


if __name__ == "__main__":
    projected = {"projection_dim": 16}
    refined = partial(ekfac, solver="cg", num_steps=3, batch_size=384)
    run({
        "ekfac": partial(score, ekfac, {}),
        "ekfac solver=cg num_steps=3": partial(score, refined, {}),
        "trackstar": partial(score, by_trackstar, projected),
        "trak": partial(score, by_trak, {**projected, "loss_fn": "log_odds", "projection_target": "global"}),
        "score projection_dim=16": partial(score, inner_products, projected),
    })  # fmt: skip
