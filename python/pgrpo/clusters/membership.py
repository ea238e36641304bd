"""Who belongs to which cluster, and whose rewards share a history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from pgrpo.clusters.assignment import cluster_users
from pgrpo.clusters.description import Description, describe
from pgrpo.errors import DataError
from pgrpo.plugins.hookspecs import Clusterer
from pgrpo.types import ClusterId, Dataset, Json


class Membership:
    """The one owner of user -> cluster in a run.

    Args:
        clusterer: what divides the users; it is fitted here, or restored.
        dataset: whose users are divided.
        state: what `state_dict` of an earlier run returned, to be taken over instead of fitting.

    Attributes:
        about: name of each cluster, the largest first -> who its users are.

    Raises:
        PluginError: the clusterer raised, or returned something that names no clusters.
    """

    about: Mapping[str, Description]

    def __init__(
        self, clusterer: Clusterer, dataset: Dataset, state: Mapping[str, Json] | None = None
    ) -> None:
        self._clusterer = clusterer
        self._cluster_of = cluster_users(clusterer, dataset, state)
        features = np.array(list(dataset.users.values())).reshape(len(self._cluster_of), -1)
        described = describe(features, list(self._cluster_of.values()), dataset.feature_names)
        self.about = {str(cluster): about for cluster, about in described.items()}

    def cluster(self, user: str) -> ClusterId:
        """The cluster of a user.

        Raises:
            DataError: the data set has no such user.
        """
        if user not in self._cluster_of:
            raise DataError(f"user {user!r} has no cluster")
        return self._cluster_of[user]

    def histories(
        self, history: Literal["cluster", "one", "shuffled"], seed: int
    ) -> Mapping[str, ClusterId]:
        """User -> name of the history that its rewards are normalised by.

        Args:
            history: `cluster`: each cluster has its own. The others are control arms: `one` for
                everybody, or `shuffled`, of clusters of the same sizes made of users drawn at random.
            seed: of that draw.
        """
        users = list(self._cluster_of)
        match history:
            case "cluster":
                return self._cluster_of
            case "one":
                return dict.fromkeys(users, 0)
            case "shuffled":
                order = np.random.default_rng(seed).permutation(len(users))
                return {
                    user: self._cluster_of[users[i]] for user, i in zip(users, order, strict=True)
                }

    def state_dict(self) -> Mapping[str, Json]:
        """All that was learned of the users, as JSON values."""
        return self._clusterer.state_dict()
