"""`pgrpo cluster`: its numbers against independent ones, its clusters in runs, its page as shown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tree, train, write_config
from plotly import graph_objects
from scipy import stats
from test_report import HOSTILE, parse

from pgrpo.cli import main
from pgrpo.clusters.analysis import Candidate, analyse, best
from pgrpo.clusters.division import divide
from pgrpo.clusters.kmeans import KMeans
from pgrpo.clusters.measures import (
    RewardInformation,
    agreement,
    half_samples,
    means,
    projection,
    reward_information,
    silhouettes,
)
from pgrpo.clusters.membership import Membership
from pgrpo.clusters.saved import Saved
from pgrpo.config.sections import ClusteringConfig
from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.plugins.registry import load_registry
from pgrpo.runs.config import parse_config
from pgrpo.runs.rewards import read_rewards
from pgrpo.types import Dataset, Example

Capture = pytest.CaptureFixture[str]


def people(clusters: Sequence[Any]) -> dict[str, Any]:
    return {f"u{place}": cluster for place, cluster in enumerate(clusters)}


# Numbers.


def test_eta_squared_is_that_of_an_analysis_of_variance():
    rng = np.random.default_rng(0)
    cluster_of = people(rng.integers(0, 4, 30).tolist())
    users = [f"u{n}" for n in rng.integers(0, 30, 200)]
    rewards = rng.normal(size=200) + [0.3 * cluster_of[user] for user in users]
    found = reward_information(cluster_of, users, rewards)
    assert found
    groups = [rewards[[cluster_of[user] == k for user in users]] for k in range(4)]
    expected: Any = stats.f_oneway(*groups)
    ratio = (found.eta2 / 3) / ((1 - found.eta2) / 196)
    assert ratio == pytest.approx(expected.statistic, rel=1e-9)
    assert (found.num_users, found.num_rewards) == (len(set(users)), 200)


def test_eta_squared_by_hand_and_its_null_by_all_deals():
    # Means 1 and 4 about 2: of squares 4, 1, 0, 9 the clusters' 3 * 1 + 1 * 9 ... by counts of rewards.
    cluster_of, users = people(["a", "a", "b"]), ["u0", "u1", "u1", "u2"]
    rewards = np.array([0.0, 1.0, 2.0, 5.0])
    found = reward_information(cluster_of, users, rewards)
    assert found
    between, total = 3 * (1 - 2) ** 2 + (5 - 2) ** 2, 4 + 1 + 0 + 9
    assert found.eta2 == pytest.approx(between / total)
    # The three deals: b to u0 (0 against 8 / 3), to u1 (1.5 against 2.5), to u2.
    deals = [
        (1 * 4 + 3 * (8 / 3 - 2) ** 2) / 14,
        (2 * 0.5**2 + 2 * 0.5**2) / 14,
        between / total,
    ]
    assert found.null_mean == pytest.approx(np.mean(deals), abs=0.02)
    assert found.null_95 == pytest.approx(max(deals))
    assert found.p == pytest.approx(1 / 3, abs=0.04)
    assert found.adjusted == pytest.approx(
        (found.eta2 - found.null_mean) / (1 - found.null_mean), rel=1e-12
    )


def test_the_null_of_many_deals_is_that_of_all_permutations():
    cluster_of, rng = people([0, 0, 0, 1, 1, 2]), np.random.default_rng(2)
    users = [f"u{n}" for n in [0, 0, 1, 2, 3, 3, 3, 4, 5, 5]]
    rewards = rng.normal(size=10)

    def share(labels: Sequence[int]) -> float:
        own = np.array([labels[int(user[1:])] for user in users])
        parts = [rewards[own == k] for k in range(3)]
        between = sum(len(part) * (part.mean() - rewards.mean()) ** 2 for part in parts)
        return float(between / ((rewards - rewards.mean()) ** 2).sum())

    labels = [0, 0, 0, 1, 1, 2]
    everything = np.array([share(deal) for deal in permutations(labels)])
    found = reward_information(cluster_of, users, rewards)
    assert found
    assert found.eta2 == pytest.approx(share(labels))
    as_good = (everything >= found.eta2 - 1e-12).mean()
    # A binomial share of 2000 draws, within four standard errors.
    assert found.p == pytest.approx(as_good, abs=4 * np.sqrt(as_good * (1 - as_good) / 2000))
    spread = everything.std() / np.sqrt(2000)
    assert found.null_mean == pytest.approx(everything.mean(), abs=4 * spread)


def test_p_is_uniform_for_random_clusters_though_people_differ():
    rng, ps, fs = np.random.default_rng(1), [], []
    for _ in range(200):
        cluster_of = people(rng.integers(0, 5, 60).tolist())
        users = [f"u{n}" for n in range(60) for _ in range(8)]
        # Two thirds of the variance lie between people.
        rewards = np.repeat(rng.normal(size=60), 8) + rng.normal(size=480) * 0.7
        found = reward_information(cluster_of, users, rewards, permutations=199)
        assert found
        ps.append(found.p)
        own = np.array([cluster_of[user] for user in users])
        fs.append(stats.f_oneway(*[rewards[own == k] for k in range(5)]).pvalue)
    assert stats.kstest(ps, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(np.array(ps) < 0.05) <= 0.10
    # What deals out single rewards takes people for clusters.
    assert np.mean(np.array(fs) < 0.05) > 0.5


def test_what_has_no_reward_information():
    users, rewards = ["u0", "u1", "u2"], np.array([0.1, 0.1, 0.1])
    assert reward_information(people("aab"), users, rewards) is None
    assert reward_information(people("aaa"), users, np.array([1.0, 2.0, 3.0])) is None
    assert reward_information(people("aab"), users[:2], np.array([1.0, 2.0])) is None
    everybody_alone = reward_information(people("abc"), users, np.array([1.0, 2.0, 4.0]))
    assert everybody_alone
    assert everybody_alone.eta2 == pytest.approx(1.0)
    assert everybody_alone.p == 1.0 and everybody_alone.adjusted == pytest.approx(0.0)


def test_a_clusters_mean_reward_has_the_error_of_its_people():
    rng = np.random.default_rng(3)
    cluster_of = people([0] * 12 + [1])
    rewards = np.repeat(rng.normal(size=13), 5) + rng.normal(size=65)
    found = means(cluster_of, [f"u{n}" for n in range(13) for _ in range(5)], rewards)
    of_people = rewards.reshape(13, 5).mean(axis=1)[:12]
    mean, error = found[0]
    assert mean == pytest.approx(of_people.mean())
    assert error == pytest.approx(of_people.std(ddof=1) / np.sqrt(12))
    assert found[1] == (pytest.approx(rewards[60:].mean()), None)


def test_silhouettes_are_those_of_the_definition():
    rng = np.random.default_rng(4)
    points, clusters = rng.normal(size=(25, 3)), [*rng.choice(["a", 1, "1"], 24).tolist(), "alone"]
    found = silhouettes(points, clusters)
    assert found is not None
    for place, own in enumerate(clusters):
        away = np.linalg.norm(points - points[place], axis=1)
        others = {
            k: [away[j] for j in range(25) if clusters[j] == k and j != place] for k in clusters
        }
        if not others[own]:
            assert found[place] == 0
            continue
        a = np.mean(others.pop(own))
        b = min(np.mean(distances) for distances in others.values())
        assert found[place] == pytest.approx((b - a) / max(a, b))
    assert silhouettes(points, [0] * 25) is None
    assert silhouettes(points, list(range(25))) is None


def test_the_map_is_that_of_a_singular_value_decomposition():
    rng = np.random.default_rng(5)
    points = rng.normal(size=(40, 4)) @ np.diag([1.0, 5.0, 2.0, 0.1]) + 3
    found = projection(points)
    assert found
    centred = points - points.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found.places), np.abs(centred @ axes[:2].T), atol=1e-9)
    np.testing.assert_allclose(found.explained, sizes[:2] ** 2 / (sizes**2).sum())
    assert (found.axes.max(axis=1) >= -found.axes.min(axis=1)).all()
    line = projection(points[:, :1])
    assert line
    assert line.explained == (1.0, 0.0) and not line.places[:, 1].any()
    assert projection(np.ones((5, 2))) is None
    assert projection(np.ones((5, 0))) is None


def test_agreement_is_of_the_common_users_of_each_pair():
    one = people([0, 0, 1, 1, 5])
    other = {**people(["x", "x", "y", "z"]), "w": "x"}
    # Of the four: pairs together 2 and 1, both 1, of 6; (1 - 2/6) / (1.5 - 2/6) = 4 / 7.
    assert agreement([one, other]) == pytest.approx(4 / 7)
    assert agreement([one, one, one]) == 1
    assert agreement([one, other, one]) == pytest.approx((4 / 7 + 1 + 4 / 7) / 3)
    assert agreement([one]) is None
    assert agreement([{"a": 1}, {"b": 1}]) is None


def test_halves_are_of_half_the_users_and_differ():
    users = [f"u{n}" for n in range(31)]
    drawn = half_samples(users, 6, seed=0)
    assert [len(half) for half in drawn] == [16] * 6
    assert all(half == [user for user in users if user in half] for half in drawn)
    assert len({tuple(half) for half in drawn}) == 6
    assert drawn == half_samples(users, 6, seed=0) != half_samples(users, 6, seed=1)


# How many.


def planted(num: int = 3, each: int = 30, seed: int = 0) -> Dataset:
    """Users around as many centres, every third of them in turn."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(num, 4)) * 6
    users = {f"u{n}": centers[n % num] + rng.normal(size=4) for n in range(num * each)}
    examples = [Example(f"prompt of {user}", user) for user in users]
    return Dataset(examples, [], users, ("plays", "reads", "cooks", "runs"))


def of(num: int) -> KMeans.Config:
    return KMeans.Config.model_validate({"num_clusters": num})


def kmeans(configured: int) -> Any:
    def make(num: int | None) -> KMeans:
        return KMeans(of(configured if num is None else num))

    return make


@pytest.mark.parametrize("num", [2, 4])
def test_as_many_clusters_are_recommended_as_were_planted(num: int):
    found = analyse(kmeans(3), planted(num), configured=3, ks=[2, 4, 6])
    assert [each.num_clusters for each in found.candidates] == [2, 3, 4, 6]
    assert found.recommended and found.recommended.num_clusters == num
    assert found.recommended.stability == pytest.approx(1)
    assert found.own.num_clusters == 3 and found.own.information is None
    assert found.candidates[1] is found.own


def test_rewards_decide_between_numbers_that_are_equally_good():
    def of(
        num: int,
        silhouette: float = 0.3,
        stability: float = 0.8,
        information: RewardInformation | None = None,
    ) -> Candidate:
        return Candidate(num, silhouette, stability, information)

    def told(eta2: float, p: float) -> RewardInformation:
        return RewardInformation(eta2, 0.01, 0.03, p, 50, 500, np.zeros(1))

    assert best([of(2)]) is None
    assert best([of(5), of(2, silhouette=0.304)]) == of(2, silhouette=0.304)
    clear = of(5, information=told(0.2, 0.001))
    assert best([of(2, information=told(0.1, 0.001)), clear]) is clear
    # What chance does as well counts for nothing.
    lucky = of(5, information=told(0.2, 0.06))
    plain = of(2, information=told(0.01, 0.5))
    assert best([plain, lucky]) is plain
    shaky = of(8, information=told(0.3, 0.001), silhouette=0.1, stability=0.2)
    assert best([of(2, information=told(0.1, 0.001)), clear, shaky]) is clear


def test_a_number_that_cannot_be_made_is_left_out_and_told():
    dataset, told = planted(2, each=5), list[str]()
    found = analyse(kmeans(2), dataset, configured=2, ks=[3, 400], note=told.append)
    assert [each.num_clusters for each in found.candidates] == [2, 3]
    assert any("400 clusters cannot be made: num_clusters is 400" in text for text in told)

    def random(num: int | None) -> Any:
        settings: Any = {"name": "random", "num_clusters": num or 2, "sizes": [3, 1]}
        return load_registry().clusterer(ClusteringConfig(**settings))

    fixed = analyse(random, dataset, configured=2, ks=[3], note=told.append)
    assert [each.num_clusters for each in fixed.candidates] == [2]
    assert any("3 clusters cannot be made" in text and "sizes" in text for text in told)
    many = analyse(kmeans(2), dataset, configured=2, ks=[9])
    assert many.candidates[-1].stability is None, "half of the users are fewer than nine"


def test_clusters_that_read_examples_are_fitted_to_those_of_their_users():
    dataset = planted(2, each=6)
    seen: list[tuple[set[str], set[str]]] = []

    class Reads(KMeans):
        def fit(self, users: Any, features: Any, examples: Any) -> None:
            seen.append((set(users), {example.user for example in examples}))
            assert [examples[place].user for place in range(len(examples))] == [
                example.user for example in examples
            ]
            super().fit(users, features, examples)

    analyse(lambda _: Reads(of(2)), dataset, configured=None)
    assert len(seen) == 11
    assert all(users == owners for users, owners in seen)
    assert len(seen[0][0]) == 12 and {len(users) for users, _ in seen[1:]} == {6}


# Rewards that are read.


def test_rewards_come_from_rows_and_runs(tmp_path: Path) -> None:
    rows = tmp_path / "rewards.csv"
    rows.write_text("user,reward,note\nu1,0.5,x\nu2,,x\nu1,-1,x\n")
    found = read_rewards(rows)
    assert (found.users, found.values.tolist()) == (["u1", "u1"], [0.5, -1.0])
    lines = tmp_path / "rewards.jsonl"
    lines.write_text('{"user": 3, "reward": 2}\n{"user": 4.0, "reward": null}\n')
    found = read_rewards(lines)
    assert (found.users, found.values.tolist()) == (["3"], [2.0])
    for text, words in (
        ('{"user": 3}\n', "no column 'reward'"),
        ('{"user": 3, "reward": "much"}\n', "'much'; expected a finite number"),
        ('{"user": 3, "reward": null}\n', "holds no reward of anybody"),
    ):
        lines.write_text(text)
        with pytest.raises(DataError, match=words):
            read_rewards(lines)


# Through the command line.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return train(folder, {"run.eval_every": 0, "data.num_examples": 320})


def config(folder: Path, **changes: Any) -> str:
    return str(write_config(folder, {"data.num_examples": 320, **changes}))


def found_by(capsys: Capture, *arguments: object) -> Tree:
    capsys.readouterr()
    assert main(["cluster", *map(str, arguments), "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: Capture, *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_run_tells_what_clusters_know_of_its_rewards(run: Path, tmp_path: Path, capsys: Capture):
    out = tmp_path / "out"
    found = found_by(capsys, config(tmp_path), "--rewards", run, "--ks", "2,7", "--out", out)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    told = found["measures"]["information"]
    assert told["num_rewards"] == len(samples) == 16
    known = len({sample["user"] for sample in samples})
    assert told["num_users"] == known < found["num_users"]
    assert f"Rewards are known of {known} of the people." in found["sentences"]
    assert found["rewards"] == (
        "16 rollouts of the run run, of 32: run.samples_per_step = 4 logs so many of each step"
    )
    assert [note.split(":")[0] for note in found["reward_notes"]] == [
        "They are in-sample",
        "They are a stratified sample",
    ]
    saved = json.loads((out / "clusters.json").read_text())
    rewards = np.array([sample["reward"] for sample in samples])
    own = np.array([saved["assignment"][sample["user"]] for sample in samples])
    parts = [rewards[own == k] for k in set(own)]
    between = sum(len(part) * (part.mean() - rewards.mean()) ** 2 for part in parts)
    assert told["eta2"] == pytest.approx(between / ((rewards - rewards.mean()) ** 2).sum())
    assert [each["num_clusters"] for each in found["candidates"]] == [2, 3, 7]
    assert sum(each["num_users"] for each in saved["clusters"].values()) == 40
    for cluster in saved["clusters"].values():
        users = [example["user"] for example in cluster["examples"]]
        assert {saved["clusters"][str(saved["assignment"][user])]["about"] for user in users} == {
            cluster["about"]
        }
    members = Membership(
        divide(
            load_registry().clusterer(ClusteringConfig(name="kmeans", num_clusters=3)),  # pyright: ignore[reportCallIssue]
            personas(),
        )
    )
    assert all(members.cluster(user) == cluster for user, cluster in saved["assignment"].items())


def personas() -> Dataset:
    from pgrpo.data.personas import PersonasConfig, load_personas

    return load_personas(PersonasConfig(name="personas", num_examples=320, words=2))


def write_rewards(path: Path, rewards: dict[str, list[float]]) -> Path:
    rows = [(user, reward) for user, own in rewards.items() for reward in own]
    path.write_text("user,reward\n" + "".join(f"{user},{reward}\n" for user, reward in rows))
    return path


def test_clusters_without_information_are_called_so(tmp_path: Path, capsys: Capture):
    rng, out = np.random.default_rng(0), tmp_path / "out"
    users = list(personas().users)
    noise = write_rewards(
        tmp_path / "noise.csv", {user: rng.normal(size=4).tolist() for user in users}
    )
    found = found_by(capsys, config(tmp_path), "--rewards", noise, "--ks", "2,5", "--out", out)
    assert "carry no reward information" in found["headline"]
    told, said = found["measures"]["information"], " ".join(found["sentences"])
    assert told["p"] >= 0.05
    eta2, most = (f"{x:.3f}" if x >= 0.01 else f"{x:.4f}" for x in (told["eta2"], told["null_95"]))
    assert f"Clusters carry none: eta squared {eta2}, as random clusters" in said
    assert f"of the same sizes have up to {most}" in said
    assert "estimator.history = 'one'" in said

    taste = {
        user: (rng.normal(size=4) + 3 * place[0] / 40).tolist()
        for user, place in personas().users.items()
    }
    clear = write_rewards(tmp_path / "taste.csv", taste)
    found = found_by(capsys, config(tmp_path), "--rewards", clear, "--ks", "2,5", "--out", out)
    assert "people carry reward information" in found["headline"]
    assert found["measures"]["information"]["p"] < 0.01


def test_the_page_shows_it_all_and_loads_nothing(run: Path, tmp_path: Path, capsys: Capture):
    out = tmp_path / "out"
    arguments = (config(tmp_path), "--rewards", run, "--ks", "2,5", "--out", out)
    found = found_by(capsys, *arguments)
    page = parse(out / "clusters.html")
    for heading in ("Map of people", "Clusters", "How many clusters", "Reward information"):
        assert heading in page.text
    assert "Silhouettes" in page.text and found["headline"] in page.text
    assert all(note in page.text for note in found["reward_notes"])
    assert page.text.count("n-sample, of the people whom the clusters were made of") == 1
    assert "In-sample: the people are those whom the clusters were made of" in page.text
    assert "people whose features are nearest to its mean" in page.text
    assert page.attributes("src") == page.attributes("href") == []
    places = {attrs["id"] for _, attrs in page.tags if attrs.get("class") == "figure"}
    assert places == page.figures.keys() and len(places) == 6
    for figure in page.figures.values():
        drawn: Any = graph_objects.Figure(figure)
        assert len(drawn.data) > 0
    for cluster in found["clusters"].values():
        assert cluster["about"] in page.text
        for example in cluster["examples"]:
            cell = f"{example['text']}person {example['user']}"
            assert any(cell in row[1:] for row in page.rows)
    (shown,) = [row for row in page.rows if row[:1] == ["5" + "recommended"] or row[:1] == ["5"]]
    assert shown[1] == f"{found['candidates'][-1]['silhouette']:.3f}"
    # Again, over what is there; whatever else lies there stays.
    (out / "mine.txt").write_text("mine")
    before = (out / "clusters.json").read_bytes()
    assert found_by(capsys, *arguments) == found
    assert (out / "clusters.json").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == [
        "clusters.html",
        "clusters.json",
        "mine.txt",
    ]


def test_of_many_clusters_and_people_a_page_shows_some_and_says_so(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pgrpo.clusters.analysis.SAMPLE", 90)
    monkeypatch.setattr("pgrpo.report.clusters.DRAWN", 60)
    lines = ["user,kind,age"] + [f"u{n},k{n % 40},{n * 7 % 31}" for n in range(150)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    arguments = ("--set", "clustering.name=column", "--set", "clustering.column=kind")
    found = found_by(capsys, path, *arguments, "--out", tmp_path / "out")
    assert found["num_clusters"] == len(found["clusters"]) == 40
    page = parse(tmp_path / "out" / "clusters.html")
    # Who is one of the smallest and of the worst is shown once.
    told = re.search(
        r"Of 40 clusters (\d+) are shown: the 8 largest, the 8 smallest and", page.text
    )
    assert told
    assert 16 <= int(told[1]) <= 24
    assert "Of 90 people drawn at random." in page.text
    assert "Drawn are 60 of 150 people." in page.text
    rows = [row for row in page.rows if row and row[0].startswith("k") and len(row) == 5]
    assert len(rows) == int(told[1])
    (map_of_people,) = [f for f in page.figures.values() if f["layout"]["yaxis"].get("scaleanchor")]
    assert sum(len(trace["text"]) for trace in map_of_people["data"]) <= 60


def test_without_features_nobody_is_called_typical(tmp_path: Path, capsys: Capture):
    path = tmp_path / "rows.csv"
    path.write_text("user,kind\n" + "".join(f"u{n},k{n % 2}\n" for n in range(20)))
    arguments = ("--set", "clustering.name=column", "--set", "clustering.column=kind")
    found = found_by(capsys, path, *arguments, "--out", tmp_path / "out")
    shown = {k: [each["user"] for each in c["examples"]] for k, c in found["clusters"].items()}
    assert shown == {"k0": ["u0", "u2", "u4"], "k1": ["u1", "u3", "u5"]}
    page = parse(tmp_path / "out" / "clusters.html")
    assert "there are no features to tell who is typical" in page.text
    assert "First in the data set" in page.text and "earest" not in page.text


def test_hostile_names_and_texts_are_shown_not_run(tmp_path: Path, capsys: Capture):
    rows = [
        {"prompt": f"{HOSTILE} {n}", "user": f"{HOSTILE}{n}", "kind": f"{HOSTILE}{n % 2}", "age": n}
        for n in range(12)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--set", "clustering.name=column", "--set", "clustering.column=kind")
    found_by(capsys, path, *arguments, "--out", tmp_path / "out")
    page = parse(tmp_path / "out" / "clusters.html")
    assert len(page.scripts) == 3 and not any(tag == "img" for tag, _ in page.tags)
    assert HOSTILE.strip() in page.text
    names = [trace["name"] for figure in page.figures.values() for trace in figure["data"]]
    assert names and not any("<" in name for name in names)


def test_rows_alone_are_clustered_by_their_numbers(tmp_path: Path, capsys: Capture):
    rng = np.random.default_rng(0)
    lines = ["name,age,town,score"]
    lines += [
        f"p{n % 20},{20 + 40 * (n % 2) + rng.normal():.3f},T{n % 3},{n % 2 + rng.normal() / 9:.3f}"
        for n in range(60)
    ]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    override = ("--set", "data.user_column=name", "--set", "clustering.num_clusters=2")
    found = found_by(capsys, path, *override, "--ks", "4", "--out", out)
    saved = json.loads((out / "clusters.json").read_text())
    assert saved["feature_names"] == ["age", "score"]
    assert {
        user: cluster == saved["assignment"]["p0"] for user, cluster in saved["assignment"].items()
    } == {f"p{n}": n % 2 == 0 for n in range(20)}
    assert found["recommended"] == 2
    assert found["rewards"] is None and "--rewards" in found["sentences"][0]

    thumbs = tmp_path / "thumbs.jsonl"
    said = [
        {
            "prompt": f"q{n}",
            "completion": "a b" * (1 + n % 5),
            "label": n % (2 + n % 4) == 0,
            "user": f"u{n % 12}",
        }
        for n in range(240)
    ]
    thumbs.write_text("".join(json.dumps(row) + "\n" for row in said))
    found = found_by(capsys, thumbs, "--set", "clustering.num_clusters=2", "--out", out)
    saved = json.loads((out / "clusters.json").read_text())
    assert saved["feature_names"][0] == "mean value"
    assert found["rewards"].startswith("one rule for everybody, fitted to choices, on ")


def test_choices_that_people_made_tell_what_clusters_know(tmp_path: Path, capsys: Capture):
    """Two kinds of people who choose by taste, of which one is the larger."""
    lines = ["id,round,item,sweet,taken"]
    rng = np.random.default_rng(0)
    for person in range(60):
        for turn in range(8):
            likes = person % 3 > 0
            first = int(rng.integers(2))
            for place in range(2):
                sweet = (place + first) % 2
                lines.append(f"{person},{turn},{place},{sweet},{int(bool(sweet) == likes)}")
    (tmp_path / "panel.csv").write_text("\n".join(lines) + "\n")
    rules = [{"word": "sweet", "when": {"sweet": 1}}, {"word": "sour"}]
    words = [{"attribute": "taste", "rules": rules}]
    data: Tree = {
        "name": "panel",
        "path": str(tmp_path),
        "file": "panel.csv",
        "person": "id",
        "situation": "round",
        "alternative": "item",
        "chosen": "taken",
        "words": words,
        "earlier": 2,
        "evaluation_choices": 3,
    }
    changes = {"data": data, "clustering.num_clusters": 2, "rewards": [{"name": "choice"}]}
    path = write_config(tmp_path, changes)
    found = found_by(capsys, path, "--ks", "2", "--out", tmp_path / "out")
    # One rule for everybody is right for two thirds, always, and for nobody else: all is between them.
    assert found["measures"]["information"]["eta2"] == pytest.approx(1.0)
    assert found["measures"]["information"]["num_rewards"] == 180
    assert found["reward_notes"] == [
        "They are of later choices than those that features, the rule and clusters come from."
    ]
    rewards = {name: each["reward"] for name, each in found["clusters"].items()}
    assert rewards == {"0": 1.0, "1": 0.0}


def test_what_is_refused(tmp_path: Path, capsys: Capture):
    path, out = config(tmp_path), ("--out", tmp_path / "out")
    assert "--ks is '0,2'" in refusal(capsys, "cluster", path, "--ks", "0,2", *out)
    column = config(tmp_path / "c", clustering={"name": "column", "column": "persona"})
    assert "--ks has no effect: clusterer 'column'" in refusal(
        capsys, "cluster", column, "--ks", "2", *out
    )
    strangers = write_rewards(tmp_path / "r.csv", {"nobody": [1.0, 2.0]})
    assert "none of the 2 rewards is of a user of the data set" in refusal(
        capsys, "cluster", path, "--rewards", strangers, *out
    )
    assert "does not exist" in refusal(capsys, "cluster", path, "--rewards", tmp_path / "no", *out)
    assert "is not a run folder" in refusal(
        capsys, "cluster", path, "--rewards", tmp_path / "c", *out
    )
    assert "does not exist" in refusal(capsys, "cluster", tmp_path / "rows.csv", *out)
    assert "config file" in refusal(capsys, "cluster", tmp_path / "run.conf", *out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(capsys, "cluster", path, "--out", tmp_path / "file")


def test_a_clusterer_that_is_told_no_number_is_looked_at_as_it_is(tmp_path: Path, capsys: Capture):
    column = config(tmp_path, clustering={"name": "column", "column": "persona"})
    found = found_by(capsys, column, "--out", tmp_path / "out")
    assert found["candidates"] == [] and found["recommended"] is None
    assert found["measures"]["num_clusters"] == 7 and found["measures"]["stability"] == 1
    assert "No others are compared" in parse(tmp_path / "out" / "clusters.html").text
    single = config(tmp_path, clustering={"name": "single"})
    found = found_by(capsys, single, "--out", tmp_path / "out")
    assert found["measures"]["silhouette"] is None and found["num_clusters"] == 1


# Clusters that runs load.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    out = folder / "clusters"
    assert main(["cluster", config(folder), "--ks", "3", "--out", str(out), "--quiet"]) == 0
    return out


def clusterer(path: Path, **options: Any) -> Saved:
    return Saved(Saved.Config(path=str(path), **options))


def test_known_people_keep_their_cluster_and_others_are_assigned_as_it_was_fitted(saved: Path):
    content = json.loads((saved / "clusters.json").read_text())
    dataset = personas()
    known, new = list(dataset.users)[:30], list(dataset.users)[30:]
    users = {user: np.zeros(8) for user in known} | {
        f"new {user}": dataset.users[user] for user in new
    }
    other = Dataset([], [], users, dataset.feature_names)
    members = Membership(divide(clusterer(saved), other))
    # Whatever their features are now.
    assert all(members.cluster(user) == content["assignment"][user] for user in known)
    # The same features as somebody who was there.
    assert all(members.cluster(f"new {user}") == content["assignment"][user] for user in new)
    file = Membership(divide(clusterer(saved / "clusters.json"), other))
    assert file.histories("cluster", 0) == members.histories("cluster", 0)

    pooled = Membership(
        divide(clusterer(saved, unseen="pooled"), Dataset([], [], users, ("x",) * 8))
    )
    assert all(pooled.cluster(user) == content["assignment"][user] for user in known)
    assert {pooled.cluster(f"new {user}") for user in new} == {"unseen"}
    assert pooled.about["unseen"]["num_users"] == len(new)


def test_a_state_needs_no_file(saved: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "gone")
    dataset = personas()
    first = Membership(divide(clusterer(tmp_path / "gone"), dataset))
    state = json.loads(json.dumps(first.state_dict(), sort_keys=True))
    shutil.rmtree(tmp_path / "gone")
    again = Membership(divide(clusterer(tmp_path / "gone"), dataset, state))
    assert again.histories("cluster", 0) == first.histories("cluster", 0)
    assert again.state_dict() == first.state_dict()
    with pytest.raises(CheckpointError, match="damaged: assignment"):
        clusterer(tmp_path).load_state_dict({**state, "assignment": {"u": 0.5}})
    with pytest.raises(DataError, match=r"does not exist; pgrpo cluster writes it"):
        Membership(divide(clusterer(tmp_path / "gone"), dataset))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[: len(content) // 2], "is damaged, or not of pgrpo cluster"),
        (lambda content: "[1]", "is damaged, or not of pgrpo cluster"),
        (lambda content: content.replace('"version": 2', '"version": 1'), "version 1, expected 2"),
        (lambda content: content.replace('"data"', '"date"'), "data is .*: Field required"),
        (lambda content: content.replace('"assignment"', '"asignment"'), "assignment"),
        (lambda content: content.replace('"name": "kmeans"', '"name": 3'), "clusterer.name is 3"),
        (lambda content: content.replace("writes dry", "writes wry"), "has no 'writes wry'"),
        (lambda content: content.replace('"name": "kmeans"', '"name": "kmean"'), "no clusterer"),
        (lambda content: content.replace('"centers"', '"center"'), "no numbers 'centers'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(saved: Path, tmp_path: Path, change: Any, words: str):
    content = (saved / "clusters.json").read_text()
    (tmp_path / "clusters.json").write_text(change(content))
    dataset = personas()
    stranger = {"stranger": np.zeros(8)} | dict(dataset.users)
    with pytest.raises(DataError, match=words):
        Membership(divide(clusterer(tmp_path), Dataset([], [], stranger, dataset.feature_names)))


def test_a_cluster_of_the_name_of_the_unseen_is_refused(saved: Path, tmp_path: Path):
    content = json.loads((saved / "clusters.json").read_text())
    content["assignment"]["user-0"] = "unseen"
    (tmp_path / "clusters.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="have one called 'unseen'"):
        Membership(divide(clusterer(tmp_path, unseen="pooled"), personas()))


def test_people_whom_the_saved_clusterer_cannot_assign_are_named(tmp_path: Path, capsys: Capture):
    column = config(tmp_path, clustering={"name": "column", "column": "persona"})
    found_by(capsys, column, "--out", tmp_path / "out")
    dataset = personas()
    users = {"stranger": np.zeros(8)} | dict(dataset.users)
    with pytest.raises(DataError, match="1 of 41 users are not in the saved clusters") as error:
        Membership(
            divide(clusterer(tmp_path / "out"), Dataset([], [], users, dataset.feature_names))
        )
    assert "user 'stranger' has no row" in str(error.value) and "'pooled'" in str(error.value)


def test_a_run_with_saved_clusters_counts_new_people_and_goes_on_without_the_file(
    saved: Path, tmp_path: Path, capsys: Capture
):
    shutil.copytree(saved, tmp_path / "clusters")
    known = json.loads((saved / "clusters.json").read_text())["assignment"]
    # Twice the people, of whom the first half has the names of those who were clustered.
    changes = {
        "data.num_examples": 640,
        "clustering": {"name": "saved", "path": "clusters", "unseen": "pooled"},
        "estimator.prior_count": 8.0,
        "run.num_steps": 2,
        "run.samples_per_step": 8,
    }
    run = train(tmp_path, changes)
    capsys.readouterr()
    info = json.loads((run / "run.json").read_text())
    assert info["clusters"]["unseen"]["num_users"] == 40
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    assert all(s["cluster_id"] == known.get(s["user"], "unseen") for s in samples)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        new = sum(s["user"] not in known for s in samples if s["step"] == line["step"])
        assert line["num_unseen"] == new
        assert new == 0 or line["clusters"]["unseen"]["num_rollouts"] == new
    assert any(line["num_unseen"] for line in lines)
    # The config names the place as it is seen from anywhere.
    assert str(tmp_path / "clusters") in (run / "config.toml").read_text()
    shutil.rmtree(tmp_path / "clusters")
    assert main(["train", "--resume", str(run), "--set", "run.num_steps=3"]) == 0


def test_clusters_of_other_data_are_told_of(saved: Path, tmp_path: Path, capsys: Capture) -> None:
    """Such as another split, by which clusters may have been made of answers that a run holds out."""
    data = json.loads((saved / "clusters.json").read_text())["data"]
    assert (data["name"], data["num_examples"], data["seed"]) == ("personas", 320, 0)
    told = "the saved clusters were found in other data: [data] had "

    def changed(**changes: Any) -> Tree:
        return {"clustering": {"name": "saved", "path": str(saved)}, **changes}

    def checked(**changes: Any) -> list[str]:
        capsys.readouterr()
        assert main(["check", config(tmp_path, **changed(**changes)), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["suspicious"]

    assert not any(told in sentence for sentence in checked())
    others: Tree = {"data.num_examples": 400, "data.seed": 3}
    (said,) = [sentence for sentence in checked(**others) if told in sentence]
    assert said == (
        f"{told}num_examples = 320, here 400; seed = 0, here 3. What is held out here may be among what "
        "they were made from"
    )
    train(tmp_path, {**changed(**others), "run.num_steps": 1})
    assert f"warning: {said}" in " ".join(capsys.readouterr().out.split())


def test_check_tells_of_new_people(saved: Path, tmp_path: Path, capsys: Capture):
    clustering = {"name": "saved", "path": str(saved)}
    path = config(tmp_path, **{"data.num_examples": 400, "clustering": clustering})
    assert main(["check", path]) == 0
    assert "note: 10 of 50 people are in none of the saved clusters" in capsys.readouterr().out


def test_pooled_histories_want_a_weight(saved: Path):
    tree: Tree = {
        "model": {"name": "tiny"},
        "data": {"name": "personas"},
        "clustering": {"name": "saved", "path": str(saved), "unseen": "pooled"},
        "rewards": [{"name": "persona"}],
    }
    with pytest.raises(ConfigError, match="estimator.prior_count weighs; it is 0, expected more"):
        parse_config(tree)
    parse_config({**tree, "estimator": {"prior_count": 4.0}})
    parse_config({**tree, "estimator": {"history": "one"}})
    parse_config({**tree, "estimator": {"name": "grpo"}})
    parse_config({**tree, "clustering": {"name": "saved", "path": str(saved)}})
