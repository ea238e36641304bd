"""Numbers that tell of clusters: how well they are parted, whether they come out again, and how much of
the rewards they explain.

Axes: U users, F features, N rewards, K clusters, P permutations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pgrpo.types import ClusterId, FloatArray

PERMUTATIONS = 2000
"""Draws of the null: its 95 % quantile then has 100 of them above it, and no p is below 1 / 2001."""


@dataclass(frozen=True, slots=True)
class RewardInformation:
    """How much of the variance of rewards lies between clusters, and how much would by chance.

    With the mean reward m, the n_k rewards of cluster k and their mean m_k,

        eta2 = sum_k n_k (m_k - m)^2 / sum_i (r_i - m)^2

    The null deals the clusters to the users anew, so that every cluster keeps its number of users and
    every user its rewards: those of one person belong together, and dealing out single rewards would
    take whatever people differ in for information of the clusters. (The normalizer's diagnostics know
    sums of clusters alone, no people, so that their null is that of independent rewards.)
    """

    eta2: float
    """Share of the variance that lies between the clusters."""
    null_mean: float
    """Mean of that share over the draws of the null."""
    null_95: float
    """What 95 % of the draws stay at or below."""
    p: float
    """(1 + draws of at least eta2) / (1 + P): how often chance does as well (Davison and Hinkley
    1997)."""
    num_users: int
    """Users with a reward."""
    num_rewards: int
    """N."""
    null: FloatArray = field(repr=False, compare=False)
    """[P] the draws."""

    @property
    def adjusted(self) -> float:
        """What there is beyond chance, (eta2 - null_mean) / (1 - null_mean): comparable between numbers
        of clusters, for more of them explain more by chance alone. 0 where chance explains everything,
        up to rounding, as with a cluster for each person."""
        left = 1 - self.null_mean
        return (self.eta2 - self.null_mean) / left if left > 1e-9 else 0.0

    @property
    def is_clear(self) -> bool:
        """Whether chance does as well in less than one of twenty draws."""
        return self.p < 0.05


def reward_information(
    cluster_of: Mapping[str, ClusterId],
    users: Sequence[str],
    rewards: FloatArray,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> RewardInformation | None:
    """What clusters tell of rewards; None where that has no meaning: rewards that are all equal, or
    people with a reward in fewer than two clusters.

    Costs O(N + P U).

    Args:
        cluster_of: every user's cluster.
        users: [N] whose reward each is.
        rewards: [N] raw and finite.
        permutations: P.
        seed: of the draws.
    """
    if not len(rewards) or np.ptp(rewards) == 0:
        return None
    names, whose = list(dict.fromkeys(users)), _codes(users)
    labels = _codes([cluster_of[name] for name in names])
    num_clusters = int(labels.max()) + 1
    if num_clusters < 2:
        return None
    deviations = rewards - rewards.mean()
    counts = np.bincount(whose).astype(np.float64)
    sums = np.bincount(whose, weights=deviations)
    total = float(deviations @ deviations)

    def share(dealt: NDArray[np.intp]) -> float:
        # Every cluster has a user with a reward, so that none has a count of 0.
        size = np.bincount(dealt, weights=counts, minlength=num_clusters)
        between = np.square(np.bincount(dealt, weights=sums, minlength=num_clusters)) / size
        return float(between.sum()) / total

    rng = np.random.default_rng(seed)
    eta2, null = (
        share(labels),
        np.array([share(rng.permutation(labels)) for _ in range(permutations)]),
    )
    # Sums of the same numbers in another order differ by rounding.
    as_good = int((null >= eta2 * (1 - 1e-9)).sum())
    return RewardInformation(
        eta2=eta2,
        null_mean=float(null.mean()),
        null_95=float(np.quantile(null, 0.95, method="higher")),
        p=(1 + as_good) / (1 + permutations),
        num_users=len(names),
        num_rewards=len(rewards),
        null=null,
    )


def means(
    cluster_of: Mapping[str, ClusterId], users: Sequence[str], rewards: FloatArray
) -> dict[ClusterId, tuple[float, float | None]]:
    """Mean reward of each cluster that has some, and its standard error; None with a single person.

    People are what is drawn, not rewards. With the n rewards of U people and each one's sum e of
    deviations from the mean,

        se^2 = U / (U - 1) * sum_u e_u^2 / n^2          (Cochran 1977, of a ratio of two sums)
    """
    whose: dict[ClusterId, dict[str, list[float]]] = {}
    for user, reward in zip(users, rewards.tolist(), strict=True):
        whose.setdefault(cluster_of[user], {}).setdefault(user, []).append(reward)
    found: dict[ClusterId, tuple[float, float | None]] = {}
    for cluster, of_users in whose.items():
        num, count = len(of_users), sum(map(len, of_users.values()))
        mean = sum(map(sum, of_users.values())) / count
        squares = sum((sum(own) - len(own) * mean) ** 2 for own in of_users.values())
        error = (squares * num / (num - 1)) ** 0.5 / count if num > 1 else None
        found[cluster] = (mean, error)
    return found


def silhouettes(points: FloatArray, clusters: Sequence[ClusterId]) -> FloatArray | None:
    """[U] how much nearer each point is to its own cluster than to the next, from -1 to 1 (Rousseeuw
    1987); None where there is one cluster alone, or one for every point.

    Of a point with mean distance a to the others of its cluster and b to those of the nearest other
    one, (b - a) / max(a, b); 0 of one that is alone. Distances are Euclidean; costs O(U^2 F).
    """
    from sklearn.metrics import silhouette_samples  # it takes a second to import

    labels = _codes(clusters)
    if not 2 <= len(np.unique(labels)) < len(labels):
        return None
    return np.asarray(silhouette_samples(points, labels), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Projection:
    """Points on the plane along which they spread most: their first two principal components."""

    places: FloatArray
    """[U, 2]."""
    axes: FloatArray
    """[2, F] of unit length; the largest entry of each is positive, which fixes its sign."""
    explained: tuple[float, float]
    """Share of the variance along each."""


def projection(points: FloatArray) -> Projection | None:
    """The principal components of points [U, F]; None where they do not spread at all."""
    centred = points - points.mean(axis=0)
    variances, vectors = np.linalg.eigh(centred.T @ centred)
    if not len(variances) or variances[-1] <= 0:
        return None
    # One feature alone has no second axis.
    axes = np.zeros((2, points.shape[1]))
    axes[: min(2, len(variances))] = vectors.T[::-1][:2]
    largest = axes[np.arange(2), np.abs(axes).argmax(axis=1)]
    axes *= np.where(largest < 0, -1.0, 1.0)[:, None]
    shares = [*(variances[::-1] / variances.sum()).tolist(), 0.0]
    return Projection(centred @ axes.T, axes, (shares[0], max(shares[1], 0.0)))


def agreement(fits: Sequence[Mapping[str, ClusterId]]) -> float | None:
    """Mean adjusted Rand index (Hubert and Arabie 1985) over all pairs of fits, of the users that both
    divide: 1 where they always agree, 0 where they do by chance. None where no two share two users."""
    from sklearn.metrics import adjusted_rand_score  # as above

    found: list[float] = []
    for one, other in combinations(fits, 2):
        common = [user for user in one if user in other]
        if len(common) > 1:
            labels = [_codes([fit[user] for user in common]) for fit in (one, other)]
            found.append(float(adjusted_rand_score(*labels)))
    return float(np.mean(found)) if found else None


def half_samples(users: Sequence[str], num: int, seed: int) -> list[list[str]]:
    """Halves of the users, each drawn anew without replacement, in the order that the users have."""
    rng = np.random.default_rng(seed)
    size = (len(users) + 1) // 2
    return [
        [users[int(place)] for place in np.sort(rng.permutation(len(users))[:size])]
        for _ in range(num)
    ]


def _codes(names: Sequence[ClusterId]) -> NDArray[np.intp]:
    """[U] names as numbers from 0 on; ints and strings stay apart."""
    number: dict[ClusterId, int] = {}
    return np.array([number.setdefault(each, len(number)) for each in names], dtype=np.intp)
