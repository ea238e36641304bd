"""TRL's GRPOTrainer, or any class made from it, with advantages by per-cluster histories.

    from pgrpo.integrations.trl import personalize

    trainer = personalize(GRPOTrainer)(
        model=..., reward_funcs=..., train_dataset=..., args=GRPOConfig(...),
        normalizer=pgrpo.ClusterNormalizer("pgrpo"), cluster_column="cluster_id",
    )

Each row of the data set names its cluster in `cluster_column`. TRL gathers the rewards of all ranks;
the ids are gathered here, so every rank folds the same batch and the histories of all ranks are equal.
They are in TRL's checkpoints, and are restored with the optimizer.

`scale_rewards` has no effect any more: the estimator says how advantages are scaled.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from pgrpo.errors import ConfigError, DataError
from pgrpo.integrations.adapter import Adapter, check_version
from pgrpo.integrations.trainer import Remembering, fingerprint
from pgrpo.normalizer import ClusterNormalizer

log = logging.getLogger(__name__)

TESTED = "1.16.0", "1.17.0"
"""The first version of TRL that this was tested with, and the first that it was not."""

HOOKS = (
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
    "_set_signature_columns_if_needed",
)
"""Methods of the trainer that are overridden."""


@cache
def personalize(trainer: type[Any]) -> type[Any]:
    """A class as `trainer`, but with advantages by per-cluster histories.

    Args:
        trainer: TRL's GRPOTrainer, or a class made from it: Unsloth's, or one's own that keeps to its
            methods.

    Returns:
        A subclass with two more arguments: `normalizer`, a `ClusterNormalizer`, and `cluster_column`,
        the column of the data set that holds each row's cluster id, `cluster_id` by default.

    Raises:
        ConfigError: TRL is not installed, or the class is none of its GRPO trainers.
    """
    check_version("trl", *TESTED)
    missing = [name for name in HOOKS if not hasattr(trainer, name)]
    if missing:
        raise ConfigError(
            f"{trainer.__name__} has no {', '.join(missing)}; expected TRL's GRPOTrainer or a subclass"
        )
    return type(f"Personalized{trainer.__name__}", (_Personalized, trainer), {})


class _Personalized(Remembering):
    """What `personalize` puts before a trainer: the calls of its hooks that see rewards and
    checkpoints."""

    log_of = log
    _signature_columns: list[str] | None

    def __init__(
        self,
        *args: Any,
        normalizer: ClusterNormalizer,
        cluster_column: str = "cluster_id",
        **kwargs: Any,
    ) -> None:
        self.histories = Adapter(normalizer)
        self.cluster_column = cluster_column
        self._scored: tuple[Any, ...] = ()
        super().__init__(*args, **kwargs)
        self._check_column("cluster_column", cluster_column)
        combine: str = self.args.multi_objective_aggregation
        self._check_rewards(f"multi_objective_aggregation is {combine!r}", combine)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if (
            self._signature_columns is not None
            and self.cluster_column not in self._signature_columns
        ):
            self._signature_columns.append(self.cluster_column)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Any:
        """TRL's, with what else it takes to normalise them: the ids of all ranks."""
        from accelerate.utils import gather_object

        trainer: Any = super()
        rewards = trainer._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        try:
            clusters = [row[self.cluster_column] for row in inputs]
        except KeyError:
            raise DataError(
                f"a row has no column {self.cluster_column!r}, which names its cluster; it has "
                f"{', '.join(inputs[0])}"
            ) from None
        trainer._log_completion_extra("cluster", [str(cluster) for cluster in clusters])
        prints = [fingerprint(prompt) for prompt in prompts]
        lengths = [len(ids) for ids in completion_ids_list]
        rows = gather_object(list(zip(clusters, prints, lengths, strict=True)))
        self._scored = rewards, *zip(*rows, strict=True)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """TRL's, with other advantages: in what it returns and in what it logs."""
        trainer: Any = super()
        output = trainer._generate_and_score_completions(inputs)
        rewards, clusters, prints, lengths = self._scored
        advantages = self._advantages(rewards, clusters, None, prints, lengths)
        own = output["advantages"]
        first = self.accelerator.process_index * len(own)
        output["advantages"] = own.new_tensor(advantages[first : first + len(own)])
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())
        return output
