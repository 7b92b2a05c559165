"""Confidence intervals of a score by the bootstrap, and a paired test of two systems.

Captions are resampled with a fixed seed, and all resamples are scored at once. The interval is the percentile
bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13), the test is approximate
randomization (Noreen, Computer-Intensive Methods for Testing Hypotheses, 1989).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


RESAMPLES = 1000
RANDOMIZATIONS = 10_000
LEVEL = 0.95
CHUNK = 2**24  # random numbers drawn at a time: 128 MB


def mean(sums: np.ndarray, number: int) -> np.ndarray:
    """Return the mean `[...]` of one statistic per caption from its sums `[..., 1]` over `number` captions."""
    return sums[..., 0] / number


@dataclass(frozen=True)
class Score:
    """A score of N captions that is a function of sums over them.

    `statistics`, float `[N, S]`, are what each caption adds to the sums: one value for a mean over captions; for BLEU
    the matched and the possible n-grams. `combine` turns sums `[..., S]` over so many captions into scores `[...]`.
    """

    statistics: np.ndarray
    combine: Callable[[np.ndarray, int], np.ndarray] = mean

    @classmethod
    def of(cls, values: np.ndarray) -> "Score":
        """Return the mean of one value per caption, `[N]`."""
        return cls(np.asarray(values, dtype=np.float64)[:, None])

    @property
    def value(self) -> float:
        """The score of all captions."""
        return float(self.combine(self.statistics.sum(axis=0), len(self.statistics)))

    def part(self, rows: np.ndarray | slice) -> "Score":
        """Return the score of some of the captions, given by index or by a boolean mask."""
        return Score(self.statistics[rows], self.combine)


def resampling_counts(number: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return how often each resample draws each of `number` captions, float32 `[resamples, number]`."""
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, number), dtype=np.float32)
    for resample in counts:
        resample[:] = np.bincount(rng.integers(number, size=number), minlength=number)
    return counts


def resampled(score: Score, counts: np.ndarray) -> np.ndarray:
    """Return the score of each resample, float64 `[resamples]`; NaN for one without any captions.

    `counts` are those of `resampling_counts`; of a part of the captions their columns. A single caption does not show
    how much captions vary: all of its resamples are NaN.
    """
    if len(score.statistics) == 1:
        return np.full(len(counts), math.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return score.combine(counts @ score.statistics, counts.sum(axis=1, dtype=np.float64))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of resampled scores `[resamples]`; NaN and infinity are left out."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def num_decimals(low: float | None, high: float | None) -> int:
    """Return how many decimals of a score are worth showing, 2 or 3: one beyond the first that its interval moves."""
    if low is None or high is None or high <= low:
        return 3
    return min(3, max(2, 1 + math.ceil(-math.log10((high - low) / 2))))


@dataclass(frozen=True)
class Comparison:
    """The score of the first of two systems minus that of the second; all NaN where one is undefined.

    `low` and `high` are the ends of the 95 % interval. `p_value` is two-sided, by approximate randomization: how often
    a difference at least as large occurs when a coin decides for each caption whether the two systems swap theirs.
    """

    difference: float
    low: float
    high: float
    p_value: float


def compare(first: Score, second: Score, counts: np.ndarray) -> Comparison:
    """Test a score of two systems on the same N images, resampled alike by `resampling_counts`, `[resamples, N]`.

    Raises:
        ValueError: the two do not have the same number of captions.
    """
    difference, exchanged = first.value - second.value, second.statistics - first.statistics
    if not math.isfinite(difference):
        return Comparison(*[math.nan] * 4)
    low, high = interval(resampled(first, counts) - resampled(second, counts))
    rng, number, swapped = np.random.default_rng(0), len(exchanged), []
    chunk = max(1, CHUNK // number)
    for start in range(0, RANDOMIZATIONS, chunk):
        swaps = rng.integers(2, size=(min(chunk, RANDOMIZATIONS - start), number), dtype=np.uint8)
        moved = swaps.astype(np.float64) @ exchanged
        ours, theirs = first.statistics.sum(axis=0) + moved, second.statistics.sum(axis=0) - moved
        swapped.append(np.abs(first.combine(ours, number) - second.combine(theirs, number)))
    swapped = np.concatenate(swapped)
    swapped = swapped[np.isfinite(swapped)]
    extreme = int((swapped >= abs(difference) - 1e-12).sum())  # the order of a sum changes the last bits
    return Comparison(difference, low, high, (1 + extreme) / (1 + len(swapped)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: Holm, Scandinavian Journal of Statistics 6:65, 1979."""
    order = np.argsort(p_values)
    corrected = np.empty(len(order))
    steps = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()
