"""Differences between arms by seeds and people: against simulations with a known truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pgrpo.report.statistics import (
    Difference,
    bootstrap_difference,
    mean_change,
    paired_difference,
)


def simulated(
    rng: np.random.Generator, seeds: int, prompts: list[int], sd: tuple[float, float, float]
) -> tuple[np.ndarray, list[str]]:
    """Changes [S, H] of mean 0: of a seed, of a person (`prompts[i]` prompts), and of each."""
    people = [f"p{i}" for i, size in enumerate(prompts) for _ in range(size)]
    by_person = np.repeat(rng.normal(0, sd[1], len(prompts)), prompts)
    each = rng.normal(0, sd[2], (seeds, len(people)))
    return rng.normal(0, sd[0], (seeds, 1)) + by_person + each, people


def test_the_bootstrap_agrees_with_every_draw_there_is() -> None:
    """Three seeds and three people: all 27 x 27 draws, one by one."""
    rng = np.random.default_rng(1)
    change, people = simulated(rng, 3, [1, 3, 2], (0.5, 1.0, 1.0))
    change[0, 2] = math.nan
    own = {name: [h for h, who in enumerate(people) if who == name] for name in set(people)}
    means: list[float] = []
    for seeds in itertools.product(range(3), repeat=3):
        for drawn in itertools.product(sorted(own), repeat=3):
            asked = [h for name in drawn for h in own[name]]
            means.append(float(np.mean([np.nanmean(change[s, asked]) for s in seeds])))
    found = bootstrap_difference(change, people, draws=50_000)
    assert found is not None
    assert found.mean == pytest.approx(np.nanmean(change, 1).mean()), "seeds count alike"
    low, high = np.nanquantile(means, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    again = bootstrap_difference(change, people, draws=50_000)
    assert again == found


@pytest.mark.parametrize(
    ("sd", "least"),
    [((0.02, 0.1, 0.5), 0.93), ((0.0, 0.3, 0.4), 0.93), ((0.05, 0.0, 0.1), 0.9)],
    ids=["seeds and people", "people alone", "seeds alone"],
)
def test_intervals_cover_the_truth(sd: tuple[float, float, float], least: float) -> None:
    """Five seeds and sixty people of one to five prompts. Where seeds alone differ the bootstrap
    by itself covers .84."""
    rng = np.random.default_rng(7)
    trials = 300
    covered = 0
    for _ in range(trials):
        change, people = simulated(rng, 5, rng.integers(1, 6, 60).tolist(), sd)
        found = paired_difference(change, people, draws=1000)
        assert found is not None
        covered += found.low <= 0 <= found.high
    assert covered / trials >= least


def test_prompts_of_one_person_are_not_taken_for_independent() -> None:
    """As many prompts of fewer people tell less."""
    rng = np.random.default_rng(3)
    change, people = simulated(rng, 5, [10] * 30, (0.0, 1.0, 0.1))
    together = bootstrap_difference(change, people)
    apart = bootstrap_difference(change, [str(h) for h in range(len(people))])
    assert together is not None
    assert apart is not None
    assert together.high - together.low > 2 * (apart.high - apart.low)
    expected = 2 * 1.96 / math.sqrt(30)
    assert together.high - together.low == pytest.approx(expected, rel=0.35)


def test_one_difference_is_no_more_certain_than_either_of_its_parts() -> None:
    rng = np.random.default_rng(4)
    change, people = simulated(rng, 5, [2] * 40, (0.3, 0.1, 0.2))
    found, drawn = paired_difference(change, people), bootstrap_difference(change, people)
    student = mean_change([0.0] * 5, change.mean(1).tolist())
    assert found is not None
    assert drawn is not None
    assert student is not None
    assert found.low == min(drawn.low, student.low) < max(drawn.low, student.low)
    assert found.high == max(drawn.high, student.high)
    assert found.mean == pytest.approx(student.mean)


@pytest.mark.parametrize(
    ("change", "people"),
    [
        (np.ones((1, 4)), list("abcd")),
        (np.ones((3, 4)), list("aaaa")),
        (np.full((3, 4), math.nan), list("abcd")),
    ],
    ids=["one seed", "one person", "nothing known"],
)
def test_what_supports_no_interval(change: np.ndarray, people: list[str]) -> None:
    assert bootstrap_difference(change, people) is None
    assert paired_difference(change, people) is None


def test_the_rule_of_verdicts() -> None:
    assert Difference(0.2, 0.1, 0.3).outcome == "better"
    assert Difference(-0.2, -0.3, -0.1).outcome == "worse"
    assert Difference(0.2, -0.1, 0.5).outcome == "level"
    assert Difference(0.2, 0.2, 0.2).outcome == "level", "an interval without width says nothing"
    assert Difference(0.0, -0.01, 0.01).reaches(0.02)
    assert Difference(0.1, -0.03, 0.2).outcome == "level"
    assert not Difference(0.1, -0.03, 0.2).reaches(0.02), "level is not reached"
