"""Clusters against planted ones, and data that cannot be clustered."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pgrpo.clusters.assignment import cluster_users
from pgrpo.clusters.description import describe
from pgrpo.config.sections import ClusteringConfig
from pgrpo.errors import CheckpointError, ConfigError, DataError, PluginError
from pgrpo.plugins.registry import load_registry
from pgrpo.types import Dataset, Example

SIZES = (50, 30, 12)
CENTERS = np.array([[0.0, 0.0, 900.0], [0.3, 0.0, -900.0], [0.3, 5.0, 0.0]])


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def planted():
    """Users in three clusters of known sizes, features on very different scales, shuffled."""
    rng = np.random.default_rng(5)
    truth = rng.permutation(np.repeat([0, 1, 2], SIZES))
    features = CENTERS[truth] + rng.normal(size=(len(truth), 3)) * [0.01, 0.1, 20.0]
    return [f"user-{i}" for i in range(len(truth))], features, truth.tolist()


def build(registry, **settings):
    return registry.clusterer(ClusteringConfig.model_validate(settings))


def test_kmeans_finds_planted_clusters_and_numbers_them_by_size(registry, planted):
    users, features, truth = planted
    for seed in range(5):
        kmeans = build(registry, name="kmeans", num_clusters=3, seed=seed)
        kmeans.fit(users, features, [])
        assigned = kmeans.assign(users, features)
        assert assigned == truth
        assert all(type(cluster) is int for cluster in assigned)


def test_the_seed_reaches_the_clusterer(registry, planted):
    users = planted[0]
    features = np.random.default_rng(1).normal(size=(len(users), 6))

    def centers(seed):
        kmeans = build(registry, name="kmeans", num_clusters=7, n_init=1, seed=seed)
        kmeans.fit(users, features, [])
        return kmeans.state_dict()["centers"]

    assert centers(1) == centers(1)
    assert centers(1) != centers(2)


def test_sklearn_gives_new_users_the_nearest_ones_label(registry, planted):
    users, features, truth = planted
    settings = {"estimator": "sklearn.cluster.AgglomerativeClustering", "n_clusters": 3}
    clusterer = build(registry, name="sklearn", **settings)
    clusterer.fit(users, features, [])
    labels = clusterer.assign(users, features)
    for cluster in range(3):
        expected = labels[truth.index(cluster)]
        assert clusterer.assign(["stranger"], CENTERS[cluster : cluster + 1]) == [expected]


def test_a_constant_feature_does_not_matter(registry, planted):
    users, features, truth = planted
    kmeans = build(registry, name="kmeans", num_clusters=3)
    padded = np.column_stack([features, np.full(len(users), 0.1)])
    kmeans.fit(users, padded, [])
    assert kmeans.assign(users, padded) == truth
    padded[:, 3] += 1.0
    assert kmeans.assign(users, padded) == truth


def rows(**values_of):
    return [
        Example("?", user, {} if value is Ellipsis else {"segment": value})
        for user, values in values_of.items()
        for value in values
    ]


def test_column_reads_the_cluster_off_the_examples(registry):
    column = build(registry, name="column", column="segment")
    users, nothing = ["a", "b", "c"], np.empty((3, 0))
    column.fit(users, nothing, rows(a=["x", "x"], b=[1], c=["1"]))
    assert column.assign(users, nothing) == ["x", 1, "1"]
    restored = build(registry, name="column", column="segment")
    restored.load_state_dict(json.loads(json.dumps(column.state_dict(), sort_keys=True)))
    assert restored.assign(["c", "a", "b"], nothing) == ["1", "x", 1]
    with pytest.raises(DataError, match="user 'd' has no row"):
        column.assign(["d"], nothing)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"a": ["x"], "b": ["x", "y", "x"]}, ["'segment'", "'b'", "'x' in 2 rows", "'y' in 1"]),
        ({"a": ["x", None, ..., "x", "x"]}, ["'segment'", "'a'", "missing in 2 of 5 rows"]),
        ({"a": [...]}, ["'segment'", "'a'", "missing in 1 of 1 rows"]),
        ({"a": [1.5]}, ["'segment'", "'a'", "1.5", "whole number"]),
        ({"a": [True]}, ["'segment'", "'a'", "True", "whole number"]),
        ({"a": [["x"]]}, ["'segment'", "'a'", "['x']"]),
        ({"a": [1, "1"]}, ["'a'", "1 in 1 rows and '1' in 1 rows"]),
    ],
)
def test_column_refuses_what_is_no_cluster(registry, values, words):
    column = build(registry, name="column", column="segment")
    with pytest.raises(DataError) as caught:
        column.fit(list(values), np.empty((len(values), 0)), rows(**values))
    assert all(word in str(caught.value) for word in words), caught.value


def test_kmeans_refuses_what_it_cannot_cluster(registry):
    kmeans = build(registry, name="kmeans", num_clusters=3)
    with pytest.raises(PluginError, match="before it was fitted"):
        kmeans.assign(["a"], np.zeros((1, 2)))
    with pytest.raises(DataError, match="num_clusters is 3, but only 2 of 4 users differ"):
        kmeans.fit(list("abcd"), np.array([[0.0], [1.0], [0.0], [1.0]]), [])
    with pytest.raises(DataError, match="feature 1 of user 'b' is nan"):
        kmeans.fit(list("ab"), np.array([[0.0, 1.0], [0.0, np.nan]]), [])
    with pytest.raises(DataError, match="no features"):
        kmeans.fit(list("ab"), np.empty((2, 0)), [])
    with pytest.raises(DataError, match="no users"):
        kmeans.fit([], np.empty((0, 2)), [])
    with pytest.raises(DataError, match=r"shape \[1, 2\], expected \[2, F\]"):
        kmeans.fit(list("ab"), np.zeros((1, 2)), [])
    kmeans.fit(list("abc"), np.eye(3), [])
    with pytest.raises(DataError, match="users have 2 features, expected 3"):
        kmeans.assign(list("abc"), np.zeros((3, 2)))


def test_a_damaged_state_changes_nothing(registry, planted):
    users, features, truth = planted
    kmeans = build(registry, name="kmeans", num_clusters=3)
    kmeans.fit(users, features, [])
    state = kmeans.state_dict()
    for damage in ({"centers": "x"}, {"centers": state["centers"][:2]}, {"mean": [[0.0]]}):
        with pytest.raises(CheckpointError):
            kmeans.load_state_dict({**state, **damage})
    with pytest.raises(CheckpointError, match="std"):
        kmeans.load_state_dict({key: state[key] for key in ("mean", "centers")})
    assert kmeans.assign(users, features) == truth
    for name, settings in (
        ("column", {"column": "x"}),
        ("sklearn", {"estimator": "sklearn.cluster.DBSCAN"}),
    ):
        with pytest.raises(CheckpointError):
            build(registry, name=name, **settings).load_state_dict({})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"estimator": "sklearn.cluster.KMean"}, ["cannot be imported", "KMean"]),
        ({"estimator": "nowhere.KMeans"}, ["cannot be imported", "nowhere"]),
        ({"estimator": "KMeans"}, ["cannot be imported"]),
        ({"estimator": "sklearn.linear_model.Ridge"}, ["no class with fit_predict"]),
        ({"estimator": "sklearn.cluster.KMeans", "n_cluster": 3}, ["did you mean 'n_clusters'"]),
        ({}, ["estimator is missing"]),
    ],
)
def test_sklearn_settings_are_checked_before_the_run(registry, settings, words):
    with pytest.raises(ConfigError) as caught:
        build(registry, name="sklearn", **settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_sklearn_passes_on_an_estimators_refusal(registry):
    settings = {"estimator": "sklearn.cluster.KMeans", "n_clusters": 5}
    clusterer = build(registry, name="sklearn", **settings)
    with pytest.raises(DataError, match="KMeans cannot cluster 2 users"):
        clusterer.fit(["a", "b"], np.eye(2), [])


def test_describe_names_what_stands_out():
    features = np.zeros((10, 4))
    features[:2] = [9.0, 5.0, 7.0, 1.0]  # above average in 0, 1, 2, which vary alike; 3 too
    features[:2, 3] = -4.0
    features[4, 2] = 9.0
    names = ("Action", "War", "Drama", "Romance")
    told = describe(features, ["few"] * 2 + ["many"] * 8, names)
    assert list(told) == ["many", "few"]
    assert told["few"]["num_users"] == 2 and told["few"]["share"] == 0.2
    about = told["few"]["about"]
    assert about.startswith("above average in ") and about.endswith("; below average in Romance")
    assert "Drama" not in about  # its z-score is the third highest
    assert "above average in Romance" in told["many"]["about"]
    everyone = describe(features, [0] * 10, names)
    assert everyone[0] == {"num_users": 10, "share": 1.0, "about": ""}


class Careless:
    """A clusterer as a hurried author writes it; the test sets what it returns."""

    def __init__(self, labels, state=None):
        self._labels, self._state = labels, state

    def fit(self, users, features, examples):
        assert len(examples[:2]) == 2
        assert examples[-1] is not None

    def assign(self, users, features):
        if isinstance(self._labels, Exception):
            raise self._labels
        return self._labels

    def state_dict(self):
        return self._state or {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    ("labels", "state", "message"),
    [
        ([0, 1, 0.5], None, "a cluster is an int or a string, not 0.5"),
        ([0, 1], None, "returned 2 clusters for 3 users"),
        ([1, "1", 2], None, "differ only in type"),
        (ValueError("no such\nthing"), None, "ValueError: no such thing"),
        ([0, 1, 2], {"centers": np.zeros(2)}, "not JSON serializable"),
    ],
)
def test_a_careless_clusterer_is_named_before_the_first_step(labels, state, message):
    examples = [Example("x", f"u{i}") for i in range(3)]
    users = {f"u{i}": np.zeros(1) for i in range(3)}
    dataset = Dataset(examples, [Example("y", "u0")], users, ("f",))
    with pytest.raises(PluginError, match=message) as error:
        cluster_users(Careless(labels, state), dataset)
    assert "Careless" in str(error.value)
    assert "\n" not in str(error.value)


class Reader(Careless):
    """A clusterer that keeps what it is shown."""

    shown: Any = None

    def fit(self, users, features, examples):
        self.shown = [example.text for example in examples]


class AnswerReader(Reader):
    reads_answers = True


def test_who_reads_answers_is_shown_no_held_out_ones():
    early, train, late = ([Example(f"{name} {i}", f"u{i}") for i in range(2)] for name in "abc")
    users = {f"u{i}": np.zeros(1) for i in range(2)}
    for observed, known in (
        ((), ["b 0", "b 1"]),
        ([*early, *train], ["a 0", "a 1", "b 0", "b 1"]),
    ):
        dataset = Dataset(train, late, users, ("f",), observed=observed)
        reader, answer_reader = Reader([0, 1]), AnswerReader([0, 1])
        cluster_users(reader, dataset)
        assert reader.shown == ["b 0", "b 1", "c 0", "c 1"]
        cluster_users(answer_reader, dataset)
        assert answer_reader.shown == known


def test_numpy_labels_become_plain_ones():
    users = {f"u{i}": np.zeros(1) for i in range(3)}
    examples = [Example("x", user) for user in users]
    careless: Any = Careless(np.array([2, 0, 2]))
    clusters = cluster_users(careless, Dataset(examples, examples, users, ("f",)))
    assert clusters == {"u0": 2, "u1": 0, "u2": 2}
    assert {type(cluster) for cluster in clusters.values()} == {int}
