"""What every integration does: the normalizer's advantages, and no history touched that should not be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frameworks import FRAMEWORKS, HERE, MIXED, SIZE, Framework

from pgrpo import ClusterNormalizer, DataError
from pgrpo.errors import CheckpointError

Made = Callable[[ClusterNormalizer], Framework]

NEEDS = {"trl": (3, 11)}
"""Python that a framework needs, where it is not every one."""


@pytest.fixture(params=HERE)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """Makes the framework's loop around a normalizer."""
    name: str = request.param
    if sys.version_info < NEEDS.get(name, (3, 10)):
        pytest.skip(f"{name} needs Python {NEEDS[name]}")
    return lambda normalizer: FRAMEWORKS[name](normalizer, tmp_path / "run")


def batch(seed: int, groups: int = 6, rewards: int = 1) -> tuple[Any, list[int | str], list[int]]:
    """Rewards that float32 holds exactly, clusters and groups; one group mixes clusters if it can."""
    rng = np.random.default_rng(seed)
    names: list[int | str] = ["ä", 3, "3", -7]
    clusters = [names[i] for i in rng.integers(0, 4, groups) for _ in range(SIZE)]
    if MIXED:
        clusters[: SIZE // 2] = ["mixed"] * (SIZE // 2)
    values = np.round(rng.normal(size=(groups * SIZE, rewards)) * 64) / 64
    return values, clusters, [i // SIZE for i in range(groups * SIZE)]


def calls(loop: Framework, groups: int = 6) -> list[slice]:
    """The rollouts of each call of the normalizer."""
    whole = groups * SIZE
    return [slice(i, i + SIZE) for i in range(0, whole, SIZE)] if loop.by_group else [slice(whole)]


def same(found: list[float], expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", ["pgrpo", "grpo", "rloo", "shrinkage", "auto", "batch"])
def test_advantages_are_the_normalizers_own(made: Made, estimator: str) -> None:
    normalizer, alone = ClusterNormalizer(estimator), ClusterNormalizer(estimator)
    loop = made(normalizer)
    for seed in range(3):
        rewards, clusters, groups = batch(seed)
        expected = np.concatenate(
            [alone(rewards[part, 0], clusters[part], groups[part]) for part in calls(loop)]
        )
        assert np.abs(expected).max() > 0.5
        same(loop.advantages(rewards.tolist(), clusters), expected)
    assert normalizer.state_dict() == alone.state_dict()


def test_evaluation_reads_histories_and_leaves_them(made: Made) -> None:
    normalizer, alone = ClusterNormalizer("pgrpo"), ClusterNormalizer("pgrpo")
    loop = made(normalizer)
    if not loop.evaluates:
        pytest.skip("it computes no advantages in evaluation")
    rewards, clusters, groups = batch(0)
    loop.advantages(rewards.tolist(), clusters)
    alone(rewards[:, 0], clusters, groups)
    before = normalizer.state_dict()
    rewards, clusters, groups = batch(1)
    expected = alone.normalize(rewards[:, 0], clusters, groups)
    same(loop.advantages(rewards.tolist(), clusters, training=False), expected)
    assert normalizer.state_dict() == before


def test_rollouts_without_a_reward_enter_nothing_and_count_nothing(made: Made) -> None:
    normalizer, alone = ClusterNormalizer("shrinkage"), ClusterNormalizer("shrinkage")
    loop = made(normalizer)
    rewards, clusters, groups = batch(2)
    missing = [1, 6, 7, *range(12, 16)]
    given: list[list[float | None]] = rewards.tolist()
    for place in missing:
        given[place] = [None]
    expected = np.zeros(len(given))
    for part in calls(loop):
        kept = [i for i in range(len(given))[part] if i not in missing]
        if kept:
            columns = ([column[i] for i in kept] for column in (clusters, groups))
            expected[kept] = alone(rewards[kept, 0], *columns)
    same(loop.advantages(given, clusters), expected)
    assert normalizer.state_dict() == alone.state_dict()


def test_a_batch_without_any_reward_changes_nothing(made: Made) -> None:
    normalizer = ClusterNormalizer("pgrpo")
    found = made(normalizer).advantages([[None]] * (2 * SIZE), ["a"] * (2 * SIZE))
    assert found == [0.0] * (2 * SIZE)
    assert not normalizer.snapshot()


def test_a_reward_that_is_infinite_is_refused_and_nothing_is_folded(made: Made) -> None:
    normalizer = ClusterNormalizer("pgrpo")
    loop = made(normalizer)
    rewards, clusters, _ = batch(0)
    loop.advantages(rewards.tolist(), clusters)
    before = normalizer.state_dict()
    rewards[3] = np.inf
    with pytest.raises(DataError, match="inf"):
        loop.advantages(rewards.tolist(), clusters)
    assert normalizer.state_dict() == before


def test_several_rewards_have_histories_of_their_own(made: Made) -> None:
    def several() -> ClusterNormalizer:
        return ClusterNormalizer(
            "pgrpo",
            reward_weights=[1.0, 0.5],
            reward_names=["correct", "style"],
            combine="normalize_then_sum",
            nan_policy="zero",
        )

    normalizer, alone = several(), several()
    loop = made(normalizer)
    if not loop.several:
        pytest.skip("it has one reward of a rollout")
    for seed in range(2):
        rewards, clusters, groups = batch(seed, rewards=2)
        given: list[list[float | None]] = rewards.tolist()
        given[5][1] = None
        rewards[5, 1] = np.nan
        same(loop.advantages(given, clusters), alone(rewards, clusters, groups))
    assert set(normalizer.rewards) == {"correct", "style"}
    assert normalizer.state_dict() == alone.state_dict()


@pytest.mark.parametrize("estimator", ["pgrpo", "auto"])
def test_a_checkpoint_goes_on_where_it_stopped(made: Made, tmp_path: Path, estimator: str) -> None:
    normalizer = ClusterNormalizer(estimator)
    loop = made(normalizer)
    rewards, clusters, _ = batch(0)
    loop.advantages(rewards.tolist(), clusters)
    (tmp_path / "saved").mkdir()
    loop.save(tmp_path / "saved")
    kept = normalizer.state_dict()
    rewards, clusters, _ = batch(1)
    expected = loop.advantages(rewards.tolist(), clusters)

    again = ClusterNormalizer(estimator)
    resumed = made(again)
    resumed.load(tmp_path / "saved")
    assert again.state_dict() == kept
    assert resumed.advantages(rewards.tolist(), clusters) == expected
    assert again.state_dict() == normalizer.state_dict()


def test_a_batch_that_a_resumed_run_repeats_is_counted_once(made: Made, tmp_path: Path) -> None:
    loop = made(ClusterNormalizer("pgrpo"))
    if not loop.repeats:
        pytest.skip("its checkpoints are not made in the middle of a batch")
    rewards, clusters, groups = batch(0)
    loop.advantages(rewards.tolist(), clusters)
    (tmp_path / "saved").mkdir()
    loop.save(tmp_path / "saved")
    normalizer, alone = ClusterNormalizer("pgrpo"), ClusterNormalizer("pgrpo")
    resumed = made(normalizer)
    resumed.load(tmp_path / "saved")
    alone.update(rewards[:, 0], clusters)
    expected = alone.normalize(rewards[:, 0], clusters, groups)
    same(resumed.advantages(rewards.tolist(), clusters), expected)
    assert normalizer.state_dict() == alone.state_dict()
    # Later on the same prompts are those of another step.
    resumed.advantages(rewards.tolist(), clusters)
    alone.update(rewards[:, 0], clusters)
    assert normalizer.state_dict() == alone.state_dict()


def test_a_damaged_checkpoint_is_refused_and_histories_stay(made: Made, tmp_path: Path) -> None:
    loop = made(ClusterNormalizer("pgrpo"))
    rewards, clusters, _ = batch(0)
    loop.advantages(rewards.tolist(), clusters)
    (tmp_path / "saved").mkdir()
    loop.save(tmp_path / "saved")
    found = list((tmp_path / "saved").rglob("pgrpo_histories.bin"))
    if not found:
        pytest.skip("a checkpoint of one's own is one's own to check")
    histories = found[0]
    data = bytearray(histories.read_bytes())
    data[len(data) // 2] ^= 1
    histories.write_bytes(bytes(data))
    normalizer = ClusterNormalizer("pgrpo")
    other = made(normalizer)
    other.advantages(batch(1)[0].tolist(), batch(1)[1])
    before = normalizer.state_dict()
    with pytest.raises(CheckpointError, match="pgrpo_histories"):
        other.load(tmp_path / "saved")
    assert normalizer.state_dict() == before
