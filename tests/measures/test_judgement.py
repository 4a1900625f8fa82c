"""AUC, rates, intervals, the blind baseline, the table of evidence."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from tests.reference import audit as reference
from vestige import measures
from vestige.errors import CorruptFile, DataError, SpecError


@pytest.fixture(scope="module")
def scored():
    draw = np.random.default_rng(0)
    members = draw.random(300) < 0.4
    return np.round(draw.normal(size=300) + members, 1), members


def test_the_area_and_its_interval_are_delongs(scored):
    scores, members = scored
    found = measures.attack(scores, members).auc
    assert found.value == pytest.approx(roc_auc_score(members, scores), rel=1e-12)
    width = 1.959963984540054 * np.sqrt(reference.delong_variance(scores[members], scores[~members]))
    np.testing.assert_allclose([found.low, found.high], [found.value - width, found.value + width], rtol=1e-10)


def test_intervals_of_areas_cover_the_truth():
    draw, truth, covered = np.random.default_rng(0), 0.7602499389065233, 0
    for _ in range(400):
        found = measures.area(draw.normal(size=40) + 1, draw.normal(size=60))
        covered += found.low <= truth <= found.high
    assert 0.91 < covered / 400 < 0.985


@pytest.mark.parametrize("level", [0.001, 0.01, 0.1, 0.5, 1.0])
def test_rates_are_those_of_the_best_threshold(scored, level):
    scores, members = scored
    found = measures.attack(scores, members, tpr_at=(level,), fpr_at=(level,))
    true, false = found.tpr_at[level], found.fpr_at[level]
    assert true.rate.value == reference.true_rate(scores, members, level)
    assert false.rate.value == reference.false_rate(scores, members, level)
    assert (scores[members] >= true.threshold).mean() == true.rate.value
    assert (scores[~members] >= true.threshold).mean() <= level
    assert true.resolved == (level * (~members).sum() >= 1)


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (3, 10), (10, 10), (1, 1), (500, 1000)])
def test_a_share_has_its_exact_interval(successes, count):
    found = measures.share(successes, count)
    wanted = binomtest(successes, count).proportion_ci(method="exact")
    np.testing.assert_allclose(found, [successes / count, wanted.low, wanted.high], rtol=1e-9, atol=1e-12)


def test_an_area_without_overlap_still_has_an_interval():
    found = measures.area(np.array([2.0, 3.0]), np.array([0.0, 1.0, 1.5]))
    assert found.value == found.high == 1.0
    assert found.low < 0.2
    assert measures.area(np.array([0.0]), np.array([0.0, 1.0])).value == 0.25


def test_a4_7_an_empty_group_is_nan_with_its_count_and_no_crash(scored):
    scores, _ = scored
    noisy = np.zeros(300, dtype=bool)  # label_noise = 0
    found = measures.attack(scores, noisy)
    assert found.members == 0
    assert np.isnan(found.auc.value)
    assert np.isnan(found.tpr_at[0.01].rate.value)
    assert measures.group_means(scores, {"noisy": noisy, "true": ~noisy})["true"] == (pytest.approx(scores.mean()), 300)
    mean, count = measures.group_means(scores, {"noisy": noisy})["noisy"]
    assert np.isnan(mean)
    assert count == 0


def test_scores_that_are_nan_are_counted_and_taken_for_neither_side(scored):
    scores, members = scored
    some = np.where(np.arange(300) < 50, np.nan, scores)
    found = measures.attack(some, members)
    assert found.unscored == 50
    assert found.members + found.others == 250
    assert found.auc == measures.attack(scores[50:], members[50:]).auc
    with pytest.raises(DataError):
        measures.attack(scores[1:], members)
    with pytest.raises(SpecError):
        measures.attack(scores, members, tpr_at=(0.0,))


@pytest.mark.slow
def test_the_blind_baseline_finds_words_lengths_and_dates_and_nothing_in_nothing():
    draw = np.random.default_rng(0)
    members = np.arange(200) % 2 == 0
    words = np.array(["ash", "elm", "fir", "oak", "yew", "bay"])
    plain = [" ".join(draw.choice(words, 6)) for _ in range(200)]
    nothing = measures.area(*(measures.blind(plain, members)[side] for side in (members, ~members)))
    assert nothing.low < 0.5 < nothing.high
    told = [text + (" new" if member else "") for text, member in zip(plain, members, strict=True)]
    longer = [text + (" oak" * 6 if member else "") for text, member in zip(plain, members, strict=True)]
    dates = np.where(members, 2020.0, 2024.0) + draw.normal(size=200)
    dates[:5] = np.nan
    for found in (
        measures.blind(told, members),
        measures.blind(longer, members),
        measures.blind(plain, members, dates=dates),
    ):
        assert measures.area(found[members], found[~members]).value > 0.9
    np.testing.assert_array_equal(measures.blind(told, members), measures.blind(told, members))


@pytest.mark.slow
def test_the_intervals_of_the_blind_baseline_count_its_fits():
    draw = np.random.default_rng(1)
    members = np.arange(60) % 2 == 0
    texts = [" ".join(draw.choice([f"w{number}" for number in range(60)], 12)) for _ in members]
    scores, found = measures.blind(texts, members), measures.blind_attack(texts, members)
    plain = measures.attack(scores, members)
    assert found.auc.value == plain.auc.value
    wider = (found.auc.high - found.auc.low) / (plain.auc.high - plain.auc.low)
    assert 1.1 < wider < 2.2
    for level, rate in found.tpr_at.items():
        assert rate.rate.value == plain.tpr_at[level].rate.value
        assert rate.rate.high > plain.tpr_at[level].rate.high
    told = [text + (" new" if member else "") for text, member in zip(texts, members, strict=True)]
    assert measures.blind_attack(told, members).auc.low > 0.5


@pytest.mark.slow
def test_intervals_of_the_blind_baseline_hold_one_half_where_membership_is_random():
    """`benchmarks/blind_coverage.py` has 140 draws; by independent scores 80 % of the intervals would hold 0.5."""
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice([f"w{number}" for number in range(80)], draw.integers(5, 30))) for _ in range(60)]
    held = []
    for seed in range(60):
        members = np.zeros(60, dtype=bool)
        members[np.random.default_rng(seed).permutation(60)[:30]] = True
        found = measures.blind_attack(texts, members, seed=seed).auc
        held.append(found.low <= 0.5 <= found.high)
    assert binomtest(sum(held), len(held), 0.95).pvalue > 0.01


def test_the_blind_baseline_does_not_learn_copies_by_heart():
    members = np.arange(80) % 2 == 0
    texts = [f"word{row // 4}" for row in range(80)]  # Each text twice on either side.
    found = measures.blind(texts, members)
    assert np.isfinite(found).all()
    assert abs(measures.area(found[members], found[~members]).value - 0.5) < 0.1
    with pytest.raises(DataError, match="two different texts"):
        measures.blind(["same"] * 80, members)


def test_a4_8_evidence_is_a_column_per_measure_whatever_the_number_of_examples(tmp_path):
    draw, ids = np.random.default_rng(0), [f"id-{row}" for row in range(3000)]
    tables = [
        measures.evidence_table(ids, {"psmi": draw.normal(size=3000)}, checkpoint=step, layer=layer)
        for step in (0, 10)
        for layer in (1, 2, 3)
    ]
    losses = draw.normal(size=3000)
    losses[0] = np.nan
    tables.append(measures.evidence_table(ids, {"loss": losses}, checkpoint=10))
    path = tmp_path / "evidence.parquet"
    measures.write_evidence(path, tables)
    whole = measures.read_evidence(path)
    assert whole.column_names == ["checkpoint", "layer", "example_id", "psmi", "loss"]
    assert len(whole) == 21_000
    last = measures.read_evidence(path, ["loss"], checkpoint=10).to_pandas()
    np.testing.assert_array_equal(last[last.layer.isna()]["loss"], losses)
    with pytest.raises(DataError, match="holds no gap; it holds psmi, loss"):
        measures.read_evidence(path, ["gap"])
    with pytest.raises(DataError, match="same example"):
        measures.write_evidence(path, [tables[0], tables[0]])
    with pytest.raises(DataError, match="psmi"):
        measures.evidence_table(ids, {"psmi": losses[1:]})
    path.write_bytes(b"torn")
    with pytest.raises(CorruptFile):
        measures.read_evidence(path)
