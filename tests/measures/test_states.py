"""Measures of hidden states: PSMI, SMI, Mahalanobis, and the choice of a layer."""

import inspect
import tracemalloc

import numpy as np
import pytest

from tests.reference import audit as reference
from vestige import measures
from vestige.errors import DataError, SpecError


def classes(count=200, width=6, seed=0, apart=1.5):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    return draw.normal(size=(count, width)) + apart * draw.normal(size=(3, width))[labels], labels


@pytest.mark.parametrize("directions", [1, 7, 600, None])
def test_psmi_of_one_dimension_is_the_gaussian_pointwise_information(directions):
    states, labels = classes(width=1)
    found = measures.psmi(states, labels, directions=directions)
    wanted = reference.gaussian_information(states[:, 0].tolist(), labels.tolist())
    np.testing.assert_allclose(found.mean, wanted, rtol=0, atol=1e-10)
    assert found.std.max() < 1e-10
    assert found.uncomputable == 0


def test_psmi_is_the_mean_over_its_directions_with_their_quantiles():
    states, labels = classes()
    found = measures.psmi(states, labels, directions=40, seed=3)
    slices = states @ measures.draw_directions(6, 40, 3)
    each = np.array([reference.gaussian_information(slice.tolist(), labels.tolist()) for slice in slices.T])
    np.testing.assert_allclose(found.mean, each.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.std, each.std(0), atol=1e-12)
    np.testing.assert_allclose(found.low, np.quantile(each, 0.01, axis=0), atol=1e-12)
    np.testing.assert_allclose(found.high, np.quantile(each, 0.99, axis=0), atol=1e-12)


def test_a4_4_psmi_with_the_same_seed_has_the_same_bits_and_the_same_directions_everywhere():
    states, labels = classes()
    one, other = (measures.psmi(states, labels, directions=50, seed=1) for _ in range(2))
    assert one.mean.tobytes() == other.mean.tobytes()
    assert not np.array_equal(one.mean, measures.psmi(states, labels, directions=50, seed=2).mean)
    np.testing.assert_array_equal(measures.draw_directions(6, 50, 1), measures.draw_directions(6, 1200, 1)[:, :50])
    np.testing.assert_allclose(np.linalg.norm(measures.draw_directions(6, 1200, 1), axis=0), 1.0)


def test_a4_4_psmi_of_an_outlier_at_a_thousand_deviations_is_finite():
    states, labels = classes()
    states[7] += 1e3 * states.std(0)
    found = measures.psmi(states, labels, directions=200)
    assert all(np.isfinite(part).all() for part in found[:4])


def test_psmi_of_flat_states_is_nothing_and_a_lonely_label_has_none():
    labels = np.array([0, 0, 1, 1, 2])
    found = measures.psmi(np.ones((5, 3)), labels, directions=10)
    np.testing.assert_allclose(found.mean[:4], 0.0, atol=1e-12)
    assert np.isnan(found.mean[4])
    assert found.uncomputable == 1
    with pytest.raises(DataError, match="No label has two"):
        measures.psmi(np.ones((3, 2)), np.arange(3))
    with pytest.raises(DataError, match="example 1 is not finite"):
        measures.psmi(np.array([[0.0], [np.nan]]), np.zeros(2))
    with pytest.raises(SpecError, match="directions=0"):
        measures.psmi(np.ones((5, 3)), labels, directions=0)


def test_the_automatic_number_of_directions_settles_or_says_that_it_did_not():
    states, labels = classes(width=40)
    found = measures.psmi(states, labels)
    assert found.converged
    assert found.directions % 500 == 0
    assert found.directions >= 1000
    short = measures.psmi(states, labels, most=500)
    assert (short.converged, short.directions) == (False, 500)


def test_mislabelled_and_outlying_states_have_low_psmi():
    states, labels = classes(600, apart=4.0)
    given = labels.copy()
    given[:20] = (labels[:20] + 1) % 3
    found = measures.psmi(states, given, directions=500)
    assert measures.area(-found.mean[:20], -found.mean[20:]).value > 0.95


def test_smi_rises_with_separation_and_a_layer_is_chosen_by_it():
    near, labels = classes(apart=0.0)
    far, _ = classes(apart=3.0)
    assert measures.smi(near, labels, directions=20).mean < 0.1 < measures.smi(far, labels, directions=20).mean
    layers = {3: near, 8: far, 12: near}
    assert measures.choose_layer(layers, labels) == 12
    assert measures.choose_layer(layers, labels, by="smi", directions=20) == 8
    assert measures.smi(far, labels, directions=5) == measures.smi(far, labels, directions=5)
    assert np.isnan(measures.smi(far[:0], labels[:0]).mean)


def test_a4_1_no_layer_is_chosen_on_what_is_to_be_found():
    # The published advantage of PSMI came in part from the layer that suited the evaluated labels best.
    assert set(inspect.signature(measures.choose_layer).parameters) == {"states", "labels", "by", "directions", "seed"}
    states, _ = classes()
    assert measures.choose_layer({1: states, 2: states}, np.zeros(len(states))) == 2
    # And no area comes without its interval.
    assert measures.Attack.__annotations__["auc"] is measures.Interval


@pytest.mark.parametrize("dimensions", [1, 3, 100])
def test_a4_5_mahalanobis_keeps_the_dimensions_that_are_asked_for(dimensions):
    states = np.random.default_rng(0).normal(size=(50, 8)) @ np.diag(np.arange(1.0, 9.0))
    wanted = reference.mahalanobis(states, min(dimensions, 8))
    np.testing.assert_allclose(measures.mahalanobis(states, dimensions=dimensions), wanted, rtol=1e-10)


def test_a4_5_mahalanobis_needs_no_matrix_of_examples_by_examples():
    states = np.random.default_rng(0).normal(size=(20_000, 8))
    tracemalloc.start()
    measures.mahalanobis(states)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * states.nbytes  # n x n would be 2,500 times as much.


def test_mahalanobis_to_other_states_and_of_flat_ones():
    states = np.random.default_rng(0).normal(size=(300, 4))
    assert measures.mahalanobis(np.full((1, 4), 10.0), states)[0] > 10
    np.testing.assert_array_equal(measures.mahalanobis(np.ones((3, 2))), 0.0)
    with pytest.raises(DataError):
        measures.mahalanobis(states, states[:, :2])
    with pytest.raises(SpecError):
        measures.mahalanobis(states, dimensions=0)
