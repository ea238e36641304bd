"""Who belongs where, as a clusterer has found it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pgrpo.clusters.assignment import Shares, cluster_users, user_shares
from pgrpo.clusters.description import Description, describe
from pgrpo.plugins.hookspecs import Clusterer
from pgrpo.types import ClusterId, Dataset, Json


@dataclass(frozen=True, slots=True)
class Division:
    """The users of a run, divided: plain values, that one process can tell another."""

    state: Mapping[str, Json]
    """The clusterer's."""
    cluster_of: Mapping[str, ClusterId]
    """User -> the cluster it belongs to, or belongs to most."""
    shares: Mapping[str, Shares] | None
    """User -> how much of it belongs to which cluster; None where users belong to one cluster each."""
    about: Mapping[str, Description]
    """Name of each cluster, the largest first -> who its users are."""


def divide(
    clusterer: Clusterer,
    dataset: Dataset,
    state: Mapping[str, Json] | None = None,
    *,
    soft: bool = False,
) -> Division:
    """Have a clusterer divide the users of a data set.

    Args:
        clusterer: it is fitted here, or restored.
        dataset: whose users are divided.
        state: what the clusterer's `state_dict` returned once, to be taken over instead of fitting.
        soft: ask it for memberships as well.

    Raises:
        ConfigError: it has none.
        PluginError: it raised, or returned something that names no clusters.
    """
    cluster_of = cluster_users(clusterer, dataset, state)
    shares = user_shares(clusterer, dataset, cluster_of) if soft else None
    features = np.array(list(dataset.users.values())).reshape(len(cluster_of), -1)
    described = describe(features, list(cluster_of.values()), dataset.feature_names)
    about = {str(cluster): about for cluster, about in described.items()}
    return Division(clusterer.state_dict(), cluster_of, shares, about)
