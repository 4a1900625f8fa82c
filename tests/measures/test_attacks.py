"""Membership attacks beyond the loss: RMIA, trajectories, sampled extraction, quantile regression, usage, epsilon."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from tests.architectures import build
from tests.reference import audit as reference
from vestige import measures
from vestige.errors import DataError, SpecError

MODELS, EXAMPLES = 9, 30


def chances(effect=0.5, seed=0):
    """Log-probabilities of examples under models, and which models were trained on which."""
    draw = np.random.default_rng(seed)
    membership = draw.random((MODELS, EXAMPLES)) < 0.5
    hard = draw.normal(size=EXAMPLES)
    return -np.exp(hard + 0.3 * draw.normal(size=(MODELS, EXAMPLES)) - effect * membership), membership


def as_numbers(rows):
    return [math.nan if value is None else value for value in rows]


@pytest.mark.parametrize("ratio", [0.8, 1.0, 2.0])
def test_rmia_is_the_share_of_others_that_an_example_stands_out_over(ratio):
    values, membership = chances()
    membership[:, 0], membership[:, 1] = True, False
    left_out = np.arange(MODELS) == 4
    population = np.arange(EXAMPLES) % 3 > 0
    taken = [model for model in range(MODELS) if model != 4]
    given = values[4].tolist(), values.tolist(), membership.tolist()
    found = measures.rmia(values[4], values, membership, left_out=left_out, population=population, ratio=ratio)
    np.testing.assert_allclose(found, as_numbers(reference.rmia(*given, taken, ratio, population)), rtol=1e-12)
    assert np.isnan(found[:2]).all()
    assert np.isfinite(found[2:]).all()
    everyone = measures.rmia(values[4], values, membership, ratio=ratio)
    wanted = as_numbers(reference.rmia(*given, range(MODELS), ratio, [True] * EXAMPLES))
    np.testing.assert_allclose(everyone, wanted, rtol=1e-12)


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_rmia_offline_needs_one_reference_model_and_no_member(slope):
    values, membership = chances()
    given = values[0].tolist(), values[1:].tolist(), membership[1:].tolist()
    found = measures.rmia_offline(values[0], values[1:], membership[1:], slope=slope)
    wanted = as_numbers(reference.rmia_offline(*given, 1.0, [True] * EXAMPLES, slope))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    alone = measures.rmia_offline(values[0], values[1:2], slope=slope)
    nobody = [[False] * EXAMPLES]
    wanted = reference.rmia_offline(given[0], given[1][:1], nobody, 1.0, [True] * EXAMPLES, slope)
    np.testing.assert_allclose(alone, wanted, rtol=1e-12)


def test_the_slope_is_that_of_models_with_and_without_the_examples():
    draw = np.random.default_rng(0)
    out = draw.uniform(0.1, 0.9, size=200)
    values = np.log(np.stack([1 - 0.4 * (1 - out), out]))
    membership = np.array([[True] * 200, [False] * 200])
    assert measures.fit_slope(values, membership) == pytest.approx(0.4, rel=1e-9)
    assert measures.fit_slope(values, ~membership[:1].repeat(2, 0)) == 1.0


def test_rmia_refuses_what_is_no_log_probability_and_survives_tiny_ones():
    values, membership = chances()
    with pytest.raises(DataError, match="at or below zero"):
        measures.rmia(-values[0], values, membership)
    with pytest.raises(DataError, match="give log-probabilities"):
        measures.rmia(values[0][1:], values, membership)
    with pytest.raises(SpecError, match="ratio"):
        measures.rmia(values[0], values, membership, ratio=0.0)
    with pytest.raises(SpecError, match="slope"):
        measures.rmia_offline(values[0], values, membership, slope=1.5)
    far = measures.rmia(1000 * values[0], 1000 * values, membership)
    assert np.isfinite(far).any()
    values[:, 3] = np.nan
    assert np.isnan(measures.rmia(values[0], values, membership)[3])


def test_a_trajectory_is_the_mean_fall_since_the_first_checkpoint():
    losses = np.array([[3.0, 2.0, np.nan], [2.0, 2.0, 1.0], [0.5, 2.5, 1.0]])
    np.testing.assert_allclose(measures.loss_trajectory(losses), [1.75, -0.25, np.nan])
    with pytest.raises(DataError, match="two or more"):
        measures.loss_trajectory(losses[:1])


@pytest.mark.parametrize(("top_k", "temperature"), [(0, 1.0), (3, 0.7), (40, 2.0)])
def test_the_chance_of_a_continuation_is_the_product_over_its_tokens(top_k, temperature):
    draw = np.random.default_rng(0)
    logits = torch.from_numpy(np.round(2 * draw.normal(size=(4, 3, 11)), 1))  # rounded, so that some are tied
    tokens = logits.argsort(-1)[..., -2]
    tokens[0, 0] = int(logits[0, 0].argmin())
    found = measures.sampling_log_probability(logits, tokens, top_k=top_k, temperature=temperature).sum(1).exp()
    wanted = [
        reference.sampled_chance(rows, row, top_k, temperature)
        for rows, row in zip(logits.tolist(), tokens.tolist(), strict=True)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    with pytest.raises(SpecError, match="temperature"):
        measures.sampling_log_probability(logits, tokens, temperature=0.0)


def test_n_p_extraction_equals_sampling_within_its_interval():
    model, prefix, count, draws, top_k, temperature = build("llama", torch.float32), 4, 2, 3000, 4, 0.8
    texts = [np.array([1, 5, 3, 2, 6, 4, 1]), np.array([2, 2, 0, 1]), np.array([3, 1, 4, 1, 5, 1])]
    with torch.no_grad():  # continuations that are likely enough to be drawn
        for text in (texts[0], texts[2]):
            for position in range(prefix, prefix + count):
                text[position] = int(
                    model(input_ids=torch.tensor(text[:position])[None]).logits[0, -1].topk(2).indices[1]
                )
    found = measures.continuation_log_probability(
        texts, measures.predict(model), prefix=prefix, continuation=count, top_k=top_k, temperature=temperature
    )
    assert np.isnan(found[1])
    draw = torch.Generator().manual_seed(0)
    for row in (0, 2):
        tokens = torch.tensor(texts[row][:prefix]).repeat(draws, 1)
        for _ in range(count):
            with torch.no_grad():
                scaled = model(input_ids=tokens).logits[:, -1] / temperature
            best = scaled.topk(top_k)
            chosen = torch.multinomial(best.values.softmax(-1), 1, generator=draw)
            tokens = torch.cat([tokens, best.indices.gather(1, chosen)], dim=1)
        hits = int((tokens[:, prefix:] == torch.tensor(texts[row][prefix : prefix + count])).all(1).sum())
        interval = binomtest(hits, draws).proportion_ci(0.999)
        assert interval.low < math.exp(found[row]) < interval.high
        assert hits > 30


def test_tries_and_chances_are_two_sides_of_one_formula():
    log_p = np.log([0.5, 0.01, 1.0, 1e-9])
    np.testing.assert_allclose(measures.chance_within(log_p, 10), [1 - 0.5**10, 1 - 0.99**10, 1.0, 1e-8], rtol=1e-7)
    np.testing.assert_array_equal(measures.tries_needed(log_p[:3], 0.5), [1, 69, 1])
    assert measures.tries_needed(np.array([-np.inf]))[0] == np.inf
    assert measures.chance_within(np.array([-np.inf]), 1000)[0] == 0
    for chance in (0.1, 0.9):
        least = measures.tries_needed(log_p[1:2], chance)[0]
        assert measures.chance_within(log_p[1:2], int(least))[0] >= chance
        assert measures.chance_within(log_p[1:2], int(least) - 1)[0] < chance
    with pytest.raises(SpecError, match="chance"):
        measures.tries_needed(log_p, 1.0)


@pytest.mark.slow
def test_quantile_regression_takes_away_what_the_text_explains_and_keeps_its_false_positives():
    draw = np.random.default_rng(0)
    held = np.arange(800) % 2 == 0
    hardness = draw.uniform(0, 10, size=800)
    scores = -hardness + 0.5 * draw.normal(size=800) + np.where(held, 0.0, 1.5)
    found = measures.quantile_excess(scores, hardness[:, None], held)
    plain = measures.attack(scores, ~held).auc.value
    assert plain < 0.7
    assert measures.attack(found, ~held).auc.value > 0.9
    assert 0.02 < (found[held] > 0).mean() < 0.1
    # Where nothing was trained on, the data pass the threshold as often as the holdout does.
    null = measures.quantile_excess(scores - np.where(held, 0.0, 1.5), hardness[:, None], held)
    assert measures.attack(null, ~held).auc.low < 0.5 < measures.attack(null, ~held).auc.high
    assert np.isnan(measures.quantile_excess(scores[:30], hardness[:30, None], held[:30])).all()
    with pytest.raises(DataError, match="one per example"):
        measures.quantile_excess(scores, hardness[:5, None], held)


@pytest.mark.slow
def test_usage_of_a_set_is_found_by_weak_scores_and_p_values_are_uniform_or_larger_without_any():
    draw = np.random.default_rng(0)
    ours, others = draw.normal(size=(400, 3)) + np.array([0.5, 0.0, 0.0]), draw.normal(size=(300, 3))
    found = measures.infer_usage(ours, others)
    assert found.p_value < 1e-3
    assert 0.5 < found.effect.low < found.effect.value < 0.76
    assert (found.data, found.holdout, found.paired) == (400, 300, False)
    small = [
        measures.infer_usage(draw.normal(size=(40, 2)), draw.normal(size=(40, 2)), splits=5, seed=seed).p_value <= 0.1
        for seed in range(60)
    ]
    assert binomtest(sum(small), 60, 0.1, alternative="greater").pvalue > 0.01
    with pytest.raises(DataError, match="20 of each"):
        measures.infer_usage(ours[:19], others)


def test_pairs_find_what_differences_between_texts_hide():
    draw = np.random.default_rng(0)
    hardness = 20 * draw.normal(size=(120, 1))
    ours, twins = hardness + draw.normal(size=(120, 1)) + 1.5, hardness + draw.normal(size=(120, 1))
    ours[5] = np.nan
    paired, plain = measures.infer_usage(ours, twins, paired=True), measures.infer_usage(ours, twins)
    assert paired.p_value < 1e-4
    assert paired.effect.low > 0.6
    assert (paired.data, paired.holdout) == (119, 119)
    assert plain.p_value > 0.01
    with pytest.raises(DataError, match="as many rows"):
        measures.infer_usage(ours[1:], twins, paired=True)


@pytest.mark.parametrize(("candidates", "epsilon"), [(2, 1.0), (16, 2.0), (1024, 6.0)])
def test_the_bound_on_epsilon_is_valid_and_not_empty_on_randomised_responses(candidates, epsilon):
    """Each secret is answered by itself with probability e^eps / (e^eps + N - 1), else by one of the others."""
    draw, bounds = np.random.default_rng(0), []
    honest = math.exp(epsilon) / (math.exp(epsilon) + candidates - 1)
    for _ in range(200):
        ranks = np.where(draw.random(400) < honest, 1, draw.integers(2, candidates + 1, size=400))
        bounds.append(measures.epsilon_from_ranks(ranks.astype(float), candidates))
    wrong = sum(bound > epsilon for bound in bounds)
    assert binomtest(wrong, 200, 0.05, alternative="greater").pvalue > 0.01
    assert np.median(bounds) > 0.6 * epsilon


def test_secrets_that_were_not_learned_show_nothing():
    draw = np.random.default_rng(0)
    bounds = [measures.epsilon_from_ranks(draw.integers(1, 1025, size=60).astype(float), 1024) for _ in range(200)]
    assert binomtest(sum(bound > 0 for bound in bounds), 200, 0.05, alternative="greater").pvalue > 0.01
    perfect = measures.epsilon_from_ranks(np.ones(30), 2)
    assert perfect == pytest.approx(math.log(0.05 ** (1 / 30) / (1 - 0.05 ** (1 / 30))), rel=1e-9)
    for ranks, candidates in ((np.array([0.0]), 8), (np.array([9.0]), 8), (np.ones(0), 8), (np.ones(3), 1)):
        with pytest.raises(DataError, match="candidates"):
            measures.epsilon_from_ranks(ranks, candidates)
    with pytest.raises(SpecError, match="confidence"):
        measures.epsilon_from_ranks(np.ones(3), 8, confidence=1.0)


def test_the_bound_from_guesses_is_the_tail_of_a_binomial():
    found = measures.epsilon_from_guesses(90, 100, 1000)
    assert reference.binomial_tail(90, 100, 1 / (1 + math.exp(-found))) == pytest.approx(0.05, rel=1e-6)
    assert measures.epsilon_from_guesses(30, 30, 30) == pytest.approx(
        measures.epsilon_from_ranks(np.ones(30), 2), rel=1e-6
    )
    assert measures.epsilon_from_guesses(52, 100, 100) == 0
    loose = [measures.epsilon_from_guesses(90, 100, 1000, delta=delta) for delta in (0.0, 1e-7, 1e-5)]
    assert loose[0] > loose[1] > loose[2] > 0
    with pytest.raises(DataError, match="do not go together"):
        measures.epsilon_from_guesses(5, 4, 10)
    with pytest.raises(SpecError, match="delta"):
        measures.epsilon_from_guesses(3, 4, 10, delta=1.0)


def test_the_bound_from_guesses_is_valid_on_randomised_responses():
    draw, right = np.random.default_rng(0), math.e / (1 + math.e)
    bounds = [measures.epsilon_from_guesses(int(draw.binomial(300, right)), 300, 300) for _ in range(100)]
    assert binomtest(sum(bound > 1.0 for bound in bounds), 100, 0.05, alternative="greater").pvalue > 0.01
    assert np.median(bounds) > 0.6
