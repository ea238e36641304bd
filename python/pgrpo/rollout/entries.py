"""Which histories the rewards of some groups enter, and with which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pgrpo.clusters.assignment import Shares
from pgrpo.normalizer import ClusterNormalizer
from pgrpo.types import ClusterId, FloatArray, Group

Columns: TypeAlias = Mapping[str, Any]
"""What else a rule reads of rollouts, [N] each; None of what it does not read."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Rollouts as a normalizer is told of them: M entries, one for each rollout and history that its
    reward enters.

    A user who belongs to cluster k with weight w_k gives each reward of its groups w_k times to the
    history of k, and the advantage of such a rollout is

        A = sum_k w_k A_k

    where A_k is what the rule makes of its group as one of cluster k. For that the entries of a group
    in k are a group of their own: their mean, their spread and how many weights a rollout is of them
    (`weights` of `ClusterNormalizer`) are those of the whole group. A rollout that got no reward is one
    entry, for it enters no history, and is counted once.

    Where every user of the groups belongs to one cluster, there is an entry for each rollout, without
    weights: what a normalizer computes of them is the same to the last bit as if there were no soft
    membership.
    """

    rewards: FloatArray
    """[N] or [N, R], of the rollouts."""
    places: NDArray[np.intp] | None
    """[M] the rollout of each entry; None where entry n is that of rollout n."""
    keys: Sequence[ClusterId]
    """[M] names of histories."""
    groups: Sequence[int]
    """[M] numbers of groups."""
    weights: FloatArray | None
    """[M] of the histories in their users; None where all are 1."""

    @classmethod
    def of(
        cls, groups: Sequence[Group], rewards: FloatArray, shares: Mapping[str, Shares]
    ) -> Entries:
        """The entries of groups.

        Args:
            groups: whose rollouts, in order, they are.
            rewards: [N] or [N, R] what is folded and normalised of each rollout.
            shares: user -> the histories that its rewards enter, with weights whose sum is 1.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        of = [shares[rollout.prompt.example.user] for rollout in rollouts]
        if all(len(each) == 1 for each in of):
            keys = [key for each in of for key in each]
            return cls(rewards, None, keys, [rollout.group_id for rollout in rollouts], None)
        known = np.isfinite(rewards).reshape(len(rollouts), -1).any(axis=1)
        rewarded = set(np.flatnonzero(known).tolist())
        numbers: dict[tuple[int, ClusterId], int] = {}
        rows: list[tuple[int, ClusterId, int, float]] = []
        for place, (rollout, each) in enumerate(zip(rollouts, of, strict=True)):
            entered = each if place in rewarded else {max(each, key=lambda key: each[key]): 1.0}
            for key, weight in entered.items():
                number = numbers.setdefault((rollout.group_id, key), len(numbers))
                rows.append((place, key, number, weight))
        places, keys, parts, weights = zip(*rows, strict=True)
        return cls(rewards, np.array(places), keys, parts, np.array(weights))

    def advantages(self, normalizer: ClusterNormalizer, columns: Columns) -> FloatArray:
        """[N] what a normalizer makes of the rewards, which enter its histories; `columns` [N] are what
        else its rule reads."""
        places, weights = self.places, self.weights
        if places is None or weights is None:
            return normalizer(self.rewards, self.keys, self.groups, **columns)
        found = normalizer(
            self.rewards[places], self.keys, self.groups, weights=weights, **self._spread(columns)
        )
        advantages = np.zeros(len(self.rewards))
        np.add.at(advantages, places, weights * found)
        return advantages

    def fold(self, normalizer: ClusterNormalizer, columns: Columns) -> None:
        """Let the rewards enter a normalizer's histories; `columns` as above."""
        rewards = self.rewards if self.places is None else self.rewards[self.places]
        columns = columns if self.places is None else self._spread(columns)
        normalizer.update(rewards, self.keys, self.groups, self.weights, **columns)

    def _spread(self, columns: Columns) -> Columns:
        return {
            name: None if column is None else np.asarray(column)[self.places]
            for name, column in columns.items()
        }
