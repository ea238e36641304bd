"""Every user's cluster, or clusters, by a clusterer that is fitted or restored and not trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from pgrpo.clusters.saved import Saved
from pgrpo.errors import ConfigError, PgrpoError, PluginError
from pgrpo.normalizer.arrays import short
from pgrpo.plugins.hookspecs import Clusterer, SoftClusterer
from pgrpo.types import ClusterId, Dataset, Example, FloatArray, Json

NEGLIGIBLE = 0.01
"""The least of a user's weights are left out as long as they come to no more than this together: a
reward then enters the few histories that it tells something, and hardly any mean notices."""

Shares = Mapping[ClusterId, float]
"""By how much a user belongs to each of several clusters, or a reward to each of several histories;
together 1."""


def cluster_users(
    clusterer: Clusterer, dataset: Dataset, state: Mapping[str, Json] | None = None
) -> dict[str, ClusterId]:
    """Fit a clusterer to a data set, or restore it, and say every user's cluster.

    A clusterer that reads answers is shown no held-out ones.

    What a plugin returns is checked here, before the first step: one int or string per user, no two
    of them alike in print, and a state that JSON can hold.

    Raises:
        PluginError: the clusterer raised, or returned something else.
        DataError: saved clusters are of people with other features.
    """
    users, features = _users(dataset)
    name = type(clusterer).__name__
    with _blamed(name):
        if state is None:
            clusterer.fit(users, features, _examples(clusterer, dataset))
        else:
            clusterer.load_state_dict(state)
        assigned = [_cluster_id(cluster) for cluster in clusterer.assign(users, features)]
        json.dumps(clusterer.state_dict(), allow_nan=False)
    if len(assigned) != len(users):
        raise PluginError(
            f"clusterer {name} returned {len(assigned)} clusters for {len(users)} users"
        )
    if len({str(cluster) for cluster in assigned}) < len(set(assigned)):
        raise PluginError(
            f"clusterer {name} returned clusters that differ only in type, as 1 and '1'"
        )
    if isinstance(clusterer, Saved):
        clusterer.check_features(dataset.feature_names)
    return dict(zip(users, assigned, strict=True))


def user_shares(
    clusterer: Clusterer, dataset: Dataset, cluster_of: Mapping[str, ClusterId]
) -> dict[str, Shares]:
    """By how much each user belongs to each cluster, as a clusterer says that `cluster_users` has
    fitted or restored.

    The least weights, NEGLIGIBLE together, are left out, and the rest divided by their sum. A user of
    one cluster has the weight 1 exactly.

    Args:
        clusterer: with a method `memberships`.
        dataset: whose users they are.
        cluster_of: what `cluster_users` said of them.

    Raises:
        ConfigError: the clusterer has no such method.
        PluginError: it raised, or a user's weights are none: not one mapping per user, a cluster that
            is no int or string, a weight below 0, a sum other than 1, or a cluster of `assign` with
            less weight than another.
    """
    name = type(clusterer).__name__
    if not isinstance(clusterer, SoftClusterer):
        raise ConfigError(
            f"clustering.soft is true, and clusterer {name} has no method memberships that says by how "
            "much a user belongs to each cluster; expected false"
        )
    users, features = _users(dataset)
    with _blamed(name):
        memberships = [
            {_cluster_id(cluster): float(weight) for cluster, weight in weights.items()}
            for weights in clusterer.memberships(users, features)
        ]
    if len(memberships) != len(users):
        raise PluginError(
            f"clusterer {name} returned {len(memberships)} memberships for {len(users)} users"
        )
    named = {cluster for weights in memberships for cluster in weights} | set(cluster_of.values())
    if len({str(cluster) for cluster in named}) < len(named):
        raise PluginError(
            f"clusterer {name} returned clusters that differ only in type, as 1 and '1'"
        )
    shares: dict[str, Shares] = {}
    for user, weights in zip(users, memberships, strict=True):
        total, largest = math.fsum(weights.values()), max(weights.values(), default=math.nan)
        if not (min(weights.values(), default=-1.0) >= 0 and abs(total - 1) <= 1e-6):
            raise PluginError(
                f"clusterer {name} returned memberships {short(weights)} for user {user!r}; expected "
                "weights of at least 0 with the sum 1"
            )
        cluster = cluster_of[user]
        if weights.get(cluster, 0.0) < largest - 1e-9:
            raise PluginError(
                f"clusterer {name} assigned user {user!r} to cluster {cluster!r}, whose weight is "
                f"{weights.get(cluster, 0.0):g}; expected one of the largest weight, {largest:g}"
            )
        shares[user] = _weighty(weights, cluster)
    return shares


def _weighty(weights: Shares, cluster: ClusterId) -> Shares:
    """Weights without the least ones, but for that of the user's own cluster, divided by their sum; in
    their own order."""
    left_out, negligible = 0.0, set[ClusterId]()
    for each, weight in sorted(weights.items(), key=lambda item: item[1]):
        left_out += weight
        if left_out > NEGLIGIBLE:
            break
        negligible.add(each)
    # Of very many equal weights, the own cluster's may be among the least.
    negligible.discard(cluster)
    kept = {each: weight for each, weight in weights.items() if each not in negligible}
    total = math.fsum(kept.values())
    return {each: weight / total for each, weight in kept.items()}


def _users(dataset: Dataset) -> tuple[list[str], FloatArray]:
    """Users [U] and their features [U, F]."""
    users = list(dataset.users)
    features = np.array([dataset.users[user] for user in users], dtype=np.float64)
    return users, features.reshape(len(users), len(dataset.feature_names))


@contextmanager
def _blamed(name: str) -> Generator[None]:
    """What a clusterer raises, as a PluginError that names it."""
    try:
        yield
    except PgrpoError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"clusterer {name} failed: {type(error).__name__}: {reason}") from error


def _cluster_id(cluster: object) -> ClusterId:
    """A plain int or string, also out of NumPy's types."""
    if isinstance(cluster, np.generic):
        cluster = cast(object, cluster.item())
    if isinstance(cluster, bool) or not isinstance(cluster, int | str):
        raise TypeError(f"a cluster is an int or a string, not {cluster!r}")
    return cluster


def _examples(clusterer: Clusterer, dataset: Dataset) -> Sequence[Example]:
    """What a clusterer may read: all rows, or those of the training period."""
    if getattr(clusterer, "reads_answers", False):
        return dataset.observed or dataset.train
    return _AllExamples(dataset)


class _AllExamples(Sequence[Example]):
    """Training and held-out examples behind one another, made as they are read."""

    def __init__(self, dataset: Dataset) -> None:
        self._parts = (dataset.train, dataset.evaluation)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        train, evaluation = self._parts
        return train[place] if place < len(train) else evaluation[place - len(train)]
