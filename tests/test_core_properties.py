"""What holds of the numbers, whatever they are."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import astuple, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pgrpo import ClusterNormalizer, DataError
from pgrpo.normalizer import RULES, Options

pytest_plugins = ["parallel"]

EPS = Options.eps
ESTIMATORS = list(RULES)
WITH_A_ZERO = ["max_rl", "rae"]
"""Where zero is matters to these, not only how rewards differ."""
ORDERS = ["update_then_normalize", "normalize_then_update"]
Floats = NDArray[np.float64]
Batch = tuple[Floats, list[int], list[str]]

# Every test runs in several threads too, and all examples of a seed are the same.
few = settings(max_examples=50, deadline=None)


@st.composite
def batches(draw: st.DrawFn, min_size: int = 1) -> Batch:
    """Rewards [N], clusters and ragged groups that mix them; binary and continuous rewards."""
    reward = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1, 1), st.floats(50, 60))
    group = st.sampled_from(["a", "b", "c", "d"])
    rows = draw(
        st.lists(st.tuples(reward, st.integers(0, 3), group), min_size=min_size, max_size=30)
    )
    rewards = np.array([row[0] for row in rows], np.float64)
    return rewards, [row[1] for row in rows], [row[2] for row in rows]


@few
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


@few
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
@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "rae"])
@pytest.mark.parametrize("reward", [0.1, 1e8 + 0.1, -1e15 / 3, 1e30 / 7])
def test_equal_rewards_give_exactly_zero(reward: float, estimator: str, dtype: Any) -> None:
    cases: list[dict[str, Any]] = [
        {"order": ORDERS[0]},
        {"order": ORDERS[1]},
        {"prior_count": 3.0, "forgetting": 0.7},
    ]
    for options in cases:
        normalizer = ClusterNormalizer(estimator, **options)
        for size in (1, 3, 7, 1000, 5000):
            ids = (np.arange(size) * 7919) % 5
            rewards, weights = np.full(size, reward, dtype), np.arange(size) % 7 / 3
            for column in (None, weights):
                advantages = normalizer(rewards, ids, ids[::-1], weights=column, lengths=weights)
                assert not advantages.any()
        assert {stats.std for stats in normalizer.snapshot().values()} == {0.0}


@few
@given(batches(), batches(), batches())
def test_merging_is_the_order_of_nothing(a: Batch, b: Batch, c: Batch) -> None:
    """Histories merge to the same whatever the order, and to what one history would hold."""

    def fold(*parts: Batch) -> ClusterNormalizer:
        normalizer = ClusterNormalizer("shrinkage", track_delta=True)
        for part in parts:
            normalizer.update(*part)
        return normalizer

    left, right, deltas, one = fold(a), fold(c), fold(), fold(a, b, c)
    left.merge(fold(b))
    left.merge(fold(c))
    right.merge(fold(b).delta())
    right.merge(fold(a))
    for part in (b, c, a):
        deltas.merge(fold(part).delta())
    assert set(left.snapshot()) == set(right.snapshot()) == set(one.snapshot())
    parts = dict(zip(one.state_dict()["clusters"], one.state_dict()["within_squares"], strict=True))
    for other in (left, right, deltas):
        state, snapshot = other.state_dict(), other.snapshot()
        for cluster, within in zip(state["clusters"], state["within_squares"], strict=True):
            assert within == pytest.approx(parts[cluster], rel=1e-12, abs=1e-20)
        for cluster, stats in one.snapshot().items():
            # A spread is the root of an m2 that is off by 1e-13 or so.
            assert astuple(snapshot[cluster]) == pytest.approx(astuple(stats), rel=1e-10, abs=1e-6)
            assert snapshot[cluster].count == stats.count


@few
@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "rae"])
@given(batch=batches(), seed=st.integers(0, 2**32))
def test_order_of_entries_is_free(estimator: str, batch: Batch, seed: int) -> None:
    rewards, clusters, groups = batch
    shuffle = np.random.default_rng(seed).permutation(len(rewards))
    lengths = np.arange(len(rewards)) % 7
    expected = ClusterNormalizer(estimator)(rewards, clusters, groups, lengths=lengths)[shuffle]
    clusters, groups = np.array(clusters)[shuffle], np.array(groups)[shuffle]
    normalizer = ClusterNormalizer(estimator)
    shuffled = normalizer(rewards[shuffle], clusters, groups, lengths=lengths[shuffle])
    np.testing.assert_allclose(shuffled, expected, rtol=1e-9, atol=1e-8)


@few
@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(batch=batches(), data=st.data())
def test_whole_weights_are_repetitions(estimator: str, batch: Batch, data: st.DataObject) -> None:
    """For estimators that leave nobody out. A part of one group is told apart from its copies by
    `shrinkage` and `auto`, so that of these the histories alone are compared."""
    rewards, clusters, groups = batch
    size = len(rewards)
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    lengths = np.arange(size) % 7
    repeated = [np.repeat(column, weights) for column in (rewards, clusters, groups, lengths)]
    weighted, copies = ClusterNormalizer(estimator), ClusterNormalizer(estimator)
    found = weighted(rewards, clusters, groups, weights=weights, lengths=lengths)
    expected = copies(repeated[0], repeated[1], repeated[2], lengths=repeated[3])
    if estimator not in ("rloo", "shrinkage", "auto"):
        np.testing.assert_allclose(np.repeat(found, weights), expected, rtol=1e-9, atol=1e-8)
    left, right = weighted.snapshot(), copies.snapshot()
    assert left.keys() == right.keys()
    for cluster, stats in left.items():
        assert stats.count == right[cluster].count
        assert astuple(stats) == pytest.approx(astuple(right[cluster]), rel=1e-10, abs=1e-6)


@few
@given(
    batch=batches(),
    estimator=st.sampled_from(ESTIMATORS),
    clip=st.floats(0.01, 2),
    order=st.sampled_from(ORDERS),
)
def test_clip(batch: Batch, estimator: str, clip: float, order: str) -> None:
    free, bounded = (ClusterNormalizer(estimator, order=order, clip=c) for c in (None, clip))
    for _ in range(2):
        lengths = np.arange(len(batch[0])) % 7
        expected = np.clip(free(*batch, lengths=lengths), -clip, clip)
        np.testing.assert_array_equal(bounded(*batch, lengths=lengths), expected)
    assert free.state_dict() == bounded.state_dict()


OTHER_VALUES: dict[str, Any] = {
    "ddof": 1,
    "eps": 0.5,
    "order": ORDERS[1],
    "forgetting": 0.5,
    "prior_count": 8.0,
    "sigma_floor": 2.0,
    "min_count": 30,
    "clip": 0.1,
}


LENGTHS = np.arange(40) % 7


def some_batches(num: int = 3) -> list[tuple[Floats, Any, Any]]:
    """Clusters of very different sizes, in groups of about four that may mix them."""
    rng = np.random.default_rng(6)
    return [
        (rng.normal(size=40), rng.choice(3, 40, p=[0.7, 0.2, 0.1]), rng.integers(0, 10, 40))
        for _ in range(num)
    ]


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("option", OTHER_VALUES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_said_to_have_no_effect_has_none(
    estimator: str, option: str, weight: float
) -> None:
    usual = ClusterNormalizer(estimator, frequency_weight=weight)
    other = ClusterNormalizer(estimator, frequency_weight=weight, **{option: OTHER_VALUES[option]})
    same = [
        np.array_equal(usual(*batch, lengths=LENGTHS), other(*batch, lengths=LENGTHS))
        for batch in some_batches()
    ]
    assert all(same) == (option in RULES[estimator].without_effect(weight))


def test_every_option_is_asked_for_its_effect() -> None:
    apart = {"estimator", "nan_policy", "frequency_weight"}  # what they are for shows at once
    apart |= {"track_diagnostics", "track_delta", "num_threads"}  # these change no advantage
    assert OTHER_VALUES.keys() == {field.name for field in fields(Options)} - apart


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_said_of_an_estimator_is_so(estimator: str) -> None:
    rule, (first, second, _) = RULES[estimator], some_batches()
    experienced, norms = ClusterNormalizer(estimator), np.linspace(0.1, 2, 40)
    experienced(*first, lengths=LENGTHS)
    told, longer = copy.copy(experienced), copy.copy(experienced)
    found = experienced(*second, lengths=LENGTHS)
    fresh = ClusterNormalizer(estimator)(*second, lengths=LENGTHS)
    assert np.array_equal(found, fresh) != rule.reads_histories
    with_norms = told(*second, score_norms=norms, lengths=LENGTHS)
    assert np.array_equal(found, with_norms) != rule.reads_score_norms
    assert np.array_equal(found, longer(*second, lengths=norms)) != rule.needs_lengths
    standard = abs(found.mean()) < 1e-12 and abs(found.std() - 1) < 1e-3
    assert standard == (rule.whitens or estimator == "batch")
    alone = ClusterNormalizer(estimator)(*first[:2], np.arange(40), lengths=LENGTHS)
    assert (np.abs(alone).max() < 1e-12) == rule.zero_alone
    for method, needs in (("update", rule.keeps_parts), ("normalize", rule.needs_groups)):
        with pytest.raises(DataError) if needs else nullcontext():
            getattr(ClusterNormalizer(estimator), method)(*first[:2], lengths=LENGTHS)
    complaint = f"estimator {estimator} needs lengths: that of each reward's completion"
    with pytest.raises(DataError, match=complaint) if rule.needs_lengths else nullcontext():
        ClusterNormalizer(estimator)(*first)
    ClusterNormalizer(estimator).update(*first)


# The eps that advantages are standardised with has no unit.
@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if not RULES[name].whitens])
@pytest.mark.parametrize("order", ORDERS)
def test_units_are_free(estimator: str, order: str) -> None:
    """Rewards in other units, with another zero: the same advantages, if eps is in those units."""
    rng = np.random.default_rng(11)
    scaled = ClusterNormalizer(estimator, order=order, eps=EPS * 8)
    plain = ClusterNormalizer(estimator, order=order)
    unit = 8.0 if estimator in ("dr_grpo", "rloo", "opo", "rae") else 1.0
    zero = 0.0 if estimator in WITH_A_ZERO else 2.0**20
    for _ in range(4):
        rewards, clusters = rng.integers(-50, 50, 60) / 16, rng.integers(0, 3, 60)
        groups = rng.integers(0, 12, 60)
        lengths = rng.integers(0, 9, 60)
        expected = plain(rewards, clusters, groups, lengths=lengths) * unit
        found = scaled(8 * rewards + zero, clusters, groups, lengths=lengths)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("size", [8, 64, 3000, 20_000])
def test_kinds_of_ids_and_rewards_agree(estimator: str, size: int) -> None:
    """There are fast ways for some; all give what strings give."""
    rng = np.random.default_rng(size)
    histories = {
        kind: ClusterNormalizer(estimator) for kind in ("i4", "i8", "far", "names", "mixed", "f4")
    }
    for _ in range(3):
        rewards = rng.normal(2, 1, size).astype(np.float32).astype(np.float64)
        clusters, groups = rng.integers(0, 9, size), rng.integers(0, max(size // 4, 1), size)
        names = [f"c{i}" for i in clusters]
        lengths = np.arange(size) % 7
        names_of_groups = [str(g) for g in groups]
        expected = histories["names"](rewards, names, names_of_groups, lengths=lengths)
        batches: dict[str, tuple[Any, Any, Any]] = {
            "i4": (rewards, clusters.astype(np.int32), groups.astype(np.int32)),
            "i8": (rewards, clusters, groups),
            "far": (rewards, clusters - 2**50, groups - 2**62),
            "mixed": (rewards, [i if i % 2 else f"c{i}" for i in clusters.tolist()], groups),
        }
        for kind, batch in batches.items():
            found = histories[kind](*batch, lengths=lengths)
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)
        found = histories["f4"](rewards.astype(np.float32), clusters, groups, lengths=lengths)
        assert found.dtype == np.float32
        error = np.abs(found - expected) / (1 + np.abs(expected))
        assert error.max() <= 2e-7


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


@pytest.mark.parametrize("grouped", [False, True])
def test_any_number_of_threads_gives_the_same_bits(grouped: bool) -> None:
    rng = np.random.default_rng(4)
    rewards, clusters = rng.normal(size=600_000), rng.integers(0, 99, 600_000)
    groups = np.arange(600_000) // 4 if grouped else None
    estimator = "shrinkage" if grouped else "pgrpo"
    one, many = (ClusterNormalizer(estimator, num_threads=number) for number in (1, 3))
    np.testing.assert_array_equal(
        one(rewards, clusters, groups), many(rewards, clusters, groups), strict=True
    )
    assert one.state_dict() == many.state_dict()


def test_a_mean_far_from_zero_keeps_its_spread() -> None:
    """core.md, target 12, at a size that takes a second: plain sums would have no digits left."""
    rng = np.random.default_rng(9)
    noise, normalizer = rng.normal(0, 1e-3, (20, 50_000)), ClusterNormalizer()
    rewards = 1e8 + noise
    # What the rounding of 1e8 left of the noise is known exactly.
    noise = rewards - 1e8
    for row in rewards:
        normalizer.update(row, np.zeros(len(row), np.int64))
    state = normalizer.state_dict()
    mean = state["origin"][0] - 1e8 + state["offset"][0]
    assert abs(mean - noise.mean()) <= 1e-10 * noise.std()
    assert normalizer.snapshot()[0].std == pytest.approx(noise.std(), rel=1e-10)


@given(st.floats(0.01, 1), st.lists(st.floats(-10, 10), min_size=1, max_size=30))
@few
def test_forgetting_is_geometric(rho: float, rewards: list[float]) -> None:
    """One reward a batch: each weighs rho to the power of the batches since."""
    forgetting, weighted = ClusterNormalizer(forgetting=rho), ClusterNormalizer()
    for reward in rewards:
        forgetting.update([reward], ["a"])
    weights = rho ** np.arange(len(rewards), dtype=np.float64)[::-1]
    weighted.update(rewards, ["a"] * len(rewards), weights=weights)
    left, right = forgetting.snapshot()["a"], weighted.snapshot()["a"]
    assert left.count == pytest.approx(right.count, rel=1e-12)
    assert left.mean == pytest.approx(right.mean, rel=1e-9, abs=1e-10)
    assert left.std == pytest.approx(right.std, rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 2)), min_size=1, max_size=30), st.data())
@few
def test_retracting_is_the_inverse_of_updating(
    rows: list[tuple[float, int]], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(rows)))
    normalizer, kept = ClusterNormalizer(), ClusterNormalizer()
    rewards, clusters = (list(column) for column in zip(*rows, strict=True))
    normalizer.update(rewards, clusters)
    normalizer.retract(rewards[cut:], clusters[cut:])
    kept.update(rewards[:cut], clusters[:cut])
    left, right = normalizer.snapshot(), kept.snapshot()
    assert left.keys() == right.keys()
    for cluster, stats in right.items():
        assert left[cluster].count == stats.count
        assert astuple(left[cluster]) == pytest.approx(astuple(stats), rel=1e-9, abs=1e-6)


def test_a_young_history_explodes_only_in_the_other_order() -> None:
    """math.md, experiment 6: without a prior, normalize_then_update exceeds |A| of 1e3."""
    rewards, clusters = np.array([0.0, 0.0]), ["cold"] * 2
    for order, worst in ((ORDERS[0], 1.8), (ORDERS[1], 1e4)):
        normalizer = ClusterNormalizer(order=order)
        assert not normalizer(rewards, clusters).any()
        assert normalizer(np.array([1.0, 0.0]), clusters)[0] == pytest.approx(worst, rel=0.05)
