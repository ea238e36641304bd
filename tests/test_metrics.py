"""Figures of a step against their definitions, written out."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import grouped
from hypothesis import given
from hypothesis import strategies as st

from pgrpo.normalizer import ClusterNormalizer, ClusterStats
from pgrpo.runs.log import Log
from pgrpo.runs.metrics import (
    EXTREMES,
    PAIRS,
    cluster_records,
    collapse,
    equal_groups,
    extremes,
    fairness,
    one_of_each,
    peak_memory_bytes,
    processor_name,
    warnings,
)
from pgrpo.runs.records import MAX_CLUSTERS, FairnessRecord, StepRecord
from pgrpo.types import Example, Prompt, Rollout

EPS = 1e-4


def outcomes(groups, rewards, advantages):
    """Groups of a (cluster, size) each, with their shares of the arrays."""
    rollouts = [
        Rollout(Prompt(Example("", "u"), cluster, (1,)), number, (2,), "x", (0.0,), False)
        for number, (cluster, size) in enumerate(groups)
        for _ in range(size)
    ]
    return grouped(rollouts, advantages, rewards)


def members(groups):
    """The cluster of each rollout."""
    return [cluster for cluster, size in groups for _ in range(size)]


@pytest.mark.parametrize("ddof", [0, 1])
def test_corollary_3_1(ddof: int) -> None:
    """P-GRPO's advantage = scale_ratio * GRPO's advantage + bias, for every group by itself."""
    rng = np.random.default_rng(0)
    normalizer = ClusterNormalizer("pgrpo", ddof=ddof, nan_policy="zero")
    for _ in range(5):
        groups = [("a", 4), (7, 2), ("a", 3)]
        rewards = rng.normal(3, 2, 9)
        rewards[4:6] = 1.5  # equal rewards: a group without a spread
        advantages = normalizer(rewards, members(groups))
        histories = normalizer.snapshot()
        found = outcomes(groups, rewards, advantages)
        records, _ = cluster_records(found, histories, histories, eps=EPS, ddof=ddof)
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
            assert records[name].scale_ratio == pytest.approx(np.mean(ratios))
            assert records[name].bias == pytest.approx(np.mean(biases))
            raw = np.concatenate([rewards[span] for span in spans[name]])
            assert records[name].reward == pytest.approx(raw.mean())
            assert records[name].num_rollouts == len(raw)
            chosen = np.concatenate([advantages[span] for span in spans[name]])
            assert records[name].advantage == pytest.approx(chosen.mean())


def test_clusters_that_were_not_met_and_rewards_that_are_missing() -> None:
    normalizer = ClusterNormalizer("pgrpo", nan_policy="zero")
    normalizer.update([1.0, 3.0], [5, 5])
    rewards = np.array([1.0, np.nan, 2.0, np.nan, np.nan])
    advantages = normalizer(rewards, [0] * 5)
    histories = normalizer.snapshot()
    found = outcomes([(0, 3), (0, 2)], rewards, advantages)
    records, spread = cluster_records(found, histories, histories, eps=EPS, ddof=0)
    assert spread == FairnessRecord(worst=1.5, gap=0.0, gini=0.0)
    assert records["5"].reward is None
    assert records["5"].scale_ratio is None
    assert (records["5"].num_rollouts, records["5"].count) == (0, 2)
    assert (records["5"].mean, records["5"].std) == (2.0, 1.0)
    assert (records["0"].num_rollouts, records["0"].reward) == (2, 1.5)
    # The group without rewards has no part in the terms.
    assert records["0"].scale_ratio == pytest.approx(1.0)
    assert records["0"].bias == pytest.approx(0.0)


def test_terms_of_the_history_before_the_step() -> None:
    normalizer = ClusterNormalizer("pgrpo", order="normalize_then_update")
    normalizer.update([1.0, 3.0], ["old", "old"])
    before = normalizer.snapshot()
    rewards = np.array([4.0, 8.0, 1.0, 2.0])
    advantages = normalizer(rewards, ["old", "old", "new", "new"])
    after = normalizer.snapshot()
    found = outcomes([("old", 2), ("new", 2)], rewards, advantages)
    records, _ = cluster_records(found, after, before, eps=EPS, ddof=0)
    assert records["old"].count == 4
    assert records["old"].scale_ratio == pytest.approx((2 + EPS) / (1 + EPS))
    assert records["old"].bias == pytest.approx(4 / (1 + EPS))
    # A cluster without a history had nothing to be compared with.
    assert (records["new"].scale_ratio, records["new"].bias) == (None, None)
    assert (records["new"].reward, records["new"].advantage) == (1.5, 0.0)


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
    rewards = np.array([1, 1, 0, 1, 3, np.nan, 2, np.nan, np.nan], dtype=float)
    groups = outcomes([(0, 2), (0, 2), (1, 1), (1, 2), (1, 2)], rewards, rewards)
    # Equal, different, a group of one, one reward left, none left.
    assert equal_groups(groups) == pytest.approx(4 / 5)


MANY = 10_000


def test_of_many_clusters_the_extremes_and_the_changed_are_listed() -> None:
    """A record of 10,000 clusters names 64, says how many there are, and costs no more than a pass."""
    rng = np.random.default_rng(0)
    histories: dict[int | str, ClusterStats] = {
        c: ClusterStats(float(n), float(mean), 1.0)
        for c, (n, mean) in enumerate(
            zip(rng.permutation(MANY) + 2, rng.normal(size=MANY), strict=True)
        )
    }
    changed = rng.permutation(MANY)[:200].tolist()
    rewards = np.array([reward for c in changed for reward in (0.0, c)])
    groups = outcomes([(c, 2) for c in changed], rewards, np.zeros(400))
    records, spread = cluster_records(groups, histories, histories, eps=EPS, ddof=0)
    assert len(records) == MAX_CLUSTERS
    by_size = sorted(histories, key=lambda c: histories[c].count)
    worst = sorted(histories, key=lambda c: histories[c].mean)[:EXTREMES]
    extreme = {*by_size[:EXTREMES], *by_size[-EXTREMES:], *worst}
    assert extreme <= {int(c) for c in records}
    others = [c for c in sorted(changed) if c not in extreme][: MAX_CLUSTERS - len(extreme)]
    assert {int(c) for c in records} == extreme | set(others)
    # The spread is that of all clusters of the step, listed or not.
    assert spread == fairness([c / 2 for c in sorted(changed)])
    few = dict(list(histories.items())[:MAX_CLUSTERS])
    assert len(cluster_records([], few, few, eps=EPS, ddof=0)[0]) == MAX_CLUSTERS


def test_extremes() -> None:
    sizes = {c: float(i) for i, c in enumerate("abcdefgh")}
    values = {c: -size for c, size in sizes.items()} | {"d": -99.0}
    assert extremes(sizes, values, 3) == list("abcdefgh")
    assert extremes(sizes, values, 2) == list("abdgh")
    assert extremes(sizes, {"e": 1.0}, 1) == list("aeh")


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_fairness(values: list[float]) -> None:
    found = fairness(values)
    assert found.worst == min(values)
    assert found.gap == max(values) - min(values)
    if max(values) == 0:
        assert found.gini is None
        return
    # The area between the Lorenz curve and the diagonal, twice.
    shares = np.cumsum([0, *sorted(values)]) / sum(values)
    lorenz = 1 - sum((shares[1:] + shares[:-1]) / len(values))
    assert found.gini == pytest.approx(lorenz, abs=1e-9)
    pairs = sum(abs(a - b) for a, b in combinations(values, 2))
    assert found.gini == pytest.approx(pairs / (len(values) * sum(values)), abs=1e-9)


def test_fairness_where_gini_means_nothing() -> None:
    assert fairness([]) == FairnessRecord()
    assert fairness([-1.0, 2.0]) == FairnessRecord(worst=-1.0, gap=3.0, gini=None)
    assert fairness([0.3]).gini == 0.0


def test_gini_of_many_clusters_is_that_of_their_pairs() -> None:
    values = np.random.default_rng(1).random(2 * PAIRS)
    pairs = np.abs(values[:, None] - values[None, :]).mean() / (2 * values.mean())
    assert fairness(values.tolist()).gini == pytest.approx(pairs, rel=1e-12)


def test_the_machine() -> None:
    assert processor_name()
    before = peak_memory_bytes()
    block = np.ones(30_000_000)
    after = peak_memory_bytes()
    assert before is not None
    assert after is not None
    assert after >= before > 100_000_000
    assert after >= block.nbytes


def steps(folder: Path, *parts: tuple[int, dict[str, float]]) -> Log[StepRecord]:
    """A log of so many steps with these values, then so many with others, ..."""
    log = Log(folder / "metrics.jsonl", StepRecord)
    step = 0
    for count, values in parts:
        for _ in range(count):
            step += 1
            log.append(StepRecord.model_validate({"step": step, **values}))
    return log


HEALTHY = {"entropy": 1.2, "equal_groups": 0.3, "truncated": 0.1}


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ({}, []),
        ({"entropy": 0.13}, []),
        ({"entropy": 0.11}, ["entropy fell from 1.20 to 0.110 nats"]),
        ({"equal_groups": 0.85}, ["85% of the groups"]),
        ({"truncated": 0.99}, ["ended 99% of the completions of the last steps, and 10%"]),
        ({"truncated": 0.99, "equal_groups": 0.9, "entropy": 0.0}, ["entropy", "90%", "99%"]),
    ],
)
def test_collapse_is_warned_of(tmp_path: Path, end: dict[str, float], said: list[str]) -> None:
    found = collapse(steps(tmp_path, (30, HEALTHY), (10, {**HEALTHY, **end})))
    assert len(found) == len(said)
    for warning, words in zip(found, said, strict=True):
        assert words in warning


def test_what_was_so_from_the_beginning_is_no_collapse(tmp_path: Path) -> None:
    always = {"entropy": 0.0, "equal_groups": 1.0, "truncated": 1.0}
    assert collapse(steps(tmp_path, (40, always))) == []


def test_a_short_run_tells_nothing_of_collapse(tmp_path: Path) -> None:
    assert collapse(steps(tmp_path, (9, HEALTHY), (10, {**HEALTHY, "entropy": 0.0}))) == []
    assert collapse(Log(tmp_path / "none.jsonl", StepRecord)) == []


@given(st.lists(st.sampled_from("abc")))
def test_one_of_each_takes_kinds_in_turn(kinds: list[str]) -> None:
    entries = list(enumerate(kinds))
    found = one_of_each(entries, lambda entry: entry[1])
    assert sorted(found) == entries
    rounds = [sum(other == kind for other in kinds[:place]) for place, kind in found]
    assert rounds == sorted(rounds)
    for number in set(rounds):
        places = [place for (place, _), turn in zip(found, rounds, strict=True) if turn == number]
        assert places == sorted(places)
