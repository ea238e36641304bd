"""Who belongs where, as a clusterer has found it, and as it finds it again while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypedDict

import numpy as np

from pgrpo.clusters.assignment import Shares, cluster_users, user_shares
from pgrpo.clusters.description import Description, describe
from pgrpo.errors import CheckpointError
from pgrpo.plugins.hookspecs import Clusterer
from pgrpo.types import ClusterId, Dataset, Json


class Flow(TypedDict):
    """Where people went when they were divided again."""

    step: int
    """Steps taken before."""
    num_moved: int
    """Users whose cluster has another name than before."""
    users: dict[str, dict[str, int]]
    """Cluster before -> cluster after -> number of users."""


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
    names: Sequence[ClusterId]
    """Every name that a cluster has had so far: none is given to another."""
    flows: Sequence[Flow] = ()
    """How people moved, of each time that they were divided again."""

    @property
    def version(self) -> int:
        """How many times they have been divided again."""
        return len(self.flows)

    @property
    def step(self) -> int:
        """Steps taken before the last time; 0 if there was none."""
        return self.flows[-1]["step"] if self.flows else 0

    def to_json(self) -> dict[str, Any]:
        """Everything but the clusterer's state, as JSON values."""
        shares = None
        if self.shares is not None:
            shares = {user: [[*item] for item in own.items()] for user, own in self.shares.items()}
        return {
            "cluster_of": dict(self.cluster_of),
            "shares": shares,
            "about": dict(self.about),
            "names": list(self.names),
            "flows": list(self.flows),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Json], saved: Mapping[str, Any]) -> Division:
        """What `to_json` returned, with the clusterer's state.

        Raises:
            CheckpointError: something is missing.
        """
        try:
            shares = saved["shares"]
            return cls(
                state,
                saved["cluster_of"],
                None if shares is None else {user: dict(own) for user, own in shares.items()},
                saved["about"],
                saved["names"],
                saved["flows"],
            )
        except KeyError as error:
            raise CheckpointError(f"the checkpoint lacks {error} of its assignment") from None


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
    named = [*described, *(key for own in (shares or {}).values() for key in own)]
    return Division(clusterer.state_dict(), cluster_of, shares, about, list(dict.fromkeys(named)))


def divide_again(
    before: Division, clusterer: Clusterer, dataset: Dataset, step: int, *, soft: bool = False
) -> Division:
    """Have a clusterer divide users who are divided already, and give its clusters the old names.

    A new cluster gets the name of the old one that it shares its users with, such that as many users as
    possible keep their cluster's name (the assignment problem, Kuhn 1955); with soft membership a user
    counts as the product of its old and new weight. A cluster that shares nobody with the one left for
    it gets a name that none has had so far.

    Args:
        before: how they were divided.
        clusterer: that has not been fitted yet.
        dataset: with the features by which they are divided now.
        step: steps taken so far.
        soft: as of `divide`.

    Raises:
        ConfigError, PluginError: as `divide`.
    """
    found = divide(clusterer, dataset, soft=soft)
    name_of = _names(before, found)
    cluster_of = {user: name_of[cluster] for user, cluster in found.cluster_of.items()}
    shares = found.shares and {
        user: {name_of[cluster]: weight for cluster, weight in own.items()}
        for user, own in found.shares.items()
    }
    named = {str(label): str(name) for label, name in name_of.items()}
    users: dict[str, dict[str, int]] = {}
    for user, cluster in before.cluster_of.items():
        row = users.setdefault(str(cluster), {})
        row[str(cluster_of[user])] = row.get(str(cluster_of[user]), 0) + 1
    num_moved = sum(n for old, row in users.items() for new, n in row.items() if old != new)
    return replace(
        found,
        cluster_of=cluster_of,
        shares=shares,
        about={named[label]: about for label, about in found.about.items()},
        names=list(dict.fromkeys([*before.names, *name_of.values()])),
        flows=[*before.flows, Flow(step=step, num_moved=num_moved, users=users)],
    )


def _names(before: Division, found: Division) -> dict[ClusterId, ClusterId]:
    """What each cluster that was found is to be called."""
    # Here, for it takes a while that runs which divide once need not wait.
    from scipy.optimize import linear_sum_assignment

    old = {name: row for row, name in enumerate(before.names)}
    new = {label: column for column, label in enumerate(found.names)}
    shared = np.zeros((len(old), len(new)))
    for user in found.cluster_of:
        for name, share in _of(before, user).items():
            for label, weight in _of(found, user).items():
                shared[old[name], new[label]] += share * weight
    rows, columns = linear_sum_assignment(shared, maximize=True)
    name_of: dict[ClusterId, ClusterId] = {
        found.names[column]: before.names[row]
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        if shared[row, column] > 0
    }
    used = set(map(str, before.names))
    for label in found.names:
        if label not in name_of:
            name_of[label] = _fresh(label, used)
            used.add(str(name_of[label]))
    return name_of


def _of(division: Division, user: str) -> Shares:
    shares = division.shares
    return {division.cluster_of[user]: 1.0} if shares is None else shares[user]


def _fresh(label: ClusterId, used: set[str]) -> ClusterId:
    """The clusterer's own label if it is not used, else the first number, or the first number behind
    it, that is not."""
    if str(label) not in used:
        return label
    if isinstance(label, int):
        return next(number for number in count() if str(number) not in used)
    return next(name for number in count(2) if (name := f"{label} {number}") not in used)
