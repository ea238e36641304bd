"""ms-swift's GRPO trainer with advantages by per-cluster histories.

A plugin of one's own switches it on:

    import pgrpo
    from pgrpo.integrations.swift import personalize

    personalize(pgrpo.ClusterNormalizer("pgrpo"))

and swift is told of that file:

    swift rlhf --rlhf_type grpo --external_plugins plugin.py ...

Each row of the data set names its cluster in the column `cluster_id`. swift gathers the rewards of all
ranks; the ids are gathered here, so every rank folds the same batch and the histories of all ranks are
equal. They are in swift's checkpoints, and are restored with the optimizer.

`advantage_estimator` and the scale of `scale_rewards` have no effect any more: the normalizer's
estimator says how advantages are scaled.
"""

from __future__ import annotations

import logging
from collections import deque
from itertools import takewhile
from typing import Any

from pgrpo.errors import ConfigError, DataError
from pgrpo.integrations.adapter import Adapter, check_version
from pgrpo.integrations.trainer import Remembering, fingerprint
from pgrpo.normalizer import ClusterNormalizer

log = logging.getLogger(__name__)

TESTED = "4.6.0", "4.7"
"""The first version of ms-swift that this was tested with, and the first that it was not."""

TRAINER = "PersonalizedGRPOTrainer"
"""Under this name swift finds the class here."""


def personalize(normalizer: ClusterNormalizer, cluster_key: str = "cluster_id") -> None:
    """Have swift make its GRPO trainer with per-cluster histories, from now on in this process.

    Args:
        normalizer: its histories and options; each rank has its own, and they stay equal.
        cluster_key: the column of the data set that holds each row's cluster id.

    Raises:
        ConfigError: ms-swift is not installed.
    """
    check_version("ms-swift", *TESTED)
    from swift.trainers.trainer_factory import TrainerFactory

    _Personalized.chosen = normalizer, cluster_key
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.{TRAINER}"


def __getattr__(name: str) -> Any:
    """The trainer's class, made when swift asks for it: a plugin is read before swift has chosen its
    device, and its trainers are imported after that, as they are without pgrpo."""
    if name != TRAINER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from swift.rlhf_trainers import GRPOTrainer

    return type(TRAINER, (_Personalized, GRPOTrainer), {})


class _Personalized(Remembering):
    """What is put before swift's trainer: the calls of its hooks that see rewards and checkpoints."""

    chosen: tuple[ClusterNormalizer, str]
    """What `personalize` was called with last."""
    log_of = log

    # Attributes of swift's trainer.
    beta: float
    dynamic_num_samples: bool
    kl_in_reward: bool
    scale_rewards: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        normalizer, self.cluster_key = self.chosen
        self.histories = Adapter(normalizer)
        super().__init__(*args, **kwargs)
        self._check_column("cluster_key", self.cluster_key)
        combine = "normalize_then_sum" if self.scale_rewards == "gdpo" else "sum_then_normalize"
        self._check_rewards(f"scale_rewards is {self.scale_rewards!r}", combine)
        if self.kl_in_reward and self.beta:
            raise ConfigError(
                "kl_in_reward is true, and histories are of rewards alone; set --kl_in_reward false, "
                "which puts the KL penalty into the loss, or --beta 0"
            )

    def _compute_advantages(
        self, samples: list[Any], rewards_per_func: Any, batch_encoded_inputs: Any
    ) -> Any:
        """swift's, of all ranks, with other advantages: its metrics are its own.

        Where an agent's trajectory was split into several samples it counts once, by the last, and all
        of them get that one's advantage.
        """
        from accelerate.utils import gather_object

        trainer: Any = super()
        own = trainer._compute_advantages(samples, rewards_per_func, batch_encoded_inputs)
        rows: list[Any] = gather_object([self._row(sample) for sample in samples])
        last = {row[0]: index for index, row in enumerate(rows)}
        places = list(last.values())
        _, groups, clusters, prints, lengths = zip(*(rows[i] for i in places), strict=True)
        found = self._advantages(
            rewards_per_func[places],
            clusters,
            groups if self.dynamic_num_samples else None,
            prints,
            lengths,
        )
        logged = self._logs.setdefault("cluster", deque(maxlen=self.args.generation_batch_size))
        logged.extend(str(row[2]) for row in rows)
        of_trajectory = dict(zip(last, found.tolist(), strict=True))
        return own.new_tensor([of_trajectory[row[0]] for row in rows])

    def _row(self, sample: Any) -> tuple[Any, ...]:
        """Trajectory, prompt, cluster, fingerprint and length of a sample, for all ranks."""
        if self.cluster_key not in sample.extra:
            raise DataError(
                f"a row has no column {self.cluster_key!r}, which names its cluster; it has "
                f"{', '.join(sample.extra) or 'none of its own'}"
            )
        messages: list[dict[str, Any]] = sample.messages
        prompt = list(takewhile(lambda message: message["role"] != "assistant", messages))
        turns: list[Any] = sample.response_token_ids
        length = sum(len(turn) if isinstance(turn, list) else 1 for turn in turns)
        return (
            sample.request_id,
            sample.prompt_id,
            sample.extra[self.cluster_key],
            fingerprint(prompt),
            length,
        )
