"""What TRL's trainer and swift's share: histories in transformers' logs and checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from zlib import crc32

import numpy as np

from pgrpo.errors import ConfigError
from pgrpo.integrations.adapter import Adapter, cluster_means
from pgrpo.types import ClusterId, FloatArray


class Remembering:
    """Goes before a trainer's class, and takes part where it scores, logs, saves and resumes."""

    histories: Adapter
    log_of: ClassVar[logging.Logger]
    """Logger of the integration, for what the histories warn of."""

    # Attributes of the trainer's class, which comes after this one.
    accelerator: Any
    args: Any
    model: Any
    num_generations: int
    num_generations_eval: int
    reward_func_names: list[str]
    reward_weights: Any
    state: Any
    train_dataset: Any
    _logs: Any
    _metrics: Any

    def _check_rewards(self, setting: str, combine: str) -> None:
        """Whether the trainer's several rewards are what the normalizer was made for.

        Args:
            setting: the trainer's that tells how they are combined, as it stands, for errors.
            combine: what it means, as the normalizer calls it.

        Raises:
            ConfigError: they are not.
        """
        normalizer, names = self.histories.normalizer, self.reward_func_names
        weights = [float(weight) for weight in self.reward_weights]
        options = normalizer.options
        wanted = f"reward_weights={weights}, reward_names={names}, combine={combine!r}"
        if options.reward_weights is None:
            if combine == "normalize_then_sum" and len(names) > 1:
                raise ConfigError(
                    f"{setting}, and {normalizer!r} keeps one history of the sum; make it with {wanted}"
                )
        elif options.names() != names or options.reward_weights != tuple(weights):
            raise ConfigError(
                f"{normalizer!r} has other rewards than the trainer; make it with {wanted}"
            )
        elif options.combine != combine:
            raise ConfigError(
                f"{setting}, and {normalizer!r} does otherwise; make it with {wanted}"
            )

    def _check_column(self, setting: str, column: str) -> None:
        """Whether the data set has a column, where it can tell: one that is streamed cannot."""
        columns = getattr(self.train_dataset, "column_names", None)
        if columns is not None and column not in columns:
            raise ConfigError(
                f"{setting} is {column!r}, which the data set does not have; it has "
                f"{', '.join(columns)}"
            )

    def _advantages(
        self,
        rewards: Any,
        clusters: Sequence[ClusterId],
        groups: Sequence[ClusterId] | None,
        prints: Sequence[int],
        lengths: Sequence[float],
    ) -> FloatArray:
        """Advantages of a generation, whose clusters go to the trainer's metrics.

        Args:
            rewards: [N, R] of all ranks, a tensor with NaN where a function gave none.
            clusters: [N].
            groups: [N] ids; None where those of a group stand together.
            prints: [N] of `fingerprint`, which tell this generation from the one before.
            lengths: [N] tokens of the completions.
        """
        training: bool = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        several = rewards.double().cpu().numpy()
        if self.histories.normalizer.options.reward_weights is None:
            weights = self.reward_weights.double().cpu().numpy()
            unscored = np.isnan(several).all(axis=1)
            several = np.where(unscored, np.nan, np.nansum(several * weights, axis=1))
        advantages = self.histories.advantages(
            several,
            clusters,
            [index // size for index in range(len(several))] if groups is None else groups,
            training=training,
            batch=(int(self.state.epoch or 0), prints),
            lengths=lengths,
        )
        for name, value in cluster_means(several, advantages, clusters).items():
            self._metrics["train" if training else "eval"][name].append(value)
        return advantages

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The trainer's, with the histories as they stand."""
        if self.model.training:
            logs |= self.histories.metrics()
        super().log(logs, start_time)  # type: ignore[misc]
        if "train_runtime" in logs:
            self._warn()

    def _warn(self) -> None:
        """Tell what the histories warn of: at the end and at checkpoints, for young ones are noise."""
        if self.accelerator.is_main_process:
            for warning in self.histories.new_warnings():
                self.log_of.warning("%s", warning)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            self.histories.save(Path(output_dir))
        self._warn()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self.histories.load(Path(checkpoint))


def fingerprint(prompt: Any) -> int:
    """What tells a prompt from others and is the same after a restart, as addresses are not."""
    return crc32(json.dumps(prompt, default=_kind).encode())


def _kind(value: object) -> str:
    return type(value).__name__
