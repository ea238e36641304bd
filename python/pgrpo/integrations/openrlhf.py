"""OpenRLHF's PPO trainers, synchronous and asynchronous, with advantages by per-cluster histories.

It is started in OpenRLHF's place, with OpenRLHF's own arguments and options of the normalizer:

    python -m pgrpo.integrations.openrlhf
        --algo.advantage.estimator group_norm --data.label_key label --pgrpo.min_count 8 ...

A rollout is told from others by its label alone, so the label names the cluster: it is an entry
`cluster_id` of the column that `--data.label_key` names, or the label itself with
`--pgrpo.cluster_key ''`. Advantages are computed in the one process that trains, so there is one set of
histories. It is part of what OpenRLHF saves in DeepSpeed's checkpoint as the state of its trainer.
"""

from __future__ import annotations

import json
import logging
import runpy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from openrlhf.models.utils import compute_reward
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.integrations.adapter import Adapter, check_version, cluster_means
from pgrpo.types import ClusterId

log = logging.getLogger(__name__)

TESTED = "0.11.2", "0.12"
"""The first version of OpenRLHF that this was tested with, and the first that it was not."""

OPTION = "--pgrpo"
"""What arguments begin with that are not OpenRLHF's own, as `--pgrpo.min_count 8`."""

ESTIMATOR = "group_norm"
"""What OpenRLHF calls GRPO; its advantages are replaced, and everything else is done as for it."""

STATE = "pgrpo"
"""Where histories lie in what OpenRLHF saves with its checkpoints."""


class ClusterExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's, with other advantages.

    Args:
        histories: those of this run.
        cluster_key: where a label has its cluster; empty if the label is the cluster.
        *args: those of OpenRLHF's.
    """

    def __init__(self, histories: Adapter, cluster_key: str, *args: Any) -> None:
        super().__init__(*args)
        self.histories = histories
        self.cluster_key = cluster_key
        self.metrics: dict[str, float] = {}

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        """OpenRLHF's, which penalises lengths and logs; then advantages of the rewards that are left.

        Raises:
            DataError: a rollout's label names no cluster.
        """
        penalties = [experience.kl for experience in experiences]  # OpenRLHF forgets them
        experiences = super().compute_advantages_and_returns(experiences)
        rewards = torch.cat([experience.rewards for experience in experiences]).double().cpu()
        clusters = [self._cluster(label) for each in experiences for label in each.labels]
        size = self.args.rollout.n_samples_per_prompt
        found = self.histories.advantages(
            rewards.numpy(),
            clusters,
            [place // size for experience in experiences for place in experience.index],
            training=True,
            lengths=[n for each in experiences for n in each.action_mask.sum(-1).tolist()],
        )
        self.metrics = cluster_means(rewards.numpy(), found, clusters) | self.histories.metrics()
        parts = torch.from_numpy(found).float().split([len(each.rewards) for each in experiences])
        for experience, kl, advantages in zip(experiences, penalties, parts, strict=True):
            tokens = compute_reward(
                advantages,
                self.kl_ctl.value,
                kl,
                action_mask=experience.action_mask,
                reward_clip_range=self.args.reward.clip_range,
            )
            experience.returns = self.get_cumulative_returns(tokens, experience.action_mask, 1.0)
            experience.advantages = experience.returns.clone()
            experience.info["return"] = tokens.sum(-1)
        return experiences

    def _cluster(self, label: Any) -> ClusterId:
        if not self.cluster_key:
            return label
        if not isinstance(label, Mapping) or self.cluster_key not in label:
            raise DataError(
                f"a rollout's label is {label!r} and has no {self.cluster_key!r}, which names its "
                f"cluster: {OPTION}.cluster_key is the name of another entry, or '' where the label "
                "is the cluster"
            )
        return label[self.cluster_key]


def personalize(trainer: type, options: Mapping[str, Any]) -> type:
    """A trainer class of OpenRLHF with histories; neither is an actor of Ray yet.

    Args:
        trainer: OpenRLHF's, or a subclass.
        options: of the normalizer, and `cluster_key`.
    """
    base: Any = trainer

    class Personalized(base):
        """OpenRLHF's trainer, with per-cluster histories in its checkpoints."""

        def __init__(self, pretrain: str, strategy: Any, *args: Any, **kwargs: Any) -> None:
            settings = strategy.args
            if settings.algo.advantage.estimator != ESTIMATOR:
                raise ConfigError(
                    f"--algo.advantage.estimator is {settings.algo.advantage.estimator}; expected "
                    f"{ESTIMATOR}, whose advantages pgrpo replaces"
                )
            if not settings.data.label_key:
                raise ConfigError(
                    "--data.label_key is not set; expected the column whose entries name clusters"
                )
            self.histories, cluster_key = Adapter.of_section(options, OPTION)
            super().__init__(pretrain, strategy, *args, **kwargs)
            self.experience_maker = ClusterExperienceMaker(
                self.histories,
                cluster_key,
                self.actor_model_group,
                self.critic_model_group,
                self.reward_model_group,
                self.reference_model_group,
                self.kl_ctl,
                self.strategy,
                self.tokenizer,
            )

        def train_step(self, rollout_samples: Any, global_step: int) -> tuple[dict[str, Any], int]:
            status, global_step = super().train_step(rollout_samples, global_step)
            for warning in self.histories.new_warnings():
                log.warning("%s", warning)
            return status | self.experience_maker.metrics, global_step

        def save_logs_and_checkpoints(
            self, global_step: int, logs_dict: Any = None, client_states: Any = None
        ) -> None:
            states = self._with_histories(client_states)
            super().save_logs_and_checkpoints(global_step, logs_dict, states)

        def save_best_checkpoint(
            self, eval_metrics: Any, global_step: int, client_states: Any = None
        ) -> None:
            states = self._with_histories(client_states)
            super().save_best_checkpoint(eval_metrics, global_step, states)

        def _with_histories(self, client_states: dict[str, Any] | None) -> dict[str, Any]:
            # The same dict, for OpenRLHF goes on with what it has put into it.
            states = {} if client_states is None else client_states
            states[STATE] = self.histories.normalizer.state_dict()
            return states

        def restore_best_checkpoint_state(self, checkpoint_states: Any) -> None:
            super().restore_best_checkpoint_state(checkpoint_states)
            if not checkpoint_states.get("global_step"):
                return
            if STATE not in checkpoint_states:
                raise CheckpointError(
                    f"the checkpoint of step {checkpoint_states['global_step']} holds no histories: it "
                    "was saved without pgrpo. To begin with empty ones, start a new run from its model"
                )
            self.histories.normalizer.load_state_dict(checkpoint_states[STATE])

    return Personalized


def own_options(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Options that stand in arguments as `--pgrpo.NAME VALUE`, and OpenRLHF's arguments.

    Values are read as JSON where they are: numbers, true, null, lists. Everything else is text.

    Raises:
        ConfigError: an option has no value.
    """
    options: dict[str, Any] = {}
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, is_one, value = argument.partition("=")
        if not name.startswith(f"{OPTION}."):
            others.append(argument)
            continue
        text = value if is_one else next(rest, None)
        if text is None:
            raise ConfigError(f"{name} has no value")
        try:
            options[name.removeprefix(f"{OPTION}.")] = json.loads(text)
        except json.JSONDecodeError:
            options[name.removeprefix(f"{OPTION}.")] = text
    return options, others


def main() -> None:
    """OpenRLHF's `train_ppo_ray`, with trainers that have histories."""
    check_version("openrlhf", *TESTED)
    options, others = own_options(sys.argv[1:])
    Adapter.of_section(options, OPTION)  # mistakes are told before anything is started
    # OpenRLHF takes them from here, and Ray sends the classes to where they run.
    for module, name in ((ppo_trainer, "PPOTrainer"), (ppo_trainer_async, "TrainingActor")):
        plain = getattr(module, name).__ray_metadata__.modified_class.__ray_actor_class__
        setattr(module, name, ray.remote(personalize(plain, options)))
    sys.argv[1:] = others
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")


if __name__ == "__main__":
    # By its name, for of what is in __main__ Ray's processes know nothing.
    from pgrpo.integrations.openrlhf import main as start

    start()
