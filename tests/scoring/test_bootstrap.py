"""Bootstrap intervals and the paired test, against their definitions and against scipy."""

import numpy as np
import pytest
from scipy import stats

from captioning.scoring.bootstrap import RESAMPLES, Score, compare, holm, interval, resampled, resampling_counts


def ratio(sums, number):
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


@pytest.fixture
def values():
    return np.random.default_rng(1).beta(1, 5, size=400)


def test_each_resample_draws_as_many_captions_as_there_are():
    counts = resampling_counts(30)
    assert counts.shape == (RESAMPLES, 30) and (counts.sum(axis=1) == 30).all()
    assert len({tuple(row) for row in counts}) > 900
    assert (counts == resampling_counts(30)).all() and (counts != resampling_counts(30, seed=1)).any()


def test_a_mean_is_resampled_as_by_drawing_captions(values):
    counts = resampling_counts(len(values), 20)
    drawn = [np.repeat(values, row.astype(int)).mean() for row in counts]
    assert resampled(Score.of(values), counts) == pytest.approx(drawn, abs=1e-9)


def test_the_interval_is_that_of_scipy(values):
    low, high = interval(resampled(Score.of(values), resampling_counts(len(values))))
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.002)
    assert low < values.mean() < high


def test_a_score_that_is_no_mean_is_made_of_sums(values):
    statistics = np.column_stack([values, np.arange(len(values)) % 3])
    score = Score(statistics, ratio)
    assert score.value == pytest.approx(values.sum() / statistics[:, 1].sum())
    assert score.part(np.arange(10)).value == pytest.approx(values[:10].sum() / statistics[:10, 1].sum())
    counts = resampling_counts(len(values), 5)
    expected = [(row @ values) / (row @ statistics[:, 1]) for row in counts.astype(float)]
    assert resampled(score, counts) == pytest.approx(expected, rel=1e-9)


def test_some_of_the_captions_are_scored_by_their_own_number(values):
    counts, score = resampling_counts(len(values)), Score.of(values)
    found = resampled(score.part(slice(40)), counts[:, :40])
    assert found.mean() == pytest.approx(values[:40].mean(), abs=0.01)
    assert found.std() > 2 * resampled(score, counts).std()


def test_a_score_without_a_value_has_no_interval_and_is_not_compared():
    score = Score(np.zeros((10, 2)), ratio)
    assert np.isnan(interval(resampled(score, resampling_counts(10)))).all()
    found = compare(score, Score(np.ones((10, 2)), ratio), resampling_counts(10))
    assert np.isnan([found.difference, found.low, found.high, found.p_value]).all()


def test_the_difference_of_a_single_caption_has_no_interval():
    found = compare(Score.of(np.array([0.9])), Score.of(np.array([0.1])), resampling_counts(1))
    assert (found.difference, found.p_value) == (0.8, 1) and np.isnan([found.low, found.high]).all()


def test_two_equal_systems_do_not_differ(values):
    found = compare(Score.of(values), Score.of(values.copy()), resampling_counts(len(values)))
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_a_small_but_constant_gain_is_found(values):
    counts = resampling_counts(len(values))
    found = compare(Score.of(values + 0.01), Score.of(values), counts)
    assert found.difference == pytest.approx(0.01) and found.low > 0.009 and found.p_value < 0.001
    assert compare(Score.of(values), Score.of(values + 0.01), counts).difference == pytest.approx(-0.01)


def test_the_p_value_is_that_of_a_permutation_test():
    rng = np.random.default_rng(3)
    first = rng.normal(size=80)
    second = first + rng.normal(0.15, 1, size=80)
    found = compare(Score.of(first), Score.of(second), resampling_counts(80))
    expected = stats.permutation_test(
        (first, second), lambda a, b: (a - b).mean(), permutation_type="samples", n_resamples=20_000, rng=0
    ).pvalue
    assert 0.02 < expected < 0.9 and found.p_value == pytest.approx(expected, abs=0.02)


def test_systems_on_other_captions_are_no_pair(values):
    with pytest.raises(ValueError, match="shapes"):
        compare(Score.of(values), Score.of(values[:-1]), resampling_counts(len(values)))


def test_randomizations_without_a_value_count_neither_way():
    """A rare finding: in half of the swaps one of the two systems has none of it."""
    first, second = np.zeros((8, 2)), np.zeros((8, 2))
    first[0], second[1] = (1, 1), (0, 1)
    found = compare(Score(first, ratio), Score(second, ratio), resampling_counts(8))
    assert (found.difference, found.p_value) == (1, 1), "all swaps that have a value have this difference"


def test_p_values_are_corrected_for_their_number():
    """Worked by hand: the smallest counts for all four, and no p-value falls below that of a smaller one."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []
