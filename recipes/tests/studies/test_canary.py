"""One of 2,000 training sequences is what a test sequence was made from: unlearning finds it."""

import numpy as np
import pytest
import torch

from studies.miniature import tokenized_rows
from vestige.methods import Unlearning, make_job
from vestige.models import LoadedModel, model_fingerprint
from vestige.settings import UntracSettings
from vestige.training import Recipe, Rows, fit
from vestige_recipes.untrac_miniature.run import markov_corpora, tiny_gpt

ROWS, CANARY = 2_000, 1_234


@pytest.mark.slow
def test_a_planted_canary_is_in_the_first_percent_of_2000_examples(tmp_path):
    """B-R5: the test sequence shares the last twenty tokens of its source, which are like no other sequence's."""
    rows = markov_corpora(5, sequences=ROWS // 8).train
    secret = np.random.default_rng(7).integers(0, 24, 25)
    rows[CANARY] = rows[CANARY] | {"input_ids": secret.tolist()}
    asked = np.concatenate([np.random.default_rng(8).integers(0, 24, 5), secret[5:]])
    data = tokenized_rows(rows)
    queries = tokenized_rows([{"id": "asked", "source": "asked", "input_ids": asked.tolist()}])
    model = tiny_gpt().eval()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.init_weights()
    fit(model, Rows(data, range(ROWS)), Recipe(3e-3, 16), steps=320, seed=0)
    model.eval().requires_grad_(False)
    loaded = LoadedModel(model, None, "canary", model_fingerprint(model), 25)
    settings = UntracSettings(model="m", data="d", queries="q", out=tmp_path / "run", level="example")
    scores = Unlearning(make_job(settings, loaded, data, queries)).scores[0]
    assert scores.shape == (ROWS,)
    assert int((scores > scores[CANARY]).sum()) < ROWS // 100
