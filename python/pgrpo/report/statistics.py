"""Means over seeds, differences with their uncertainty, and smoothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
from scipy import stats

from pgrpo.types import FloatArray

CONFIDENCE = 0.95
DRAWS = 10_000
"""Of a bootstrap: the ends of an interval are then off by a fiftieth of its length or so."""

Outcome: TypeAlias = Literal["better", "level", "worse"]


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

    @property
    def outcome(self) -> Outcome:
        """`better` where the whole interval is above zero, `worse` where it is below, else `level`."""
        return "level" if not self.clear else "better" if self.low > 0 else "worse"

    def reaches(self, margin: float) -> bool:
        """Whether the interval leaves out any loss of `margin` or more (non-inferiority). That a
        difference is level does not say so: the noisier it is, the sooner it is level."""
        return self.high - self.low > 1e-9 and self.low > -margin


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


def bootstrap_difference(
    change: FloatArray, people: Sequence[str], draws: int = DRAWS, seed: int = 0
) -> Difference | None:
    """Mean over seeds of each one's mean change, with the percentile interval of a two-way bootstrap.

    Each draw takes as many seeds and, on its own, as many people as there are, with replacement (the
    pigeonhole bootstrap, Owen 2007), a person with all prompts that are theirs: prompts of a person are
    not independent, and all seeds share them. It errs on the wide side where seeds and people vary
    alike; with few seeds that differ more than people do, on the narrow one, like any percentile
    interval of five values.

    Args:
        change: [S, H] after - before by seed and prompt; NaN where one of them is unknown.
        people: [H] whose prompt it is.
        draws: number of draws.
        seed: of the draws.

    Returns:
        None with fewer than two seeds or people, or where nothing is known of a seed.
    """
    names, who = np.unique(np.array(people), return_inverse=True)
    num_seeds, num_people = len(change), len(names)
    known = np.isfinite(change)
    if num_seeds < 2 or num_people < 2 or not known.any(1).all():
        return None

    def per_person(values: FloatArray) -> FloatArray:
        return np.stack([np.bincount(who, row, num_people) for row in values]).astype(np.float64)

    sums, sizes = per_person(np.where(known, change, 0.0)), per_person(known.astype(np.float64))
    seeds, drawn = _drawn(num_seeds, num_people, draws, seed)
    with np.errstate(invalid="ignore"):
        of_seed = (drawn @ sums.T) / (drawn @ sizes.T)  # [draws, S]
    # Of a seed that was not drawn nothing need be known.
    means = np.where(seeds > 0, seeds * of_seed, 0.0).sum(1) / num_seeds
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(means, [tail, 1 - tail])
    return Difference(float((sums.sum(1) / sizes.sum(1)).mean()), float(low), float(high))


@lru_cache(maxsize=2)
def _drawn(num_seeds: int, num_people: int, draws: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """How often each seed and each person is drawn, all that a mean needs of a draw: [draws, S] and
    [draws, P]. Kept, for the differences of one experiment are all of as many."""
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), draws)
    people = rng.multinomial(num_people, np.full(num_people, 1 / num_people), draws)
    return seeds.astype(np.float64), people.astype(np.float64)


def paired_difference(
    change: FloatArray, people: Sequence[str], draws: int = DRAWS
) -> Difference | None:
    """Mean of the changes [S, H] with the interval that verdicts rest on: at either end the farther of
    the two-way bootstrap's (`bootstrap_difference`) and Student's of the seeds' means (`mean_change`).

    Student's knows nothing of who was asked, and the bootstrap is too narrow for what differs between a
    few seeds; whatever stands after both is not owed to either. None as there.
    """
    drawn = bootstrap_difference(change, people, draws)
    means = [mean(row) for row in change]
    student = mean_change([0.0] * len(means), means)
    if drawn is None or student is None:
        return None
    return Difference(drawn.mean, min(drawn.low, student.low), max(drawn.high, student.high))


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
