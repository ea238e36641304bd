"""What holds of the numbers, with a slow two-pass NumPy oracle as the measure."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pgrpo import ClusterNormalizer

EPS = 1e-4
ESTIMATORS = ["pgrpo", "grpo", "dr_grpo", "rloo", "batch"]
ORDERS = ["update_then_normalize", "normalize_then_update"]
Floats = NDArray[np.float64]
Batch = tuple[Floats, list[int], list[str]]


@st.composite
def batches(draw: st.DrawFn, min_size: int = 1) -> Batch:
    """Rewards [N], clusters and ragged groups that mix them; binary and continuous rewards."""
    reward = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1, 1), st.floats(50, 60))
    group = st.sampled_from(["a", "b", "c", "d"])
    rows = draw(
        st.lists(st.tuples(reward, st.integers(0, 3), group), min_size=min_size, max_size=40)
    )
    rewards = np.array([row[0] for row in rows], np.float64)
    return rewards, [row[1] for row in rows], [row[2] for row in rows]


def standardize(reward: float, among: Floats, ddof: int) -> float:
    std = float(np.std(among, ddof=ddof)) if len(among) > ddof else 0.0
    return (reward - float(np.mean(among))) / (std + EPS)


def oracle(estimator: str, past: Batch, now: Batch, ddof: int, order: str) -> Floats:
    rewards, clusters, groups = now
    seen = past[0] if order == ORDERS[1] else np.concatenate([past[0], rewards])
    seen_clusters = np.array(past[1] if order == ORDERS[1] else past[1] + clusters)
    advantages: list[float] = []
    for index, reward in enumerate(rewards):
        group = rewards[np.array(groups) == groups[index]]
        members = np.array(groups) == groups[index]
        others = rewards[members & (np.arange(len(rewards)) != index)]
        history = seen[seen_clusters == clusters[index]]
        match estimator:
            case "pgrpo":
                advantages.append(standardize(reward, history, ddof) if len(history) else 0.0)
            case "grpo":
                advantages.append(standardize(reward, group, ddof))
            case "dr_grpo":
                advantages.append(float(reward - group.mean()))
            case "rloo":
                advantages.append(float(reward - others.mean()) if len(others) else 0.0)
            case _:
                advantages.append(standardize(reward, rewards, ddof))
    return np.array(advantages, np.float64)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(past=batches(), now=batches(), ddof=st.sampled_from([0, 1]), order=st.sampled_from(ORDERS))
def test_oracle(estimator: str, past: Batch, now: Batch, ddof: int, order: str) -> None:
    normalizer = ClusterNormalizer(estimator, ddof=ddof, order=order)
    normalizer.update(past[0], past[1])
    expected = oracle(estimator, past, now, ddof, order)
    # A mean near 60 is off by 1e-13 or so, which a divisor of eps makes 1e-9.
    np.testing.assert_allclose(normalizer(*now), expected, rtol=1e-9, atol=1e-8)


@given(past=batches(), now=batches(), ddof=st.sampled_from([0, 1]), order=st.sampled_from(ORDERS))
def test_corollary_3_1(past: Batch, now: Batch, ddof: int, order: str) -> None:
    """The P-GRPO advantage is the GRPO advantage times a ratio of scales, plus a bias term."""
    pgrpo = ClusterNormalizer(ddof=ddof, order=order)
    pgrpo.update(past[0], past[1])
    before = pgrpo.snapshot()
    left, right = pgrpo(*now), ClusterNormalizer("grpo", ddof=ddof)(*now)
    read = before if order == ORDERS[1] else pgrpo.snapshot()
    rewards, clusters, groups = now
    for index, cluster in enumerate(clusters):
        if cluster not in read:
            assert left[index] == 0.0
            continue
        group = rewards[np.array(groups) == groups[index]]
        group_std = float(np.std(group, ddof=ddof)) if len(group) > ddof else 0.0
        divisor = read[cluster].std + EPS
        ratio, bias = (group_std + EPS) / divisor, (group.mean() - read[cluster].mean) / divisor
        assert left[index] == pytest.approx(
            ratio * right[index] + bias, rel=1e-11, abs=1e-12 / divisor
        )


@given(st.lists(batches(), min_size=1, max_size=4), st.sampled_from([0, 1]))
def test_bound(many: list[Batch], ddof: int) -> None:
    """|A| <= sqrt(n - 1), by Samuelson's inequality, when the history holds the batch."""
    normalizer = ClusterNormalizer(ddof=ddof)
    for rewards, clusters, _ in many:
        advantages = normalizer(rewards, clusters)
        counts = normalizer.snapshot()
        bounds = np.sqrt([counts[cluster].count - 1 for cluster in clusters])
        assert np.all(np.abs(advantages) <= bounds * (1 + 1e-9))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("reward", [0.1, 1e8 + 0.1, -1e15 / 3, 1e30 / 7])
def test_equal_rewards_give_exactly_zero(reward: float, estimator: str, dtype: Any) -> None:
    for normalizer in [ClusterNormalizer(estimator, order=order) for order in ORDERS]:
        for size in (1, 3, 7, 1000):
            ids = (np.arange(size) * 7919) % 5
            advantages = normalizer(np.full(size, reward, dtype), ids, ids[::-1])
            assert not advantages.any()
        assert {stats.std for stats in normalizer.snapshot().values()} == {0.0}


@given(batches(), batches(), batches())
def test_merging_is_the_order_of_nothing(a: Batch, b: Batch, c: Batch) -> None:
    """Histories merge to the same whatever the order, and to what one history would hold."""

    def fold(*parts: Batch) -> ClusterNormalizer:
        normalizer = ClusterNormalizer()
        for part in parts:
            normalizer.update(part[0], part[1])
        return normalizer

    left, right = fold(a), fold(c)
    left.merge(fold(b))
    left.merge(fold(c))
    right.merge(fold(b))
    right.merge(fold(a))
    one = fold((np.concatenate([a[0], b[0], c[0]]), a[1] + b[1] + c[1], []))
    assert set(left.snapshot()) == set(right.snapshot()) == set(one.snapshot())
    for cluster, stats in one.snapshot().items():
        for other in (left, right):
            # A spread is the root of an m2 that is off by 1e-13 or so.
            found = astuple(other.snapshot()[cluster])
            assert found == pytest.approx(astuple(stats), rel=1e-10, abs=1e-6)
            assert other.snapshot()[cluster].count == stats.count


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(batch=batches(), seed=st.integers(0, 2**32))
def test_order_of_entries_is_free(estimator: str, batch: Batch, seed: int) -> None:
    rewards, clusters, groups = batch
    shuffle = np.random.default_rng(seed).permutation(len(rewards))
    expected = ClusterNormalizer(estimator)(rewards, clusters, groups)[shuffle]
    clusters, groups = np.array(clusters)[shuffle], np.array(groups)[shuffle]
    shuffled = ClusterNormalizer(estimator)(rewards[shuffle], clusters, groups)
    np.testing.assert_allclose(shuffled, expected, rtol=1e-9, atol=1e-8)


def test_large_batches_are_folded_like_small_ones() -> None:
    rng = np.random.default_rng(1)
    rewards, clusters = rng.normal(5, 2, 200_000), rng.integers(0, 50, 200_000)
    advantages = ClusterNormalizer()(rewards, clusters)
    for cluster in range(50):
        own = rewards[clusters == cluster]
        expected = (own - own.mean()) / (own.std() + EPS)
        np.testing.assert_allclose(advantages[clusters == cluster], expected, rtol=0, atol=1e-12)


def test_equal_calls_are_bit_equal() -> None:
    rng = np.random.default_rng(2)
    rewards, ids = rng.normal(size=10_000), rng.integers(0, 999, 10_000)
    first, second = (ClusterNormalizer()(rewards, ids) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_young_history_explodes_only_in_the_other_order() -> None:
    """math.md, experiment 6: without a prior, normalize_then_update exceeds |A| of 1e3."""
    rewards, clusters = np.array([0.0, 0.0]), ["cold"] * 2
    for order, worst in ((ORDERS[0], 1.8), (ORDERS[1], 1e4)):
        normalizer = ClusterNormalizer(order=order)
        assert not normalizer(rewards, clusters).any()
        assert normalizer(np.array([1.0, 0.0]), clusters)[0] == pytest.approx(worst, rel=0.05)
