"""Bootstrap intervals and the paired test, against their definitions and against scipy."""

import numpy as np
import pytest
from scipy import stats

from captioning.scoring.bootstrap import RESAMPLES, Score, compare, interval, resampled, resampling_counts


def ratio(sums, number):
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


@pytest.fixture
def values():
    return np.random.default_rng(1).beta(1, 5, size=400)


def test_each_resample_draws_as_many_captions_as_there_are():
    counts = resampling_counts(30)
    assert counts.shape == (RESAMPLES, 30)
    assert (counts.sum(axis=1) == 30).all()
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


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        low, high = interval(resampled(Score.of(rng.normal(3, 1, 60)), resampling_counts(60, seed=seed)))
        covered += low <= 3 <= high
    assert 0.88 <= covered / 100 < 1


def test_a_score_that_is_no_mean_is_made_of_sums(values):
    statistics = np.column_stack([values, np.arange(len(values)) % 3])
    score = Score(statistics, ratio)
    assert score.value == pytest.approx(values.sum() / statistics[:, 1].sum())
    assert score.of_rows(np.arange(10)) == pytest.approx(values[:10].sum() / statistics[:10, 1].sum())
    counts = resampling_counts(len(values), 5)
    expected = [(row @ values) / (row @ statistics[:, 1]) for row in counts.astype(float)]
    assert resampled(score, counts) == pytest.approx(expected, rel=1e-9)


def test_some_of_the_captions_are_scored_by_their_own_number(values):
    rows = np.arange(len(values)) < 40
    found = resampled(Score.of(values), resampling_counts(len(values)), rows)
    assert found.mean() == pytest.approx(values[:40].mean(), abs=0.01)
    assert found.std() > 2 * resampled(Score.of(values), resampling_counts(len(values))).std()


def test_a_score_without_a_value_has_no_interval_and_is_not_compared():
    score = Score(np.zeros((10, 2)), ratio)
    assert np.isnan(interval(resampled(score, resampling_counts(10)))).all()
    found = compare(score, Score(np.ones((10, 2)), ratio), resampling_counts(10))
    assert np.isnan([found.difference, found.low, found.high, found.p_value]).all()


def test_two_equal_systems_do_not_differ(values):
    found = compare(Score.of(values), Score.of(values.copy()), resampling_counts(len(values)))
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_a_small_but_constant_gain_is_found(values):
    counts = resampling_counts(len(values))
    found = compare(Score.of(values + 0.01), Score.of(values), counts)
    assert found.difference == pytest.approx(0.01)
    assert found.low > 0.009
    assert found.p_value < 0.001
    assert compare(Score.of(values), Score.of(values + 0.01), counts).difference == pytest.approx(-0.01)


def test_the_p_value_is_that_of_a_permutation_test():
    rng = np.random.default_rng(3)
    first = rng.normal(size=80)
    second = first + rng.normal(0.15, 1, size=80)
    found = compare(Score.of(first), Score.of(second), resampling_counts(80))
    expected = stats.permutation_test(
        (first, second), lambda a, b: (a - b).mean(), permutation_type="samples", n_resamples=20_000, rng=0
    ).pvalue
    assert 0.02 < expected < 0.9
    assert found.p_value == pytest.approx(expected, abs=0.02)


def test_chance_is_called_chance_as_often_as_it_should():
    rng = np.random.default_rng(5)
    counts = resampling_counts(50, 10)
    low = sum(
        compare(Score.of(rng.normal(size=50)), Score.of(rng.normal(size=50)), counts).p_value < 0.1 for _ in range(100)
    )
    assert 2 <= low <= 20


def test_systems_on_other_captions_are_no_pair(values):
    with pytest.raises(ValueError, match="shapes"):
        compare(Score.of(values), Score.of(values[:-1]), resampling_counts(len(values)))


def test_randomizations_without_a_value_count_neither_way():
    """A rare finding: in half of the swaps one of the two systems has none of it."""
    first, second = np.zeros((8, 2)), np.zeros((8, 2))
    first[0], second[1] = (1, 1), (0, 1)
    found = compare(Score(first, ratio), Score(second, ratio), resampling_counts(8))
    assert found.difference == 1
    assert found.p_value == 1, "all swaps that have a value have this difference"
