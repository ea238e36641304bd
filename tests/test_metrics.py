"""Figures of a step against their definitions, written out."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import grouped, start, train, write_config
from hypothesis import given
from hypothesis import strategies as st

from pgrpo.cli import main
from pgrpo.normalizer import ClusterNormalizer
from pgrpo.runs.metrics import (
    EventFile,
    cluster_records,
    equal_groups,
    fairness,
    peak_memory_bytes,
    processor_name,
    warnings,
)
from pgrpo.types import Example, Prompt, Rollout

EPS = 1e-4


def make_rollouts(groups: list[tuple[int | str, int]]) -> list[Rollout]:
    """Rollouts of groups of a (cluster, size) each."""
    return [
        Rollout(Prompt(Example("", "u"), cluster, (1,)), number, (2,), "x", (0.0,), False)
        for number, (cluster, size) in enumerate(groups)
        for _ in range(size)
    ]


@pytest.mark.parametrize("ddof", [0, 1])
def test_corollary_3_1(ddof: int) -> None:
    """P-GRPO's advantage = scale_ratio * GRPO's advantage + bias, for every group by itself."""
    rng = np.random.default_rng(0)
    normalizer = ClusterNormalizer("pgrpo", ddof=ddof, nan_policy="zero")
    for _ in range(5):
        groups: list[tuple[int | str, int]] = [("a", 4), (7, 2), ("a", 3)]
        rollouts = make_rollouts(groups)
        rewards = rng.normal(3, 2, 9)
        rewards[4:6] = 1.5  # equal rewards: a group without a spread
        clusters = [r.prompt.cluster_id for r in rollouts]
        advantages = normalizer(rewards, clusters)
        histories = normalizer.snapshot()
        records = cluster_records(
            grouped(rollouts, advantages, rewards), histories, histories, eps=EPS, ddof=ddof
        )
        assert list(records) == ["7", "a"]
        spans = {"a": [slice(0, 4), slice(6, 9)], "7": [slice(4, 6)]}
        for name, history in (("a", histories["a"]), ("7", histories[7])):
            ratios, biases = [], []
            for span in spans[name]:
                group = rewards[span]
                std = group.std(ddof=ddof)
                ratios.append((std + EPS) / (history.std + EPS))
                biases.append((group.mean() - history.mean) / (history.std + EPS))
                grpo = (group - group.mean()) / (std + EPS)
                np.testing.assert_allclose(
                    advantages[span], ratios[-1] * grpo + biases[-1], rtol=1e-9, atol=1e-9
                )
            assert records[name]["scale_ratio"] == pytest.approx(np.mean(ratios))
            assert records[name]["bias"] == pytest.approx(np.mean(biases))
            members = np.concatenate([rewards[span] for span in spans[name]])
            assert records[name]["reward"] == pytest.approx(members.mean())
            assert records[name]["num_rollouts"] == len(members)
            chosen = np.concatenate([advantages[span] for span in spans[name]])
            assert records[name]["advantage"] == pytest.approx(chosen.mean())


def test_clusters_that_were_not_met_and_rewards_that_are_missing() -> None:
    normalizer = ClusterNormalizer("pgrpo", nan_policy="zero")
    normalizer.update([1.0, 3.0], [5, 5])
    rollouts = make_rollouts([(0, 3), (0, 2)])
    rewards = np.array([1.0, np.nan, 2.0, np.nan, np.nan])
    advantages = normalizer(rewards, [0] * 5)
    histories = normalizer.snapshot()
    records = cluster_records(
        grouped(rollouts, advantages, rewards), histories, histories, eps=EPS, ddof=0
    )
    assert records["5"]["reward"] is None
    assert records["5"]["scale_ratio"] is None
    assert (records["5"]["num_rollouts"], records["5"]["count"]) == (0, 2)
    assert (records["5"]["mean"], records["5"]["std"]) == (2.0, 1.0)
    assert (records["0"]["num_rollouts"], records["0"]["reward"]) == (2, 1.5)
    # The group without rewards has no part in the terms.
    assert records["0"]["scale_ratio"] == pytest.approx(1.0)
    assert records["0"]["bias"] == pytest.approx(0.0)


def test_terms_of_the_history_before_the_step() -> None:
    normalizer = ClusterNormalizer("pgrpo", order="normalize_then_update")
    normalizer.update([1.0, 3.0], ["old", "old"])
    before = normalizer.snapshot()
    rollouts = make_rollouts([("old", 2), ("new", 2)])
    rewards = np.array([4.0, 8.0, 1.0, 2.0])
    advantages = normalizer(rewards, ["old", "old", "new", "new"])
    after = normalizer.snapshot()
    records = cluster_records(
        grouped(rollouts, advantages, rewards), after, before, eps=EPS, ddof=0
    )
    assert records["old"]["count"] == 4
    assert records["old"]["scale_ratio"] == pytest.approx((2 + EPS) / (1 + EPS))
    assert records["old"]["bias"] == pytest.approx(4 / (1 + EPS))
    # A cluster without a history had nothing to be compared with.
    assert (records["new"]["scale_ratio"], records["new"]["bias"]) == (None, None)
    assert (records["new"]["reward"], records["new"]["advantage"]) == (1.5, 0.0)


def test_a_mean_advantage_is_warned_of_where_lengths_feel_it() -> None:
    rising = ClusterNormalizer("pgrpo", track_diagnostics=True)
    for step in range(20):
        rising([step, step + 1.0, step + 2.0], ["a", "a", "b"])
    found = rising.diagnostics()
    assert warnings(found, "dapo") == warnings(found, "dr_grpo") == found.warnings
    *others, last = warnings(found, "grpo")
    assert others == found.warnings
    assert "with loss.aggregation grpo favours short completions" in last
    falling = ClusterNormalizer("pgrpo", track_diagnostics=True)
    for step in range(20):
        falling([-step, -step - 1.0], ["a", "a"])
    assert "favours long completions" in warnings(falling.diagnostics(), "grpo")[-1]
    # Advantages that sum up to 0 in each group favour neither.
    centred = ClusterNormalizer("rloo", track_diagnostics=True)
    centred([0.0, 1.0, 2.0], ["a", "a", "a"], [0, 0, 0])
    assert warnings(centred.diagnostics(), "grpo") == centred.diagnostics().warnings


def test_nothing_is_said_of_advantages_before_there_are_any() -> None:
    assert warnings(ClusterNormalizer("pgrpo", track_diagnostics=True).diagnostics(), "grpo") == []


def test_equal_groups() -> None:
    rollouts = make_rollouts([(0, 2), (0, 2), (1, 1), (1, 2), (1, 2)])
    rewards = np.array([1, 1, 0, 1, 3, np.nan, 2, np.nan, np.nan], dtype=float)
    # Equal, different, a group of one, one reward left, none left.
    assert equal_groups(grouped(rollouts, rewards=rewards)) == pytest.approx(4 / 5)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_fairness(values: list[float]) -> None:
    found = fairness(values)
    assert found["worst"] == min(values)
    assert found["gap"] == max(values) - min(values)
    if max(values) == 0:
        assert found["gini"] is None
        return
    # The area between the Lorenz curve and the diagonal, twice.
    shares = np.cumsum([0, *sorted(values)]) / sum(values)
    lorenz = 1 - sum((shares[1:] + shares[:-1]) / len(values))
    assert found["gini"] == pytest.approx(lorenz, abs=1e-9)
    pairs = sum(abs(a - b) for a, b in combinations(values, 2))
    assert found["gini"] == pytest.approx(pairs / (len(values) * sum(values)), abs=1e-9)


def test_fairness_where_gini_means_nothing() -> None:
    assert fairness([]) == {"worst": None, "gap": None, "gini": None}
    assert fairness([-1.0, 2.0]) == {"worst": -1.0, "gap": 3.0, "gini": None}
    assert fairness([0.3])["gini"] == 0.0


def test_the_machine() -> None:
    assert processor_name()
    before = peak_memory_bytes()
    block = np.ones(30_000_000)
    after = peak_memory_bytes()
    assert before is not None
    assert after is not None
    assert after >= before > 100_000_000
    assert after >= block.nbytes


# TensorBoard.


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags: Any = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def test_events_are_read_by_tensorboard(tmp_path: Path) -> None:
    events = EventFile(tmp_path / "tensorboard", 1)
    events.write({"step": 1, "reward": 0.5, "kl": None, "clusters": {"a": {"count": 3}}}, 1)
    # On disk at once, however the process ends.
    assert read_events(tmp_path / "tensorboard") == {
        "reward": [(1, 0.5)],
        "clusters/a/count": [(1, 3.0)],
    }
    events.write({"step": 2, "reward": 0.75}, 2)
    events.write({"reward": 0.25}, 2, prefix="held_out/")
    found = read_events(tmp_path / "tensorboard")
    assert found["reward"] == [(1, 0.5), (2, 0.75)]
    assert found["held_out/reward"] == [(2, 0.25)]


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    changes = {"run.tensorboard": True, "run.checkpoint_every": 3, "run.num_steps": 5}
    whole = read_events(train(tmp_path / "whole", changes) / "tensorboard")
    assert [step for step, _ in whole["reward"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in whole["held_out/reward"]] == [0, 2, 4, 5]
    run = tmp_path / "run"
    config = write_config(tmp_path, changes)
    # Steps 4 and 5 are logged, but not saved.
    process = start(
        "train", config, "--out", run, kill_at=1, folder=run / "checkpoints/.partial-000005"
    )
    process.join()
    assert process.exitcode == -9
    assert main(["train", "--resume", str(run)]) == 0
    again = read_events(run / "tensorboard")
    for tag in ("reward", "loss", "clusters/0/mean", "held_out/reward"):
        assert again[tag] == whole[tag]
