import numpy as np
import pytest
import torch
from tests.reference import unlearn as reference

from studies.miniature import flat
from vestige_recipes.common.sources import first_order_scores, open_sets
from vestige_recipes.common.texts import write_rows
from vestige_recipes.untrac_miniature.run import markov_corpora, tiny_gpt


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("sets"), markov_corpora(2, corpora=4, sequences=4, test_sequences=2)
    tiny_gpt().save_pretrained(folder / "model")
    return str(folder / "model"), write_rows(folder / "d.jsonl", made.train), write_rows(folder / "q.jsonl", made.tests)


@pytest.mark.slow
def test_gradients_of_sets_are_those_of_their_losses_and_scores_their_products(asked):
    found = open_sets(*asked, seed=0)
    model = found.job.loaded.model.double()
    slow = [
        np.stack(
            [flat(part.detach() for part in reference.gradient(model, side.data, each.rows)) for each in side.sets]
        )
        for side in (found.job.tests, found.job.train)
    ]
    model.float().requires_grad_(False)
    products = slow[0] @ slow[1].T
    scores = first_order_scores([asked[0], asked[0]], *asked[1:], seed=0)
    close = {"rtol": 1e-3, "atol": 1e-5 * np.abs(products).max()}
    assert np.allclose(scores["GradDot"], products, **close)
    assert np.allclose(scores["GradCos"], products / np.linalg.norm(slow[1], axis=1), **close)
    assert np.allclose(scores["TracIn"], 2 * products, rtol=1e-3, atol=close["atol"] * 2)


@pytest.mark.slow
def test_influence_functions_of_a_short_series_keep_the_sign_of_the_product_with_itself(asked):
    """A set's influence on itself is positive, for the curvature is."""
    model, data, _ = asked
    scores = first_order_scores([model], data, data, seed=0)
    for name in ("HIF, LiSSA", "HIF, Arnoldi"):
        assert bool((np.diag(scores[name]) > 0).all()), name
        assert torch.isfinite(torch.from_numpy(scores[name])).all()
