"""slime's and miles' hook for rewards: advantages by per-cluster histories in their place.

    --custom-reward-post-process-path pgrpo.integrations.slime.post_process
    --custom-config-path pgrpo.yaml        # pgrpo: {estimator: auto, min_count: 8}; may be left out

Each sample names its cluster in `metadata["cluster_id"]`, which comes from the data set's column of
metadata. What the function returns is trained on as it is: `--advantage-estimator grpo` hands it to the
tokens and does not normalise it again. All samples of a rollout come to the one process that manages
rollouts, so there is one set of histories.

The hook is not told of checkpoints. So histories are saved under `args.save` after each rollout, and
the first call of a resumed run loads those of the rollout that it goes on from.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgrpo.errors import DataError
from pgrpo.integrations.adapter import Adapter

log = logging.getLogger(__name__)

FOLDER = "pgrpo"
"""Where histories lie in `args.save`."""

KEPT = 3
"""Rollouts whose histories stay when they are not of one that slime saves: a run may be a few ahead of
its checkpoint."""


class _Histories:
    """Those of one run, in the process that manages its rollouts."""

    def __init__(self, args: Any) -> None:
        self.adapter, self.cluster_key = Adapter.of_section(getattr(args, "pgrpo", None), "pgrpo")
        self.rollout = int(getattr(args, "start_rollout_id", None) or 0)
        if self.rollout > 0:
            self.adapter.load(_folder(args.load, self.rollout - 1))

    def advantages(self, args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
        raw = [sample.get_reward_value(args) for sample in samples]
        missing = [place for place, s in enumerate(samples) if self.cluster_key not in s.metadata]
        if missing:
            raise DataError(
                f"sample {missing[0]} has no metadata {self.cluster_key!r}, which names its cluster; "
                f"it has {', '.join(map(str, samples[missing[0]].metadata)) or 'none'}"
            )
        found = self.adapter.advantages(
            np.array([np.nan if reward is None else float(reward) for reward in raw]),
            [sample.metadata[self.cluster_key] for sample in samples],
            [sample.group_index for sample in samples],
            training=True,
            lengths=[float(sample.response_length) for sample in samples],
        )
        for warning in self.adapter.new_warnings():
            log.warning("%s", warning)
        if getattr(args, "save", None):
            folder = _folder(args.save, self.rollout)
            folder.mkdir(parents=True, exist_ok=True)
            self.adapter.save(folder)
            self._drop(args)
        self.rollout += 1
        return [0.0 if reward is None else float(reward) for reward in raw], found.tolist()

    def _drop(self, args: Any) -> None:
        """Delete the histories of a rollout that no checkpoint is of."""
        old = self.rollout - KEPT
        every = getattr(args, "save_interval", None)
        if old < 0 or (every and (old + 1) % every == 0):
            return
        folder = _folder(args.save, old)
        for file in folder.iterdir() if folder.is_dir() else ():
            file.unlink()
        if folder.is_dir():
            folder.rmdir()


_running: list[_Histories] = []
"""Those of this process, from the first call on."""


def post_process(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Rewards as they are, and advantages, of all samples of a rollout.

    Args:
        args: slime's; `args.pgrpo` has options of the normalizer and `cluster_key`.
        samples: slime's, with `metadata` and `group_index`. One without a reward has advantage 0.

    Raises:
        ConfigError: an option is unknown or out of range.
        DataError: a sample has no cluster.
        CheckpointError: a run is resumed whose histories were not saved.
    """
    if not _running:
        _running.append(_Histories(args))
    return _running[0].advantages(args, samples)


def _folder(root: Any, rollout: int) -> Path:
    return Path(root) / FOLDER / f"step_{rollout}"
