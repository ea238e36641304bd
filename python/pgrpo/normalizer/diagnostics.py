"""What the running sums of a normalizer tell about its clusters, and what to be warned of.

Costs O(K) for K clusters; no single reward is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pgrpo.normalizer.options import RULES, Options
from pgrpo.normalizer.state import deviation
from pgrpo.types import ClusterId, FloatArray

LAGGING = 0.3
"""Mean advantages beyond this say that histories lag behind the rewards."""
MINORITY = 0.05
"""Clusters with a smaller share of the data learn slowly, however they are normalised."""
Z_95 = 1.6448536269514722
"""What 95 % of a standard normal variable's values lie below."""


@dataclass(frozen=True, slots=True)
class ClusterDiagnostics:
    """One cluster; rewards are raw. None is what was not tracked, or what too little is known of."""

    count: float
    """Finite rewards seen, n_p."""
    share: float
    """Of the rewards of all clusters, q_p."""
    mean: float
    """Of its rewards."""
    std: float
    """Of its rewards, dividing by count - ddof; 0 where count <= ddof."""
    group_size: float | None
    """Mean number of its rollouts in a group, G_p. Where groups mix clusters, its own ones count."""
    icc: float | None
    """Share of the reward's variance that lies between prompts, tau^2 / (tau^2 + MSW), of the
    variances of `shrinkage`."""
    scale_ratio: float | None
    """(sqrt(MSW) + eps) / (sigma_p + eps): how P-GRPO scales GRPO's advantages (Corollary 3.1)."""
    bias_rms: float | None
    """sqrt(SSB / n_p) / (sigma_p + eps): root mean square of what P-GRPO adds to them (Corollary 3.1),
    of SSB, the sum of squares between groups."""
    mean_advantage: float | None
    """Of the advantages returned so far, before clipping."""
    std_advantage: float | None
    """Their standard deviation about that mean."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """All clusters with a history, and what to be warned of."""

    clusters: dict[ClusterId, ClusterDiagnostics]
    eta2: float | None
    """Share of the variance of all rewards that lies between clusters."""
    eta2_null: float | None
    """The same share to be expected if rewards were dealt to the clusters at random: (K-1) / (N-1)."""
    eta2_threshold: float | None
    """What 95 % of such deals stay below, by the F distribution of normal rewards, approximated to
    2.5 % of the value (in truth 94.7 to 95.5 % stay below). None where N - K < 3. Rewards are taken as
    independent: those of one prompt are not, so clusters of few prompts exceed it by prompts alone."""
    num_nonfinite: int
    """Non-finite rewards left out so far."""
    warnings: list[str]
    """What may go wrong, a sentence each."""


def diagnose(
    ids: Sequence[ClusterId],
    sums: Mapping[str, FloatArray],
    num_nonfinite: int,
    options: Options,
) -> Diagnostics:
    """Read the sums [K] of each cluster."""
    eps, sigma_floor = options.eps, options.sigma_floor
    n, m2 = sums["count"], sums["m2"]
    mean = sums["origin"] + sums["offset"]
    std = deviation(n, m2, options.ddof)
    sigma = np.maximum(std, sigma_floor)
    parts, squares, within = sums["num_parts"], sums["squared_sizes"], sums["within_squares"]
    calls, total = sums["num_advantages"], sums["advantage_sum"]
    with np.errstate(divide="ignore", invalid="ignore"):
        # Weighted sums that should be equal are so up to rounding.
        estimable = (n - parts > 1e-12 * n) & (n * n - squares > 1e-12 * n * n)
        nothing = np.full_like(n, np.nan)
        grouped = parts > 0
        between = np.maximum(m2 - within, 0.0)
        within_mean = np.where(grouped & estimable, within / (n - parts), nothing)
        tau2 = np.maximum((between - parts * within_mean) / (n - squares / n), 0.0)
        icc = tau2 / (tau2 + within_mean)
        group_size = np.where(grouped, n / parts, nothing)
        scale_ratio = (np.sqrt(within_mean) + eps) / (sigma + eps)
        bias_rms = np.where(grouped, np.sqrt(between / n) / (sigma + eps), nothing)
        mean_advantage = total / calls
        spread = sums["advantage_squares"] / calls - mean_advantage**2
        std_advantage = np.sqrt(np.maximum(spread, 0.0))
    share = n / n.sum()
    eta2, null, threshold = _between_clusters(sums)

    warnings: list[str] = []

    def warn(found: np.ndarray[tuple[int], np.dtype[np.bool_]], what: str) -> None:
        names = [repr(ids[index]) for index in np.flatnonzero(found).tolist()]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            noun = "cluster" if len(names) == 1 else "clusters"
            warnings.append(f"{noun} {', '.join(names[:3])}{more}: {what}")

    # Rewards of 0 and 1 alone fulfil var = mean (1 - mean), and no others between 0 and 1 do.
    binary = np.abs(m2 - n * mean * (1 - mean)) <= 1e-9 * n
    if options.estimator == "pgrpo":
        what = "rewards differ more between prompts than between rollouts of one (ICC * group size > 1)"
        warn((icc * group_size > 1) & ~binary, f"{what}; shrinkage or auto varies less")
    idle = RULES[options.estimator].without_effect(0.0)
    if "forgetting" not in idle:
        what = "the history lags behind; forgetting below 1 lets it follow"
        warn(np.abs(mean_advantage) > LAGGING, f"|mean advantage| > {LAGGING}: {what}")
    if "prior_count" not in idle:
        warn(n < 2 * group_size, "fewer rewards than two groups have; prior_count steadies it")
    warn(
        (n >= 2) & (std <= sigma_floor),
        "the standard deviation is 0, or at the floor: all rewards nearly equal",
    )
    warn(share < MINORITY, f"under {MINORITY:.0%} of the data; frequency_weight 0.5 helps it")
    if eta2 is not None and threshold is not None and eta2 <= threshold:
        warnings.append(
            f"clusters carry no information about mean rewards: they explain {eta2:.2%} of the "
            f"variance, and random ones would explain up to {threshold:.2%}"
        )
    if num_nonfinite:
        warnings.append(f"rewards that are None, NaN or infinite were left out: {num_nonfinite}")

    columns = [
        n, share, mean, std, group_size, icc, scale_ratio, bias_rms, mean_advantage, std_advantage,
    ]  # fmt: skip
    clusters: dict[ClusterId, ClusterDiagnostics] = {}
    for cluster, row in zip(ids, np.column_stack(columns).tolist(), strict=True):
        known = (None if math.isnan(value) else value for value in row[4:])
        clusters[cluster] = ClusterDiagnostics(*row[:4], *known)
    return Diagnostics(clusters, eta2, null, threshold, num_nonfinite, warnings)


def _between_clusters(
    sums: Mapping[str, FloatArray],
) -> tuple[float | None, float | None, float | None]:
    """eta^2, what is expected of it and what 95 % stay below if clusters say nothing."""
    n, num_clusters = sums["count"], len(sums["count"])
    total = float(n.sum())
    if num_clusters < 2 or total <= num_clusters:
        return None, None, None
    # About one of the origins: means far from 0 would cancel.
    mean = (sums["origin"] - sums["origin"][0]) + sums["offset"]
    between = float(n @ (mean - n @ mean / total) ** 2)
    variation = between + float(sums["m2"].sum())
    if variation == 0:
        return None, None, None
    freedom = num_clusters - 1, total - num_clusters
    threshold = None
    if freedom[1] >= 3:
        ratio = freedom[0] * f_quantile_95(*freedom)
        threshold = ratio / (ratio + freedom[1])
    return between / variation, freedom[0] / (total - 1), threshold


def f_quantile_95(numerator: float, denominator: float) -> float:
    """The 95 % quantile of an F distribution of so many degrees of freedom, the second at least 3.

    By Paulson's approximation (1942): the cube root of F, like that of a chi-square over its degrees
    of freedom, is nearly normal with mean 1 - 2 / (9 d) and variance 2 / (9 d).
    """
    a, b = 2 / (9 * numerator), 2 / (9 * denominator)
    # ((1 - b) x - (1 - a))^2 = z^2 (b x^2 + a), of x the cube root of F: the larger solution.
    square, middle = (1 - b) ** 2 - Z_95**2 * b, (1 - a) * (1 - b)
    rest = (1 - a) ** 2 - Z_95**2 * a
    return ((middle + math.sqrt(middle**2 - square * rest)) / square) ** 3
