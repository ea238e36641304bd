"""Every estimator with every option against the exact oracle of reference.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import ESTIMATORS, ORDERS, Reference

from pgrpo import ClusterNormalizer
from pgrpo.normalizer import RULES

pytest_plugins = ["parallel"]

Batch = tuple[NDArray[np.float64], dict[str, Any]]

# From bandits to nearly equal rewards far from 0; all that a float can be is not meant here.
SCALES = {"unit": (0.0, 1.0), "shifted": (50.0, 3.0), "small": (0.0, 1e-3), "far": (1e6, 1.0)}


def random_batch(
    rng: np.random.Generator,
    scale: str,
    weighted: bool,
    num_clusters: int = 4,
    parents: bool = False,
) -> Batch:
    """Ragged groups, some of one, most of them of one cluster; some rewards are equal."""
    size = int(rng.integers(1, 40))
    center, spread = SCALES[scale]
    groups = rng.integers(0, max(size // 3, 1), size)
    clusters = groups % num_clusters
    strangers = rng.random(size) < 0.2
    clusters[strangers] = rng.integers(0, num_clusters, int(strangers.sum()))
    rewards = center + spread * (rng.normal(size=size) + rng.normal(size=size)[groups])
    if rng.random() < 0.3:
        rewards = center + spread * rng.integers(0, 2, size).astype(np.float64)
    columns: dict[str, Any] = {"clusters": clusters, "groups": groups}
    if weighted:
        columns["weights"] = rng.choice([0.0, 0.25, 1.0, 1.5, 3.0], size)
    if weighted or rng.random() < 0.3:
        columns["score_norms"] = rng.random(size) + 0.1
    columns["lengths"] = rng.integers(0, 6, size).astype(np.float64)
    if parents:
        # Called as clusters are, and other things.
        columns["parents"] = clusters % 2
    return rewards, columns


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddof": {"ddof": 1},
    "eps": {"eps": 0.5},
    "forgetting": {"forgetting": 0.9},
    "prior": {"prior_count": 8.0},
    "floor": {"sigma_floor": 1.5},
    "clip": {"clip": 0.7},
    "min_count": {"min_count": 6},
    "frequency": {"frequency_weight": 0.5},
    "all": {
        "ddof": 1,
        "forgetting": 0.8,
        "prior_count": 2.5,
        "sigma_floor": 0.01,
        "clip": 1.5,
        "min_count": 3.5,
        "frequency_weight": 0.5,
    },
}


@dataclass(frozen=True)
class Case:
    estimator: str
    order: str
    options: str
    weighted: bool
    parents: bool = False

    @property
    def scale(self) -> str:
        """Each case has one of the scales, each estimator and option all of them."""
        cases = [self.order == ORDERS[1], self.weighted, list(OPTIONS).index(self.options) % 2]
        return list(SCALES)[(cases[0] + 2 * cases[1] + cases[2]) % len(SCALES)]

    @property
    def arguments(self) -> dict[str, Any]:
        return {"order": self.order, **OPTIONS[self.options]}

    def run(self, normalizer: Any) -> list[NDArray[np.float64]]:
        """The advantages of calls, updates and normalizing, in turn."""
        rng = np.random.default_rng(list(ESTIMATORS).index(self.estimator))
        found: list[NDArray[np.float64]] = []
        for step in range(4):
            rewards, columns = random_batch(rng, self.scale, self.weighted, parents=self.parents)
            found.append(normalizer(rewards, **columns))
            rewards, columns = random_batch(rng, self.scale, self.weighted, parents=self.parents)
            if step == 1:
                normalizer.update(rewards, **columns)
            found.append(normalizer.normalize(rewards, **columns))
        return found


@cache
def exact(case: Case) -> tuple[Reference, list[NDArray[np.float64]]]:
    reference = Reference(case.estimator, **case.arguments)
    return reference, case.run(reference)


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators(estimator: str, order: str, options: str, weighted: bool) -> None:
    check(Case(estimator, order, options, weighted))


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("options", ["prior", "all"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("estimator", [name for name, r in RULES.items() if r.reads_histories])
def test_priors_of_parents(estimator: str, order: str, options: str, weighted: bool) -> None:
    check(Case(estimator, order, options, weighted, parents=True))


def check(case: Case) -> None:
    """That the core finds the advantages and the histories of the oracle."""
    reference, advantages = exact(case)
    normalizer = ClusterNormalizer(case.estimator, **case.arguments)
    center, spread = SCALES[case.scale]
    # Means are off by some roundings, of rewards or of their distance from the origin; a divisor of
    # eps alone makes that larger.
    rounding = 2e-16 * (spread + center * 1e-3) / case.arguments.get("eps", 1e-4)
    for found, expected in zip(case.run(normalizer), advantages, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=20 * rounding)
    snapshot, parents = normalizer.snapshot(), normalizer.parents()
    assert set(snapshot) == {c for c in reference.rewards if reference.history(c).count > 0}
    assert set(parents) == set(reference.of_parents)
    histories = [(stats, reference.history(c)) for c, stats in snapshot.items()]
    histories += [(stats, reference.history_of_parent(p)) for p, stats in parents.items()]
    for stats, history in histories:
        assert stats.count == pytest.approx(float(history.count), rel=1e-14)
        assert stats.mean == pytest.approx(float(history.mean), rel=1e-14, abs=1e-15)
        # A spread of nothing but rounding is as large as the rounding of a reward.
        sigma = history.sigma(case.arguments.get("ddof", 0))
        assert stats.std == pytest.approx(sigma, rel=1e-11, abs=center * 1e-15)


dyadic = st.integers(-64, 64).map(lambda eighths: eighths / 8)
entry = st.tuples(
    dyadic,
    st.sampled_from(["a", "b", 7]),
    st.integers(-1, 2),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.sampled_from([0.0, 1.0, 4.0]),
)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=50, deadline=None)
@given(
    batches=st.lists(st.lists(entry, max_size=8), max_size=3),
    order=st.sampled_from(ORDERS),
    ddof=st.sampled_from([0, 1]),
    forgetting=st.sampled_from([1.0, 0.5]),
    prior_count=st.sampled_from([0.0, 1.0, 4.0]),
    sigma_floor=st.sampled_from([0.0, 0.5]),
    min_count=st.sampled_from([0, 1, 2.5]),
    frequency_weight=st.sampled_from([0.0, 0.5, 1.0]),
    parent_of=st.none()
    | st.fixed_dictionaries(dict.fromkeys(["a", "b", 7], st.sampled_from(["a", 7, "7"]))),
)
def test_anything(
    estimator: str,
    batches: list[list[tuple[Any, ...]]],
    parent_of: dict[Any, Any] | None,
    **options: Any,
) -> None:
    """Whatever hypothesis thinks of, of rewards and weights whose sums are exact."""
    normalizer, reference = ClusterNormalizer(estimator, **options), Reference(estimator, **options)
    for batch in batches:
        rewards, clusters, groups, weights, norms, lengths = (
            map(list, zip(*batch, strict=True)) if batch else [[]] * 6
        )
        arguments: dict[str, Any] = {"weights": weights, "score_norms": norms, "lengths": lengths}
        if parent_of is not None and options["prior_count"] > 0:
            arguments["parents"] = [parent_of[cluster] for cluster in clusters]
        found = normalizer(rewards, clusters, groups, **arguments)
        expected = reference(rewards, clusters, groups, **arguments)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
