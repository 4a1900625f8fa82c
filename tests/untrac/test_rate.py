import numpy as np
import pytest
import torch

from tests.untrac.conftest import a_job
from vestige.errors import NonFinite
from vestige.methods import CURVATURE_SHARE, Unlearning, settle_rate


@pytest.mark.parametrize("right", [3e-6, 4e-4, 0.2])
def test_the_rate_is_where_curvature_has_its_share(right):
    """Curvature over slope grows in proportion; far away it says only `less`."""

    def share(rate, number):
        return float("inf") if rate > 100 * right else CURVATURE_SHARE * rate / right

    assert settle_rate(share, 1e-3) == pytest.approx(right, rel=0.06)


def test_a_model_without_a_good_rate_is_told():
    with pytest.raises(NonFinite, match="--learning-rate"):
        settle_rate(lambda rate, number: float("nan"), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop", "adafactor"])
@pytest.mark.parametrize("direction", ["untrac", "inverse"])
def test_at_the_chosen_rate_slope_decides(tmp_path, optimizer, direction):
    given = {"optimizer": optimizer, "direction": direction, "learning_rate": None, "stop": "auto"}
    scored = Unlearning(a_job(tmp_path, dtype=torch.float32, **given))
    share = scored.job.curvature_share(scored.done, -1)
    assert CURVATURE_SHARE / 3 < share < 3 * CURVATURE_SHARE
    assert scored.recipe.learning_rate > 0


@pytest.mark.slow
def test_a_rate_that_is_too_high_is_read_early_or_warned_about(tmp_path):
    scored = Unlearning(a_job(tmp_path, learning_rate=3e-2, steps=20))
    last = scored.job.curvature_share(scored.done, -1)
    assert last > 2 * CURVATURE_SHARE
    assert scored.stop.point == 0 or scored.stop.curvature_share <= 2 * CURVATURE_SHARE
    assert scored.stop.point < scored.done.after.shape[1] - 1


def test_an_overflow_says_what_to_do(tmp_path):
    with pytest.raises(NonFinite, match="--learning-rate"):
        Unlearning(a_job(tmp_path, dtype=torch.float32, optimizer="sgd", learning_rate=1e30, stop="last"))


@pytest.mark.slow
def test_weighing_by_size_multiplies_by_the_share_of_the_data(tmp_path):
    plain, weighed = (Unlearning(a_job(tmp_path / str(flag), weigh_by_size=flag)) for flag in (False, True))
    data = plain.job.train.data
    sizes = np.array([data.target_counts[each.rows].sum() for each in plain.job.train.sets])
    assert np.allclose(weighed.scores, plain.scores * sizes / sizes.mean())
