"""What can be known of clusters before a run begins with them, and how many to make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgrpo.clusters.assignment import cluster_users
from pgrpo.clusters.description import Description, describe
from pgrpo.clusters.features import standardised
from pgrpo.clusters.measures import (
    RewardInformation,
    agreement,
    half_samples,
    means,
    reward_information,
    silhouettes,
)
from pgrpo.errors import ConfigError, DataError
from pgrpo.plugins.hookspecs import Clusterer
from pgrpo.types import ClusterId, Dataset, Example, FloatArray, Json

SAMPLE = 4000
"""Most users that silhouettes and stability are taken of: silhouettes look at all pairs, of which this
is 16 million."""

HALVES = 10
"""Halves of the users on which a clusterer is fitted, for each number of clusters: 45 pairs, whose
agreement is averaged."""

KS = (2, 3, 5, 8, 16)
"""Numbers of clusters that are compared, besides the one that is configured."""

TYPICAL = 3
"""Users of a cluster that stand for it."""

SEED = 0
"""Of samples, halves and permutations: the same clusters have the same numbers every time."""


@dataclass(frozen=True, slots=True)
class Rewards:
    """Rewards of people."""

    users: Sequence[str]
    """[N] whose each is."""
    values: FloatArray
    """[N] raw and finite."""
    about: str
    """What they are, in words that go on after `of`."""
    notes: Sequence[str] = ()
    """Sentences on what they can tell of clusters and what not."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A number of clusters, and how well so many do; None is what cannot be known."""

    num_clusters: int
    """What was asked of the clusterer."""
    silhouette: float | None
    """Mean over the users."""
    stability: float | None
    """Mean adjusted Rand index between fits on halves of the users."""
    information: RewardInformation | None
    """Of the rewards, where there are any."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """Clusters, and all that was found out about them."""

    cluster_of: Mapping[str, ClusterId]
    """Every user's cluster."""
    state: Mapping[str, Json]
    """The fitted clusterer's."""
    feature_names: tuple[str, ...]
    """Names of the F features."""
    about: Mapping[ClusterId, Description]
    """Who the clusters are, the largest first."""
    typical: Mapping[ClusterId, Sequence[str]]
    """Users nearest to the mean of their cluster by their features, at most TYPICAL; where there are
    none, the first of each cluster."""
    points: FloatArray
    """[U, F] standardised features, in the order of `cluster_of`; F is 0 where there are none."""
    sampled: NDArray[np.intp]
    """[S] places of the users that silhouettes and stability are of: all, or SAMPLE of them."""
    silhouettes: FloatArray | None
    """[S] of the sampled users."""
    own: Candidate
    """The clusters as they are configured."""
    candidates: Sequence[Candidate]
    """By number of clusters; empty where the clusterer is not told how many to make."""
    rewards: Rewards | None
    """What the reward information is of."""
    mean_rewards: Mapping[ClusterId, tuple[float, float | None]]
    """Of each cluster that has some, and its standard error over people."""

    @property
    def recommended(self) -> Candidate | None:
        """The best of the candidates; see `best`."""
        return best(self.candidates)


def analyse(
    make: Callable[[int | None], Clusterer],
    dataset: Dataset,
    *,
    configured: int | None,
    rewards: Rewards | None = None,
    ks: Iterable[int] = KS,
    note: Callable[[str], None] = lambda _: None,
) -> Analysis:
    """Fit a clusterer, and others like it with other numbers of clusters, and measure them.

    Args:
        make: a new clusterer that makes so many clusters; with None one as it is configured.
        dataset: whose users are divided.
        configured: how many clusters the configured one makes; None where it is not told a number, and
            then no others are compared with it.
        rewards: of the users; others' are left out.
        ks: numbers of clusters to compare.
        note: is told what takes long.

    Raises:
        PluginError: the clusterer failed.
        DataError: it refuses the data as it is configured, or no reward is of one of its users.
    """
    users = list(dataset.users)
    note(f"fitting clusters to {len(users):,} users")
    clusterer = make(None)
    cluster_of = cluster_users(clusterer, dataset)
    if rewards is not None:
        rewards = _of_users(rewards, cluster_of)
    features = np.array(list(dataset.users.values()), dtype=np.float64).reshape(len(users), -1)
    # A clusterer need not read features, and then they may be anything.
    points = standardised(features) if np.isfinite(features).all() else features[:, :0]
    rng = np.random.default_rng(SEED)
    sampled = np.sort(rng.permutation(len(users))[:SAMPLE])
    pool = [users[place] for place in sampled.tolist()]
    parts, drawn = _Parts(dataset), half_samples(pool, HALVES, SEED)

    def measured(
        num: int | None, clusters: Mapping[str, ClusterId]
    ) -> tuple[Candidate, FloatArray | None]:
        known = [clusters[user] for user in pool]
        found = silhouettes(points[sampled], known) if points.shape[1] else None
        told = None
        if rewards is not None:
            told = reward_information(clusters, rewards.users, rewards.values, seed=SEED)
        try:
            fits = [cluster_users(make(num), parts.of(half)) for half in drawn]
        except DataError:
            # Half of the users are too few for so many clusters.
            fits = []
        silhouette = None if found is None else float(found.mean())
        number = len(set(clusters.values())) if num is None else num
        return Candidate(number, silhouette, agreement(fits), told), found

    note("measuring them")
    own, per_user = measured(configured, cluster_of)
    candidates = {} if configured is None else {configured: own}
    for num in sorted({*ks} - {configured}) if configured is not None else ():
        note(f"{num} clusters")
        try:
            clusters = cluster_users(make(num), dataset)
        except (ConfigError, DataError) as error:
            # The former where another setting goes with the number, as the sizes of `random` do.
            note(f"{num} clusters cannot be made: {error}")
            continue
        candidates[num], _ = measured(num, clusters)
    return Analysis(
        cluster_of=cluster_of,
        state=clusterer.state_dict(),
        feature_names=dataset.feature_names,
        about=describe(features, list(cluster_of.values()), dataset.feature_names),
        typical=_typical(cluster_of, points),
        points=points,
        sampled=sampled,
        silhouettes=per_user,
        own=own,
        candidates=[candidates[num] for num in sorted(candidates)],
        rewards=rewards,
        mean_rewards={} if rewards is None else means(cluster_of, rewards.users, rewards.values),
    )


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate with the best mean rank in silhouette, stability and reward information; of equal
    ones that with fewer clusters. None where there are fewer than two.

    Each measure counts alike, for none of them is all: silhouettes do not know what is rewarded, one
    cluster is always stable, and rewards are noisy. Differences below 0.01 are ties. Rewards count by
    what clusters explain beyond chance, and by 0 where chance does as well (p >= 0.05).
    """
    if len(candidates) < 2:
        return None
    ranks = [sum(ranks_of(each, candidates).values()) for each in candidates]
    return min(zip(ranks, candidates, strict=True), key=lambda c: (c[0], c[1].num_clusters))[1]


def ranks_of(candidate: Candidate, candidates: Sequence[Candidate]) -> dict[str, int]:
    """Measure -> the candidate's place in it, from 1 on; of the measures that anybody has."""
    places: dict[str, int] = {}
    for measure in ("silhouette", "stability", "information"):
        values = [_value(each, measure) for each in candidates]
        if max(values) > -np.inf:
            own = _value(candidate, measure)
            places[measure] = 1 + sum(value > own for value in values)
    return places


def _value(candidate: Candidate, measure: str) -> float:
    value: Any = getattr(candidate, measure)
    if isinstance(value, RewardInformation):
        value = value.adjusted if value.is_clear else 0.0
    return -np.inf if value is None else round(float(value), 2)


def _of_users(rewards: Rewards, cluster_of: Mapping[str, ClusterId]) -> Rewards:
    known = np.array([user in cluster_of for user in rewards.users], dtype=bool)
    if not known.any():
        raise DataError(
            f"none of the {len(rewards.users):,} rewards is of a user of the data set; the first is of "
            f"{rewards.users[0]!r}, and the data set's first user is {next(iter(cluster_of))!r}"
        )
    if known.all():
        return rewards
    left_out = f"{rewards.about}; {(~known).sum():,} of users who are not in the data set left out"
    users = [user for user in rewards.users if user in cluster_of]
    return replace(rewards, users=users, values=rewards.values[known], about=left_out)


def _typical(
    cluster_of: Mapping[str, ClusterId], points: FloatArray
) -> dict[ClusterId, Sequence[str]]:
    users = list(cluster_of)
    members: dict[ClusterId, list[int]] = {}
    for place, cluster in enumerate(cluster_of.values()):
        members.setdefault(cluster, []).append(place)
    found: dict[ClusterId, Sequence[str]] = {}
    for cluster, places in members.items():
        own = points[places]
        distances = np.square(own - own.mean(axis=0)).sum(axis=1)
        nearest = np.argsort(distances, kind="stable")[:TYPICAL]
        found[cluster] = [users[places[place]] for place in nearest.tolist()]
    return found


class _Parts:
    """Data sets of some of the users.

    Whose an example is, is looked up when a clusterer asks for examples: most do not, and some data
    sets make each example when it is read.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._train, self._evaluation = _Owned(dataset.train), _Owned(dataset.evaluation)
        self._observed = _Owned(dataset.observed)

    def of(self, users: Sequence[str]) -> Dataset:
        """The data set of these users, in their order."""
        wanted = frozenset(users)
        return replace(
            self._dataset,
            users={user: self._dataset.users[user] for user in users},
            train=_Own(self._train, wanted),
            evaluation=_Own(self._evaluation, wanted),
            observed=_Own(self._observed, wanted),
        )


class _Owned:
    """Examples, and whose they are."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    @cached_property
    def users(self) -> Sequence[str]:
        """Whose each example is."""
        return [example.user for example in self.examples]


class _Own(Sequence[Example]):
    """The examples of some users."""

    def __init__(self, owned: _Owned, users: frozenset[str]) -> None:
        self._owned, self._users = owned, users

    @cached_property
    def _places(self) -> list[int]:
        return [place for place, user in enumerate(self._owned.users) if user in self._users]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._owned.examples[place] for place in self._places[index]]
        return self._owned.examples[self._places[index]]
