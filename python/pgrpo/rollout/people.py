"""What a run knows of each user, by which users are divided again and histories go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from pgrpo.clusters.assignment import Shares
from pgrpo.errors import CheckpointError
from pgrpo.normalizer import ClusterNormalizer, ClusterStats
from pgrpo.normalizer.state import SUMS
from pgrpo.types import ClusterId, Dataset, FloatArray, Group, Rollout

NOT_OF_PEOPLE = ("auto", "rae")
"""Estimators whose sums cannot be told apart by people: in the regression of `auto` a reward counts by
the mean that its cluster's history had before it, and in the exponential mean of `rae` by how many
rewards of the cluster came after it."""

PRIOR_COUNT = 4.0
"""Rewards of all users that each user's moments are read with, so that a user of whom little is known
is like the others: a person's two or three rewards would tell more of chance than of the person."""

POSITIONS = 8
"""Choices of a list that are told apart by their place; further ones are not."""


class People:
    """Moments of every user's rewards, kept beside the histories of clusters.

    A history is made of count, mean and sum of squared deviations, and, where an estimator or
    diagnostics look at groups, of numbers, sizes and squared deviations of the groups. All of them can
    be told apart by users, for a group is one user's. So the history of any set of users follows from
    theirs: what `regroup` makes is what there would be had the users always been divided that way.

    Args:
        dataset: whose users they are.
        source: what users are divided by: `clustering.recluster_from`.
        rewards: names of the rewards.
        of_each: the options of several rewards, where advantages are made of each by itself; else
            empty.
        sums: clusters have histories of the sum of the rewards beside those that advantages are read
            from.

    Users are known by their names, also in a checkpoint: a data set may have them in another order when
    a run goes on.
    """

    def __init__(
        self,
        dataset: Dataset,
        source: Literal["rewards", "behaviour"],
        rewards: Sequence[str],
        of_each: Mapping[str, Any],
        *,
        sums: bool,
    ) -> None:
        self._dataset, self._source = dataset, source
        if source == "rewards":
            self._signals = list(rewards)
        else:
            places = [f"reward of choice {place + 1}" for place in range(POSITIONS)]
            self._signals = ["reward", "completion tokens", *places]
        self._tables = {
            "advantages": ClusterNormalizer(
                "pgrpo", nan_policy="zero", track_diagnostics=True, **of_each
            )
        }
        if sums:
            self._tables["sums"] = ClusterNormalizer("pgrpo", nan_policy="zero")
        self._known = ClusterNormalizer(
            "pgrpo",
            nan_policy="zero",
            reward_weights=[1.0] * len(self._signals),
            reward_names=self._signals,
            combine="normalize_then_sum",
        )

    def fold(self, groups: Sequence[Group], rewards: FloatArray) -> None:
        """Add the rewards of groups; `rewards` [N] or [N, R] are what advantages are made of."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        users = [rollout.prompt.example.user for rollout in rollouts]
        group_ids = [rollout.group_id for rollout in rollouts]
        self._tables["advantages"].update(rewards, users, group_ids)
        if "sums" in self._tables:
            shaped = np.concatenate([group.shaped for group in groups])
            self._tables["sums"].update(shaped, users)
        self._known.update(np.concatenate([self._signals_of(group) for group in groups]), users)

    def dataset(self) -> Dataset:
        """The data set with what is known of its users by now as further features.

        Mean and, of `rewards`, standard deviation of each signal that was met, read with PRIOR_COUNT
        values of all users: how many values a user has is no feature of its own, for it tells how often
        the user was asked, and not what the user wants.
        """
        names: list[str] = []
        columns: list[FloatArray] = []
        for signal, normalizer in self._known.rewards.items():
            known = normalizer.snapshot()
            if known:
                mean, std = _read_with_prior(known, list(self._dataset.users))
                names.append(f"mean {signal}")
                columns.append(mean)
                if self._source == "rewards":
                    names.append(f"spread of {signal}")
                    columns.append(std)
        added = np.column_stack(columns) if columns else np.empty((len(self._dataset.users), 0))
        users = {
            user: np.concatenate([features, own])
            for (user, features), own in zip(self._dataset.users.items(), added, strict=True)
        }
        known_names = (*self._dataset.feature_names, *names)
        return replace(self._dataset, users=users, feature_names=known_names)

    def regroup(
        self,
        normalizer: ClusterNormalizer,
        shares: Mapping[str, Shares],
        *,
        of: Literal["advantages", "sums"],
    ) -> None:
        """Make a normalizer's histories those that there would be had users always belonged to these.

        Means and squared deviations are merged by the formula of Chan et al., for all users of a
        history at once, in the order in which users first got a reward. Sums of advantages begin anew:
        they tell of the histories that were read, and of no user.

        Args:
            normalizer: whose histories are replaced.
            shares: user -> the histories that its rewards enter, with weights whose sum is 1.
            of: which of them it is: of what advantages are made of, or of the sum.
        """
        state, found = normalizer.state_dict(), self._tables[of].state_dict()
        if normalizer.rewards:
            pairs = zip(state["histories"], found["histories"], strict=True)
            histories = [_regrouped(*pair, shares) for pair in pairs]
            normalizer.load_state_dict({**state, "histories": histories})
        else:
            normalizer.load_state_dict(_regrouped(state, found, shares))

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        tables = {name: table.state_dict() for name, table in self._tables.items()}
        return {**tables, "known": self._known.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: it is something else, or knows rewards of users whom the data set has not.
        """
        try:
            for name, table in self._tables.items():
                table.load_state_dict(state[name])
            self._known.load_state_dict(state["known"])
        except KeyError as error:
            raise CheckpointError(f"the checkpoint lacks {error} of its people") from None
        for part in self._known.rewards.values():
            for user in part.snapshot():
                if user not in self._dataset.users:
                    raise CheckpointError(
                        f"the checkpoint knows rewards of user {user!r}, whom the data set has not; "
                        "expected the data that the run began with"
                    )

    def _signals_of(self, group: Group) -> FloatArray:
        """[G, S] of each rollout; NaN where there is none."""
        if self._source == "rewards":
            return np.stack([group.scores[name] for name in self._signals], axis=1)
        signals = np.full((len(group.rollouts), len(self._signals)), np.nan)
        for row, rollout, reward in zip(signals, group.rollouts, group.rewards, strict=True):
            row[:2] = reward, len(rollout.completion_ids)
            place = _place(rollout)
            if place is not None:
                row[2 + place] = reward
        return signals


def _place(rollout: Rollout) -> int | None:
    """Which of its prompt's choices a rollout has taken, of the first POSITIONS."""
    choices = rollout.prompt.choices or ()
    return next(
        (n for n, ids in enumerate(choices[:POSITIONS]) if ids == rollout.completion_ids), None
    )


def _read_with_prior(
    known: Mapping[ClusterId, ClusterStats], users: Sequence[str]
) -> tuple[FloatArray, FloatArray]:
    """Means [U] and standard deviations [U] of all users, as if each had PRIOR_COUNT further values
    that are distributed as those of all users together."""
    count, mean, std = np.zeros((3, len(users)))
    for place, user in enumerate(users):
        if user in known:
            stats = known[user]
            count[place], mean[place], std[place] = stats.count, stats.mean, stats.std
    pool_mean = float(count @ mean / count.sum())
    pool_variance = float(count @ (std**2 + (mean - pool_mean) ** 2) / count.sum())
    weight = count / (count + PRIOR_COUNT)
    gap = mean - pool_mean
    variance = weight * std**2 + (1 - weight) * pool_variance + weight * (1 - weight) * gap**2
    return pool_mean + weight * gap, np.sqrt(variance)


def _regrouped(
    of_clusters: Mapping[str, Any], of_people: Mapping[str, Any], shares: Mapping[str, Shares]
) -> dict[str, Any]:
    """A normalizer's state with the histories of clusters made of those of people."""
    names: dict[ClusterId, int] = {}
    entries = [
        (row, names.setdefault(name, len(names)), weight)
        for row, user in enumerate(of_people["clusters"])
        for name, weight in shares[user].items()
    ]
    rows, cells = (np.array([entry[n] for entry in entries], np.intp) for n in (0, 1))
    weights = np.array([entry[2] for entry in entries])
    sums = {name: np.array(of_people[name], np.float64)[rows] for name in SUMS}

    def total(values: FloatArray) -> FloatArray:
        found = np.zeros(len(names))
        np.add.at(found, cells, values)
        return found

    counts = weights * sums["count"]
    count = total(counts)
    # The origin of a cluster is that of its first user.
    origin = sums["origin"][np.unique(cells, return_index=True)[1]]
    means = (sums["origin"] - origin[cells]) + sums["offset"]
    offset = total(counts * means) / count
    found = {
        **{name: np.zeros(len(names)) for name in SUMS},
        "count": count,
        "origin": origin,
        "offset": offset,
        "m2": total(weights * sums["m2"]) + total(counts * (means - offset[cells]) ** 2),
        "num_parts": total(weights * sums["num_parts"]),
        # Of sizes, which are weighted themselves.
        "squared_sizes": total(weights**2 * sums["squared_sizes"]),
        "within_squares": total(weights * sums["within_squares"]),
    }
    lists = {name: values.tolist() for name, values in found.items()}
    return {**of_clusters, "clusters": list(names), **lists}
