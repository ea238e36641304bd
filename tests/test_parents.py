"""Histories that borrow from a parent's: whatever carries histories carries the parents' as well.

What is read of them is compared with the exact oracle in test_differential.py.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import Reference

from pgrpo import ClusterNormalizer, ConfigError, DataError
from pgrpo.errors import CheckpointError
from pgrpo.normalizer import ClusterStats, NodeHistories

pytest_plugins = ["parallel"]

Floats = NDArray[np.float64]

PERSONS, CLUSTERS = 30, 4
OPTIONS: dict[str, Any] = {"prior_count": 6.0}


def cluster_of(persons: Any) -> Any:
    """Called by a name, or by a number that is a person's as well."""
    return [f"c{person % 2}" if person % 4 < 2 else int(person) % 4 for person in persons]


def batch(seed: int, size: int = 64) -> tuple[Floats, list[int], list[Any]]:
    """Rewards, persons and their clusters, whose rewards differ."""
    random = np.random.default_rng(seed)
    persons: list[int] = random.integers(0, PERSONS, size).tolist()
    return random.normal(5 + np.array(persons) % 4, 2), persons, cluster_of(persons)


def told(*seeds: int, **options: Any) -> ClusterNormalizer:
    normalizer = ClusterNormalizer(**OPTIONS, **options)
    for seed in seeds:
        rewards, persons, clusters = batch(seed)
        normalizer.update(rewards, persons, parents=clusters)
    return normalizer


def assert_near(found: ClusterNormalizer, expected: ClusterNormalizer) -> None:
    """That counts are equal, and all else up to rounding."""
    for one, other in (
        (found.snapshot(), expected.snapshot()),
        (found.parents(), expected.parents()),
    ):
        assert one.keys() == other.keys()
        for name, stats in other.items():
            assert one[name].count == stats.count
            # A spread is the root of an m2 that is off by 1e-13 or so.
            assert astuple(one[name]) == pytest.approx(astuple(stats), rel=1e-9, abs=1e-6)
    # What is read of them, which all persons together have a part in.
    rewards, persons, clusters = batch(99)
    np.testing.assert_allclose(
        found.normalize(rewards, persons, parents=clusters),
        expected.normalize(rewards, persons, parents=clusters),
        rtol=1e-9,
    )


def test_a_parent_has_the_rewards_that_came_with_it() -> None:
    found, by_cluster, by_person = told(1, 2, 3), ClusterNormalizer(), ClusterNormalizer()
    for seed in (1, 2, 3):
        rewards, persons, clusters = batch(seed)
        by_cluster.update(rewards, clusters)
        by_person.update(rewards, persons)
    assert found.snapshot() == by_person.snapshot()
    parents, expected = found.parents(), by_cluster.snapshot()
    assert parents.keys() == expected.keys()
    for cluster, stats in expected.items():
        assert parents[cluster].count == stats.count
        assert astuple(parents[cluster]) == pytest.approx(astuple(stats), rel=1e-12)


def test_rows_have_a_parent_each() -> None:
    rows, entries = ClusterNormalizer(**OPTIONS), ClusterNormalizer(**OPTIONS)
    rewards = np.arange(12.0).reshape(4, 3) % 5
    persons, clusters = np.array([7, 8, 7, 9]), np.array([1, 2, 1, 2])
    found = rows(rewards, persons, parents=clusters)
    each: Any = entries(rewards.ravel(), persons.repeat(3), parents=clusters.repeat(3))
    np.testing.assert_array_equal(found.ravel(), each)
    assert rows.state_dict() == entries.state_dict()
    with pytest.raises(DataError, match=r"parents\[2, 0\] is 3; expected 1, which cluster 7 has"):
        rows(rewards, persons, parents=[1, 2, 3, 2])
    assert rows.state_dict() == entries.state_dict()


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([1, 2], r"rewards has 3 entries, parents has 2"),
        ([1, 2.5, 1], r"parents\[1\] is 2.5; expected an int or a string"),
        ([1, 2, None], r"parents\[2\] is None; expected an int or a string"),
        (["a", "b", "c"], r'parents\[2\] is "c"; expected "a", which cluster 7 has earlier'),
    ],
)
def test_bad_parents_change_nothing(parents: Any, message: str) -> None:
    normalizer = told(1)
    before = normalizer.state_dict()
    for method in (normalizer, normalizer.update, normalizer.normalize, normalizer.retract):
        with pytest.raises(DataError, match=message):
            method([1.0, 2.0, 3.0], [7, 8, 7], parents=parents)
    assert normalizer.state_dict() == before


def test_without_a_prior_there_is_nothing_to_borrow() -> None:
    normalizer = ClusterNormalizer()
    for method in (normalizer, normalizer.update, normalizer.normalize):
        with pytest.raises(ConfigError, match="borrowing from parents needs a prior_count above 0"):
            method([1.0], [1], parents=[1])
    assert normalizer.state_dict() == ClusterNormalizer().state_dict()


@pytest.mark.parametrize("trip", ["dict", "file", "pickle", "copy"])
def test_state_round_trips_exactly(trip: str, tmp_path: Path) -> None:
    normalizer, restored = told(1, 2, track_delta=True), ClusterNormalizer(**OPTIONS)
    if trip == "dict":
        restored = ClusterNormalizer(track_delta=True, **OPTIONS)
        restored.load_state_dict(json.loads(json.dumps(normalizer.state_dict())))
    elif trip == "file":
        restored = ClusterNormalizer(track_delta=True, **OPTIONS)
        path = Path(mkdtemp(dir=tmp_path), "histories")
        normalizer.save(path)
        restored.load(path)
    else:
        restored = (
            copy.copy(normalizer) if trip == "copy" else pickle.loads(pickle.dumps(normalizer))
        )
    assert restored.state_dict() == normalizer.state_dict()
    assert restored.parents() == normalizer.parents()
    assert len(restored.parents()) == CLUSTERS
    rewards, persons, clusters = batch(3)
    went_on: Any = normalizer(rewards, persons, parents=clusters)
    np.testing.assert_array_equal(restored(rewards, persons, parents=clusters), went_on)
    assert restored.state_dict() == normalizer.state_dict()
    assert restored.delta() == normalizer.delta()


@pytest.mark.parametrize("name", [{"parent": 1.5}, {"parent": {"parent": 1}}, {"child": 1}, {}])
def test_a_damaged_name_is_refused(name: Any) -> None:
    state = told(1).state_dict()
    state["clusters"][0] = name
    with pytest.raises(CheckpointError, match=r"clusters\[0\] is {.*expected int or str"):
        ClusterNormalizer().load_state_dict(state)
    state["clusters"] = [{"parent": 1}] * len(state["clusters"])
    with pytest.raises(CheckpointError, match="clusters names one of them twice"):
        ClusterNormalizer().load_state_dict(state)


def test_merging_is_one_stream() -> None:
    whole, gathered, merged = told(1, 2, 3, 4), ClusterNormalizer(**OPTIONS), told(4)
    shards = [told(1, 2, track_delta=True), told(3, track_delta=True), told(4, track_delta=True)]
    for shard in shards:
        gathered.merge(shard.delta())
    for shard in shards[:2]:
        merged.merge(shard)
    assert_near(gathered, whole)
    assert_near(merged, whole)


def test_retracting_undoes() -> None:
    normalizer, expected = told(1, 2), told(2)
    rewards, persons, clusters = batch(1)
    normalizer.retract(rewards, persons, parents=clusters)
    assert_near(normalizer, expected)
    before = normalizer.state_dict()
    with pytest.raises(DataError, match=r"cluster \"c0\" \(a parent\) holds .* cannot retract"):
        # The persons have as many, the cluster has not.
        counts = {person: int(stats.count) for person, stats in normalizer.snapshot().items()}
        everything = [person for person, count in counts.items() for _ in range(count)]
        normalizer.retract([5.0] * len(everything), everything, parents=["c0"] * len(everything))
    assert normalizer.state_dict() == before


def test_persons_are_dropped_together() -> None:
    normalizer = told(1)
    before, persons = normalizer.state_dict(), list(normalizer.snapshot())
    needs = "dropping some of the clusters needs histories without parents"
    for drop in (normalizer.forget, normalizer.keep):
        with pytest.raises(ConfigError, match=needs):
            drop(persons[:2])
    # A parent is none of the clusters that can be told to go, or to stay.
    assert normalizer.forget(["c0"]) == 0
    assert normalizer.state_dict()["count"] == before["count"]
    assert normalizer.keep([]) == len(persons)
    assert normalizer.state_dict() == ClusterNormalizer(**OPTIONS).state_dict()


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_each_of_several_rewards_borrows(combine: str) -> None:
    weights = [1.0, 0.25]
    normalizer = ClusterNormalizer(reward_weights=weights, combine=combine, **OPTIONS)
    oracles = [Reference(**OPTIONS) for _ in weights]
    for seed in range(3):
        rewards, persons, clusters = batch(seed)
        both = np.stack([rewards, rewards**2], axis=1)
        found = normalizer(both, persons, parents=clusters)
        if combine == "sum_then_normalize":
            expected = oracles[0](both @ weights, persons, parents=clusters)
        else:
            each = (o(c, persons, parents=clusters) for o, c in zip(oracles, both.T, strict=True))
            expected = np.stack([*each], axis=1) @ weights
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    restored = ClusterNormalizer(reward_weights=weights, combine=combine, **OPTIONS)
    restored.load_state_dict(json.loads(json.dumps(normalizer.state_dict())))
    for name, part in normalizer.rewards.items():
        assert len(part.parents()) == CLUSTERS
        assert restored.rewards[name].parents() == part.parents()


@pytest.mark.skipif(os.name != "posix", reason="there are no shared tables")
def test_processes_share_parents_too(tmp_path: Path) -> None:
    path = Path(mkdtemp(dir=tmp_path), "table")
    one, other = (ClusterNormalizer.shared(path, capacity=128, **OPTIONS) for _ in range(2))
    for seed, normalizer in ((1, one), (2, other), (3, one)):
        rewards, persons, clusters = batch(seed)
        normalizer.update(rewards, persons, parents=clusters)
    assert other.state_dict() == one.state_dict()
    assert_near(one, told(1, 2, 3))
    restored = ClusterNormalizer(**OPTIONS)
    restored.load_state_dict(one.state_dict())
    assert_near(restored, one)
    with pytest.raises(ConfigError, match="dropping some of the clusters"):
        one.forget([1])
    one.keep([])
    assert (other.snapshot(), other.parents()) == ({}, {})


@pytest.mark.skipif(os.name != "posix", reason="there are no shared tables")
def test_nodes_hand_each_other_parents(tmp_path: Path) -> None:
    folder = Path(mkdtemp(dir=tmp_path))
    east, west = (NodeHistories(folder / n, n, capacity=128, **OPTIONS) for n in ("east", "west"))
    for seed, node in ((1, east), (2, west), (3, east)):
        rewards, persons, clusters = batch(seed)
        node.advantages(0, rewards, persons, parents=clusters)
    for node, sealed in ((east, west.seal(0)), (west, east.seal(0))):
        assert node.merge(sealed)
        assert_near(node.histories, told(1, 2, 3))
        node.rewind()
        assert_near(node.histories, told(1, 2, 3))


@given(
    rows=st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 5)), max_size=20),
    rho=st.sampled_from([1.0, 0.5]),
    prior=st.sampled_from([0.5, 4.0]),
    constant=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_each_its_own_parent_or_all_the_same(
    rows: list[tuple[int, int]], rho: float, prior: float, constant: bool
) -> None:
    """One parent of all is the pool, shrunk toward itself; equal rewards give exactly 0."""
    options: dict[str, Any] = {"prior_count": prior, "forgetting": rho}
    with_parent, without = ClusterNormalizer(**options), ClusterNormalizer(**options)
    for reward, person in rows:
        rewards = [0.1] * 2 if constant else [reward / 4, reward / 2]
        found = with_parent(rewards, [person] * 2, parents=["all"] * 2)
        expected = without(rewards, [person] * 2)
        if rho == 1:
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        if constant:
            assert found == [0.0, 0.0]


def test_threads_lose_nothing() -> None:
    """Batches on both sides of the size from which the interpreter is released."""
    normalizer = ClusterNormalizer(**OPTIONS)

    def work(seed: int) -> None:
        for call in range(20):
            rewards, persons, clusters = batch(20 * seed + call, 8 if call % 4 else 5000)
            assert np.isfinite(normalizer(rewards, persons, parents=clusters)).all()
            assert normalizer.parents().keys() >= set(clusters)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    parts = [batch(seed, 8 if seed % 4 else 5000) for seed in range(80)]
    rewards = np.concatenate([rewards for rewards, *_ in parts])
    for found, place in ((normalizer.snapshot(), 1), (normalizer.parents(), 2)):
        names: list[Any] = [name for part in parts for name in part[place]]
        assert found.keys() == set(names)
        for name, stats in found.items():
            own = rewards[[other == name for other in names]]
            expected = ClusterStats(len(own), own.mean(), own.std())
            assert stats.count == expected.count
            assert astuple(stats) == pytest.approx(astuple(expected), rel=1e-9)
