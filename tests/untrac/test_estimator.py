import numpy as np
import pytest

from tests.cli.conftest import furnished, workshop  # noqa: F401
from tests.workshop import PAIRS
from vestige.errors import SpecError
from vestige.methods import UnTrac, UnTracConfig

TEXTS = [f"{prompt} {answer}" for prompt, answer, _ in PAIRS]


@pytest.mark.slow
def test_a_text_is_its_own_best_explanation(workshop):  # noqa: F811
    untrac = UnTrac(UnTracConfig(model_name="tiny-model"))
    scores = untrac.compute_influence_scores(TEXTS[4], TEXTS)
    assert scores.shape == (len(TEXTS),)
    assert int(np.argmax(scores)) == 4
    top = untrac.top_k(TEXTS[4], TEXTS, k=3)
    assert [each.rank for each in top] == [1, 2, 3]
    assert (top[0].position, top[0].text) == (4, TEXTS[4])
    assert top[0].score == scores[4]


def test_several_test_texts_are_one_set_and_the_order_of_texts_does_not_matter(workshop):  # noqa: F811
    untrac = UnTrac(UnTracConfig(model_name="tiny-model", unlearning_rate=1e-3))
    scores = untrac.compute_influence_scores(TEXTS[:2], TEXTS)
    turned = untrac.compute_influence_scores(TEXTS[:2], TEXTS[::-1])
    assert np.allclose(scores, turned[::-1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("texts", [[], ["a"] * 11])
def test_too_few_or_too_many_texts_are_refused(workshop, texts):  # noqa: F811
    untrac = UnTrac(UnTracConfig(model_name="tiny-model", max_train_samples=10))
    with pytest.raises(SpecError, match="max_train_samples"):
        untrac.compute_influence_scores("a", texts)
