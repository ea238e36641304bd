"""What a step tells about itself, computed from its batch: the record that every log gets."""

from __future__ import annotations

import heapq
import math
import platform
import sys
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pgrpo.clusters.division import Flow
from pgrpo.config.sections import EstimatorConfig
from pgrpo.normalizer import ClusterStats
from pgrpo.normalizer.diagnostics import Diagnostics
from pgrpo.rollout.collector import Batch
from pgrpo.runs.log import Log
from pgrpo.runs.records import (
    MAX_CLUSTERS,
    MAX_WAYS,
    ClusterRecord,
    FairnessRecord,
    FlowRecord,
    HistoryRecord,
    RewardRecord,
    SampleRecord,
    StepRecord,
)
from pgrpo.types import ClusterId, FloatArray, Group

if sys.platform != "win32":
    import resource

EXTREMES = 8
"""Clusters of each kind (largest, smallest, worst) that a record lists before all others."""

PAIRS = 1024
"""Up to so many clusters the Gini coefficient is summed over their pairs, at 8 MB."""


def step_record(
    batch: Batch,
    estimator: EstimatorConfig,
    new: Collection[str] | None = None,
    **update: Any,
) -> StepRecord:
    """The record of a step.

    Args:
        batch: what the step learned from.
        estimator: the section `[estimator]`.
        new: users whom saved clusters do not know; None where clusters are not saved ones.
        update: fields of the record that its update, its engine and its clock tell.
    """
    rollouts = [rollout for group in batch.groups for rollout in group.rollouts]
    rewards = np.concatenate([group.rewards for group in batch.groups])
    rewarded = rewards[np.isfinite(rewards)]
    penalties = [group.penalties for group in batch.groups if group.penalties is not None]
    clusters, spread = cluster_records(
        batch.groups,
        batch.after,
        batch.before if estimator.order == "normalize_then_update" else batch.after,
        batch.of_rewards,
        eps=estimator.eps,
        ddof=estimator.ddof,
    )
    return StepRecord(
        step=batch.step,
        reward=float(rewarded.mean()),
        rewards=reward_records(batch.groups),
        num_rollouts=len(rollouts),
        num_unrewarded=len(rollouts) - len(rewarded),
        num_unseen=None if new is None else sum(r.prompt.example.user in new for r in rollouts),
        num_replaced=len(batch.replaced),
        completion_tokens=float(np.mean([len(r.completion_ids) for r in rollouts])),
        truncated=float(np.mean([r.truncated for r in rollouts])),
        overlong=float(np.concatenate(penalties).mean()) if penalties else None,
        equal_groups=equal_groups(batch.groups, of_each=estimator.combine == "normalize_then_sum"),
        entropy=-float(np.mean([np.mean(r.rollout_logprobs) for r in rollouts])),
        rollout_version=min(r.policy_version for r in rollouts),
        assignment_version=batch.assignment_version,
        peak_memory_bytes=peak_memory_bytes(),
        num_clusters=len(batch.after),
        clusters=clusters,
        fairness=spread,
        **update,
    )


def sample_records(batch: Batch, wanted: int) -> list[SampleRecord]:
    """So many of the step's rollouts, in their order: of every cluster one, then of every cluster
    another, ..., each from another group as long as there is one."""
    rollouts = [
        (g, place) for g, group in enumerate(batch.groups) for place in range(len(group.rollouts))
    ]
    groups_in_turn = sorted(rollouts, key=lambda rollout: rollout[1])
    in_turn = one_of_each(groups_in_turn, lambda r: batch.groups[r[0]].prompt.cluster_id)
    return [
        sample_record(batch.step, batch.assignment_version, batch.groups[g], place)
        for g, place in sorted(in_turn[:wanted])
    ]


def sample_record(step: int, assignment_version: int, group: Group, place: int = 0) -> SampleRecord:
    """One rollout of a group, as it is logged."""
    rollout = group.rollouts[place]
    return SampleRecord(
        step=step,
        prompt=rollout.prompt.example.text,
        completion=rollout.completion,
        reward=_finite(float(group.rewards[place])),
        advantage=_finite(float(group.advantages[place])),
        scores={n: _finite(float(scores[place])) for n, scores in _several(group).items()},
        cluster_id=rollout.prompt.cluster_id,
        user=rollout.prompt.example.user,
        assignment_version=assignment_version,
    )


def flow_records(flows: Sequence[Flow]) -> dict[str, FlowRecord]:
    """How people moved whenever they were divided again, by the version of the assignment: of each time
    the MAX_WAYS that most took."""
    records: dict[str, FlowRecord] = {}
    for version, flow in enumerate(flows, 1):
        ways = [(n, old, new) for old, row in flow["users"].items() for new, n in row.items()]
        most = set(heapq.nlargest(MAX_WAYS, ways, key=lambda way: way[0]))
        users: dict[str, dict[str, int]] = {}
        for n, old, new in ways:
            if (n, old, new) in most:
                users.setdefault(old, {})[new] = n
        records[str(version)] = FlowRecord(
            step=flow["step"], num_moved=flow["num_moved"], users=users
        )
    return records


def reward_records(groups: Sequence[Group]) -> dict[str, RewardRecord]:
    """What each of several rewards gave; empty where there is one."""
    records: dict[str, RewardRecord] = {}
    for name in _several(groups[0]):
        scores = np.concatenate([group.scores[name] for group in groups])
        given = scores[np.isfinite(scores)]
        mean = float(given.mean()) if len(given) else None
        records[name] = RewardRecord(reward=mean, num_rollouts=len(given))
    return records


def _several(group: Group) -> Mapping[str, FloatArray]:
    return group.scores if len(group.scores) > 1 else dict[str, FloatArray]()


EntryT = TypeVar("EntryT")


def one_of_each(entries: Sequence[EntryT], kind: Callable[[EntryT], Hashable]) -> list[EntryT]:
    """The entries reordered: the first of every kind, then the second of every kind, ..."""
    met: Counter[Hashable] = Counter()
    turns: list[tuple[int, int]] = []
    for place, entry in enumerate(entries):
        turns.append((met[kind(entry)], place))
        met[kind(entry)] += 1
    return [entries[place] for _, place in sorted(turns)]


def cluster_records(
    groups: Sequence[Group],
    histories: Mapping[ClusterId, ClusterStats],
    read: Mapping[ClusterId, ClusterStats],
    of_rewards: Mapping[str, Mapping[ClusterId, ClusterStats]] | None = None,
    *,
    eps: float,
    ddof: int,
) -> tuple[dict[str, ClusterRecord], FairnessRecord]:
    """Per cluster with a history: raw reward of this step, history after it, mean advantage and the
    terms of Corollary 3.1 by the cluster's own history `read`, before or after the step; and the
    spread of the rewards over the clusters of this step.

    With a group's mean and standard deviation m_G, s_G and its cluster's m_p, s_p, P-GRPO's
    advantage is scale_ratio * (GRPO's advantage) + bias, where

        scale_ratio = (s_G + eps) / (s_p + eps)        bias = (m_G - m_p) / (s_p + eps)

    both averaged here over the cluster's groups (arXiv 2603.10009, Corollary 3.1), of rewards less
    penalties, as they are in the history. That is what the cluster's own history says, as it stands:
    `prior_count` and `sigma_floor` are not in it, nor is any other history that advantages may come
    from. NaN rewards are left out. Histories of each reward by itself (`of_rewards`) are told beside
    them.

    Of more than MAX_CLUSTERS clusters, those are given that `_listed` chooses. O(N + K) for N rollouts
    and K clusters.
    """
    met: dict[ClusterId, list[tuple[FloatArray, FloatArray, FloatArray]]] = {}
    for group in groups:
        rewarded = np.isfinite(group.rewards)
        if rewarded.any():
            part = (group.rewards[rewarded], group.shaped[rewarded], group.advantages[rewarded])
            met.setdefault(group.prompt.cluster_id, []).append(part)
    means = {
        cluster: float(np.concatenate([rewards for rewards, *_ in parts]).mean())
        for cluster, parts in met.items()
    }
    records: dict[str, ClusterRecord] = {}
    for cluster in _listed(histories, means):
        history, parts = histories[cluster], met.get(cluster, [])
        terms: list[tuple[float, float]] = []
        if cluster in read:
            scale = read[cluster].std + eps
            for _, shaped, _ in parts:
                if len(shaped) > ddof:
                    std, mean = float(shaped.std(ddof=ddof)), float(shaped.mean())
                    terms.append(((std + eps) / scale, (mean - read[cluster].mean) / scale))
        scale_ratio, bias = np.mean(terms, axis=0).tolist() if terms else (None, None)
        records[str(cluster)] = ClusterRecord(
            reward=means.get(cluster),
            num_rollouts=sum(len(rewards) for rewards, *_ in parts),
            count=history.count,
            mean=_finite(history.mean),
            std=_finite(history.std),
            advantage=float(np.concatenate([a for *_, a in parts]).mean()) if parts else None,
            scale_ratio=scale_ratio,
            bias=bias,
            rewards={
                name: HistoryRecord(count=of.count, mean=_finite(of.mean), std=_finite(of.std))
                for name, table in (of_rewards or {}).items()
                if (of := table.get(cluster)) is not None
            },
        )
    return records, fairness([means[cluster] for cluster in histories if cluster in means])


def _listed(
    histories: Mapping[ClusterId, ClusterStats], met: Mapping[ClusterId, float]
) -> Sequence[ClusterId]:
    """Clusters of a record, in the order of the histories: all, or, where they are more than
    MAX_CLUSTERS, the extremes and then those that were met in this step, the worst first."""
    if len(histories) <= MAX_CLUSTERS:
        return list(histories)
    chosen = extremes(
        {cluster: history.count for cluster, history in histories.items()},
        {cluster: history.mean for cluster, history in histories.items()},
        EXTREMES,
    )
    changed = heapq.nsmallest(MAX_CLUSTERS, met, key=lambda c: met[c])
    chosen = set(list(dict.fromkeys([*chosen, *changed]))[:MAX_CLUSTERS])
    return [cluster for cluster in histories if cluster in chosen]


KeyT = TypeVar("KeyT")


def extremes(sizes: Mapping[KeyT, float], values: Mapping[KeyT, float], each: int) -> list[KeyT]:
    """The largest, the smallest and the worst (of least value), `each` of them, in their own order;
    all where they are no more than 3 * each. Who is several of these leaves no room to others."""
    if len(sizes) <= 3 * each:
        return list(sizes)
    chosen = {
        *heapq.nlargest(each, sizes, key=lambda key: sizes[key]),
        *heapq.nsmallest(each, sizes, key=lambda key: sizes[key]),
        *heapq.nsmallest(each, values, key=lambda key: values[key]),
    }
    return [key for key in sizes if key in chosen]


def fairness(values: Sequence[float]) -> FairnessRecord:
    """Spread over clusters: the worst value, best minus worst, and the Gini coefficient.

    Gini = sum_ij |v_i - v_j| / (2 K^2 mean), 0 when all are equal; None unless all values are
    non-negative and one is positive, where it has no meaning.
    """
    v = np.asarray(values, dtype=np.float64)
    if not len(v):
        return FairnessRecord()
    gini = None
    if v.min() >= 0 and v.max() > 0:
        if len(v) <= PAIRS:
            difference = np.abs(v[:, None] - v[None, :]).mean()
        else:
            # In rising order the i-th of K values is the larger one of i pairs, the smaller one of
            # K - 1 - i.
            ranks = np.arange(len(v))
            difference = 2 * float((2 * ranks - len(v) + 1) @ np.sort(v)) / len(v) ** 2
        gini = float(difference / (2 * v.mean()))
    return FairnessRecord(worst=float(v.min()), gap=float(v.max() - v.min()), gini=gini)


def equal_groups(groups: Sequence[Group], *, of_each: bool = False) -> float:
    """Share of the groups whose rewards less penalties are all equal, in which GRPO has no
    signal; with `of_each` those of every single reward. NaN rewards are left out."""

    def equal(rewards: FloatArray) -> bool:
        return len(set(rewards[np.isfinite(rewards)])) <= 1

    return float(
        np.mean([all(map(equal, g.scores.values() if of_each else [g.shaped])) for g in groups])
    )


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


COLLAPSE_STEPS = 10
"""Steps at the beginning and at the end of a run that are compared."""

EQUAL_GROUPS, CUT_OFF, ENTROPY_LEFT = 0.8, 0.95, 0.1
"""Beyond these shares of a step's groups and completions, and below this part of the entropy that a
run began with, its policy may have collapsed."""


def collapse(records: Log[StepRecord]) -> list[str]:
    """What tells that a policy may have collapsed: it says one thing only, or does not come to an end.

    The means of the last steps are judged, beside those of the first; a run that is too short to
    have both tells nothing.
    """
    ends = records.ends()
    if ends is None or ends[1] - ends[0] + 1 < 2 * COLLAPSE_STEPS:
        return []
    first, last = (
        list(records.at(range(start, start + COLLAPSE_STEPS)))
        for start in (ends[0], ends[1] - COLLAPSE_STEPS + 1)
    )

    def mean(steps: Sequence[StepRecord], name: str) -> float:
        values = [value for step in steps if (value := getattr(step, name)) is not None]
        return float(np.mean(values)) if values else math.nan

    found: list[str] = []
    before, after = mean(first, "entropy"), mean(last, "entropy")
    if after < ENTROPY_LEFT * before:
        found.append(
            f"entropy fell from {before:.2f} to {after:.3f} nats a token: the policy hardly varies "
            "what it says; a lower learning rate or loss.kl_coef keep it from that"
        )
    equal = mean(last, "equal_groups")
    # A group of one is equal to itself.
    if equal > EQUAL_GROUPS and any(step.equal_groups != 1 for step in (*first, *last)):
        found.append(
            f"{equal:.0%} of the groups of the last steps have rewards that are all equal: estimators "
            "that compare within a group have hardly anything left to learn from"
        )
    before, after = mean(first, "truncated"), mean(last, "truncated")
    if after > CUT_OFF > before:
        found.append(
            f"generation.max_new_tokens ended {after:.0%} of the completions of the last steps, and "
            f"{before:.0%} of those of the first: the policy no longer comes to an end"
        )
    return found


def peak_memory_bytes() -> int | None:
    """Most memory this process has held so far, in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
