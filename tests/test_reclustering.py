"""Users who are divided again while a run goes on: names, histories, records, and going on from anywhere."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tree, install_plugin, start, tiny_run, trace, train, write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly import graph_objects

from pgrpo.cli import main
from pgrpo.clusters.assignment import Shares
from pgrpo.clusters.division import Division, divide, divide_again
from pgrpo.errors import CheckpointError, ConfigError
from pgrpo.normalizer import ClusterNormalizer
from pgrpo.report import figures
from pgrpo.rollout.collector import Collector
from pgrpo.rollout.entries import Entries
from pgrpo.rollout.people import PRIOR_COUNT, People
from pgrpo.runs.config import parse_config
from pgrpo.runs.folder import RunFolder
from pgrpo.train.checkpoint import latest_checkpoint
from pgrpo.types import ClusterId, Dataset, Example, Group, Prompt, Rollout

# Names.


class Told:
    """A clusterer that says what it was told."""

    def __init__(self, memberships: Mapping[str, Shares]) -> None:
        self.told = memberships

    def fit(self, users: Any, features: Any, examples: Any) -> None:
        pass

    def assign(self, users: Sequence[str], features: Any) -> list[ClusterId]:
        return [max(self.told[user], key=lambda key: self.told[user][key]) for user in users]

    def memberships(self, users: Sequence[str], features: Any) -> list[Shares]:
        return [self.told[user] for user in users]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def of_one(clusters: Sequence[ClusterId]) -> dict[str, Shares]:
    return {f"u{n}": {cluster: 1.0} for n, cluster in enumerate(clusters)}


def again(
    before: Sequence[ClusterId], *after: Sequence[ClusterId]
) -> tuple[Division, list[ClusterId]]:
    """The last of several divisions, and the clusters it gives to the users."""
    users = {f"u{n}": np.array([float(n)]) for n in range(len(before))}
    dataset = Dataset([], [], users, ("number",))
    division = divide(Told(of_one(before)), dataset)
    for step, labels in enumerate(after, 1):
        division = divide_again(division, Told(of_one(labels)), dataset, step)
    return division, list(division.cluster_of.values())


def test_a_cluster_keeps_its_name_whatever_it_is_called_anew() -> None:
    division, found = again("aaabbbcc", "xxxzzzyy")
    assert found == list("aaabbbcc")
    assert division.flows == [
        {"step": 1, "num_moved": 0, "users": {"a": {"a": 3}, "b": {"b": 3}, "c": {"c": 2}}}
    ]
    assert list(division.about) == ["a", "b", "c"]
    assert division.about["c"]["num_users"] == 2
    assert (division.version, division.step) == (1, 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_as_many_as_possible_keep_the_name_of_their_cluster(pairs: list[tuple[int, int]]) -> None:
    before, after = zip(*pairs, strict=True)
    division, found = again(before, after)
    kept = sum(old == new for old, new in zip(before, found, strict=True))
    old_names, labels = sorted(set(before)), sorted(set(after))
    # Every way to give each label an old name, or none.
    ways = permutations([*old_names, *[None] * len(labels)], len(labels))
    most = max(
        sum(dict(zip(labels, way, strict=True))[new] == old for old, new in pairs) for way in ways
    )
    assert kept == most
    assert division.flows[0]["num_moved"] == len(pairs) - kept
    assert len({*zip(after, found, strict=True)}) == len(labels), "labels are renamed, no more"


def test_a_cluster_that_shares_nobody_gets_a_name_that_none_has_had() -> None:
    # Cluster 1 dissolves, and its name is not given to what comes up later.
    assert again([0, 0, 1], [0, 0, 0], [0, 1, 0])[1] == [0, 2, 0]
    assert again([0, 0, 0], [7, 7, 9])[1] == [0, 0, 9], "its own where that is free"
    assert again(["a", "a", "a"], ["b", "b", "a"])[1] == ["a", "a", "a 2"]


def test_soft_membership_counts_people_by_their_weights() -> None:
    users = {f"u{n}": np.empty(0) for n in range(2)}
    dataset = Dataset([], [], users, ())
    # By whom they belong to most nobody stays; by their weights most do.
    before = divide(
        Told({"u0": {"a": 0.6, "b": 0.4}, "u1": {"a": 0.6, "b": 0.4}}), dataset, soft=True
    )
    told: dict[str, Shares] = {"u0": {"x": 0.9, "y": 0.1}, "u1": {"y": 0.8, "x": 0.2}}
    after = divide_again(before, Told(told), dataset, 4, soft=True)
    assert after.shares is not None
    assert after.shares["u0"] == {"a": pytest.approx(0.9), "b": pytest.approx(0.1)}
    assert after.cluster_of == {"u0": "a", "u1": "b"}


def test_a_division_survives_json() -> None:
    users = {f"u{n}": np.array([float(n)]) for n in range(2)}
    dataset = Dataset([], [], users, ("number",))
    told: dict[str, Shares] = {"u0": {0: 0.75, "0b": 0.25}, "u1": {"0b": 1.0}}
    division = divide_again(
        divide(Told(told), dataset, soft=True), Told(told), dataset, 3, soft=True
    )
    saved = json.loads(json.dumps(division.to_json()))
    assert Division.from_json({}, saved) == division


# Histories.

NUM_USERS = 6


def groups_of(
    random: np.random.Generator, num_groups: int, rewards: Sequence[str] = ("r",)
) -> list[Group]:
    groups: list[Group] = []
    for number in range(num_groups):
        user = int(random.integers(NUM_USERS))
        choices = ((4,), (5, 6), (7,)) if user % 2 else None
        prompt = Prompt(Example("", f"u{user}"), 0, (1,), choices)
        size = int(random.integers(1, 5))
        answers = [(choices or ((8,), (8, 9)))[random.integers(2)] for _ in range(size)]
        rollouts = [Rollout(prompt, number, ids, "", (-0.5,) * len(ids), False) for ids in answers]
        scores = {name: random.normal(3 * user, 1 + user, size) for name in rewards}
        if size > 2:
            scores[rewards[0]][0] = np.nan
        groups.append(
            Group(tuple(rollouts), np.sum([*scores.values()], axis=0), np.zeros(size), scores)
        )
    return groups


def people(source: Any = "rewards", rewards: Sequence[str] = ("r",), **options: Any) -> People:
    users = {f"u{n}": np.array([float(n)]) for n in range(NUM_USERS)}
    return People(Dataset([], [], users, ("number",)), source, rewards, options, sums=True)


def random_shares(random: np.random.Generator, soft: bool) -> dict[str, Shares]:
    names: list[ClusterId] = [0, "b", 2]
    shares: dict[str, Shares] = {}
    for user in range(NUM_USERS):
        weights = random.dirichlet([1, 1, 1]) if soft else random.multinomial(1, [1 / 3] * 3)
        shares[f"u{user}"] = {n: float(w) for n, w in zip(names, weights, strict=True) if w > 0}
    return shares


SEVERAL = {
    "reward_weights": [1.0, 2.0],
    "reward_names": ["r", "s"],
    "combine": "normalize_then_sum",
}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32), st.booleans(), st.sampled_from(["pgrpo", "two_way", "shrinkage", "grpo"])
)
@pytest.mark.parametrize("options", [{}, SEVERAL, {"prior_count": 4.0}])
def test_histories_go_with_their_people(options: Tree, seed: int, soft: bool, name: str) -> None:
    """To what they would be if everybody had been in the new clusters from the beginning."""
    random = np.random.default_rng(seed)
    names = ("r", "s") if options is SEVERAL else ("r",)
    known = people(rewards=names, **(options if options is SEVERAL else {}))
    chosen: Tree = {**options, "nan_policy": "zero", "track_diagnostics": True}
    went, stayed = (ClusterNormalizer(name, **chosen) for _ in range(2))
    sums = ClusterNormalizer("pgrpo", nan_policy="zero")
    before, after = random_shares(random, soft), random_shares(random, soft)
    for _ in range(4):
        groups = groups_of(random, 7, names)
        shaped = np.concatenate([group.shaped for group in groups])
        rewards = shaped
        if options is SEVERAL:
            rewards = np.concatenate([np.stack([*g.scores.values()], 1) for g in groups])
        Entries.of(groups, rewards, before).advantages(went, {})
        Entries.of(groups, rewards, after).advantages(stayed, {})
        Entries.of(groups, shaped, after).fold(sums, {})
        known.fold(groups, rewards)
    known.regroup(went, after, of="advantages")
    replaced = ClusterNormalizer("pgrpo", nan_policy="zero")
    known.regroup(replaced, after, of="sums")
    pairs = [(replaced, sums), *zip(went.rewards.values(), stayed.rewards.values(), strict=True)]
    for found, expected in pairs if options is SEVERAL else [(replaced, sums), (went, stayed)]:
        mine, theirs = columns(found), columns(expected)
        assert mine.keys() == theirs.keys()
        for cluster, sums_of in theirs.items():
            for key, value in sums_of.items():
                exact = not soft and key in ("count", "num_parts", "squared_sizes")
                tolerance = 0.0 if exact else 1e-12
                assert mine[cluster][key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
    # And what is computed by them is the same.
    groups = groups_of(random, 5, names)
    rewards = np.concatenate([group.shaped for group in groups])
    if options is SEVERAL:
        rewards = np.concatenate([np.stack([*g.scores.values()], 1) for g in groups])
    one, other = (Entries.of(groups, rewards, after).advantages(n, {}) for n in (went, stayed))
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def columns(normalizer: ClusterNormalizer) -> dict[ClusterId, dict[str, float]]:
    """What is kept of each cluster, the sums of advantages aside, which begin anew."""
    state = normalizer.state_dict()
    mean = np.add(state["origin"], state["offset"]).tolist()
    kept = ["count", "m2", "num_parts", "squared_sizes", "within_squares"]
    table = {"mean": mean, **{key: state[key] for key in kept}}
    return {
        cluster: {key: values[place] for key, values in table.items()}
        for place, cluster in enumerate(state["clusters"])
    }


def test_equal_rewards_keep_a_spread_of_exactly_0() -> None:
    known, normalizer = people(), ClusterNormalizer("pgrpo")
    for _ in range(3):
        groups = [
            Group(g.rollouts, r := np.full(len(g.rollouts), 0.1), r, {"r": r})
            for g in groups_of(np.random.default_rng(0), 6)
        ]
        known.fold(groups, np.concatenate([group.rewards for group in groups]))
    known.regroup(normalizer, {f"u{n}": {0: 1.0} for n in range(NUM_USERS)}, of="sums")
    assert normalizer.snapshot()[0].std == 0.0
    assert normalizer.snapshot()[0].mean == 0.1


def rewards_by_user(groups: list[Group]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for group in groups:
        number = int(group.prompt.example.user[1:])
        found.setdefault(number, []).extend(r for r in group.rewards.tolist() if r == r)
    return found


def test_features_of_rewards() -> None:
    known = people()
    groups = groups_of(np.random.default_rng(2), 9)
    known.fold(groups, np.concatenate([group.rewards for group in groups]))
    found = known.dataset()
    assert found.feature_names == ("number", "mean r", "spread of r")
    own = rewards_by_user(groups)
    everybody = np.concatenate([*own.values()])
    assert 0 < len(own) < NUM_USERS
    for number in range(NUM_USERS):
        mine = own.get(number, [])
        # Every reward of all users counts for as much as makes them PRIOR_COUNT together.
        weights = np.array([1.0] * len(mine) + [PRIOR_COUNT / len(everybody)] * len(everybody))
        values = np.array([*mine, *everybody])
        mean = np.average(values, weights=weights)
        std = np.sqrt(np.average((values - mean) ** 2, weights=weights))
        np.testing.assert_allclose(found.users[f"u{number}"], [number, mean, std], rtol=1e-12)


def test_features_of_behaviour() -> None:
    known = people("behaviour")
    groups = groups_of(np.random.default_rng(2), 40)
    known.fold(groups, np.concatenate([group.rewards for group in groups]))
    found = known.dataset()
    assert found.feature_names == (
        "number", "mean reward", "mean completion tokens", "mean reward of choice 1",
        "mean reward of choice 2",
    )  # fmt: skip
    rows = [
        (int(g.prompt.example.user[1:]), ids.completion_ids, reward)
        for g in groups
        for ids, reward in zip(g.rollouts, g.rewards.tolist(), strict=True)
    ]

    def shrunk(values: list[tuple[int, float]], user: int) -> float:
        pool = np.mean([value for _, value in values])
        mine = [value for who, value in values if who == user]
        return (sum(mine) + PRIOR_COUNT * pool) / (len(mine) + PRIOR_COUNT)

    known_rewards = [(u, r) for u, _, r in rows if r == r]
    lengths = [(u, float(len(ids))) for u, ids, _ in rows]
    taken = [
        [(u, r) for u, ids, r in rows if r == r and u % 2 and ids == choice]
        for choice in ((4,), (5, 6))
    ]
    for user in range(NUM_USERS):
        expected = [shrunk(values, user) for values in (known_rewards, lengths, *taken)]
        np.testing.assert_allclose(found.users[f"u{user}"][1:], expected, rtol=1e-12)


def test_people_keep_what_is_known_of_them_in_whatever_order_they_come() -> None:
    """A run may go on with a data set that has its users in another order."""
    random = np.random.default_rng(3)
    known, groups = people(), groups_of(random, 30)
    known.fold(groups, np.concatenate([group.shaped for group in groups]))
    saved = json.loads(json.dumps(known.state_dict()))

    def restored(numbers: Sequence[int]) -> People:
        users = {f"u{n}": np.array([float(n)]) for n in numbers}
        found = People(Dataset([], [], users, ("number",)), "rewards", ("r",), {}, sums=True)
        found.load_state_dict(saved)
        return found

    turned, shares = restored(range(NUM_USERS)[::-1]), random_shares(random, soft=False)
    features = turned.dataset().users
    for user, expected in known.dataset().users.items():
        np.testing.assert_allclose(features[user], expected, rtol=1e-12)
    one, other = ClusterNormalizer("pgrpo"), ClusterNormalizer("pgrpo")
    known.regroup(one, shares, of="sums")
    turned.regroup(other, shares, of="sums")
    assert one.snapshot() == other.snapshot()
    with pytest.raises(CheckpointError, match="rewards of user 'u5', whom the data set has not"):
        restored(range(NUM_USERS - 1))


# Runs.

RESTLESS = """
import numpy as np
from pgrpo.plugins import hookimpl

class Restless:
    '''Halves by the last feature, which is of the data set at first and of rewards later on.'''
    def fit(self, users, features, examples):
        self.median, self.num = float(np.median(features[:, -1])), features.shape[1]
    def assign(self, users, features):
        return [int(row[-1] > self.median) + 2 * (self.num % 2) for row in features]
    def memberships(self, users, features):
        return [{cluster: 0.75, 4 + 2 * (self.num % 2): 0.25} for cluster in self.assign(users, features)]
    def state_dict(self): return {"median": self.median, "num": self.num}
    def load_state_dict(self, state): self.median, self.num = state["median"], state["num"]

@hookimpl
def pgrpo_register_clusterers(register):
    register("restless", Restless)
"""


def dividing(changes: Mapping[str, Any] | None = None, **clustering: Any) -> Tree:
    """Six steps, divided again after the second and the fourth."""
    section = {"name": "restless", "recluster_every": 2, **clustering}
    steps = {"run.num_steps": 6, "run.samples_per_step": 8, "run.eval_every": 1}
    return {**steps, "clustering": section, **(changes or {})}


@pytest.fixture(scope="module", autouse=True)
def restless(tmp_path_factory: pytest.TempPathFactory) -> Any:
    site = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        install_plugin(site, RESTLESS)
        yield


VARIANTS: dict[str, Tree] = {
    "rewards": dividing(),
    "behaviour": dividing(recluster_from="behaviour"),
    "soft": dividing(soft=True),
    "one history": dividing({"estimator": {"name": "pgrpo", "history": "one"}}),
    "shuffled": dividing({"estimator": {"name": "shrinkage", "history": "shuffled"}}),
    "kmeans": dividing(name="kmeans", num_clusters=3),
    "a history of each reward": dividing(
        {
            "rewards": [{"name": "persona", "weight": 2.0}, {"name": "persona_utility"}],
            "estimator": {"name": "pgrpo", "combine": "normalize_then_sum"},
        }
    ),
    "groups without signal": dividing({"run.resample": 1, "estimator": {"name": "grpo"}}),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Unbroken runs, by variant, made once."""
    made: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in made:
            made[variant] = train(tmp_path_factory.mktemp("whole"), VARIANTS[variant])
        return made[variant]

    return run


def records(run: Path, name: str) -> list[Tree]:
    return [json.loads(line) for line in (run / name).read_text("utf-8").splitlines()]


@pytest.mark.parametrize("variant", ["rewards", "behaviour", "kmeans"])
def test_histories_are_those_of_the_clusters_as_they_are(whole: Any, variant: str) -> None:
    """From the raw rewards of all steps, by whom their users belong to in the end."""
    run = whole(variant)
    state = trace(run)["state"]
    cluster_of = state["assignment"]["cluster_of"]
    rewards: dict[str, list[float]] = {}
    samples = records(run, "samples.jsonl")
    assert len(samples) == 48
    for sample in samples:
        rewards.setdefault(str(cluster_of[sample["user"]]), []).append(sample["reward"])
    found = records(run, "metrics.jsonl")[-1]["clusters"]
    assert found.keys() == rewards.keys()
    for cluster, values in rewards.items():
        assert found[cluster]["count"] == len(values)
        assert found[cluster]["mean"] == pytest.approx(np.mean(values), rel=1e-12)
        assert found[cluster]["std"] == pytest.approx(np.std(values), rel=1e-12)
    # Somebody moved between the steps whose rewards are in them.
    clusters = {s["user"]: set[Any]() for s in samples}
    for sample in samples:
        clusters[sample["user"]].add(sample["cluster_id"])
    assert any(len(met) > 1 for met in clusters.values())


def test_every_record_says_of_which_division_it_is(whole: Any) -> None:
    run = whole("rewards")
    versions = [record["assignment_version"] for record in records(run, "metrics.jsonl")]
    assert versions == [0, 0, 1, 1, 2, 2]
    for sample in records(run, "samples.jsonl"):
        assert sample["assignment_version"] == (sample["step"] - 1) // 2
    evaluated = records(run, "evaluations.jsonl")
    assert [record["assignment_version"] for record in evaluated] == [0, 0, 0, 1, 1, 2, 2]
    for sample in records(run, "held_out.jsonl"):
        assert sample["assignment_version"] == max(sample["step"] - 1, 0) // 2
    state = trace(run)["state"]
    assert state["assignment_version"] == 2
    flows = RunFolder(run).info().flows
    assert {version: flow.step for version, flow in flows.items()} == {"1": 2, "2": 4}
    num_users = len(state["assignment"]["cluster_of"])
    for flow in flows.values():
        ways = [(old, new, n) for old, row in flow.users.items() for new, n in row.items()]
        assert sum(n for *_, n in ways) == num_users
        assert flow.num_moved == sum(n for old, new, n in ways if old != new)
    assert any(flow.num_moved for flow in flows.values())
    clusters = RunFolder(run).info().clusters
    counts = [*state["assignment"]["cluster_of"].values()]
    assert {name: info.num_users for name, info in clusters.items()} == {
        str(cluster): counts.count(cluster) for cluster in set(counts)
    }


def test_samples_and_evaluations_are_of_the_clusters_of_their_time(whole: Any) -> None:
    run = whole("rewards")
    users: dict[int, dict[str, Any]] = {0: {}, 1: {}, 2: {}}
    for sample in (*records(run, "samples.jsonl"), *records(run, "held_out.jsonl")):
        known = users[sample["assignment_version"]]
        assert known.setdefault(sample["user"], sample["cluster_id"]) == sample["cluster_id"]
    final = trace(run)["state"]["assignment"]["cluster_of"]
    assert all(final[user] == cluster for user, cluster in users[2].items())


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("taken", [1, 2, 3, 4, 5])
def test_a_run_goes_on_from_every_step(
    whole: Any, tmp_path: Path, variant: str, taken: int
) -> None:
    changes = {**VARIANTS[variant], "run.num_steps": taken}
    run = train(tmp_path, changes)
    assert main(["train", "--resume", str(run), "--set", "run.num_steps=6"]) == 0
    found, expected = trace(run), trace(whole(variant))
    assert found["state"] == expected["state"]
    assert found["weights"] == expected["weights"]
    for log in ("metrics", "samples"):
        assert found[log] == expected[log]


@pytest.mark.parametrize("kill_at", [70, 90, 110, 130, 150])
def test_a_run_that_is_killed_goes_on(whole: Any, tmp_path: Path, kill_at: int) -> None:
    # A process of its own finds the plugin where this one has it.
    changes = VARIANTS["kmeans"]
    run = tmp_path / "run"
    process = start(
        "train", write_config(tmp_path, changes), "--out", run, kill_at=kill_at, folder=run
    )
    process.join(120)
    assert process.exitcode == -9, "the run ended before it was killed"
    assert main(["train", "--resume", str(run)]) == 0
    assert trace(run) == trace(whole("kmeans"))


@pytest.mark.parametrize("method", ["regroup", "_normalize"])
def test_an_interrupt_while_users_move_waits_until_they_have(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The checkpoint has the new clusters then, and in the other case a batch of theirs as well."""
    run = tmp_path / "run"
    original, seen = getattr(Collector, method), []

    def interrupted(self: Collector, *arguments: Any) -> Any:
        seen.append(None)
        if len(seen) == (1 if method == "regroup" else 3):
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(Collector, method, interrupted)
    changes = {**VARIANTS["rewards"], "run.checkpoint_every": 1000}
    assert main(["train", str(write_config(tmp_path, changes)), "--out", str(run)]) == 130
    found = latest_checkpoint(run / "checkpoints")
    assert found is not None and found.step == 2
    state = found.state()
    assert state["assignment_version"] == 1
    assert (state["batch"] is None) == (method == "regroup")
    assert main(["train", "--resume", str(run)]) == 0
    assert trace(run) == trace(whole("rewards"))


def test_one_history_for_all_stays_as_it_is(whole: Any, tmp_path: Path) -> None:
    never = dividing({"estimator": {"name": "pgrpo", "history": "one"}})
    never["clustering"] = {"name": "restless"}
    found, expected = trace(whole("one history")), trace(train(tmp_path, never))
    assert found["state"]["normalizer"] == expected["state"]["normalizer"]
    assert found["weights"] == expected["weights"]
    assert found["state"]["histories"] != expected["state"]["histories"]


def test_shuffled_clusters_have_the_sizes_of_the_new_ones(whole: Any) -> None:
    state = trace(whole("shuffled"))["state"]
    rewards: dict[str, int] = {}
    for sample in records(whole("shuffled"), "samples.jsonl"):
        rewards[sample["user"]] = rewards.get(sample["user"], 0) + 1
    counts = dict(zip(state["normalizer"]["clusters"], state["normalizer"]["count"], strict=True))
    assert set(counts) <= set(state["assignment"]["cluster_of"].values())
    assert sum(counts.values()) == sum(rewards.values()) == 48


def figures_of(page: str) -> list[Tree]:
    found = re.search(
        r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL
    )
    assert found is not None
    return [*json.loads(found[1]).values()]


def test_the_report_shows_who_went_where(whole: Any) -> None:
    run = whole("kmeans")
    page = (run / "report.html").read_text("utf-8")
    info = RunFolder(run).info()
    (figure,) = [f for f in figures_of(page) if f["data"][0]["type"] == "sankey"]
    graph_objects.Figure(figure)
    node, link = figure["data"][0]["node"], figure["data"][0]["link"]
    ends = zip(link["source"], link["target"], link["value"], strict=True)
    drawn = sorted((node["label"][a], node["label"][b], n) for a, b, n in ends)
    told = sorted(
        (old, new, n)
        for flow in info.flows.values()
        for old, row in flow.users.items()
        for new, n in row.items()
    )
    assert drawn == told
    assert len(node["label"]) == len(node["color"]) == len({*link["source"], *link["target"]})
    titles = [annotation["text"] for annotation in figure["layout"]["annotations"]]
    assert titles == ["before", "from step 3", "from step 5"]
    _, _, section = page.partition("<h2>People between clusters</h2>")
    table = section.partition("</table>")[0]
    num_users = sum(cluster.num_users for cluster in info.clusters.values())
    for flow in info.flows.values():
        assert f"{flow.num_moved} of {num_users}" in table
    # And where a cluster's curve is of other people.
    marked = [f for f in figures_of(page) if f["layout"].get("shapes")]
    assert [s["x0"] for s in marked[0]["layout"]["shapes"] if s["x0"] == s["x1"]] == [2.5, 4.5]


def test_clusters_that_are_not_drawn_are_one_in_the_flow() -> None:
    moves = [{"a": {"a": 2, "b": 1}, "b": {"c": 4, "d": 3}}, {"a": {"c": 2}, "d": {"d": 3}}]
    figure = figures.flows([3, 6], moves, {"a": "#000000", "<b>": "#ffffff"})
    node, link = figure["data"][0]["node"], figure["data"][0]["link"]
    assert node["label"] == ["a", "a", "others", "others", "others"]
    ends = zip(link["source"], link["target"], link["value"], strict=True)
    assert sorted(ends) == [(0, 1, 2), (0, 2, 1), (1, 4, 2), (2, 4, 3), (3, 2, 7)]
    assert (
        figures.flows([1], [{"<b>": {"<b>": 1}}], {"<b>": "#ffffff"})["data"][0]["node"]["label"]
        == ["&lt;b&gt;"] * 2
    )


def test_a_run_that_is_never_divided_again_has_no_use_for_a_source() -> None:
    with pytest.raises(ConfigError, match="recluster_from has no effect here"):
        parse_config(tiny_run({"clustering.recluster_from": "behaviour"}))


EVERY = "clustering.recluster_every is 2"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"estimator": {"name": "auto"}},
            f"{EVERY}, and estimator 'auto' keeps sums that cannot be told apart by users; expected 0",
        ),
        (
            {"estimator": {"name": "rae"}},
            f"{EVERY}, and estimator 'rae' keeps sums that cannot be told apart by users; expected 0",
        ),
        (
            {"estimator": {"name": "pgrpo", "forgetting": 0.9}},
            f"{EVERY}, and with estimator.forgetting = 0.9 what is left of a reward depends on whose "
            "came after it; expected 1",
        ),
        (
            {"clustering.name": "saved"},
            f"{EVERY}, and people of clustering.name = 'saved' stay in the clusters that were saved; "
            "expected 0",
        ),
        (
            {"estimator": {"name": "pgrpo", "history": "user", "prior_count": 4.0}},
            f"{EVERY}, and with estimator.history = 'user' people borrow from clusters that others "
            "have been in; expected estimator.prior_count = 0",
        ),
        (
            {
                "generation": {"engine": "vllm", "max_new_tokens": 3},
                "run.pipeline": "one_step_off",
            },
            f"{EVERY}, and with run.pipeline = 'one_step_off' the next step's rollouts are made by the "
            "clusters before; expected 'synchronous'",
        ),
        (
            {"rewards": [{"name": "persona", "clusters": [0]}, {"name": "persona"}]},
            f"{EVERY}, and reward 'persona' is for some clusters, whose people change; expected no "
            "clusters",
        ),
        (
            {"rewards": [{"name": "persona", "shift": {"after": 2, "scale": 2.0}}]},
            f"{EVERY}, and reward 'persona' shifts, so that people's rewards tell when they were asked; "
            "expected no shift",
        ),
    ],
)
def test_what_cannot_go_on_is_refused(changes: Tree, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny_run(dividing(changes)))
    assert str(caught.value) == f"config: {sentence}"
