"""Users of several clusters: their rewards enter each one's history, and all make the advantage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tree, install_plugin, tiny_run, trace, train
from hypothesis import given
from hypothesis import strategies as st
from reference import Reference

from pgrpo.clusters.assignment import NEGLIGIBLE, user_shares
from pgrpo.clusters.division import divide
from pgrpo.clusters.membership import Membership
from pgrpo.errors import ConfigError, PluginError
from pgrpo.normalizer import RULES, ClusterNormalizer
from pgrpo.rollout.entries import Entries
from pgrpo.runs.config import parse_config
from pgrpo.types import ClusterId, Dataset, Example, Group, Prompt, Rollout


class Told:
    """A clusterer that says what it was told."""

    def __init__(self, memberships: Mapping[str, Any], assigned: Any = None) -> None:
        self.told, self.assigned = memberships, assigned

    def fit(self, users: Any, features: Any, examples: Any) -> None:
        pass

    def assign(self, users: Sequence[str], features: Any) -> list[ClusterId]:
        if self.assigned is not None:
            return [self.assigned] * len(users)
        return [max(self.told[user], key=self.told[user].get) for user in users]

    def memberships(self, users: Sequence[str], features: Any) -> list[Mapping[ClusterId, float]]:
        return [self.told[user] for user in users if user in self.told]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def people(*users: str) -> Dataset:
    return Dataset([], [], {user: np.empty(0) for user in users}, ())


def shares(weights: Mapping[Any, Any]) -> Mapping[ClusterId, float]:
    cluster = max(weights, key=weights.__getitem__)
    return user_shares(Told({"u": weights}), people("u"), {"u": cluster})["u"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50).filter(lambda weights: sum(weights) > 0))
def test_what_is_left_out_of_weights_is_negligible(drawn: list[float]) -> None:
    weights: dict[ClusterId, float] = {
        cluster: weight / sum(drawn) for cluster, weight in enumerate(drawn)
    }
    kept = shares(weights)
    left_out = [weight for cluster, weight in weights.items() if cluster not in kept]
    assert sum(left_out) <= NEGLIGIBLE * (1 + 1e-12)
    assert math.fsum(kept.values()) == pytest.approx(1, abs=1e-12)
    if left_out:
        least = min(weights[cluster] for cluster in kept)
        assert max(left_out) <= least and sum(left_out) + least > NEGLIGIBLE, "as many as may be"
    for one in kept:
        for other in kept:
            assert kept[one] * weights[other] == pytest.approx(kept[other] * weights[one])


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 0.0}, {"b": 0.004, "a": 0.996}])
def test_a_user_of_one_cluster_has_the_weight_1(weights: Mapping[Any, float]) -> None:
    assert shares(weights) == {"a": 1.0}


NONE = {"u": {}, "v": {0: 1.0}}


@pytest.mark.parametrize(
    ("memberships", "assigned", "sentence"),
    [
        ({"u": {0: 1.0}}, 0, "returned 1 memberships for 2 users"),
        (NONE, 0, r"memberships {} for user 'u'; expected weights of at least 0 with the sum 1"),
        ({**NONE, "u": {0: 1.5, 1: -0.5}}, 0, "-0.5} for user 'u'; expected weights of at least 0"),
        ({**NONE, "u": {0: 0.5, 1: 0.4}}, 0, "0.4} for user 'u'; expected weights of at least 0"),
        ({**NONE, "u": {0: math.nan}}, 0, "{0: nan} for user 'u'; expected weights of at least 0"),
        ({**NONE, "u": {0: 0.5, 1.5: 0.5}}, 0, "a cluster is an int or a string, not 1.5"),
        ({**NONE, "u": {0: 0.5, "0": 0.5}}, 0, "clusters that differ only in type, as 1 and '1'"),
        (
            {**NONE, "u": {0: 0.3, 1: 0.7}},
            0,
            "assigned user 'u' to cluster 0, whose weight is 0.3; expected one of the largest weight, "
            "0.7",
        ),
        ({**NONE, "u": {0: "much"}}, 0, "clusterer Told failed: ValueError"),
    ],
)
def test_memberships_that_are_none_are_refused(
    memberships: Mapping[str, Any], assigned: ClusterId, sentence: str
) -> None:
    with pytest.raises(PluginError) as caught:
        Membership(divide(Told(memberships, assigned), people("u", "v"), soft=True))
    assert sentence in str(caught.value)


def test_a_clusterer_without_memberships_is_refused(tmp_path: Path) -> None:
    from pgrpo.train.build import Assembly

    config = parse_config(tiny_run({"clustering.soft": True}))
    with Assembly(config) as parts, pytest.raises(ConfigError) as caught:
        _ = parts.members
    assert str(caught.value) == (
        "clustering.soft is true, and clusterer KMeans has no method memberships that says by how much "
        "a user belongs to each cluster; expected false"
    )


def test_arms_have_shares_of_their_own() -> None:
    told = {f"u{n}": {"a": 0.25, "b": 0.75} if n < 8 else {"c": 1.0} for n in range(12)}
    members = Membership(divide(Told(told), people(*told), soft=True))
    assert members.shares("cluster", 0) == told
    assert members.shares("one", 0) == {user: {0: 1.0} for user in told}
    shuffled = members.shares("shuffled", 0)
    assert shuffled != told
    assert sorted(map(str, shuffled.values())) == sorted(map(str, told.values()))
    keys = members.histories("shuffled", 0)
    assert {user: max(own, key=own.__getitem__) for user, own in shuffled.items()} == keys
    hard = Membership(divide(Told(told), people(*told)))
    assert hard.shares("shuffled", 0) == {user: {key: 1.0} for user, key in keys.items()}


USERS: dict[str, dict[ClusterId, float]] = {
    "anna": {0: 1.0},
    "ben": {0: 0.3, "b": 0.7},
    "cleo": {0: 0.5, "b": 0.25, 2: 0.25},
    "dora": {2: 0.9, "b": 0.1},
}


def step(random: np.random.Generator, sizes: tuple[int, ...] = (3, 4, 2, 3, 2)) -> list[Group]:
    groups: list[Group] = []
    for number, size in enumerate(sizes):
        user = str(random.choice([*USERS]))
        prompt = Prompt(Example("", user), 0, (1,))
        lengths = random.integers(1, 9, size)
        rollouts = [
            Rollout(prompt, number, (7,) * n, "", tuple(-random.random(n)), False) for n in lengths
        ]
        rewards = random.normal(random.normal(), 1.0, size)
        groups.append(Group(tuple(rollouts), rewards, np.full(size, np.nan)))
    return groups


def columns_of(groups: list[Group]) -> dict[str, np.ndarray]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    norms = [sum((1 - math.exp(x)) ** 2 for x in r.rollout_logprobs) for r in rollouts]
    return {"score_norms": np.array(norms)}


@pytest.mark.parametrize("order", ["update_then_normalize", "normalize_then_update"])
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.reads_histories])
def test_an_advantage_is_the_weighted_mean_of_what_its_clusters_make_of_it(
    name: str, order: str
) -> None:
    """The oracle is told a rollout once for each of its user's clusters, with the weight in it, and so a
    group once for each, which are not compared with each other."""
    random = np.random.default_rng(3)
    normalizer = ClusterNormalizer(name, order=order)
    oracle = Reference(name, order=order)
    for _ in range(6):
        groups = step(random)
        columns = columns_of(groups)
        rewards = np.concatenate([group.rewards for group in groups])
        found = Entries.of(groups, rewards, USERS).advantages(normalizer, columns)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        told = [
            (place, cluster, weight)
            for place, rollout in enumerate(rollouts)
            for cluster, weight in USERS[rollout.prompt.example.user].items()
        ]
        places, clusters, weights = map(list, zip(*told, strict=True))
        made = oracle(
            rewards[places],
            clusters,
            [(rollouts[place].group_id, cluster) for place, cluster, _ in told],
            weights=weights,
            score_norms=columns["score_norms"][places],
        )
        expected = np.zeros(len(rollouts))
        np.add.at(expected, places, np.array(weights) * made)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        for cluster, history in normalizer.snapshot().items():
            wanted = oracle.history(cluster)
            assert history.count == pytest.approx(float(wanted.count), rel=1e-12)
            assert history.mean == pytest.approx(float(wanted.mean), rel=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_users_of_one_cluster_each_are_as_without_soft_membership(name: str) -> None:
    random = np.random.default_rng(5)
    clusters = {user: max(own, key=own.__getitem__) for user, own in USERS.items()}
    hard, soft = (ClusterNormalizer(name, track_diagnostics=True) for _ in range(2))
    shares = {user: {cluster: 1.0} for user, cluster in clusters.items()}
    for _ in range(3):
        groups = step(random)
        rewards = np.concatenate([group.rewards for group in groups])
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        columns: Mapping[str, Any] = columns_of(groups) if RULES[name].reads_score_norms else {}
        if RULES[name].needs_lengths:
            columns = {"lengths": np.array([float(len(r.completion_ids)) for r in rollouts])}
        keys = [clusters[rollout.prompt.example.user] for rollout in rollouts]
        wanted = hard(rewards, keys, [rollout.group_id for rollout in rollouts], **columns)
        assert (Entries.of(groups, rewards, shares).advantages(soft, columns) == wanted).all()
    assert soft.state_dict() == hard.state_dict()


def test_a_rollout_without_reward_is_counted_once_and_enters_no_history() -> None:
    groups = step(np.random.default_rng(1), (4, 4))
    rewards = np.concatenate([group.rewards for group in groups])
    rewards[[1, 6]] = np.nan
    normalizer = ClusterNormalizer("pgrpo", nan_policy="zero")
    shares: dict[str, dict[ClusterId, float]] = {user: {0: 0.4, 1: 0.6} for user in USERS}
    found = Entries.of(groups, rewards, shares).advantages(normalizer, {})
    assert (found[[1, 6]] == 0).all() and (found[[0, 2, 3, 4, 5, 7]] != 0).all()
    assert normalizer.num_nonfinite == 2
    assert [s.count for s in normalizer.snapshot().values()] == pytest.approx([2.4, 3.6])


PLUGIN = """
from pgrpo.plugins import hookimpl

class Mixed:
    '''By two features; SOFT of a user belongs to a third cluster.'''
    def fit(self, users, features, examples): pass
    def assign(self, users, features): return [int(row[0] > row[1]) for row in features]
    def memberships(self, users, features):
        return [{int(row[0] > row[1]): 1 - SOFT, 2: SOFT} for row in features]
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

@hookimpl
def pgrpo_register_clusterers(register):
    register("mixed", Mixed)
"""
ALL: Tree = {"run.samples_per_step": 8, "clustering": {"name": "mixed"}}


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", PLUGIN.replace("SOFT", str(request.param)))


def soft(changes: Mapping[str, Any]) -> Tree:
    return {**ALL, **changes, "clustering": {"name": "mixed", "soft": True}}


def records(run: Path, name: str) -> list[Tree]:
    return [json.loads(line) for line in (run / name).read_text("utf-8").splitlines()]


@pytest.mark.parametrize("mixed", [0.25], indirect=True)
@pytest.mark.usefixtures("mixed")
def test_a_run_normalises_by_weighted_histories(tmp_path: Path) -> None:
    run = train(tmp_path, soft({}))
    seen: dict[ClusterId, list[tuple[float, float]]] = {0: [], 1: [], 2: []}
    samples = records(run, "samples.jsonl")
    for record in records(run, "metrics.jsonl"):
        now = [sample for sample in samples if sample["step"] == record["step"]]
        assert len(now) == 8
        for sample in now:
            assert sample["cluster_id"] in (0, 1), "the cluster it belongs to most"
            seen[sample["cluster_id"]].append((0.75, sample["reward"]))
            seen[2].append((0.25, sample["reward"]))
        history: dict[ClusterId, tuple[float, float]] = {}
        for cluster, entered in seen.items():
            if not entered:
                continue
            weights, rewards = np.array(entered).T
            mean = np.average(rewards, weights=weights)
            std = math.sqrt(np.average((rewards - mean) ** 2, weights=weights))
            history[cluster] = float(mean), std
            found = record["clusters"][str(cluster)]
            assert found["count"] == pytest.approx(weights.sum(), rel=1e-12)
            assert found["mean"] == pytest.approx(mean, rel=1e-12)
            assert found["std"] == pytest.approx(std, rel=1e-9)
        for sample in now:
            expected = 0.0
            for cluster, weight in ((sample["cluster_id"], 0.75), (2, 0.25)):
                mean, std = history[cluster]
                expected += weight * (sample["reward"] - mean) / (std + 1e-4)
            assert sample["advantage"] == pytest.approx(expected, rel=1e-9)
        assert record["clusters"]["2"]["num_rollouts"] == 0, "nobody belongs to it most"


@pytest.mark.parametrize("mixed", [0.25], indirect=True)
@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize(
    "changes",
    [
        {"estimator": {"name": "grpo"}, "run.resample": 1},
        {"estimator": {"name": "batch"}},
        {
            "estimator": {"name": "gdpo_multi", "combine": "normalize_then_sum"},
            "rewards": [{"name": "persona"}, {"name": "persona_utility"}],
        },
    ],
)
def test_rules_of_groups_make_the_same_of_rewards(tmp_path: Path, changes: Tree) -> None:
    found = trace(train(tmp_path / "soft", soft(changes)))
    hard = trace(train(tmp_path / "hard", {**ALL, **changes}))
    for key in ("samples", "weights"):
        assert found[key] == hard[key]
    rollouts = sum(record["num_rollouts"] for record in found["metrics"])
    counts = found["state"]["histories"]
    found_of = dict(zip(counts["clusters"], counts["count"], strict=True))
    assert found_of[2] == pytest.approx(rollouts / 4)
    assert sum(found_of.values()) == pytest.approx(rollouts)


@pytest.mark.parametrize("mixed", [0.0], indirect=True)
@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize(
    "changes",
    [
        *({"estimator": {"name": name}} for name in ("pgrpo", "shrinkage", "auto", "two_way")),
        {"estimator": {"name": "pgrpo", "history": "shuffled", "prior_count": 4.0}},
    ],
)
def test_a_run_whose_users_belong_to_one_cluster_each_is_the_hard_one(
    tmp_path: Path, changes: Tree
) -> None:
    found = trace(train(tmp_path / "soft", soft(changes)))
    hard = trace(train(tmp_path / "hard", {**ALL, **changes}))
    for key in ("metrics", "samples", "weights"):
        assert found[key] == hard[key]


@pytest.mark.parametrize("mixed", [0.25], indirect=True)
@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("history", ["one", "shuffled"])
def test_control_arms_read_other_histories_and_record_the_clusters(
    tmp_path: Path, history: str
) -> None:
    run = train(tmp_path, soft({"estimator": {"name": "pgrpo", "history": history}}))
    state = trace(run)["state"]
    counts = {
        name: dict(zip(state[name]["clusters"], state[name]["count"], strict=True))
        for name in ("normalizer", "histories")
    }
    # A quarter of each of the 32 rewards.
    assert counts["histories"][2] == pytest.approx(8.0)
    assert sum(counts["histories"].values()) == pytest.approx(32.0)
    if history == "one":
        assert counts["normalizer"] == {0: 32.0}
    else:
        assert counts["normalizer"][2] == pytest.approx(8.0)
        assert sum(counts["normalizer"].values()) == pytest.approx(32.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"estimator": {"name": "grpo", "frequency_weight": 0.5}},
            "estimator.frequency_weight reads shares of clusters, of which estimator 'grpo' is told "
            "nothing with clustering.soft = true; expected 0",
        ),
        (
            {"rewards": [{"name": "persona", "clusters": [0]}, {"name": "persona"}]},
            "reward 'persona' is for some clusters, and with clustering.soft = true a history would mix "
            "its rewards with those of others; expected no clusters",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(changes: Tree, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny_run(soft(changes)))
    assert str(caught.value) == f"config: {sentence}"
