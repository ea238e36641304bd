"""verl's advantage estimator `pgrpo`, and the trainer that tells it the clusters.

verl finds this module by its entry point in the group `verl.plugins`; nothing is imported by hand:

    algorithm.adv_estimator=pgrpo trainer.v1.trainer_mode=pgrpo_sync +algorithm.pgrpo.min_count=8

Each row of the data set names its cluster in the column `cluster_id`, which verl carries along to the
responses. Options of the normalizer stand under `algorithm.pgrpo`, and there `cluster_key`, where the
column has another name, or `extra_info.user`, where the cluster is an entry of a column. Advantages are
computed in the one process that drives the job, so there is one set of histories.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from verl.trainer.ppo.core_algos import register_adv_est

from pgrpo.errors import ConfigError, DataError
from pgrpo.integrations.adapter import Adapter, check_version, cluster_means
from pgrpo.types import ClusterId

log = logging.getLogger(__name__)

TESTED = "0.9.1", "0.10"
"""The first version of verl that this was tested with, and the first that it was not."""

NAME = "pgrpo"
"""What verl's config calls the estimator."""

MODE = "pgrpo_sync"
"""What verl's config calls the trainer: its own synchronous one, with histories."""


@dataclass(frozen=True)
class _Step:
    """What an estimator of verl is not told of the responses [N] that it is called for."""

    histories: Adapter
    clusters: Sequence[ClusterId]
    """[N]."""
    turns: Sequence[tuple[str, int] | None]
    """[N] the session that a response is a turn of, and which; None for what verl pads with. A session
    counts once, by its last turn, and all its turns get that one's advantage."""
    metrics: dict[str, Any]
    """verl's own of this step, which those of clusters are added to."""


_step: ContextVar[_Step | None] = ContextVar("pgrpo_verl_step", default=None)


@register_adv_est(NAME)
def advantages(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any = None,
    index: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of responses by per-cluster histories, which the batch is folded into.

    Args:
        token_level_rewards: [N, T]; a response's reward is their sum, and NaN where it has none.
        response_mask: [N, T].
        config: verl's section `algorithm`.
        index: [N] ids of the prompts, which make the groups.

    Returns:
        [N, T] the response's advantage at each of its tokens, twice, for verl's returns.

    Raises:
        ConfigError: another trainer than `pgrpo_sync` called it, which does not tell the clusters.
    """
    step = _step.get()
    if step is None:
        raise ConfigError(
            f"algorithm.adv_estimator is {NAME}, and the trainer does not tell the clusters: set "
            f"trainer.v1.trainer_mode={MODE}"
        )
    rewards = token_level_rewards.sum(-1).double().cpu().numpy()
    last: dict[str, tuple[int, int]] = {}
    for row, turn in enumerate(step.turns):
        if turn is not None:
            last[turn[0]] = max(last.get(turn[0], (-1, -1)), (turn[1], row))
    rows = [row for _, row in last.values()]
    lengths = response_mask.sum(-1).tolist()
    clusters = [step.clusters[row] for row in rows]
    found = step.histories.advantages(
        rewards[rows],
        clusters,
        [str(index[row]) for row in rows],
        training=True,
        lengths=[lengths[row] for row in rows],
    )
    step.metrics.update(cluster_means(rewards[rows], found, clusters))
    step.metrics.update(step.histories.metrics())
    of_session = dict(zip(last, found.tolist(), strict=True))
    weights = [0.0 if turn is None else of_session[turn[0]] for turn in step.turns]
    spread = response_mask.new_tensor(weights, dtype=torch.float32).unsqueeze(-1) * response_mask
    return spread, spread


def _register_trainer() -> None:
    """Put the trainer into verl's registry; it wants packages that verl itself does without."""
    import transfer_queue as tq
    from omegaconf import open_dict
    from verl.trainer.ppo.v1.trainer_base import register_trainer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    @register_trainer(MODE)
    class PersonalizedPPOTrainerSync(PPOTrainerSync):
        """verl's synchronous trainer, with per-cluster histories in its checkpoints."""

        def __init__(self, config: Any) -> None:
            check_version("verl", *TESTED)
            if config.algorithm.adv_estimator != NAME:
                raise ConfigError(
                    f"trainer.v1.trainer_mode is {MODE}, and algorithm.adv_estimator is "
                    f"{config.algorithm.adv_estimator}; expected {NAME}, or verl's own trainer sync"
                )
            self.histories, self._cluster_key = Adapter.of_section(
                config.algorithm.get("pgrpo"), "algorithm.pgrpo"
            )
            # What else verl asks of the mode is answered as for its own trainer.
            with open_dict(config):
                config.trainer.v1.trainer_mode = "sync"
            super().__init__(config)

        def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
            step = _Step(
                self.histories,
                clusters_of(tq, batch, self._cluster_key),
                turns_of(batch.keys, batch.tags),
                metrics,
            )
            token = _step.set(step)
            try:
                return super()._compute_advantage(batch, metrics)
            finally:
                _step.reset(token)

        def _save_checkpoint(self) -> None:
            # First, for verl ends with the file that makes the folder the one to resume from.
            folder = (
                Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
            )
            folder.mkdir(parents=True, exist_ok=True)
            self.histories.save(folder)
            super()._save_checkpoint()
            for warning in self.histories.new_warnings():
                log.warning("%s", warning)

        def _load_checkpoint(self) -> None:
            super()._load_checkpoint()
            if self.global_steps:
                trainer = self.config.trainer
                if trainer.resume_mode == "resume_path":
                    folder = Path(trainer.resume_from_path)
                else:
                    folder = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
                self.histories.load(folder)


def turns_of(
    keys: Sequence[str], tags: Sequence[Mapping[str, Any]]
) -> list[tuple[str, int] | None]:
    """Session and turn of responses by their keys `{uid}_{session}_{turn}`; None for padding."""
    found: list[tuple[str, int] | None] = []
    for key, tag in zip(keys, tags, strict=True):
        session, _, turn = key.rpartition("_")
        found.append(None if tag.get("is_padding", False) else (session, int(turn)))
    return found


def clusters_of(queue: Any, batch: Any, key: str) -> list[ClusterId]:
    """Cluster ids of a batch, out of verl's TransferQueue.

    Args:
        queue: the module `transfer_queue`, or what has its `kv_batch_get`.
        batch: verl's keys of the responses.
        key: a column of the data set; with dots, an entry of it: `extra_info.user`.

    Raises:
        DataError: the responses have no such field, or one of them no such entry.
    """
    field, *entries = key.split(".")
    try:
        found = queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=[field]
        )[field]
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the responses have no field {field!r}, which names their clusters: the data set needs a "
            f"column of that name, or algorithm.pgrpo.cluster_key that of another ({error})"
        ) from error
    # Numbers come as a tensor, nested or not, and everything else as a list.
    rows: list[Any] = (
        [one.item() for one in found.unbind()] if torch.is_tensor(found) else list(found)
    )
    for entry in entries:
        for row in rows:
            if not isinstance(row, Mapping) or entry not in row:
                raise DataError(
                    f"algorithm.pgrpo.cluster_key is {key!r}, and a response's {field!r} has no "
                    f"{entry!r}: it is {row!r}"
                )
        rows = [row[entry] for row in rows]
    return rows


try:
    _register_trainer()
except ImportError as error:
    log.warning("the trainer %s is not there: %s", MODE, error)
