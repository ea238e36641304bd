"""A contextual bandit whose truth is known, on which estimators are compared in seconds, without a
model.

Users fall into three clusters, 70, 20 and 10 % of them, whose tastes differ. A prompt is a user and
four candidates in R^8; a linear softmax policy that knows the cluster picks one, `group_size`
times. The reward is r = offset_p + scale_p * u + delta_x + noise, of utility u, with delta_x ~ N(0,
tau^2) common to all rollouts of the prompt x; or it is 0 or 1, and the same sum without the noise
is its log-odds.

A score is the utility a policy expects on held-out prompts, put so that uniform choice has 0 and
the best choice 1, per cluster. `score` is its mean over training, which favours learning fast;
`final` is that of the trained policy. All estimators meet the same users, candidates and noise.

`tests/test_acceptance.py` pins what is said of these in docs/estimators.md; `mixed_groups.py` asks
of groups that mix clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgrpo import ClusterNormalizer

Floats = NDArray[np.float64]

MIX = (0.7, 0.2, 0.1)
MINORITY = 2
NUM_PROMPTS, NUM_CANDIDATES, NUM_FEATURES = 16, 4, 8
NUM_HELD_OUT = 200
EVALUATE_EVERY = 10


@dataclass(frozen=True)
class Bandit:
    """What users, prompts and rewards are like, and how the policy learns of them."""

    offsets: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    tau: float = 0.0
    noise: float = 0.1
    binary: bool = False
    group_size: int = 4
    groups_mix_clusters: bool = False
    """Each rollout of a group has a user of its own; the candidates stay common to all."""
    random_ids: bool = False
    """The normalizer is told clusters drawn at random; the policy still knows the true ones."""
    shift: float = 0.0
    """What is added to every reward from half-way on: the judge changes its mind."""
    learning_rate: float = 0.5
    num_steps: int = 100
    num_seeds: int = 24


@dataclass(frozen=True)
class Run:
    """How an estimator fared."""

    scores: Floats = field(repr=False)
    """[evaluations, seeds, clusters]"""
    largest_advantage: float

    @property
    def score(self) -> float:
        return float(self.scores.mean())

    @property
    def final(self) -> Floats:
        """Scores at the end, [seeds, clusters]."""
        return self.scores[-1]

    @property
    def minority(self) -> float:
        return float(self.final[:, MINORITY].mean())

    @property
    def worst_of_seeds(self) -> Floats:
        """Final score of each seed's worst cluster, [seeds]."""
        return self.final.min(axis=1)

    @property
    def worst(self) -> float:
        """Its mean."""
        return float(self.worst_of_seeds.mean())


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@cache
def train(bandit: Bandit, estimator: str, **options: Any) -> Run:
    """All seeds at once, each with a normalizer of its own. Axes S seeds, N rollouts, K clusters, C
    candidates, D features."""
    rng = np.random.default_rng(4)
    num_seeds, num_clusters = bandit.num_seeds, len(MIX)
    num_rollouts = NUM_PROMPTS * bandit.group_size
    seeds = np.arange(num_seeds)[:, None]
    groups = np.repeat(np.arange(NUM_PROMPTS), bandit.group_size)
    offsets, scales = np.array(bandit.offsets), np.array(bandit.scales)

    tastes = rng.normal(size=(num_seeds, num_clusters, NUM_FEATURES))
    tastes /= np.linalg.norm(tastes, axis=-1, keepdims=True)
    held_out = rng.normal(
        size=(num_seeds, num_clusters, NUM_HELD_OUT, NUM_CANDIDATES, NUM_FEATURES)
    )
    utilities = (held_out @ tastes[:, :, None, :, None])[..., 0]
    by_chance, at_best = utilities.mean(axis=(2, 3)), utilities.max(axis=3).mean(axis=2)

    theta = np.zeros((num_seeds, num_clusters, NUM_FEATURES))
    normalizers = [ClusterNormalizer(estimator, **options) for _ in range(num_seeds)]
    scores: list[Floats] = []
    largest = 0.0
    for step in range(1, bandit.num_steps + 1):
        per_prompt = num_seeds, NUM_PROMPTS
        size = (num_seeds, num_rollouts) if bandit.groups_mix_clusters else per_prompt
        clusters = rng.choice(num_clusters, p=MIX, size=size)
        if not bandit.groups_mix_clusters:
            clusters = clusters[:, groups]
        candidates = rng.normal(size=(*per_prompt, NUM_CANDIDATES, NUM_FEATURES))[:, groups]
        common = bandit.tau * rng.normal(size=per_prompt)[:, groups]

        # One uniform number picks each candidate, whatever the policy: that is what pairs the runs.
        policy = softmax((candidates @ theta[seeds, clusters][..., None])[..., 0])
        thresholds = rng.random((num_seeds, num_rollouts, 1))
        picks = (policy.cumsum(axis=-1) < thresholds).sum(axis=-1, keepdims=True)
        picks = np.minimum(picks, NUM_CANDIDATES - 1)
        picked = np.take_along_axis(candidates, picks[..., None], axis=2)[:, :, 0]
        probability = np.take_along_axis(policy, picks, axis=2)[..., 0]

        rewards = offsets[clusters] + common
        rewards += scales[clusters] * (picked * tastes[seeds, clusters]).sum(axis=-1)
        rewards += bandit.shift * (2 * step > bandit.num_steps)
        luck, error = rng.random(rewards.shape), rng.normal(size=rewards.shape)
        if bandit.binary:
            rewards = (luck < 1 / (1 + np.exp(-rewards))).astype(np.float64)
        else:
            rewards += bandit.noise * error

        random_ids = rng.integers(0, num_clusters, clusters.shape)
        told = random_ids if bandit.random_ids else clusters
        advantages = np.stack(
            [
                normalizer(rewards[s], told[s], groups, score_norms=(1 - probability[s]) ** 2)
                for s, normalizer in enumerate(normalizers)
            ]
        )
        largest = max(largest, float(np.abs(advantages).max()))

        score_function = picked - (policy[..., None] * candidates).sum(axis=2)
        of_cluster = clusters[..., None] == np.arange(num_clusters)
        gradient = np.swapaxes(advantages[..., None] * of_cluster, 1, 2) @ score_function
        theta += bandit.learning_rate * gradient / num_rollouts
        if step % EVALUATE_EVERY == 0:
            trained = softmax((held_out @ theta[:, :, None, :, None])[..., 0])
            expected = (trained * utilities).sum(axis=3).mean(axis=2)
            scores.append((expected - by_chance) / (at_best - by_chance))
    return Run(np.array(scores), largest)


ONE_USER = Bandit(scales=(0.3, 0.3, 0.3))
"""R1: a group is one user's prompt; clusters differ in taste alone."""
SCALES = Bandit(scales=(0.3, 0.1, 0.03), noise=0.01, learning_rate=4, num_steps=20)
"""R2: clusters differ in how strongly their rewards speak."""
OFFSETS = Bandit(
    scales=(0.1, 0.1, 0.1),
    offsets=(2.0, 0.5, -1.0),
    groups_mix_clusters=True,
    learning_rate=1,
    num_steps=150,
)
"""R3: clusters differ in how generous their rewards are, and meet within groups."""
PROMPTS_DIFFER = replace(ONE_USER, tau=0.5)
JUDGE_SHIFTS = replace(ONE_USER, shift=-2.0, num_steps=120)

SCENARIOS = {
    "one user": ONE_USER,
    "one user, groups of 2": replace(ONE_USER, group_size=2),
    # The hardest for auto: a group of 16 knows its own spread, which a history knows of the past.
    "one user, groups of 16": Bandit(group_size=16),
    "one user, noise": replace(ONE_USER, noise=0.6, group_size=2),
    "one user, offsets, 0/1": Bandit(offsets=(-3.0, 0.0, 2.0), binary=True, group_size=2),
    "prompts differ": PROMPTS_DIFFER,
    "prompts differ, groups of 2": replace(PROMPTS_DIFFER, group_size=2),
    "prompts differ, 0/1": Bandit(tau=2.0, binary=True),
    "scales": SCALES,
    "offsets within groups": OFFSETS,
    "judge shifts": JUDGE_SHIFTS,
}
