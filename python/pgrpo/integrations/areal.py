"""AReaL's PPO with advantages by per-cluster histories in place of its normalized rewards.

    # actors.py, which AReaL's workers import as the trainer does
    class Actor(Personalized, FSDPPPOActor):
        pgrpo = {"estimator": "auto", "min_count": 8}

    # train.py
    with personalize(PPOTrainer, Actor)(config, train_dataset=rows) as trainer:
        trainer.train(workflow="pgrpo.integrations.areal.ClusterWorkflow", ...)

Each row of the data set names its cluster in `cluster_id`; the workflow hands it on with what it has
generated. Every data-parallel rank folds the rewards of all of them, in the order of ranks, so all have
the same histories. They are in AReaL's checkpoints, and restored where a run is recovered.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from areal.utils import stats_tracker
from areal.utils.environ import is_single_controller
from areal.workflow.rlvr import RLVRWorkflow

from pgrpo.errors import ConfigError, DataError
from pgrpo.integrations.adapter import Adapter, check_version
from pgrpo.integrations.torch import RankBatch, of_ranks
from pgrpo.types import ClusterId

log = logging.getLogger(__name__)

TESTED = "1.0.4", "1.1"
"""The first version of AReaL that this was tested with, and the first that it was not."""

CLUSTER = "cluster_id"
"""Where what a workflow returns has its cluster."""


def personalize(trainer: type[Any], actor: type[Any]) -> type[Any]:
    """A class as `trainer`, whose actor is of the class `actor`.

    Args:
        trainer: AReaL's PPOTrainer, or a class made from it.
        actor: a class made from `Personalized` and AReaL's actor for the backend that the config
            names. It stands in a module of its own, for AReaL's workers import it by name.

    Raises:
        ConfigError: AReaL is not installed, or the actor is not made from `Personalized`.
    """
    check_version("areal", *TESTED)
    if not issubclass(actor, Personalized):
        raise ConfigError(
            f"{actor.__name__} has no histories; expected class {actor.__name__}(Personalized, ...)"
        )
    kind: Any = actor

    class PersonalizedTrainer(trainer):
        """AReaL's trainer, with another class for its actor alone."""

        def _create_train_engine(self, actor_config: Any, alloc: Any) -> Any:
            if actor_config is not self.config.actor:
                return super()._create_train_engine(actor_config, alloc)
            made: Any = (
                kind.as_controller(actor_config, self.scheduler)
                if is_single_controller()
                else kind(config=actor_config)
            )
            made.create_process_group(parallel_strategy=alloc.parallel)
            return made

    return PersonalizedTrainer


class Personalized:
    """What stands before AReaL's actor in a class of one's own: the calls that see rewards and
    checkpoints.

    Raises:
        ConfigError: an option is unknown or out of range, or AReaL is to normalize rewards as well.
    """

    pgrpo: ClassVar[Mapping[str, Any]] = {}
    """Options of the normalizer."""

    # Attributes and methods of AReaL's actor, which comes after this class.
    actor: Any
    data_parallel_group: Any
    data_parallel_rank: int
    get_version: Any

    def __init__(self, config: Any) -> None:
        if config.reward_norm is not None:
            raise ConfigError(
                f"actor.reward_norm is {config.reward_norm}, and the histories take its place; "
                "expected null"
            )
        super().__init__(config)  # type: ignore[call-arg]
        self.histories, self._cluster_key = Adapter.of_section(
            {"cluster_key": CLUSTER, **self.pgrpo}, f"{type(self).__name__}.pgrpo"
        )
        # AReaL calls it with the rewards of a batch, and trains on what it returns.
        self.actor.reward_norm = self._normalize
        self._rows: Sequence[Mapping[str, Any]] = ()

    def compute_advantages(self, data: Sequence[dict[str, Any]]) -> Any:
        """AReaL's, of batches that still tell their clusters.

        Args:
            data: the groups of this rank, each of [G] samples. `cluster_id` is one for a group, or a
                list or tensor [G].
        """
        self._rows = data
        rest = [{k: v for k, v in group.items() if k != self._cluster_key} for group in data]
        return super().compute_advantages(rest)  # type: ignore[misc]

    def _normalize(self, rewards: torch.Tensor) -> torch.Tensor:
        own: RankBatch | DataError
        try:
            own = self._batch(rewards)
        except DataError as error:
            own = error
        # A recovered run may repeat the step that its checkpoint was saved in.
        found = of_ranks(
            self.histories, own, batch=int(self.get_version()), ranks=self.data_parallel_group
        )
        stats_tracker.scalar(**self.histories.metrics())
        return torch.from_numpy(found).to(rewards.device, torch.float32)

    def _batch(self, rewards: torch.Tensor) -> RankBatch:
        """The samples [N] of this rank's groups.

        Raises:
            DataError: a group has no cluster, or not one for each of its samples.
        """
        clusters: list[ClusterId] = []
        groups: list[ClusterId] = []
        for place, group in enumerate(self._rows):
            size = len(group["rewards"])
            if self._cluster_key not in group:
                raise DataError(
                    f"a group has no {self._cluster_key!r}, which names its cluster: the workflow "
                    f"returned {', '.join(group)}"
                )
            found = group[self._cluster_key]
            ids = found.tolist() if torch.is_tensor(found) else found
            ids = list(ids) if isinstance(ids, (list, tuple)) else [ids] * size
            if len(ids) != size:
                raise DataError(f"a group of {size} samples has {len(ids)} cluster ids")
            clusters += ids
            groups += [f"rank {self.data_parallel_rank} group {place}"] * size
        lengths = torch.cat([group["loss_mask"].sum(-1) for group in self._rows])
        return RankBatch.of(self.histories.normalizer, rewards, clusters, groups, lengths)

    def save(self, meta: Any) -> None:
        """AReaL's, with the histories beside the weights."""
        super().save(meta)  # type: ignore[misc]
        if dist.get_rank() == 0:
            self.histories.save(Path(meta.path))
            for warning in self.histories.new_warnings():
                log.warning("%s", warning)

    def load(self, meta: Any) -> None:
        """AReaL's, with the histories where it recovers a run."""
        super().load(meta)  # type: ignore[misc]
        if meta.weight_format == "dcp":
            self.histories.load(Path(meta.path))


class ClusterWorkflow(RLVRWorkflow):
    """AReaL's workflow of one turn, which hands on the cluster that its row names.

    A workflow of one's own does the same: it returns one more entry, `cluster_id`.
    """

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> dict[str, Any]:
        """AReaL's.

        Raises:
            DataError: the row has no `cluster_id`.
        """
        if CLUSTER not in data:
            raise DataError(
                f"a row has no column {CLUSTER!r}, which names its cluster; it has {', '.join(data)}"
            )
        found = await super().arun_episode(engine, data)
        return {**found, CLUSTER: data[CLUSTER]}
