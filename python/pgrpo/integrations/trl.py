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

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from pgrpo.errors import ConfigError, DataError
from pgrpo.integrations.adapter import Adapter, check_version, cluster_means
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


class _Personalized:
    """What `personalize` puts before a trainer: the calls of its hooks that see rewards and
    checkpoints."""

    # Attributes and methods of TRL's trainer, which comes after this class.
    accelerator: Any
    args: Any
    model: Any
    num_generations: int
    num_generations_eval: int
    reward_weights: Any
    state: Any
    train_dataset: Any
    _logs: Any
    _metrics: Any
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
        columns = getattr(self.train_dataset, "column_names", None)
        if columns is not None and cluster_column not in columns:
            raise ConfigError(
                f"cluster_column is {cluster_column!r}, which the data set does not have; it has "
                f"{', '.join(columns)}"
            )
        self._check_rewards(normalizer)

    def _check_rewards(self, normalizer: ClusterNormalizer) -> None:
        """Whether TRL's several reward functions are what the normalizer was made for."""
        trainer: Any = self
        names: list[str] = trainer.reward_func_names
        weights = [float(weight) for weight in self.reward_weights]
        chosen = self.args.multi_objective_aggregation
        options = normalizer.options
        wanted = f"reward_weights={weights}, reward_names={names}, combine={chosen!r}"
        if options.reward_weights is None:
            if chosen == "normalize_then_sum" and len(names) > 1:
                raise ConfigError(
                    f"multi_objective_aggregation is {chosen!r}, and {normalizer!r} keeps one history "
                    f"of the sum; make it with {wanted}"
                )
        elif options.names() != names or options.reward_weights != tuple(weights):
            raise ConfigError(f"{normalizer!r} has other rewards than TRL; make it with {wanted}")
        elif options.combine != chosen:
            raise ConfigError(
                f"multi_objective_aggregation is {chosen!r}, and {normalizer!r} does otherwise; make "
                f"it with {wanted}"
            )

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
        # What tells a batch from others must be the same after a restart, as addresses are not.
        prints = [crc32(json.dumps(prompt, default=_kind).encode()) for prompt in prompts]
        lengths = [len(ids) for ids in completion_ids_list]
        rows = gather_object(list(zip(clusters, prints, lengths, strict=True)))
        self._scored = rewards, *zip(*rows, strict=True)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """TRL's, with other advantages: in what it returns and in what it logs."""
        trainer: Any = super()
        output = trainer._generate_and_score_completions(inputs)
        training: bool = self.model.training
        rewards, clusters, prints, lengths = self._scored
        size = self.num_generations if training else self.num_generations_eval
        several = rewards.double().cpu().numpy()
        if self.histories.normalizer.options.reward_weights is None:
            weights = self.reward_weights.double().cpu().numpy()
            unscored = np.isnan(several).all(axis=1)
            several = np.where(unscored, np.nan, np.nansum(several * weights, axis=1))
        advantages = self.histories.advantages(
            several,
            clusters,
            [index // size for index in range(len(several))],
            training=training,
            batch=(int(self.state.epoch or 0), prints),
            lengths=lengths,
        )
        own = output["advantages"]
        first = self.accelerator.process_index * len(own)
        output["advantages"] = own.new_tensor(advantages[first : first + len(own)])
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())
        means = cluster_means(several, advantages, clusters)
        for name, value in means.items():
            self._metrics["train" if training else "eval"][name].append(value)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the histories as they stand."""
        if self.model.training:
            logs |= self.histories.metrics()
        super().log(logs, start_time)  # type: ignore[misc]
        if "train_runtime" in logs:
            self._warn()

    def _warn(self) -> None:
        """Tell what the histories warn of: at the end and at checkpoints, for young ones are noise."""
        if self.accelerator.is_main_process:
            for warning in self.histories.new_warnings():
                log.warning("%s", warning)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            self.histories.save(Path(output_dir))
        self._warn()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self.histories.load(Path(checkpoint))


def _kind(value: object) -> str:
    return type(value).__name__
