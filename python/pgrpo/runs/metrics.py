"""What a step tells about itself: one record per step, the same for every log and display.

docs/run_folder.md explains each name.
"""

from __future__ import annotations

import importlib
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from pgrpo.normalizer import ClusterStats
from pgrpo.normalizer.diagnostics import Diagnostics
from pgrpo.runs.folder import disk_errors
from pgrpo.types import ClusterId, Group

if sys.platform != "win32":
    import resource


def cluster_records(
    groups: Sequence[Group],
    histories: Mapping[ClusterId, ClusterStats],
    read: Mapping[ClusterId, ClusterStats],
    *,
    eps: float,
    ddof: int,
) -> dict[str, dict[str, Any]]:
    """Per cluster with a history: raw reward of this step, history after it, mean advantage and the
    terms of Corollary 3.1 by the histories that were `read`, before or after the step.

    With a group's mean and standard deviation m_G, s_G and its cluster's m_p, s_p, P-GRPO's
    advantage is scale_ratio * (GRPO's advantage) + bias, where

        scale_ratio = (s_G + eps) / (s_p + eps)        bias = (m_G - m_p) / (s_p + eps)

    both averaged here over the cluster's groups (arXiv 2603.10009, Corollary 3.1). NaN rewards are
    left out.
    """
    records: dict[str, dict[str, Any]] = {}
    rewards = np.concatenate([group.rewards for group in groups])
    advantages = np.concatenate([group.advantages for group in groups])
    cluster_of = [r.prompt.cluster_id for group in groups for r in group.rollouts]
    for cluster, history in histories.items():
        members = np.array([i for i, c in enumerate(cluster_of) if c == cluster], dtype=int)
        members = members[np.isfinite(rewards[members])]
        record: dict[str, Any] = {
            "reward": None,
            "num_rollouts": len(members),
            "count": history.count,
            "mean": _finite(history.mean),
            "std": _finite(history.std),
            "advantage": None,
            "scale_ratio": None,
            "bias": None,
        }
        if len(members):
            record["reward"] = float(rewards[members].mean())
            record["advantage"] = float(advantages[members].mean())
        if len(members) and cluster in read:
            scale = read[cluster].std + eps
            stats: list[tuple[float, float]] = []
            for group in groups:
                values = group.rewards[np.isfinite(group.rewards)]
                if group.prompt.cluster_id == cluster and len(values) > ddof:
                    std = float(values.std(ddof=ddof))
                    stats.append(
                        ((std + eps) / scale, (float(values.mean()) - read[cluster].mean) / scale)
                    )
            if stats:
                record["scale_ratio"], record["bias"] = np.mean(stats, axis=0).tolist()
        records[str(cluster)] = record
    return records


LENGTH_BIAS = 0.1
"""Mean advantages beyond this share of their root mean square are worth a warning under a loss in
which they act on lengths."""


def warnings(diagnostics: Diagnostics, aggregation: str) -> list[str]:
    """What the normalizer warns of, and what it cannot know: how the loss weighs tokens.

    Under `loss.aggregation = "grpo"` each rollout's tokens share a weight of 1: where advantages are
    positive on the mean, tokens of short completions are pushed up more than those of long ones.
    """
    found = list(diagnostics.warnings)
    told = [c for c in diagnostics.clusters.values() if c.mean_advantage is not None]
    if aggregation == "grpo" and told:
        counts, means = np.array([(c.count, c.mean_advantage) for c in told]).T
        spreads = np.array([c.std_advantage for c in told])
        mean = float(np.average(means, weights=counts))
        rms = math.sqrt(float(np.average(means**2 + spreads**2, weights=counts)))
        if abs(mean) > LENGTH_BIAS * rms:
            found.append(
                f"mean advantage {mean:+.2f} with loss.aggregation grpo favours "
                f"{'short' if mean > 0 else 'long'} completions; dapo and dr_grpo do not"
            )
    return found


def fairness(values: Sequence[float]) -> dict[str, float | None]:
    """Spread over clusters: the worst value, best minus worst, and the Gini coefficient.

    Gini = sum_ij |v_i - v_j| / (2 K^2 mean), 0 when all are equal; None unless all values are
    non-negative and one is positive, where it has no meaning.
    """
    v = np.asarray(values, dtype=np.float64)
    if not len(v):
        return {"worst": None, "gap": None, "gini": None}
    defined = v.min() >= 0 and v.max() > 0
    gini = float(np.abs(v[:, None] - v[None, :]).mean() / (2 * v.mean())) if defined else None
    return {"worst": float(v.min()), "gap": float(v.max() - v.min()), "gini": gini}


def equal_groups(groups: Sequence[Group]) -> float:
    """Share of the groups whose rewards are all equal, in which GRPO has no signal. NaN rewards are
    left out."""
    return float(np.mean([len(set(g.rewards[np.isfinite(g.rewards)])) <= 1 for g in groups]))


def peak_memory_bytes() -> int | None:
    """Most memory this process has held so far, in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class EventFile:
    """A TensorBoard event file, written on the spot.

    torch's SummaryWriter writes from a thread of its own, where a full disk is noticed too late to
    be told.

    Args:
        folder: what `tensorboard --logdir` is pointed at.
        first_step: of what will be written; TensorBoard forgets what earlier files say of it and of
            later steps, which a resumed run takes again.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # tensorboard's modules are untyped, and made when they are imported.
        protocol: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        summary: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        records: Any = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._event, self._summary = protocol.Event, summary.Summary
        self._framed = records.RecordWriter
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}"
        self._path = folder / name
        with disk_errors(f"{self._path} cannot be written"):
            folder.mkdir(exist_ok=True)
        self._add(file_version="brain.Event:2")
        start = protocol.SessionLog(status=protocol.SessionLog.START)
        self._add(step=first_step, session_log=start)

    def write(self, record: Mapping[str, Any], step: int, prefix: str = "") -> None:
        """Every number of a record, by its path."""
        values = [
            self._summary.Value(tag=path, simple_value=value)
            for path, value in _numbers(record, prefix)
        ]
        self._add(step=step, summary=self._summary(value=values))

    def _add(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        with disk_errors(f"{self._path} cannot be written"), open(self._path, "ab") as file:
            self._framed(file).write(event.SerializeToString())


def _numbers(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(cast(Mapping[str, Any], value), f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, value


def processor_name() -> str:
    """The processor as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
