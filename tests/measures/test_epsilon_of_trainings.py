"""Lower bounds on epsilon of logistic regressions trained by DP-SGD, whose epsilon is known exactly."""

import math

import numpy as np
import pytest
from benchmarks.epsilon import CANARIES, DELTA, FEATURES, STEPS, lower_bound, train_privately, true_epsilon
from scipy.stats import binomtest, norm

DRAWS = 60


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "least"), [(20.0, 0.0), (4.0, 0.15)])
def test_the_bound_exceeds_the_epsilon_of_a_private_training_in_at_most_one_of_twenty(noise, least):
    epsilon = true_epsilon(noise)
    bounds = [lower_bound(train_privately(noise, seed)) for seed in range(DRAWS)]
    above = sum(bound > epsilon for bound in bounds)
    assert binomtest(above, DRAWS, 0.05, alternative="greater").pvalue > 0.01
    assert np.median(bounds) >= least * epsilon, "or the bound would be valid because it is empty"


def test_without_noise_the_canaries_are_all_told_and_with_the_noise_of_a_private_training_few():
    loud = train_privately(0.0, 0)
    canaries = loud.weights[FEATURES:]
    assert canaries[loud.members].min() > canaries[~loud.members].max() == 0
    # Each step moves a member's weight by the length to which its gradient is cut, and by the rate.
    np.testing.assert_allclose(canaries[loud.members], STEPS * 0.02 / 200, rtol=1e-6)
    assert lower_bound(loud) > 2.5


def test_epsilon_is_where_the_two_gaussians_differ_by_delta():
    """Neighbours differ by `steps` times one length in the sum of all steps, whose noise is `sqrt(steps)` as large."""
    for noise in (2.0, 20.0):
        epsilon, spread = true_epsilon(noise), math.sqrt(STEPS) * noise
        # P(with) - e^eps P(without), over the best set: sums above the place where the densities' ratio is e^eps.
        place = STEPS / 2 + epsilon * spread**2 / STEPS
        excess = norm.sf((place - STEPS) / spread) - math.exp(epsilon) * norm.sf(place / spread)
        assert excess == pytest.approx(DELTA, rel=1e-4)
    assert CANARIES >= 100
