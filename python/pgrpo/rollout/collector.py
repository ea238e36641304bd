"""Everything of a step up to the update: prompts, rollouts, rewards, histories, advantages.

Groups are scored while others are still generated. A step's rewards are folded into the histories in
rollout order once all are there, so that whichever group finishes first, a seeded run repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from pgrpo.clusters.assignment import Shares
from pgrpo.clusters.membership import Membership
from pgrpo.config.sections import ClusteringConfig, EstimatorConfig, LossConfig, RunConfig
from pgrpo.errors import CheckpointError, PluginError
from pgrpo.normalizer import RULES, ClusterNormalizer, ClusterStats
from pgrpo.normalizer.diagnostics import Diagnostics
from pgrpo.rewards.scorer import Scorer
from pgrpo.rollout.engines import Engine
from pgrpo.rollout.entries import Columns, Entries
from pgrpo.rollout.order import PromptOrder
from pgrpo.rollout.people import People
from pgrpo.rollout.prompts import PromptBuilder
from pgrpo.rollout.seeds import derive_seed, seed_globals
from pgrpo.rollout.settings import GenerationConfig
from pgrpo.types import (
    ClusterId,
    Dataset,
    FloatArray,
    Group,
    Prompt,
    Rollout,
    split_by_group,
)

Histories = Mapping[ClusterId, ClusterStats]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from."""

    step: int
    groups: Sequence[Group]
    """All that were generated, by group_id, with rewards and advantages."""
    before: Histories
    """Clusters' histories without this step's rewards."""
    after: Histories
    """And with them."""
    replaced: Set[int] = frozenset()
    """group_ids of those that had no signal and gave their place to others."""
    of_rewards: Mapping[str, Histories] = field(default_factory=dict[str, Histories])
    """Reward -> the clusters' histories of it alone with this step's, where advantages are read from
    these."""
    assignment_version: int = 0
    """How many times users had been divided again when its prompts were made."""
    timing_s: Mapping[str, float] = field(default_factory=dict[str, float])
    """`generate` until the last group was finished, `reward` from then on."""

    def rewarded(self) -> list[Group]:
        """What the policy learns from: the groups that were not replaced, without rollouts that got no
        reward, where anything is left of them."""
        kept = [group for group in self.groups if group.group_id not in self.replaced]
        rewarded = [
            group.only(np.flatnonzero(np.isfinite(group.rewards)).tolist()) for group in kept
        ]
        return [group for group in rewarded if group.rollouts]


T = TypeVar("T")


class Peers(Protocol):
    """The processes that make a step's groups together (`train.parallel`)."""

    def share(self, costs: Sequence[float]) -> range:
        """Which of these things are this process's."""
        ...

    def gather(self, make: Callable[[], Sequence[T]]) -> list[T]:
        """What all processes make."""
        ...


class _Watch:
    """When the last group came."""

    def __init__(self) -> None:
        self._start = self._generated = time.perf_counter()

    def over(self, groups: Iterator[Group]) -> Iterator[Group]:
        try:
            yield from groups
        finally:
            self._generated = time.perf_counter()

    def laps(self) -> dict[str, float]:
        now = time.perf_counter()
        return {"generate": self._generated - self._start, "reward": now - self._generated}


@dataclass(frozen=True, slots=True)
class Sampled:
    """The groups of a step with their rewards, of which the histories know nothing yet."""

    step: int
    kept: Sequence[Group]
    replaced: Sequence[Group]
    """Those that had no signal and gave their place to others."""
    watch: _Watch


class Collector:
    """Makes the batches of a run, one step after the other.

    Args:
        run: the section `[run]`.
        clustering: the section `[clustering]`.
        estimator: the section `[estimator]`.
        loss: the section `[loss]`.
        generation: the section `[generation]`.
        dataset: whose users they are.
        order: the examples that prompts are made of.
        members: knows whose rewards share a history.
        builder: makes prompts.
        engine: generates, with whatever weights it was last synced to.
        scorer: gives rollouts their rewards.
        peers: the processes that share the work.

    Attributes:
        num_folded: steps whose rewards the histories hold.
        normalizer: makes the advantages.
        histories: those of the clusters' rewards; control arms read others, and so does
            `combine = "normalize_then_sum"`.
        people: the same by user, where users are divided again (`clustering.recluster_every`).
    """

    def __init__(
        self,
        run: RunConfig,
        clustering: ClusteringConfig,
        estimator: EstimatorConfig,
        loss: LossConfig,
        generation: GenerationConfig,
        dataset: Dataset,
        order: PromptOrder,
        members: Membership,
        builder: PromptBuilder,
        engine: Engine,
        scorer: Scorer,
        peers: Peers,
    ) -> None:
        self._run = run
        self._peers = peers
        self._generation = generation
        self._order = order
        self._members = members
        self._builder = builder
        self._engine = engine
        self._scorer = scorer
        self.num_folded = 0
        self._loss = loss
        self._rule = RULES[estimator.name]
        self._borrows = estimator.history == "user" and estimator.prior_count > 0
        self._reads_before = estimator.order == "normalize_then_update"
        options = estimator.model_dump(exclude={"name", "history", "combine"})
        self._by_reward = estimator.combine == "normalize_then_sum"
        self._several: dict[str, Any] = {}
        if self._by_reward:
            weights = scorer.weights
            self._several = {"reward_weights": [*weights.values()], "reward_names": [*weights]}
            self._several["combine"] = estimator.combine
        self.normalizer = ClusterNormalizer(
            estimator.name, nan_policy="zero", track_diagnostics=True, **options, **self._several
        )
        is_soft = members.division.shares is not None
        # What groups alone make of rewards is the same to every cluster.
        self._reads_clusters = not is_soft or self._rule.reads_histories
        self._estimator = estimator
        own = estimator.history == "cluster" and self._reads_clusters
        # What a control arm keeps is of no cluster.
        self._of_rewards = self.normalizer.rewards if own else {}
        self.histories = (
            self.normalizer
            if own and not self._by_reward
            else ClusterNormalizer("pgrpo", nan_policy="zero", **options)
        )
        self._clusters_of, self._histories_of = self._shares()
        self.people = (
            People(
                dataset,
                clustering.recluster_from,
                [*scorer.weights],
                self._several,
                sums=self.histories is not self.normalizer,
            )
            if clustering.recluster_every
            else None
        )

    def collect(self, step: int) -> Batch:
        """Generate, score, fold, normalise: `sample` and `fold` in one; raises as `sample`."""
        return self.fold(self.sample(step))

    def sample(self, step: int) -> Sampled:
        """Generate and score what a step learns from; no history changes.

        Raises:
            EngineError: generation failed.
            PluginError: a reward failed, or no rollout got one.
        """
        run, watch = self._run, _Watch()
        seed_globals(derive_seed(run.seed, "globals", step))
        seed = derive_seed(run.seed, "sampling", step)
        kept = self._sample(step, self._prompts(step), 0, seed, watch)
        replaced: list[Group] = []
        for attempt in range(run.resample):
            idle = [group for group in kept if not self._has_signal(group)]
            if not idle:
                break
            first = len(kept) + len(replaced)
            others = self._order.others(step, len(replaced) + len(idle))[len(replaced) :]
            prompts = [self._builder.build(example) for example in others]
            seed = derive_seed(run.seed, f"resample {attempt}", step)
            kept = [group for group in kept if group not in idle]
            kept += self._sample(step, prompts, first, seed, watch)
            replaced += idle

        def require_reward() -> list[None]:
            if not any(np.isfinite(group.rewards).any() for group in kept):
                raise PluginError(
                    f"no rollout of step {step} got a reward; there is nothing to learn from"
                )
            return []

        self._peers.gather(require_reward)
        return Sampled(step, kept, replaced, watch)

    def fold(self, sampled: Sampled) -> Batch:
        """Fold a step's rewards into the histories, and make advantages of them. It takes no time to
        speak of, and must not be interrupted: histories would hold rewards that no batch has."""
        before = self.histories.snapshot()
        self.num_folded = sampled.step
        groups = self._normalize(sampled.kept, sampled.replaced)
        of_rewards = {name: one.snapshot() for name, one in self._of_rewards.items()}
        after, numbers = self.histories.snapshot(), {group.group_id for group in sampled.replaced}
        timing = sampled.watch.laps()
        version = self._members.division.version
        return Batch(sampled.step, groups, before, after, numbers, of_rewards, version, timing)

    def regroup(self) -> None:
        """Let the histories be those of the clusters that users have been divided into again; it must
        not be interrupted. Where everybody reads the history that it read before, as in the control arm
        of one, nothing changes."""
        people = self.people
        assert people is not None, "there is nothing to divide histories by"
        clusters_of, histories_of = self._shares()
        if histories_of != self._histories_of:
            people.regroup(self.normalizer, histories_of, of="advantages")
        if self.histories is not self.normalizer and clusters_of != self._clusters_of:
            people.regroup(self.histories, clusters_of, of="sums")
        self._clusters_of, self._histories_of = clusters_of, histories_of

    def interrupt(self) -> None:
        """Make a `collect` that another thread is in end soon, with an error; no other may follow."""
        self._scorer.interrupt()
        self._engine.interrupt()

    def diagnostics(self) -> dict[str, Diagnostics]:
        """Of the histories that advantages are read from: by reward where each has its own, else of one
        without a name; empty where the objective takes no estimator."""
        if not self._loss.takes_estimator:
            return {}
        parts = self.normalizer.rewards or {"": self.normalizer}
        return {name: part.diagnostics() for name, part in parts.items()}

    def state_dict(self, unused: Batch | None) -> dict[str, Any]:
        """Histories, and the batch that was collected and not learned from; plain JSON values."""
        return {
            "normalizer": self.normalizer.state_dict(),
            "histories": self.histories.state_dict(),
            "people": None if self.people is None else self.people.state_dict(),
            "batch": None if unused is None else _batch_state(unused),
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> Batch | None:
        """Take over what `state_dict` returned after `step` steps; returns the unused batch.

        Raises:
            CheckpointError: something is missing.
        """
        try:
            self.normalizer.load_state_dict(state["normalizer"])
            if self.histories is not self.normalizer:
                self.histories.load_state_dict(state["histories"])
            if self.people is not None:
                self.people.load_state_dict(state["people"])
            saved = state["batch"]
            batch = None if saved is None else self._batch(saved)
        except KeyError as error:
            raise CheckpointError(f"the checkpoint lacks {error} in state.json") from None
        self.num_folded = step if batch is None else batch.step
        return batch

    def _sample(
        self, step: int, prompts: Sequence[Prompt], first: int, seed: int, watch: _Watch
    ) -> list[Group]:
        """Groups of these prompts, numbered from `first` on, with the step's rewards; each process
        makes some of them, and gets all."""
        own = self._peers.share([len(prompt.token_ids) for prompt in prompts])

        def make() -> list[Group]:
            groups = self._engine.generate(
                prompts[own.start : own.stop],
                self._generation.group_size,
                seed=seed,
                first=first + own.start,
            )
            return self._scorer.score(watch.over(groups), step)

        scored = self._peers.gather(make)
        if self._by_reward:
            scored = [replace(group, rewards=self._sum_of_known(group)) for group in scored]
        return [self._penalised(group) for group in scored]

    def _has_signal(self, group: Group) -> bool:
        """Whether the rule gives any of its rollouts an advantage when it sees this group alone."""
        if not self._loss.takes_estimator:
            return bool(without_estimator(group.shaped, self._loss.objective).any())
        rewards, columns = self._columns([group])
        # A group's part in a cluster may count for less than one reward.
        rule = ClusterNormalizer(self._rule.name, nan_policy="zero", min_count=0.0, **self._several)
        entries = Entries.of([group], rewards, self._histories_of)
        # Alone it has nobody to borrow from.
        return bool(entries.advantages(rule, {**columns, "parents": None}).any())

    def _normalize(self, kept: Sequence[Group], replaced: Sequence[Group]) -> list[Group]:
        """Fold all rewards of the step into the histories; returns all groups with advantages, of which
        those that were replaced have 0: the rule does not see them, only their clusters' histories do.
        """
        if replaced and not self._reads_before:
            self._fold(replaced)
        rewards, columns = self._columns(kept)
        self._remember(kept)
        entries = Entries.of(kept, rewards, self._histories_of)
        if self._loss.takes_estimator:
            parts = split_by_group(entries.advantages(self.normalizer, columns), kept)
        else:
            entries.fold(self.normalizer, columns)
            parts = [without_estimator(group.shaped, self._loss.objective) for group in kept]
        if replaced and self._reads_before:
            self._fold(replaced)
        groups = [replace(g, advantages=part) for g, part in zip(kept, parts, strict=True)]
        groups += [replace(group, advantages=np.zeros(len(group.rollouts))) for group in replaced]
        return sorted(groups, key=lambda group: group.group_id)

    def _fold(self, groups: Sequence[Group]) -> None:
        rewards, columns = self._columns(groups)
        Entries.of(groups, rewards, self._histories_of).fold(self.normalizer, columns)
        self._remember(groups)

    def _shares(self) -> tuple[Mapping[str, Shares], Mapping[str, Shares]]:
        """User -> the clusters whose histories its rewards enter, and those that advantages read."""
        members, seed = self._members, derive_seed(self._run.seed, "control")
        read = members.shares(self._estimator.history, seed)
        if not self._reads_clusters:
            keys = members.histories(self._estimator.history, seed)
            read = {user: {key: 1.0} for user, key in keys.items()}
        return members.shares("cluster", seed), read

    def _remember(self, groups: Sequence[Group]) -> None:
        """Add rewards to the clusters' histories, where advantages read others, and to what is known of
        users."""
        shaped = np.concatenate([group.shaped for group in groups])
        if self.histories is not self.normalizer:
            Entries.of(groups, shaped, self._clusters_of).fold(self.histories, {})
        if self.people is not None:
            self.people.fold(groups, self._rewards_of(groups))

    def _columns(self, groups: Sequence[Group]) -> tuple[FloatArray, Columns]:
        """What a normalizer is told of the rollouts [N] of groups: rewards [N] or [N, R], and what else
        the rule reads."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        parents = [r.prompt.cluster_id for r in rollouts] if self._borrows else None
        norms = lengths = None
        if self._rule.reads_score_norms:
            # Squared norms of the scores, sum_t (1 - p_t)^2.
            squares = [np.square(np.expm1(r.rollout_logprobs)).sum() for r in rollouts]
            norms = np.array(squares, np.float64)
        if self._rule.needs_lengths:
            lengths = np.array([len(r.completion_ids) for r in rollouts], np.float64)
        columns = {"score_norms": norms, "lengths": lengths, "parents": parents}
        return self._rewards_of(groups), columns

    def _rewards_of(self, groups: Sequence[Group]) -> FloatArray:
        """[N] what advantages are made of; [N, R] where each reward is normalised by itself."""
        if self._by_reward:
            scores = [np.stack([*group.scores.values()], axis=1) for group in groups]
            return np.concatenate(scores)
        return np.concatenate([group.shaped for group in groups])

    def _penalised(self, group: Group) -> Group:
        """With the penalties of the section `[generation]`, if it has any."""
        if not self._generation.overlong_buffer:
            return group
        return replace(group, penalties=overlong_penalties(group.rollouts, self._generation))

    def _sum_of_known(self, group: Group) -> FloatArray:
        """[G] weighted sum of the rewards that each rollout has; NaN where it has none."""
        weights = np.array([*self._scorer.weights.values()])
        scores = np.stack([*group.scores.values()])
        known = np.isfinite(scores)
        return np.where(known.any(0), weights @ np.where(known, scores, 0.0), np.nan)

    def _prompts(self, step: int, num_others: int = 0) -> list[Prompt]:
        """By group_id: the step's own prompts, then as many of those that may take their places."""
        examples = self._order.examples(step) + self._order.others(step, num_others)
        return [self._builder.build(example) for example in examples]

    def _batch(self, state: Mapping[str, Any]) -> Batch:
        """The batch that `_batch_state` was told of."""
        num_others = len(state["groups"]) - self._run.prompts_per_step
        prompts = self._prompts(state["step"], num_others)

        def histories(rows: Sequence[Any]) -> dict[ClusterId, ClusterStats]:
            return {cluster: ClusterStats(count, mean, std) for cluster, count, mean, std in rows}

        def group(saved: Mapping[str, Any]) -> Group:
            place = saved["group_id"]
            rollouts = tuple(
                Rollout(
                    prompts[place], place, tuple(ids), text, tuple(logprobs), truncated, version
                )
                for ids, text, logprobs, truncated, version in saved["rollouts"]
            )
            arrays = np.array(saved["rewards"]), np.array(saved["advantages"])
            scores = {name: np.array(values) for name, values in saved["scores"].items()}
            return self._penalised(Group(rollouts, *arrays, scores))

        return Batch(
            state["step"],
            [group(saved) for saved in state["groups"]],
            histories(state["before"]),
            histories(state["after"]),
            frozenset(state["replaced"]),
            {name: histories(table) for name, table in state["of_rewards"].items()},
            self._members.division.version,
        )


def without_estimator(rewards: FloatArray, objective: str) -> FloatArray:
    """What stands for the advantages of a group, [G], under an objective that takes no estimator.

    Of `dpo` the pairs that a rollout wins less those that it loses, which is its part in the first
    update but for a factor (`train.loss.preferences`); of `sft` max(r, 0), the weight of its
    cross-entropy. Both are 0 of a NaN reward.
    """
    if objective == "sft":
        return np.where(rewards > 0, rewards, 0.0)
    wins = rewards[:, None] > rewards
    return (wins.sum(1) - wins.sum(0)).astype(np.float64)


def overlong_penalties(rollouts: Sequence[Rollout], generation: GenerationConfig) -> FloatArray:
    """What completions lose for their length, [N], in units of the reward.

    Of a free completion of T tokens, the end token included, with L = `max_new_tokens`:

        overlong_penalty * clip((T - (L - overlong_buffer)) / overlong_buffer, 0, 1)

    This is -R_length of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13), times `overlong_penalty`.
    Completions from a list lose nothing.
    """
    buffer, longest = generation.overlong_buffer, generation.max_new_tokens
    lengths = np.array([len(r.completion_ids) if r.prompt.choices is None else 0 for r in rollouts])
    return generation.overlong_penalty * ((lengths - (longest - buffer)) / buffer).clip(0, 1)


def _batch_state(batch: Batch) -> dict[str, Any]:
    def histories(table: Histories) -> list[Any]:
        return [[cluster, s.count, s.mean, s.std] for cluster, s in table.items()]

    def rollout(rollout: Rollout) -> list[Any]:
        return [
            rollout.completion_ids,
            rollout.completion,
            rollout.rollout_logprobs,
            rollout.truncated,
            rollout.policy_version,
        ]

    return {
        "step": batch.step,
        "groups": [
            {
                "group_id": group.group_id,
                "rollouts": [rollout(r) for r in group.rollouts],
                "rewards": group.rewards.tolist(),
                "advantages": group.advantages.tolist(),
                "scores": {name: scores.tolist() for name, scores in group.scores.items()},
            }
            for group in batch.groups
        ],
        "before": histories(batch.before),
        "after": histories(batch.after),
        "replaced": sorted(batch.replaced),
        "of_rewards": {name: histories(table) for name, table in batch.of_rewards.items()},
    }
