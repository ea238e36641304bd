"""Every user's cluster, by a clusterer that is fitted or restored and not trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from pgrpo.clusters.saved import Saved
from pgrpo.errors import PgrpoError, PluginError
from pgrpo.plugins.hookspecs import Clusterer
from pgrpo.types import ClusterId, Dataset, Example, Json


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
    users = list(dataset.users)
    features = np.array([dataset.users[user] for user in users], dtype=np.float64)
    features = features.reshape(len(users), len(dataset.feature_names))
    name = type(clusterer).__name__
    try:
        if state is None:
            clusterer.fit(users, features, _examples(clusterer, dataset))
        else:
            clusterer.load_state_dict(state)
        assigned = [_cluster_id(cluster) for cluster in clusterer.assign(users, features)]
        json.dumps(clusterer.state_dict(), allow_nan=False)
    except PgrpoError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"clusterer {name} failed: {type(error).__name__}: {reason}") from error
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
