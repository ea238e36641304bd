"""What the normalizer is for, on a bandit whose truth is known: the experiments of math.md.

A contextual bandit: users fall into three clusters, 70, 20 and 10 % of them, whose tastes differ. A
prompt is a user and four candidates in R^8; a linear softmax policy that knows the cluster picks one,
`group_size` times. The reward is r = offset_p + scale_p * u + delta_x + noise, of utility u, with
delta_x ~ N(0, tau^2) common to all rollouts of the prompt x; or it is 0 or 1, and the same sum without
the noise is its log-odds.

A score is the utility a policy expects on held-out prompts, put so that uniform choice has 0 and the
best choice 1, per cluster. `score` is its mean over training, which favours learning fast; `final` is
that of the trained policy. All estimators meet the same users, candidates and noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pgrpo import ClusterNormalizer

Floats = NDArray[np.float64]

MIX = (0.7, 0.2, 0.1)
MINORITY = 2
NUM_SEEDS, NUM_PROMPTS, NUM_CANDIDATES, NUM_FEATURES = 24, 16, 4, 8
NUM_HELD_OUT = 200
EVALUATE_EVERY = 10


@dataclass(frozen=True)
class Bandit:
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


@dataclass(frozen=True)
class Run:
    scores: Floats = field(repr=False)
    """[evaluations, seeds, clusters]"""
    largest_advantage: float

    @property
    def score(self) -> float:
        return float(self.scores.mean())

    @property
    def final(self) -> Floats:
        """[seeds, clusters]"""
        return self.scores[-1]

    @property
    def minority(self) -> float:
        return float(self.final[:, MINORITY].mean())

    @property
    def worst(self) -> float:
        """Each seed's worst cluster."""
        return float(self.final.min(axis=1).mean())


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@cache
def train(bandit: Bandit, estimator: str, **options: Any) -> Run:
    """All seeds at once, each with a normalizer of its own. Axes S seeds, N rollouts, K clusters, C
    candidates, D features."""
    rng = np.random.default_rng(4)
    num_clusters, num_rollouts = len(MIX), NUM_PROMPTS * bandit.group_size
    seeds = np.arange(NUM_SEEDS)[:, None]
    groups = np.repeat(np.arange(NUM_PROMPTS), bandit.group_size)
    offsets, scales = np.array(bandit.offsets), np.array(bandit.scales)

    tastes = rng.normal(size=(NUM_SEEDS, num_clusters, NUM_FEATURES))
    tastes /= np.linalg.norm(tastes, axis=-1, keepdims=True)
    held_out = rng.normal(
        size=(NUM_SEEDS, num_clusters, NUM_HELD_OUT, NUM_CANDIDATES, NUM_FEATURES)
    )
    utilities = (held_out @ tastes[:, :, None, :, None])[..., 0]
    by_chance, at_best = utilities.mean(axis=(2, 3)), utilities.max(axis=3).mean(axis=2)

    theta = np.zeros((NUM_SEEDS, num_clusters, NUM_FEATURES))
    normalizers = [ClusterNormalizer(estimator, **options) for _ in range(NUM_SEEDS)]
    scores: list[Floats] = []
    largest = 0.0
    for step in range(1, bandit.num_steps + 1):
        per_prompt = NUM_SEEDS, NUM_PROMPTS
        size = (NUM_SEEDS, num_rollouts) if bandit.groups_mix_clusters else per_prompt
        clusters = rng.choice(num_clusters, p=MIX, size=size)
        if not bandit.groups_mix_clusters:
            clusters = clusters[:, groups]
        candidates = rng.normal(size=(*per_prompt, NUM_CANDIDATES, NUM_FEATURES))[:, groups]
        common = bandit.tau * rng.normal(size=per_prompt)[:, groups]

        # One uniform number picks each candidate, whatever the policy: that is what pairs the runs.
        policy = softmax((candidates @ theta[seeds, clusters][..., None])[..., 0])
        thresholds = rng.random((NUM_SEEDS, num_rollouts, 1))
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


def test_1_scales_starve_the_minority_of_a_batch() -> None:
    assert train(SCALES, "batch").minority < 0.4
    assert train(SCALES, "pgrpo").minority > 0.75


def test_2_groups_that_mix_clusters_fail_the_worst_off() -> None:
    assert train(OFFSETS, "grpo").worst < 0.2
    assert train(OFFSETS, "pgrpo").worst > 0.8


@pytest.mark.parametrize("group_size", [2, 4, 16])
def test_3_signal_to_noise_crosses_over_where_icc_is_one_over_group_size(group_size: int) -> None:
    """A group's mean is a noisy baseline, a cluster's mean one blind to the prompt. Where rewards are
    continuous, gradients have the variance within prompts plus that of the baseline: sigma^2 *
    G / (G - 1) from the group, sigma^2 + tau^2 from the cluster, equal at ICC = 1/G."""
    rng = np.random.default_rng(group_size)
    num_prompts = 320_000 // group_size
    candidates = rng.normal(size=(num_prompts, NUM_CANDIDATES, NUM_FEATURES))
    picks = rng.integers(0, NUM_CANDIDATES, (num_prompts, group_size))
    scores = candidates - candidates.mean(axis=1, keepdims=True)
    scores = np.take_along_axis(scores, picks[..., None], axis=1)
    utilities = 0.05 * np.take_along_axis(candidates[..., 0], picks, axis=1)
    # Every noise comes once more negated, so that the signal is seen without it.
    scores, utilities = np.concatenate([scores, scores]), np.concatenate([utilities, utilities])
    within, between = rng.normal(size=(num_prompts, group_size)), rng.normal(size=(num_prompts, 1))
    within, between = np.concatenate([within, -within]), np.concatenate([between, -between])
    groups = np.repeat(np.arange(len(utilities)), group_size)

    def signal_to_noise(estimator: str, odds: float) -> float:
        rewards = utilities + within + np.sqrt(odds) * between
        advantages = ClusterNormalizer(estimator)(rewards.ravel(), np.zeros_like(groups), groups)
        gradients = (advantages.reshape(*rewards.shape, 1) * scores).mean(axis=1)
        signal = gradients.mean(axis=0)
        return float(signal @ signal / gradients.var(axis=0).sum())

    ratios: list[float] = []
    for odds in np.array([0.5, 1.0, 2.0]) / (group_size - 1):
        ratios.append(signal_to_noise("pgrpo", odds) / signal_to_noise("dr_grpo", odds))
        assert ratios[-1] == pytest.approx(group_size / (group_size - 1) / (1 + odds), rel=0.02)
    assert ratios[0] > 1 > ratios[2]


def test_4_random_clusters_are_no_clusters() -> None:
    random = replace(SCALES, random_ids=True)
    difference = (train(random, "pgrpo").final - train(random, "batch").final).mean(axis=0)
    assert np.abs(difference).max() < 0.05
    assert train(SCALES, "pgrpo").minority > train(random, "pgrpo").minority + 0.3


def test_5_auto_helps_itself_where_prompts_differ() -> None:
    grpo = train(PROMPTS_DIFFER, "grpo").score
    assert train(PROMPTS_DIFFER, "pgrpo").score < grpo - 0.05
    assert train(PROMPTS_DIFFER, "auto").score > grpo - 0.015


def test_6_young_histories_explode_in_the_other_order() -> None:
    rare = Bandit(offsets=(0.0, -3.0, -3.0), binary=True, num_steps=30)
    order = "normalize_then_update"
    assert train(rare, "pgrpo", order=order).largest_advantage > 1e3
    assert train(rare, "pgrpo", order=order, prior_count=16.0).largest_advantage < 10


def test_7_forgetting_follows_a_judge_that_shifts() -> None:
    plain = train(JUDGE_SHIFTS, "pgrpo").final.mean(axis=1)
    forgetting = train(JUDGE_SHIFTS, "pgrpo", forgetting=0.9).final.mean(axis=1)
    gain = forgetting - plain
    assert gain.mean() > 0.01
    assert gain.mean() > 5 * gain.std() / np.sqrt(NUM_SEEDS)


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


@pytest.mark.parametrize("name", SCENARIOS)
def test_auto_is_never_clearly_worse_than_grpo(name: str) -> None:
    bandit = SCENARIOS[name]
    assert train(bandit, "auto").score > train(bandit, "grpo").score - 0.015


def test_auto_beats_pgrpo_on_average() -> None:
    gains = [
        train(bandit, "auto").score - train(bandit, "pgrpo").score for bandit in SCENARIOS.values()
    ]
    assert np.mean(gains) > 0.02
    assert min(gains) > -0.01
