"""Who belongs to which cluster, and whose rewards share a history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from pgrpo.clusters.assignment import Shares
from pgrpo.clusters.description import Description
from pgrpo.clusters.division import Division
from pgrpo.errors import DataError
from pgrpo.types import ClusterId, Json


class Membership:
    """The one owner of user -> cluster in a run.

    Args:
        division: who belongs where; where users are divided again, another takes its place.
    """

    def __init__(self, division: Division) -> None:
        self.division = division

    @property
    def about(self) -> Mapping[str, Description]:
        """Name of each cluster, the largest first -> who its users are."""
        return self.division.about

    def cluster(self, user: str) -> ClusterId:
        """The cluster of a user.

        Raises:
            DataError: the data set has no such user.
        """
        cluster_of = self.division.cluster_of
        if user not in cluster_of:
            raise DataError(f"user {user!r} has no cluster")
        return cluster_of[user]

    def histories(
        self, history: Literal["cluster", "user", "one", "shuffled"], seed: int
    ) -> Mapping[str, ClusterId]:
        """User -> name of the history that its rewards are normalised by.

        Args:
            history: `cluster`: each cluster has its own; `user`: each user has. The others are
                control arms: `one` for everybody, or `shuffled`, of clusters of the same sizes made of
                users drawn at random.
            seed: of that draw.
        """
        cluster_of = self.division.cluster_of
        match history:
            case "cluster":
                return cluster_of
            case "user":
                return {user: user for user in cluster_of}
            case "one":
                return dict.fromkeys(cluster_of, 0)
            case "shuffled":
                return {user: cluster_of[of] for user, of in self._shuffled(seed).items()}

    def shares(
        self, history: Literal["cluster", "user", "one", "shuffled"], seed: int
    ) -> Mapping[str, Shares]:
        """User -> the histories that its rewards enter, with weights whose sum is 1.

        Where a user belongs to one cluster alone, that is the history of `histories`, with weight 1.
        With soft membership a control arm `shuffled` gives each user the shares of the user whose
        place it takes.
        """
        shares = self.division.shares
        if shares is None or history in ("user", "one"):
            return {user: {key: 1.0} for user, key in self.histories(history, seed).items()}
        if history == "cluster":
            return shares
        return {user: shares[of] for user, of in self._shuffled(seed).items()}

    def _shuffled(self, seed: int) -> dict[str, str]:
        """User -> a user drawn at random, everybody once."""
        users = list(self.division.cluster_of)
        order = np.random.default_rng(seed).permutation(len(users))
        return {user: users[i] for user, i in zip(users, order, strict=True)}

    def state_dict(self) -> Mapping[str, Json]:
        """All that the clusterer learned of the users, as JSON values."""
        return self.division.state
