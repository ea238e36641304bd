"""Means over seeds, differences with their uncertainty, and smoothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pgrpo.types import FloatArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error (NaN where it is unknown)."""

    mean: float
    se: float = math.nan


@dataclass(frozen=True)
class Difference:
    """A difference of means over seeds, with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero.

        An interval without width does not count: on the coarse grid of a few held-out prompts two
        seeds may well differ equally by chance.
        """
        return self.high - self.low > 1e-9 and (self.low > 0 or self.high < 0)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and sd (ddof 1) / sqrt(n) of the finite values; one value has no standard error."""
    x = np.array([v for v in values if math.isfinite(v)])
    if len(x) == 0:
        return Estimate(math.nan)
    if len(x) == 1:
        return Estimate(float(x[0]))
    return Estimate(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))))


def mean_change(before: Sequence[float], after: Sequence[float]) -> Difference | None:
    """Mean of after - before with Student's t over the seeds; None with fewer than two of them."""
    change = np.array(after, float) - np.array(before, float)
    change = change[np.isfinite(change)]
    if len(change) < 2:
        return None
    estimate = over_seeds(change.tolist())
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(change) - 1)) * estimate.se
    return Difference(estimate.mean, estimate.mean - reach, estimate.mean + reach)


def tukey_difference(outcomes: Mapping[str, Sequence[float]], a: str, b: str) -> Difference:
    """Mean of arm a minus mean of arm b with the Tukey-Kramer interval.

    It holds for all pairs of arms at once (a report looks at the best of them) and takes the seeds'
    variance to be the same in every arm, so that a few seeds each suffice to estimate it. Every
    arm has two outcomes or more.
    """
    groups = {name: np.array(xs, float) for name, xs in outcomes.items()}
    freedom = sum(len(x) - 1 for x in groups.values())
    variance = sum(float(((x - x.mean()) ** 2).sum()) for x in groups.values()) / freedom
    x, y = groups[a], groups[b]
    quantile = float(stats.studentized_range.ppf(CONFIDENCE, len(groups), freedom))
    reach = quantile * math.sqrt(variance / 2 * (1 / len(x) + 1 / len(y)))
    mean = float(x.mean() - y.mean())
    return Difference(mean, mean - reach, mean + reach)


def moving_mean(values: FloatArray, window: int) -> FloatArray:
    """Centred moving mean of [T] values that skips gaps and narrows at the ends.

    Nothing is drawn before the first or after the last finite value.
    """
    present = np.isfinite(values)
    if not present.any():
        return values
    kernel, half = np.ones(window), window // 2
    sums = np.convolve(np.where(present, values, 0.0), kernel)[half : half + len(values)]
    counts = np.convolve(present, kernel)[half : half + len(values)]
    where = np.flatnonzero(present)
    inside = (np.arange(len(values)) >= where[0]) & (np.arange(len(values)) <= where[-1])
    return np.where(inside & (counts > 0.5), sums / np.maximum(counts, 1), math.nan)


def mean_and_band(values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean and band over the seeds of [S, T] values, gaps skipped.

    The band is the range for two seeds, mean +- 1.96 standard errors for more, NaN for one.
    """
    present = np.isfinite(values)
    n = present.sum(axis=0)
    filled = np.where(present, values, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(n > 0, filled.sum(axis=0) / n, math.nan)
        squares = np.where(present, values - mean, 0.0) ** 2
        reach = 1.96 * np.sqrt(squares.sum(axis=0) / (n - 1) / n)
    least = np.where(present, values, math.inf).min(axis=0)
    most = np.where(present, values, -math.inf).max(axis=0)
    low = np.where(n > 2, mean - reach, np.where(n == 2, least, math.nan))
    high = np.where(n > 2, mean + reach, np.where(n == 2, most, math.nan))
    return mean, low, high


def mean(values: Sequence[float] | FloatArray) -> float:
    """Mean of the finite values; NaN where there is none."""
    x = np.asarray(values, dtype=np.float64)
    x = x[np.isfinite(x)]
    return float(x.mean()) if len(x) else math.nan
