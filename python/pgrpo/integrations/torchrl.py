"""torchrl's `MCAdvantage` with advantages by per-cluster histories.

    from pgrpo.integrations.torchrl import ClusterAdvantage

    transform = ClusterAdvantage(pgrpo.ClusterNormalizer("pgrpo"), grpo_size=8)
    buffer = ReplayBuffer(storage=..., transform=transform)

Trajectories carry their cluster in `cluster_id`, a text or a tensor of whole numbers. What completes a
group, selects of it and drops it is torchrl's; a group that is dropped enters no history. Histories are
in the transform's `state_dict`, as torchrl's checkpoints save it.
"""

from __future__ import annotations

from typing import Any

import torch
from torchrl.objectives.llm import MCAdvantage

from pgrpo.errors import ConfigError, DataError
from pgrpo.integrations.adapter import Adapter, check_version, cluster_means
from pgrpo.normalizer import ClusterNormalizer
from pgrpo.types import ClusterId

TESTED = "0.14.1", "0.15"
"""The first version of torchrl that this was tested with, and the first that it was not."""


class ClusterAdvantage(MCAdvantage):
    """As torchrl's transform, group by group, but normalised by the histories of clusters.

    Args:
        normalizer: each group of trajectories is one call of it. Where several processes write to the
            buffer, one made by `ClusterNormalizer.shared`.
        *args: those of torchrl's transform, `grpo_size` first.
        cluster_key: where a trajectory has its cluster id, one for all its steps.
        trajectory_return: how a trajectory's rewards make one, `sum`, `max` or `mean`; histories are of
            whole trajectories, so it cannot be None.
        **kwargs: those of torchrl's transform.

    Raises:
        ConfigError: `trajectory_return` is None.
    """

    def __init__(
        self,
        normalizer: ClusterNormalizer,
        *args: Any,
        cluster_key: Any = "cluster_id",
        trajectory_return: str = "sum",
        **kwargs: Any,
    ) -> None:
        check_version("torchrl", *TESTED)
        if trajectory_return is None:
            raise ConfigError(
                "trajectory_return is None; expected sum, max or mean: histories are of trajectories"
            )
        super().__init__(*args, trajectory_return=trajectory_return, **kwargs)
        self.histories = Adapter(normalizer)
        self.cluster_key = cluster_key
        self.last_metrics: dict[str, float] = {}

    def _trajectory_advantage(self, trajs: list[Any]) -> Any:
        """torchrl's, with other advantages in what it selects.

        Raises:
            DataError: a trajectory has no cluster, or one that changes on its way.
        """
        for trajectory in trajs:
            trajectory.pop(self.advantage_key, None)
        if super()._trajectory_advantage(trajs) is None:
            return None
        # What is selected has torchrl's own advantages now.
        chosen = [t for t in trajs if t.get(self.advantage_key, None) is not None]
        rewards = [trajectory.get(self.rewards_key) for trajectory in chosen]
        returns = self._trajectory_returns(rewards).double().cpu().numpy()
        clusters = [self._cluster(trajectory) for trajectory in chosen]
        found = self.histories.advantages(returns, clusters, [0] * len(chosen), training=True)
        self.last_metrics = cluster_means(returns, found, clusters) | self.histories.metrics()
        for trajectory, reward, advantage in zip(chosen, rewards, found.tolist(), strict=True):
            trajectory.set(self.advantage_key, torch.full_like(reward, advantage))
        return self._cat_tensordicts(chosen, -1)

    def _cluster(self, trajectory: Any) -> ClusterId:
        found = trajectory.get(self.cluster_key, None)
        if found is None:
            raise DataError(
                f"a trajectory has no {self.cluster_key!r}, which names its cluster; it has "
                f"{', '.join(map(str, trajectory.keys()))}"
            )
        ids: list[Any] = [found.tolist()] if hasattr(found, "tolist") else [found]
        while ids and isinstance(ids[0], list):
            ids = [one for row in ids for one in row]
        ids = list(dict.fromkeys(ids))
        if len(ids) != 1:
            raise DataError(f"a trajectory has the clusters {ids}; expected one for all its steps")
        return ids[0]

    def share_memory_(self) -> ClusterAdvantage:
        """torchrl's, for a buffer that several processes write to.

        Raises:
            ConfigError: each process would have histories of its own.
        """
        if not self.histories.normalizer.is_shared:
            raise ConfigError(
                f"{self.histories.normalizer!r} is of one process, and several are to write to the "
                "buffer; make it with ClusterNormalizer.shared(NAME, ...)"
            )
        super().share_memory_()
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """The histories, for `state_dict`."""
        return self.histories.normalizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with the histories of a `state_dict`."""
        self.histories.normalizer.load_state_dict(state)
