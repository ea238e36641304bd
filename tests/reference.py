"""Every estimator once more, slowly and exactly: what the core is measured against.

Nothing is kept running here. A cluster's raw rewards stay with their weights, and each call works
out means and sums of squares from them in rational numbers; floats appear where a root or the
advantage itself does. So no algorithm is shared with the core: no Welford, no merging, no origin.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import starmap

import numpy as np
from numpy.typing import NDArray

from pgrpo.normalizer import RULES, Options

ESTIMATORS = list(RULES)
ORDERS = ["update_then_normalize", "normalize_then_update"]
PRIOR_EVIDENCE = 16
"""Rollouts with which `auto` believes in the cluster's mean to begin with."""
RAE_DECAY = 0.95
"""What a reward leaves of the exponential mean of `rae`."""

Ids = Iterable[Hashable]
Numbers = Iterable[float]


@dataclass(frozen=True)
class Rollout:
    index: int
    cluster: Hashable
    group: Hashable
    reward: Fraction
    weight: Fraction
    score_norm: Fraction
    length: Fraction
    parent: Hashable


@dataclass(frozen=True)
class Moments:
    """Of weighted rewards; the mean of nothing is 0."""

    count: Fraction
    mean: Fraction
    m2: Fraction

    def sigma(self, ddof: int) -> float:
        return math.sqrt(self.m2 / (self.count - ddof)) if self.count > ddof else 0.0


@dataclass
class Part:
    """What a cluster keeps of its rollouts of one group in one call."""

    decay: Fraction
    rollouts: list[Rollout]


@dataclass
class Evidence:
    """One rollout's point in `auto`'s regression of y on x."""

    weight: Fraction
    x: Fraction
    y: Fraction


def moments(rewards: Iterable[tuple[Fraction, Fraction]]) -> Moments:
    """Of (weight, reward) pairs, in two passes."""
    pairs = list(rewards)
    count = sum((weight for weight, _ in pairs), Fraction())
    if count == 0:
        return Moments(count, Fraction(), Fraction())
    mean = sum((weight * reward for weight, reward in pairs), Fraction()) / count
    m2 = sum((weight * (reward - mean) ** 2 for weight, reward in pairs), Fraction())
    return Moments(count, mean, m2)


def moments_of(rollouts: Iterable[Rollout]) -> Moments:
    return moments((rollout.weight, rollout.reward) for rollout in rollouts)


def squared_weights(rollouts: Iterable[Rollout]) -> Fraction:
    return sum((rollout.weight**2 for rollout in rollouts), Fraction())


def mean_weight(rollouts: list[Rollout]) -> Fraction:
    """By weight: what any one of them weighs where only sums of a part are known."""
    count = moments_of(rollouts).count
    return squared_weights(rollouts) / count if count > 0 else Fraction()


def mean_of_others(reward: Fraction, among: Moments, weight: Fraction) -> Fraction | None:
    """The leave-one-out mean, of a reward that weighs so much; None where there are no others."""
    if among.count <= weight:
        return None
    return reward - (reward - among.mean) * among.count / (among.count - weight)


class Reference:
    """The estimators of `pgrpo.ClusterNormalizer` for finite rewards, with the same options."""

    def __init__(self, *estimator: str, **options: object) -> None:
        chosen = Options(*estimator, **options)
        self.estimator, self.order = chosen.estimator, chosen.order
        self.ddof, self.eps, self.clip = chosen.ddof, chosen.eps, chosen.clip
        self.sigma_floor, self.min_count = chosen.sigma_floor, chosen.min_count
        self.forgetting = Fraction(chosen.forgetting)
        self.prior_count = Fraction(chosen.prior_count)
        self.frequency_weight = chosen.frequency_weight
        self.rewards: defaultdict[Hashable, list[tuple[Fraction, Fraction]]] = defaultdict(list)
        self.of_parents: defaultdict[Hashable, list[tuple[Fraction, Fraction]]] = defaultdict(list)
        self.parts: defaultdict[Hashable, list[Part]] = defaultdict(list)
        self.evidence: defaultdict[Hashable, list[Evidence]] = defaultdict(list)
        self.in_order: defaultdict[Hashable, list[tuple[Fraction, Fraction]]] = defaultdict(list)

    def __call__(
        self,
        rewards: Numbers,
        clusters: Ids,
        groups: Ids | None = None,
        *,
        weights: Numbers | None = None,
        score_norms: Numbers | None = None,
        lengths: Numbers | None = None,
        parents: Ids | None = None,
    ) -> NDArray[np.float64]:
        batch = self._rollouts(rewards, clusters, groups, weights, score_norms, lengths, parents)
        if self.order == "update_then_normalize":
            self._update(batch)
            return self._normalize(batch)
        advantages = self._normalize(batch)
        self._update(batch)
        return advantages

    def update(
        self,
        rewards: Numbers,
        clusters: Ids,
        groups: Ids | None = None,
        *,
        weights: Numbers | None = None,
        score_norms: Numbers | None = None,
        lengths: Numbers | None = None,
        parents: Ids | None = None,
    ) -> None:
        self._update(
            self._rollouts(rewards, clusters, groups, weights, score_norms, lengths, parents)
        )

    def normalize(
        self,
        rewards: Numbers,
        clusters: Ids,
        groups: Ids | None = None,
        *,
        weights: Numbers | None = None,
        score_norms: Numbers | None = None,
        lengths: Numbers | None = None,
        parents: Ids | None = None,
    ) -> NDArray[np.float64]:
        batch = self._rollouts(rewards, clusters, groups, weights, score_norms, lengths, parents)
        return self._normalize(batch)

    def history(self, cluster: Hashable) -> Moments:
        """A cluster's own history, without the prior."""
        return moments(self.rewards.get(cluster, []))

    def history_of_parent(self, parent: Hashable) -> Moments:
        """Of all rewards that came with a parent, without the prior."""
        return moments(self.of_parents.get(parent, []))

    def _rollouts(
        self,
        rewards: Numbers,
        clusters: Ids,
        groups: Ids | None,
        weights: Numbers | None,
        score_norms: Numbers | None,
        lengths: Numbers | None,
        parents: Ids | None,
    ) -> list[Rollout]:
        values = [Fraction(float(reward)) for reward in rewards]
        num = len(values)
        if groups is None:
            assert not RULES[self.estimator].needs_groups, f"{self.estimator} needs groups"
        rows = zip(
            list(range(num)),
            list(clusters),
            list(range(num) if groups is None else groups),
            values,
            *(
                [Fraction(1)] * num if column is None else [Fraction(float(v)) for v in column]
                for column in (weights, score_norms, lengths)
            ),
            [None] * num if parents is None else list(parents),
            strict=True,
        )
        return list(starmap(Rollout, rows))

    # The first half: what is remembered.

    def _update(self, batch: list[Rollout]) -> None:
        weighty = [rollout for rollout in batch if rollout.weight > 0]
        told = [rollout for rollout in weighty if rollout.parent is not None]
        for parent, rollouts in by(told, "parent").items():
            kept = [(self.forgetting * w, reward) for w, reward in self.of_parents[parent]]
            self.of_parents[parent] = kept + [(r.weight, r.reward) for r in rollouts]
        for cluster, rollouts in by(weighty, "cluster").items():
            before = self.history(cluster)
            self._forget(cluster)
            self.in_order[cluster] += [(rollout.weight, rollout.reward) for rollout in rollouts]
            self.rewards[cluster] += [(rollout.weight, rollout.reward) for rollout in rollouts]
            for part in by(rollouts, "group").values():
                self.parts[cluster].append(Part(Fraction(1), part))
                if before.count > 0:
                    self.evidence[cluster] += self._evidence(part, before.mean)

    def _forget(self, cluster: Hashable) -> None:
        """To scale a history's count and m2, its mean left alone, is to scale its weights."""
        rho = self.forgetting
        if rho == 1:
            return
        self.rewards[cluster] = [(rho * weight, reward) for weight, reward in self.rewards[cluster]]
        for part in self.parts[cluster]:
            part.decay *= rho
        for point in self.evidence[cluster]:
            point.weight *= rho

    @staticmethod
    def _evidence(part: list[Rollout], mean_before: Fraction) -> list[Evidence]:
        """How rewards depart from the mean of the part's others, against how the cluster's mean
        does, of a history that knows nothing of this batch."""
        points: list[Evidence] = []
        among, mean = moments_of(part), mean_weight(part)
        for rollout in part:
            others = mean_of_others(rollout.reward, among, mean)
            if others is not None:
                weight = rollout.weight * rollout.score_norm
                x, y = mean_before - others, rollout.reward - others
                points.append(Evidence(weight, x, y))
        return points

    # The other half: what is made of it.

    def _normalize(self, batch: list[Rollout]) -> NDArray[np.float64]:
        advantages = np.zeros(len(batch))
        total = sum((weight for own in self.rewards.values() for weight, _ in own), Fraction())
        parents = {rollout.cluster: rollout.parent for rollout in batch}
        history = {cluster: self._read(cluster, parent) for cluster, parent in parents.items()}
        own = {cluster: self.history(cluster) for cluster in history}
        for rollout, advantage in self._estimate(batch, history, own):
            count = own[rollout.cluster].count
            if count > 0 and self.frequency_weight != 0:
                advantage *= float(count / total) ** -self.frequency_weight
            if self.clip is not None:
                advantage = min(max(advantage, -self.clip), self.clip)
            advantages[rollout.index] = advantage
        return advantages

    def _read(self, cluster: Hashable, parent: Hashable) -> Moments | None:
        """The history that estimators see: with a prior, that of its parent if it has one, or None
        where it is too short."""
        prior = moments(pair for pairs in self.rewards.values() for pair in pairs)
        if parent is not None:
            prior = self._shrunk(self.history_of_parent(parent), prior)
        read = self._shrunk(self.history(cluster), prior)
        return read if read.count > 0 and read.count >= self.min_count else None

    def _shrunk(self, own: Moments, prior: Moments) -> Moments:
        """With `prior_count` more rewards, spread as those of the prior are."""
        if self.prior_count == 0 or prior.count == 0:
            return own
        count = own.count + self.prior_count
        mean = (own.count * own.mean + self.prior_count * prior.mean) / count
        m2 = own.m2 + own.count * (own.mean - mean) ** 2
        m2 += self.prior_count * (prior.m2 / prior.count + (prior.mean - mean) ** 2)
        return Moments(count, mean, m2)

    def _estimate(
        self,
        batch: list[Rollout],
        history: dict[Hashable, Moments | None],
        own: dict[Hashable, Moments],
    ) -> Iterable[tuple[Rollout, float]]:
        match self.estimator:
            case "batch":
                yield from self._standardized(batch)
            case "grpo":
                for group in by(batch, "group").values():
                    yield from self._standardized(group)
            case "dr_grpo":
                for group in by(batch, "group").values():
                    mean = moments_of(group).mean
                    weighty = any(rollout.weight > 0 for rollout in group)
                    for rollout in group:
                        yield rollout, float(rollout.reward - mean) if weighty else 0.0
            case "lite":
                sigma = moments_of(batch).sigma(self.ddof)
                for rollout, mean in self._means(batch):
                    yield rollout, float(rollout.reward - mean) / (sigma + self.eps)
            case "max_rl":
                for rollout, mean in self._means(batch):
                    yield rollout, float((rollout.reward - mean) / mean) if mean > 0 else 0.0
            case "opo":
                for group in by(batch, "group").values():
                    long = moments((r.weight * r.length, r.reward) for r in group)
                    mean = long.mean if long.count > 0 else moments_of(group).mean
                    weighty = any(rollout.weight > 0 for rollout in group)
                    for rollout in group:
                        yield rollout, float(rollout.reward - mean) if weighty else 0.0
            case "rae":
                for rollout in batch:
                    yield rollout, float(rollout.reward - self._exponential_mean(rollout.cluster))
            case "gdpo_multi":
                yield from self._whitened(batch)
            case "rloo":
                for group in by(batch, "group").values():
                    among = moments_of(group)
                    for part in by(group, "cluster").values():
                        mean = mean_weight(part)
                        for rollout in part:
                            others = mean_of_others(rollout.reward, among, mean)
                            yield rollout, 0.0 if others is None else float(rollout.reward - others)
            case "pgrpo":
                for rollout in batch:
                    read = history[rollout.cluster]
                    if read is not None:
                        yield rollout, float(rollout.reward - read.mean) / self._divisor(read)
            case "two_way":
                for group in by(batch, "group").values():
                    yield from self._two_way(group, history)
            case "shrinkage" | "auto":
                yield from self._mixed(batch, history, own)
            case other:
                raise NotImplementedError(f"the oracle does not know {other}")

    @staticmethod
    def _means(batch: list[Rollout]) -> Iterable[tuple[Rollout, Fraction]]:
        """Of the groups that have any weight."""
        for group in by(batch, "group").values():
            among = moments_of(group)
            if among.count > 0:
                yield from ((rollout, among.mean) for rollout in group)

    def _exponential_mean(self, cluster: Hashable) -> Fraction:
        """One reward after the other; its decay is as near to a rational number as a float is."""
        mean = Fraction()
        for weight, reward in self.in_order.get(cluster, []):
            left = Fraction(RAE_DECAY ** float(weight))
            mean = Fraction(float(left * mean + (1 - left) * reward))
        return mean

    def _whitened(self, batch: list[Rollout]) -> Iterable[tuple[Rollout, float]]:
        weighty = [
            found
            for group in by(batch, "group").values()
            if moments_of(group).count > 0
            for found in self._standardized(group)
        ]
        among = moments((rollout.weight, Fraction(value)) for rollout, value in weighty)
        sigma = among.sigma(self.ddof)
        for rollout, value in weighty:
            yield rollout, (value - float(among.mean)) / (sigma + self.eps)

    def _divisor(self, read: Moments, share: float = 1.0) -> float:
        """Of a history; `share` is that of its variance which a baseline leaves."""
        return max(read.sigma(self.ddof) * math.sqrt(share), self.sigma_floor) + self.eps

    def _standardized(self, rollouts: list[Rollout]) -> Iterable[tuple[Rollout, float]]:
        among = moments_of(rollouts)
        for rollout in rollouts:
            deviation = float(rollout.reward - among.mean) if among.count > 0 else 0.0
            yield rollout, deviation / (among.sigma(self.ddof) + self.eps)

    def _two_way(
        self, group: list[Rollout], history: dict[Hashable, Moments | None]
    ) -> Iterable[tuple[Rollout, float]]:
        known = [
            (rollout, read) for rollout in group if (read := history[rollout.cluster]) is not None
        ]
        residuals = [(rollout.weight, rollout.reward - read.mean) for rollout, read in known]
        among = moments(residuals)
        for (rollout, read), (_, residual) in zip(known, residuals, strict=True):
            deviation = float(residual - among.mean) if among.count > 0 else 0.0
            yield rollout, deviation / self._divisor(read)

    def _mixed(
        self,
        batch: list[Rollout],
        history: dict[Hashable, Moments | None],
        own: dict[Hashable, Moments],
    ) -> Iterable[tuple[Rollout, float]]:
        """`shrinkage` and `auto`: a baseline between the cluster's mean and the part's.

        r - b is `stretch` times the deviation within the part, plus `weight` times that of the part
        from the cluster, and so its mean square is known from how variance divides into the two:
        `left` in units of the cluster's variance.
        """
        found: list[tuple[Rollout, Fraction, Moments, Fraction]] = []
        for cluster, rollouts in by(batch, "cluster").items():
            read = history[cluster]
            if read is None:
                continue
            squares = self._squares_within(cluster)
            within_share = squares / own[cluster].m2 if own[cluster].m2 > 0 else Fraction(1)
            for rollout, weight, stretch, other in self._baselines(rollouts, own[cluster]):
                baseline = weight * read.mean + (1 - weight) * other
                left = stretch**2 * within_share + weight**2 * (1 - within_share)
                found.append((rollout, rollout.reward - baseline, read, left))

        def mean_left(*clusters: Hashable) -> Fraction:
            pairs = [
                (rollout.weight, left)
                for rollout, _, _, left in found
                if rollout.cluster in clusters
            ]
            mean = moments(pairs)
            return mean.mean if mean.count > 0 else Fraction(1)

        of_all = mean_left(*history)
        of_clusters = {cluster: mean_left(cluster) for cluster in history}
        for rollout, deviation, read, left in found:
            of_cluster = of_clusters[rollout.cluster]
            relative = left / of_cluster if of_cluster > 0 else Fraction(1)
            yield rollout, float(deviation) / self._divisor(read, float(relative * of_all))

    def _baselines(
        self, rollouts: list[Rollout], own: Moments
    ) -> Iterable[tuple[Rollout, Fraction, Fraction, Fraction]]:
        """For each rollout of a cluster: how much of the cluster's mean its baseline has, `stretch`, and
        the mean within the part that is mixed in."""
        cluster = rollouts[0].cluster
        within, between = self._components(cluster, own)
        slope = self._slope(cluster, own)
        for part in by(rollouts, "group").values():
            among, mean = moments_of(part), mean_weight(part)
            for rollout in part:
                weight, stretch, other = Fraction(1), Fraction(1), Fraction()
                if self.estimator == "shrinkage" and among.count > 0:
                    other = among.mean
                    if between > 0:
                        size = among.count / mean
                        weight = within / (within + size * between)
                if self.estimator == "auto":
                    others = mean_of_others(rollout.reward, among, mean)
                    if others is not None:
                        weight, other = slope, others
                        stretch += (1 - slope) * mean / (among.count - mean)
                yield rollout, weight, stretch, other

    def _squares_within(self, cluster: Hashable) -> Fraction:
        return sum(
            (part.decay * moments_of(part.rollouts).m2 for part in self.parts.get(cluster, [])),
            Fraction(),
        )

    def _components(self, cluster: Hashable, own: Moments) -> tuple[Fraction, Fraction]:
        """Variance within parts and between them, of the random-effects model; (0, 0) where there is
        too little to tell."""
        num_parts, squared_counts = Fraction(), Fraction()
        for part in self.parts.get(cluster, []):
            count = moments_of(part.rollouts).count
            num_parts += part.decay * squared_weights(part.rollouts) / count
            squared_counts += part.decay * count**2
        if own.count <= num_parts or own.count**2 <= squared_counts:
            return Fraction(), Fraction()
        squares = self._squares_within(cluster)
        within = squares / (own.count - num_parts)
        between = own.m2 - squares - num_parts * within
        return within, max(Fraction(), between / (own.count - squared_counts / own.count))

    def _slope(self, cluster: Hashable, own: Moments) -> Fraction:
        """Of y on x, drawn to 1 as by PRIOR_EVIDENCE rollouts of typical y at x = y; in [0, 1]."""
        points = self.evidence.get(cluster, [])
        sxx = sum((point.weight * point.x**2 for point in points), Fraction())
        sxy = sum((point.weight * point.x * point.y for point in points), Fraction())
        syy = sum((point.weight * point.y**2 for point in points), Fraction())
        prior = PRIOR_EVIDENCE * syy / own.count if points else Fraction()
        if sxx + prior == 0:
            return Fraction(1)
        return min(max((sxy + prior) / (sxx + prior), Fraction()), Fraction(1))


def by(rollouts: Iterable[Rollout], field: str) -> dict[Hashable, list[Rollout]]:
    """Rollouts by cluster or group, in order of appearance."""
    found: defaultdict[Hashable, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        found[getattr(rollout, field)].append(rollout)
    return dict(found)
