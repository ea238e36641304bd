"""What all integrations share: a normalizer behind a loop that somebody else wrote.

Such loops have no reward for some completions, evaluate with the code that they train with, and begin
again in the middle of a batch after they were stopped. None of it may reach a history.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import numpy as np

from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.normalizer import RULES, ClusterNormalizer, Options
from pgrpo.types import ClusterId, FloatArray

HISTORIES = "pgrpo_histories.bin"
"""File of the histories in a framework's checkpoint, as `ClusterNormalizer.load` reads it."""

PROGRESS = "pgrpo_progress.json"
"""File beside it, which tells what batch the histories end with."""

MAX_LOGGED = 16
"""Clusters that are logged one by one: those with most rewards."""


class Adapter:
    """Computes the advantages of gathered rewards, and remembers which batch it has folded last.

    Every rank hands in the same rewards, in the same order, so the histories of all ranks are equal bit
    for bit, and nothing has to be merged.
    """

    def __init__(self, normalizer: ClusterNormalizer) -> None:
        if not isinstance(cast(object, normalizer), ClusterNormalizer):
            raise ConfigError(
                f"normalizer is {normalizer!r}; expected a pgrpo.ClusterNormalizer, as "
                'pgrpo.ClusterNormalizer("pgrpo")'
            )
        self.normalizer = normalizer
        self._last_batch: str | None = None
        self._resumed = False
        self._warned: set[str] = set()

    @classmethod
    def of_section(cls, section: Mapping[str, Any] | None, where: str) -> tuple[Adapter, str]:
        """Empty histories by a section of a framework's config, and where rollouts have their cluster.

        Args:
            section: options of the normalizer, of one reward, and `cluster_key`, which is `cluster_id`
                if it is left out; None for all defaults.
            where: the section's name, for errors.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        options = dict(section or {})
        key = str(options.pop("cluster_key", "cluster_id"))
        known = [field.name for field in fields(Options)]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"{where}.{name} is no option; expected cluster_key, {', '.join(known)}"
                )
        return cls(ClusterNormalizer(**options)), key

    def advantages(
        self,
        rewards: FloatArray,
        clusters: Sequence[ClusterId],
        groups: Sequence[ClusterId] | None,
        *,
        training: bool,
        batch: Hashable = None,
        lengths: Sequence[float] | None = None,
    ) -> FloatArray:
        """Advantages of a batch, which enters the histories if it is one of training.

        Args:
            rewards: [N] or [N, R] of all ranks. A rollout all of whose rewards are NaN has none: it
                enters no history and no group, and its advantage is 0.
            clusters: [N] cluster ids.
            groups: [N] group ids; None where the estimator needs none.
            training: False in evaluation, where histories are read and stay as they are.
            batch: what tells this batch from the one before, the same in a resumed run: the first batch
                after `load` is not folded again if it is the one that the histories end with. None
                where the framework never repeats one.
            lengths: [N] of completions; read where the estimator needs them, and otherwise not.

        Returns:
            [N] in float64.

        Raises:
            DataError: as for `ClusterNormalizer.advantages`, or infinite rewards; nothing was folded.
        """
        for name, ids in (("cluster", clusters), ("group", groups)):
            if ids is not None and len(ids) != len(rewards):
                raise DataError(
                    f"there are {len(rewards)} rewards and {len(ids)} {name} ids; expected one of each "
                    "per rollout"
                )
        missing = np.isnan(rewards)
        kept: list[int] = np.flatnonzero(
            ~(missing.all(axis=1) if rewards.ndim == 2 else missing)
        ).tolist()
        columns: dict[str, Any] = {}
        if lengths is not None and RULES[self.normalizer.options.estimator].needs_lengths:
            columns["lengths"] = [lengths[index] for index in kept]
        name = None if batch is None else f"{crc32(repr(batch).encode()):08x}"
        repeated = self._resumed and name is not None and name == self._last_batch
        fold = training and not repeated
        compute: Any = self.normalizer.advantages if fold else self.normalizer.normalize
        advantages = np.zeros(len(rewards))
        if kept:
            advantages[kept] = compute(
                rewards[kept],
                [clusters[index] for index in kept],
                None if groups is None else [groups[index] for index in kept],
                **columns,
            )
        if training:
            self._resumed, self._last_batch = False, name
        return advantages

    def metrics(self) -> dict[str, float]:
        """Count, mean and standard deviation of the histories with most rewards, to be logged."""
        found: dict[str, float] = {}
        several = self.normalizer.rewards or {"": self.normalizer}
        for reward, normalizer in several.items():
            label = f"/{reward}" if len(several) > 1 else ""
            histories = sorted(normalizer.snapshot().items(), key=lambda item: -item[1].count)
            for cluster, stats in histories[:MAX_LOGGED]:
                for name in ("count", "mean", "std"):
                    found[f"clusters/{cluster}{label}/history_{name}"] = float(getattr(stats, name))
        return found

    def new_warnings(self) -> list[str]:
        """What `ClusterNormalizer.diagnostics` warns of and has not been told before."""
        several = self.normalizer.rewards or {"": self.normalizer}
        found = [
            f"{name}: {warning}" if len(several) > 1 else warning
            for name, normalizer in several.items()
            for warning in normalizer.diagnostics().warnings
        ]
        # A warning names clusters, which come and go; what it says of them is told once.
        fresh = [warning for warning in found if warning.rpartition(": ")[2] not in self._warned]
        self._warned |= {warning.rpartition(": ")[2] for warning in fresh}
        return fresh

    def save(self, folder: Path) -> None:
        """Write the histories into a framework's checkpoint."""
        self.normalizer.save(folder / HISTORIES)
        (folder / PROGRESS).write_text(json.dumps({"last_batch": self._last_batch}))

    def load(self, folder: Path) -> None:
        """Go on with the histories of a checkpoint.

        Raises:
            CheckpointError: there are none, or they are damaged; the histories stay as they were.
        """
        if not (folder / HISTORIES).exists():
            raise CheckpointError(
                f"{folder} holds no {HISTORIES}: it was saved without pgrpo. To begin with empty "
                "histories, start a new run from its model"
            )
        try:
            last_batch = cast(Mapping[str, Any], json.loads((folder / PROGRESS).read_text()))[
                "last_batch"
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / PROGRESS} cannot be read: {error!r}") from None
        self.normalizer.load(folder / HISTORIES)
        self._last_batch, self._resumed = last_batch, True


def cluster_means(
    rewards: FloatArray, advantages: FloatArray, clusters: Sequence[ClusterId]
) -> dict[str, float]:
    """Mean reward and advantage of a batch, for the clusters with most rollouts in it.

    Args:
        rewards: [N] or [N, R]; of several, their plain sum is averaged. Rollouts without any are
            left out.
        advantages: [N].
        clusters: [N].
    """
    columns = rewards.reshape(len(rewards), -1)
    sums = np.nansum(columns, axis=1)
    places: dict[ClusterId, list[int]] = {}
    for place in np.flatnonzero(~np.isnan(columns).all(axis=1)).tolist():
        places.setdefault(clusters[place], []).append(place)
    largest = sorted(places.items(), key=lambda item: -len(item[1]))[:MAX_LOGGED]
    return {
        f"clusters/{cluster}/{name}": float(values[rows].mean())
        for cluster, rows in largest
        for name, values in (("reward", sums), ("advantage", advantages))
    }


def check_version(package: str, first: str, beyond: str) -> None:
    """Warn where a framework is not of the versions that its integration was tested with.

    Args:
        package: its name as a distribution.
        first: the first version that was tested.
        beyond: the first version that is too new to have been tested.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ConfigError(f"{package} is not installed; this needs it") from None
    if not _numbers(first) <= _numbers(found) < _numbers(beyond):
        warnings.warn(
            f"pgrpo was tested with {package} from {first} to below {beyond}, and this is {found}: "
            "look at the advantages of the first steps",
            stacklevel=3,
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
