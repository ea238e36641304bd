"""SkyRL's trainer with advantages by per-cluster histories.

It is started in place of SkyRL's `main_base`, with SkyRL's settings and those of the normalizer:

    python -m pgrpo.integrations.skyrl trainer.algorithm.advantage_estimator=grpo pgrpo.min_count=8 ...

Each row of the data set names its cluster in the column `cluster_id`; SkyRL's rollouts carry the
number of their row. Settings of the normalizer stand under `pgrpo`, and there `cluster_key`, where the
column has another name, or `extra_info.user`, where the cluster is an entry of a column. Advantages are
computed in the one process that drives the job, so there is one set of histories.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from skyrl.backends.skyrl_train.utils.io import io
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.trainer import RayPPOTrainer
from skyrl.train.utils import validate_cfg
from skyrl.train.utils.utils import initialize_ray

from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.integrations.adapter import Adapter, check_version, cluster_means
from pgrpo.types import ClusterId

log = logging.getLogger(__name__)

TESTED = "0.4.0", "0.5"
"""The first version of SkyRL that this was tested with, and the first that it was not."""

SECTION = "pgrpo"
"""Where settings of the normalizer stand among SkyRL's."""

ESTIMATOR = "grpo"
"""SkyRL's estimator whose advantages are replaced; everything else is done as for it."""

FOLDER = "pgrpo"
"""Where histories lie in the folder of a checkpoint."""


@dataclass
class ClusterConfig(SkyRLTrainConfig):
    """SkyRL's settings, and those of the normalizer."""

    pgrpo: dict = field(default_factory=dict)  # type: ignore[type-arg]  # SkyRL builds what it can call
    """Options of the normalizer, and `cluster_key`."""


def personalize(trainer: type) -> type:
    """A trainer class of SkyRL with histories.

    Args:
        trainer: SkyRL's, or a subclass. It is made with a `ClusterConfig`.
    """
    base: Any = trainer

    class Personalized(base):
        """SkyRL's trainer, with per-cluster histories in its checkpoints."""

        def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
            estimator = cfg.trainer.algorithm.advantage_estimator
            if estimator != ESTIMATOR:
                raise ConfigError(
                    f"trainer.algorithm.advantage_estimator is {estimator}; expected {ESTIMATOR}, "
                    "whose advantages pgrpo replaces"
                )
            self.histories, self._cluster_key = Adapter.of_section(cfg.pgrpo, SECTION)
            super().__init__(cfg, *args, **kwargs)

        @torch.no_grad()
        def compute_advantages_and_returns(self, data: Any) -> Any:
            """SkyRL's, with other advantages.

            A trajectory of several steps counts once, by its last, and all its steps get that one's
            advantage. What SkyRL pads a batch with, at its end, counts nothing and gets 0.

            Raises:
                DataError: a row of the data set names no cluster.
            """
            data = super().compute_advantages_and_returns(data)
            mask = data["response_mask"].float()
            number = len(mask) - data.metadata.get("pad_size", 0)
            is_last = np.ones(number, bool)
            if self.cfg.generator.step_wise_trajectories:
                is_last = np.array(data.metadata["is_last_step"][:number])
            last = np.flatnonzero(is_last).tolist()
            uids = [data.metadata["uids"][row] for row in last]
            of_uid = {uid: self._cluster(int(uid)) for uid in dict.fromkeys(uids)}
            clusters = [of_uid[uid] for uid in uids]
            rewards = data["rewards"].double().sum(-1)[last].numpy()
            found = self.histories.advantages(
                rewards, clusters, uids, training=True, lengths=mask.sum(-1)[last].tolist()
            )
            weights = torch.zeros(len(mask))
            weights[:number] = torch.from_numpy(found[np.cumsum(is_last) - is_last]).float()
            data["advantages"] = weights.unsqueeze(-1) * mask
            data["returns"] = data["advantages"].clone()
            self._log(data, mask[:number].bool(), number)
            self.all_metrics.update(cluster_means(rewards, found, clusters))
            self.all_metrics.update(self.histories.metrics())
            for warning in self.histories.new_warnings():
                log.warning("%s", warning)
            return data

        def _log(self, data: Any, mask: torch.Tensor, number: int) -> None:
            """Correct what SkyRL has logged of advantages."""
            tokens = data["advantages"][:number][mask]
            for name, value in (("", tokens.mean().item()), ("_abs", tokens.abs().mean().item())):
                data.metadata["metrics"][f"avg_advantages{name}"] = value
                self.all_metrics[f"loss/avg_raw_advantages{name}"] = value

        def _cluster(self, place: int) -> ClusterId:
            """The cluster of a row of the data set, which SkyRL reads as prompt, class and columns."""
            found: Any = self.train_dataset[place][2]
            for entry in self._cluster_key.split("."):
                if not isinstance(found, Mapping) or entry not in found:
                    raise DataError(
                        f"{SECTION}.cluster_key is {self._cluster_key!r}, and row {place} of the data "
                        f"set has no {entry!r} there: it is {found!r}"
                    )
                found = found[entry]
            return found

        def save_checkpoints(self) -> str:
            # First, for SkyRL ends with the file that names the step to resume from.
            folder = f"{self.cfg.trainer.ckpt_path}/global_step_{self.global_step}/{FOLDER}"
            with io.local_work_dir(folder) as local:
                self.histories.save(Path(local))
            return super().save_checkpoints()

        def load_checkpoints(self) -> Any:
            found = super().load_checkpoints()
            if found[0]:
                folder = f"{found[1]}/{FOLDER}"
                if not io.exists(folder):
                    raise CheckpointError(
                        f"{found[1]} holds no {FOLDER}: it was saved without pgrpo. To begin with "
                        "empty histories, start a new run from its model"
                    )
                with io.local_read_dir(folder) as local:
                    self.histories.load(Path(local))
            return found

    return Personalized


class ClusterExp(BasePPOExp):
    """SkyRL's experiment, with a trainer that has histories."""

    def get_trainer(self, *args: Any, **kwargs: Any) -> Any:
        return personalize(RayPPOTrainer)(*args, **kwargs)


@ray.remote(num_cpus=1)
def experiment(settings: ClusterConfig) -> None:
    """Run it in a process of Ray, as SkyRL does."""
    ClusterExp(settings).run()


def read_settings(arguments: list[str]) -> ClusterConfig:
    """SkyRL's settings and pgrpo's, out of arguments as `trainer.seed=1 pgrpo.min_count=8`.

    Raises:
        ConfigError: an option of the normalizer is unknown or out of range.
        ValueError: SkyRL knows a setting not.
    """
    # SkyRL's `main_base` looks at it before it comes here, and no config has it.
    others = [each for each in arguments if not each.startswith("trainer.override_entrypoint=")]
    settings: Any = ClusterConfig.from_cli_overrides(others)
    Adapter.of_section(settings.pgrpo, SECTION)
    validate_cfg(settings)
    return settings


def main() -> None:
    """SkyRL's `main_base`, with `ClusterExp`."""
    check_version("skyrl", *TESTED)
    settings = read_settings(sys.argv[1:])
    initialize_ray(settings)
    task: Any = experiment
    ray.get(task.remote(settings))


if __name__ == "__main__":
    # By its name, for of what is in __main__ Ray's processes know nothing.
    from pgrpo.integrations.skyrl import main as start

    start()
