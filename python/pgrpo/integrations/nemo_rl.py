"""NeMo-RL's GRPO trainers with advantages by per-cluster histories.

    from pgrpo.integrations.nemo_rl import switch_on

    switch_on(pgrpo.ClusterNormalizer("pgrpo"), checkpointer)  # between setup and training
    grpo_train(...)  # or async_grpo_train, as in examples/run_grpo.py

Each sample names its cluster in `extra_env_info["cluster_id"]`, which comes from the function that
makes samples of rows. Advantages are computed in the process that drives the run, so there is one set
of histories. They are in NeMo-RL's checkpoints, and the last ones are restored here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pgrpo.errors import DataError
from pgrpo.integrations.adapter import Adapter
from pgrpo.normalizer import ClusterNormalizer
from pgrpo.types import ClusterId

log = logging.getLogger(__name__)

MODULE = "nemo_rl.algorithms.grpo"
"""Where NeMo-RL makes its estimator."""

USERS = ("nemo_rl.algorithms.grpo_sync", "nemo_rl.algorithms.single_controller_utils.setup")
"""Modules that hold the same function under their own name. Their trainers tell an estimator no
clusters: they are to be refused, and not to train by another rule without a word."""

CREATE = "_create_advantage_estimator"
"""What makes it, by the run's config."""


class Estimator:
    """What NeMo-RL calls for the advantages of a batch.

    Args:
        normalizer: which it is made around.
        cluster_key: the entry of `extra_env_info` that holds the cluster id.
    """

    def __init__(self, normalizer: ClusterNormalizer, cluster_key: str = "cluster_id") -> None:
        self.histories = Adapter(normalizer)
        self.cluster_key = cluster_key

    def compute_advantage(
        self,
        prompt_ids: torch.Tensor,
        rewards: torch.Tensor,
        mask: torch.Tensor,
        repeated_batch: Mapping[str, Any],
        **_: Any,
    ) -> torch.Tensor:
        """Advantages of a batch, which is folded into the histories.

        Args:
            prompt_ids: [N, P] tokens of the prompts; equal ones make a group.
            rewards: [N]; NaN where a sample has none.
            mask: [N, T] of the tokens that are trained.
            repeated_batch: NeMo-RL's batch.

        Returns:
            [N, T] the sample's advantage at each token.

        Raises:
            DataError: a sample has no cluster.
        """
        found = self.histories.advantages(
            rewards.detach().double().cpu().numpy(),
            self._clusters(repeated_batch),
            torch.unique(prompt_ids, dim=0, return_inverse=True)[1].tolist(),
            training=True,
            lengths=mask.sum(-1).tolist(),
        )
        return torch.from_numpy(found).to(rewards).unsqueeze(-1).expand(mask.shape)

    def _clusters(self, batch: Mapping[str, Any]) -> list[ClusterId]:
        infos: Sequence[Any] | None = batch.get("extra_env_info")
        if infos is None:
            raise DataError(
                "the batch has no extra_env_info, which names clusters: this trainer does not hand it "
                f"to an estimator, as grpo_train and async_grpo_train do; it has {', '.join(batch)}"
            )
        for place, info in enumerate(infos):
            if not isinstance(info, Mapping) or self.cluster_key not in info:
                raise DataError(
                    f"sample {place} has no extra_env_info {self.cluster_key!r}, which names its "
                    f"cluster: it is {info!r}"
                )
        return [info[self.cluster_key] for info in infos]


def switch_on(
    normalizer: ClusterNormalizer, checkpointer: Any, cluster_key: str = "cluster_id"
) -> Estimator:
    """Have the trainers of this process take their advantages from histories.

    Args:
        normalizer: which they are computed by.
        checkpointer: NeMo-RL's, which `setup` has made. Histories are restored from its last
            checkpoint, and saved into each that it begins.
        cluster_key: the entry of `extra_env_info` that holds the cluster id.

    Returns:
        The estimator, with the histories.

    Raises:
        CheckpointError: the run is resumed from a checkpoint without histories.
    """
    estimator = Estimator(normalizer, cluster_key)
    last: str | None = checkpointer.get_latest_checkpoint_path()
    if last is not None:
        estimator.histories.load(Path(last))
    begin = checkpointer.init_tmp_checkpoint

    def begin_with_histories(*args: Any, **kwargs: Any) -> Any:
        folder = begin(*args, **kwargs)
        estimator.histories.save(Path(folder))
        for warning in estimator.histories.new_warnings():
            log.warning("%s", warning)
        return folder

    checkpointer.init_tmp_checkpoint = begin_with_histories

    def create(config: Any) -> Estimator:
        return estimator

    for module in (import_module(MODULE), *(sys.modules.get(name) for name in USERS)):
        if module is not None:
            setattr(module, CREATE, create)
    return estimator
