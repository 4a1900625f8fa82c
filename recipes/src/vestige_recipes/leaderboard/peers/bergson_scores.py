"""bergson's commands `ekfac`, plain and refined, `trackstar` and `trak` with their defaults; `common.py` says how.

It takes no batch of more tokens than the model's context, here one row.
"""

from functools import partial

from bergson.cli.trackstar import trackstar
from bergson.cli.trak import trak
from bergson.config.config import (
    AstraConfig,
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
    TrackstarConfig,
    TrackstarIndexConfig,
    TrakConfig,
)
from bergson.data import load_scores
from bergson.hessians.pipeline import hessian_pipeline
from common import Job, run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def _prepare(job: Job):
    """Return the settings of an index, and the queries."""
    length = job.load_rows()[0].shape[1]
    # It loads a tokenizer even where the rows are tokens.
    names = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=names, model_max_length=length).save_pretrained(job.out / "names")
    index = {"run_path": str(job.out / "run"), "model": job.model, "tokenizer": str(job.out / "names")}
    data = {"data": DataConfig(dataset=job.train), "token_batch_size": length, "overwrite": True}
    return index | data, QuerySetConfig(dataset=job.queries)


def _read(job: Job):
    return load_scores(job.out / "run" / "scores")[:].T


def ekfac(astra: AstraConfig, job: Job):
    """Labels are drawn from the model."""
    index, queries = _prepare(job)
    hessian = HessianConfig("kfac", ev_correction=True)
    pipeline = HessianPipelineConfig(query=queries, astra=astra)
    hessian_pipeline(IndexConfig(**index), hessian, ScoreConfig(), PreprocessConfig(), pipeline)
    return _read(job)


def by_trackstar(job: Job):
    """Return what `bergson trackstar` does."""
    index, queries = _prepare(job)
    trackstar(TrackstarIndexConfig(**index), TrackstarConfig(query=queries))
    return _read(job)


def by_trak(job: Job):
    """Return what `bergson trak` does with one model."""
    index, queries = _prepare(job)
    trak(TrackstarIndexConfig(**index, loss_fn="log_odds", projection_target="global"), TrakConfig(query=queries))
    return _read(job)


if __name__ == "__main__":
    refined = partial(ekfac, AstraConfig(num_steps=3, solver="cg", batch_size=384))
    plain = partial(ekfac, AstraConfig())
    run({"ekfac": plain, "ekfac solver=cg num_steps=3": refined, "trackstar": by_trackstar, "trak": by_trak})
