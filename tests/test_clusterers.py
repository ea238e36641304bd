"""What all clusterers have in common, and each of them against what is known of the users."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from pgrpo.clusters import latent_class
from pgrpo.clusters.assignment import cluster_users
from pgrpo.config.sections import ClusteringConfig
from pgrpo.errors import CheckpointError, ConfigError, DataError, PluginError
from pgrpo.plugins import SoftClusterer
from pgrpo.plugins.registry import load_registry
from pgrpo.types import Dataset, Example

SETTINGS: list[dict[str, Any]] = [
    {"name": "kmeans", "num_clusters": 7},
    {"name": "minibatch_kmeans", "num_clusters": 7, "batch_size": 20},
    {"name": "gaussian_mixture", "num_clusters": 3, "n_init": 2},
    {"name": "gaussian_mixture", "num_clusters": 6, "covariance": "tied", "n_init": 2},
    {"name": "gaussian_mixture", "num_clusters": 3, "covariance": "full", "reg": 0.1, "n_init": 2},
    {"name": "gaussian_mixture", "num_clusters": 4, "covariance": "spherical", "n_init": 2},
    {"name": "hdbscan", "min_cluster_size": 4, "min_samples": 2},
    {"name": "hdbscan", "min_cluster_size": 4, "min_samples": 2, "noise": "own"},
    {"name": "latent_class", "num_clusters": 3, "n_init": 1},
    {"name": "random", "num_clusters": 7},
    {"name": "random", "num_clusters": 3, "sizes": [1, 5, 2.5]},
    {"name": "sklearn", "estimator": "sklearn.cluster.AgglomerativeClustering", "n_clusters": 4},
    {"name": "sklearn", "estimator": "sklearn.cluster.DBSCAN", "eps": 0.3},
    {"name": "sklearn", "estimator": "sklearn.mixture.GaussianMixture", "n_components": 3},
    {"name": "column", "column": "segment"},
    {"name": "single"},
]
IDS = [
    "-".join(map(str, (value for value in tree.values() if not isinstance(value, list))))
    for tree in SETTINGS
]
SORTED = ("kmeans", "minibatch_kmeans", "gaussian_mixture", "latent_class", "random", "single")
SOFT = ("gaussian_mixture", "latent_class")


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def build(registry, **settings):
    return registry.clusterer(ClusteringConfig.model_validate(settings))


def through_json(state):
    return json.loads(json.dumps(state, sort_keys=True, allow_nan=False))


BRANDS = ("red", "blue", "white")
TASTES = np.array([[-2.0, 0.0, 0.0, 0.0], [0.3, 3.0, 0.0, 0.0], [0.0, -1.0, 0.0, 2.5]])
"""[classes, 4] what a class gives for a unit of price, and for each brand."""


def utility(taste, attributes):
    price, brand = attributes
    return taste[0] * price + taste[1 + BRANDS.index(brand)]


def simulated(seed=0, num_people=200, num_choices=12, shares=(0.5, 0.3, 0.2), tastes=TASTES):
    """People of known classes, and their choices among two to four alternatives by a logit."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(len(shares), size=num_people, p=shares)
    examples = []
    for _, (person, k) in itertools.product(range(num_choices), enumerate(truth)):
        offered = [
            [round(float(rng.normal()), 2), str(rng.choice(BRANDS))]
            for _ in range(rng.integers(2, 5))
        ]
        values = [utility(tastes[k], attributes) + rng.gumbel() for attributes in offered]
        columns: Any = {
            "attributes": offered,
            "position": int(np.argmax(values)),
            "segment": f"class {k}",
        }
        examples.append(Example("?", f"p{person}", columns))
    return [f"p{i}" for i in range(num_people)], truth.tolist(), examples


@pytest.fixture(scope="module")
def crowd():
    """Users with features of no clear clusters, and choices of clear classes."""
    users, _, examples = simulated(num_people=60)
    return users, np.random.default_rng(1).normal(size=(len(users), 6)), examples


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_assignments_survive_json_users_one_by_one_and_a_rerun(registry, crowd, settings):
    users, features, examples = crowd
    fitted = build(registry, **settings)
    fitted.fit(users, features, examples)
    labels = fitted.assign(users, features)
    assert all(type(label) in (int, str) for label in labels)

    restored = build(registry, **settings)
    restored.load_state_dict(through_json(fitted.state_dict()))
    assert restored.assign(users, features) == labels
    assert restored.assign(users, np.asfortranarray(features)) == labels
    one_by_one = [restored.assign([u], features[i : i + 1])[0] for i, u in enumerate(users)]
    assert one_by_one == labels
    assert restored.assign(users[::-1], features[::-1]) == labels[::-1]
    assert restored.state_dict() == fitted.state_dict()

    np.random.seed(3)
    again = build(registry, **settings)
    again.fit(users, features, examples)
    assert again.state_dict() == fitted.state_dict()


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_sizes_fall(registry, crowd, settings):
    users, features, examples = crowd
    clusterer = build(registry, **settings)
    clusterer.fit(users, features, examples)
    counts = Counter(clusterer.assign(users, features))
    if settings["name"] == "hdbscan":
        assert (counts.pop(-1, 0) > 0) == (settings.get("noise") == "own")
    elif settings["name"] not in SORTED:
        return
    sizes = [counts[k] for k in range(max(counts) + 1)]
    assert sizes == sorted(sizes, reverse=True)
    if settings["name"] != "single":
        assert len(sizes) > 1


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_strangers_are_assigned_and_always_alike(registry, crowd, settings):
    users, features, examples = crowd
    clusterer = build(registry, **settings)
    clusterer.fit(users, features, examples)
    strangers, theirs = [f"s{i}" for i in range(40)], np.random.default_rng(2).normal(size=(40, 6))
    if settings["name"] == "column":
        with pytest.raises(DataError, match="user 's0' has no row"):
            clusterer.assign(strangers, theirs)
        return
    labels = clusterer.assign(strangers, theirs)
    assert set(labels) <= set(clusterer.assign(users, features))
    restored = build(registry, **settings)
    restored.load_state_dict(through_json(clusterer.state_dict()))
    assert [restored.assign([s], theirs[i : i + 1])[0] for i, s in enumerate(strangers)] == labels
    together = restored.assign([*users, *strangers], np.vstack([features, theirs]))
    assert together[len(users) :] == labels


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_memberships_are_weights_of_which_assign_takes_the_largest(registry, crowd, settings):
    users, features, examples = crowd
    clusterer = build(registry, **settings)
    clusterer.fit(users, features, examples)
    assert isinstance(clusterer, SoftClusterer) == (settings["name"] in SOFT)
    if not isinstance(clusterer, SoftClusterer):
        return
    asked = [*users, "stranger"], np.vstack([features, features[0] + 0.1])
    weights = clusterer.memberships(*asked)
    assert len(weights) == len(users) + 1
    for row, label in zip(weights, clusterer.assign(*asked), strict=True):
        assert set(row) == set(range(settings["num_clusters"]))
        assert min(row.values()) >= 0 and sum(row.values()) == pytest.approx(1, abs=1e-12)
        assert row[label] == max(row.values())
        assert all(type(weight) is float for weight in row.values())
    # Some belong to several clusters.
    assert min(max(row.values()) for row in weights) < 0.99

    restored = build(registry, **settings)
    restored.load_state_dict(through_json(clusterer.state_dict()))
    assert isinstance(restored, SoftClusterer)
    assert restored.memberships(*asked) == weights
    names, points = asked
    assert [
        restored.memberships([name], points[i : i + 1])[0] for i, name in enumerate(names)
    ] == weights


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_a_state_that_lacks_something_is_refused_and_changes_nothing(registry, crowd, settings):
    users, features, examples = crowd
    clusterer = build(registry, **settings)
    clusterer.fit(users, features, examples)
    labels, state = clusterer.assign(users, features), through_json(clusterer.state_dict())
    for key, value in state.items():
        with pytest.raises(CheckpointError, match=key):
            clusterer.load_state_dict({other: state[other] for other in state if other != key})
        with pytest.raises(CheckpointError):
            clusterer.load_state_dict({**state, key: "x"})
        if isinstance(value, list):
            with pytest.raises(CheckpointError):
                clusterer.load_state_dict({**state, key: value[:-1]})
    assert clusterer.assign(users, features) == labels


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_what_was_not_fitted_has_no_answer(registry, settings):
    if settings["name"] in ("single", "random", "column"):
        return  # they need no features, and say of a user what they know
    clusterer = build(registry, **settings)
    for ask in (lambda: clusterer.assign(["a"], np.zeros((1, 6))), clusterer.state_dict):
        with pytest.raises(PluginError, match=f"'{settings['name']}' was asked before it was"):
            ask()


def answered_otherwise(examples):
    """The same situations, of which another alternative was taken."""
    return [
        Example(
            example.text,
            example.user,
            {
                **example.columns,
                "position": (example.columns["position"] + 1) % len(example.columns["attributes"]),
            },
        )
        for example in examples
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_held_out_answers_do_not_reach_the_clusters(registry, crowd, settings):
    users, features, examples = crowd
    third = len(examples) // 3
    early, train, late = examples[:third], examples[third : 2 * third], examples[2 * third :]
    of_user: Any = dict(zip(users, features, strict=True))
    names = tuple("abcdef")

    def fitted(dataset):
        clusterer = build(registry, **settings)
        return cluster_users(clusterer, dataset), clusterer.state_dict()

    for observed in ((), (*early, *train)):
        found = fitted(Dataset(train, late, of_user, names, observed=observed))
        for held_out in (answered_otherwise(late), []):
            assert fitted(Dataset(train, held_out, of_user, names, observed=observed)) == found
        # The other way round: who reads answers learns from those of the training period, all of them.
        if settings["name"] == "latent_class":
            other = answered_otherwise(train)
            told = Dataset(
                other, late, of_user, names, observed=(*early, *other) if observed else ()
            )
            assert fitted(told) != found
            known = len(observed or train)
            assert found[1]["log_likelihood"] == pytest.approx(
                recomputed(found[1], [*early, *train][-known:])[0], rel=1e-12
            )


# --- random ---------------------------------------------------------------------------------------


def test_random_deals_the_sizes_it_was_told(registry):
    users = [f"u{i}" for i in range(361)]
    nothing = np.empty((361, 0))
    asked = {"sizes": [21, 120, 90, 80, 50], "num_clusters": 5}
    dealt = build(registry, name="random", **asked)
    dealt.fit(users, nothing, [])
    labels = dealt.assign(users, nothing)
    assert [labels.count(k) for k in range(5)] == [120, 90, 80, 50, 21]

    # Nobody's cluster depends on the order that users come in, but on the seed.
    other = build(registry, name="random", **asked)
    other.fit(users[::-1], nothing, [])
    assert other.assign(users, nothing) == labels
    reseeded = build(registry, name="random", seed=1, **asked)
    reseeded.fit(users, nothing, [])
    assert abs(adjusted_rand_score(reseeded.assign(users, nothing), labels)) < 0.03

    for num_users, sizes in ((10, [4, 3, 3]), (11, [4, 4, 3]), (3, [1, 1, 1])):
        equal = build(registry, name="random", num_clusters=3)
        equal.fit(users[:num_users], nothing[:num_users], [])
        counts = Counter(equal.assign(users[:num_users], nothing[:num_users]))
        assert [counts[k] for k in range(3)] == sizes


def test_random_deals_strangers_by_the_sizes(registry):
    dealt = build(registry, name="random", num_clusters=3, sizes=[6, 3, 1])
    dealt.fit([f"u{i}" for i in range(10)], np.empty((10, 0)), [])
    labels = dealt.assign([f"s{i}" for i in range(10_000)], np.empty((10_000, 0)))
    for cluster, share in enumerate((0.6, 0.3, 0.1)):
        # Five standard errors.
        assert (
            abs(labels.count(cluster) / 10_000 - share) < 5 * math.sqrt(share * (1 - share)) / 100
        )


def test_random_refuses_what_it_cannot_deal(registry):
    with pytest.raises(ConfigError, match="sizes has 2 entries, expected num_clusters = 3"):
        build(registry, name="random", num_clusters=3, sizes=[1, 2])
    with pytest.raises(ConfigError, match="sizes has 0.0, expected numbers above 0"):
        build(registry, name="random", num_clusters=2, sizes=[1, 0])
    for sizes, words in (
        ([], "2 users are too few for 3"),
        ([9, 1, 1], "cluster 1 would be empty"),
    ):
        clusterer = build(registry, name="random", num_clusters=3, sizes=sizes)
        with pytest.raises(DataError, match=words):
            clusterer.fit(["a", "b"], np.empty((2, 0)), [])
    with pytest.raises(CheckpointError, match="user 'a' in cluster 3, expected one of 3"):
        clusterer.load_state_dict({"cluster_of": {"a": 3}})


# --- minibatch_kmeans, gaussian_mixture, hdbscan --------------------------------------------------

CENTERS = np.array([[0.0, 0.0, 900.0], [0.6, 0.0, -900.0], [0.6, 5.0, 0.0]])


@pytest.fixture(scope="module")
def planted():
    """Users in three clusters of known sizes, features on very different scales, shuffled."""
    rng = np.random.default_rng(5)
    truth = rng.permutation(np.repeat([0, 1, 2], (60, 40, 20)))
    features = CENTERS[truth] + rng.normal(size=(len(truth), 3)) * [0.05, 0.2, 40.0]
    return [f"user-{i}" for i in range(len(truth))], features, truth.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "minibatch_kmeans", "num_clusters": 3, "batch_size": 30},
        *(
            {"name": "gaussian_mixture", "num_clusters": 3, "covariance": covariance}
            for covariance in ("diag", "full", "spherical", "tied")
        ),
        {"name": "hdbscan", "min_cluster_size": 10},
    ],
    ids=lambda tree: "-".join(map(str, tree.values())),
)
def test_planted_clusters_are_found_and_numbered_by_size(registry, planted, settings):
    users, features, truth = planted
    for seed in range(3) if settings["name"] != "hdbscan" else [0]:
        seeded = {"seed": seed} if settings["name"] != "hdbscan" else {}
        clusterer = build(registry, **settings, **seeded)
        clusterer.fit(users, features, [])
        assert clusterer.assign(users, features) == truth
        assert clusterer.assign(["x", "y", "z"], CENTERS) == [0, 1, 2]


@pytest.mark.parametrize("covariance", ["diag", "full", "spherical", "tied"])
@pytest.mark.parametrize("num_clusters", [2, 3])
def test_memberships_of_a_mixture_are_the_posteriors_of_scikit_learn(
    registry, covariance, num_clusters
):
    # As many clusters as features in one case, where a diagonal and a matrix have one shape.
    rng = np.random.default_rng(7)
    truth = np.repeat([0, 1], (140, 60))
    features = rng.normal(size=(200, 3)) * [[1, 2, 30], [2, 1, 60]][0] + truth[:, None] * [2, 1, 5]
    users = [f"u{i}" for i in range(200)]
    settings = {"covariance": covariance, "num_clusters": num_clusters, "reg": 1e-3, "seed": 4}
    clusterer = build(registry, name="gaussian_mixture", **settings)
    clusterer.fit(users, features, [])
    points = (features - features.mean(axis=0)) / features.std(axis=0)
    oracle = GaussianMixture(
        num_clusters,
        covariance_type=covariance,
        reg_covar=1e-3,
        n_init=10,
        max_iter=1000,
        random_state=4,
    ).fit(points)
    expected = oracle.predict_proba(points)
    order = np.argsort(-np.bincount(expected.argmax(axis=1), minlength=num_clusters))
    found = [
        [row[k] for k in range(num_clusters)] for row in clusterer.memberships(users, features)
    ]
    np.testing.assert_allclose(found, expected[:, order], atol=1e-9)
    far = clusterer.memberships(["far"], np.array([[1e6, -1e6, 1e6]]))[0]
    assert sum(far.values()) == pytest.approx(1)


def test_a_mixture_refuses_what_it_cannot_fit(registry):
    users, alike = [f"u{i}" for i in range(20)], np.repeat(np.eye(4), 5, axis=0)
    settings = {"num_clusters": 4, "covariance": "full", "reg": 0.0}
    mixture = build(registry, name="gaussian_mixture", **settings)
    with pytest.raises(
        DataError, match="reg is 0 and the full covariances of 4 clusters of 20 users"
    ):
        mixture.fit(users, alike, [])
    mixture = build(registry, name="gaussian_mixture", num_clusters=5)
    with pytest.raises(DataError, match="num_clusters is 5, but only 4 of 20 users differ"):
        mixture.fit(users, alike, [])


@pytest.mark.parametrize(("covariance", "fewest"), [("full", 3 * 7), ("tied", 3 + 6)])
def test_correlations_want_more_users_than_they_have_directions(registry, covariance, fewest):
    rng, settings = np.random.default_rng(4), {"num_clusters": 3, "covariance": covariance}
    users, features = [f"u{i}" for i in range(fewest)], rng.normal(size=(fewest, 6))
    mixture = build(registry, name="gaussian_mixture", **settings)
    with pytest.raises(
        DataError,
        match=f"covariance is '{covariance}', and {fewest - 1} users are too few for 3 clusters of 6 "
        f"features; expected at least {fewest} users, or 'diag'",
    ):
        mixture.fit(users[1:], features[1:], [])
    mixture.fit(users, features, [])
    assert set(mixture.assign(users, features)) == {0, 1, 2}


@pytest.mark.parametrize(("covariance", "spreads"), [("diag", 3 * 500), ("spherical", 3)])
def test_a_mixture_of_many_features_keeps_as_many_numbers_as_it_learned(
    registry, covariance, spreads
):
    rng, truth = np.random.default_rng(6), np.repeat([0, 1, 2], (60, 40, 20))
    features = rng.normal(size=(120, 500)) + rng.normal(size=(3, 500))[truth]
    users = [f"u{i}" for i in range(120)]
    mixture = build(
        registry, name="gaussian_mixture", num_clusters=3, covariance=covariance, n_init=2
    )
    mixture.fit(users, features, [])
    assert mixture.assign(users, features) == truth.tolist()
    state = mixture.state_dict()
    # Mean and deviation of each feature, shares, means, and what there is of each cluster's spread.
    assert sum(np.size(value) for value in state.values()) == 2 * 500 + 3 + 3 * 500 + spreads
    assert all(
        sum(row.values()) == pytest.approx(1) for row in mixture.memberships(users, features)
    )


def test_hdbscan_puts_noise_where_it_is_told(registry):
    rng = np.random.default_rng(3)
    few, many = rng.normal(size=(20, 2)) * 0.1, rng.normal(size=(40, 2)) * 0.1 + [10, 0]
    noise = np.array([[3.0, 9.0], [7.0, -9.0]])
    features, users = np.vstack([few, noise, many]), [f"u{i}" for i in range(62)]
    nearest = build(registry, name="hdbscan", min_cluster_size=10)
    nearest.fit(users, features, [])
    assert nearest.assign(users, features) == [1] * 20 + [1, 0] + [0] * 40
    own = build(registry, name="hdbscan", min_cluster_size=10, noise="own")
    own.fit(users, features, [])
    assert own.assign(users, features) == [1] * 20 + [-1, -1] + [0] * 40
    # A stranger is where its nearest fitted user is, who may be noise.
    strangers = np.array([[3.0, 8.0], [0.0, 0.3]])
    assert nearest.assign(["s", "t"], strangers) == [1, 1]
    assert own.assign(["s", "t"], strangers) == [-1, 1]
    scattered = build(registry, name="hdbscan", min_cluster_size=30)
    with pytest.raises(
        DataError, match="no cluster, all 32 users are noise; expected a lower min_"
    ):
        scattered.fit(users[:32], rng.normal(size=(32, 2)), [])


# --- latent_class ---------------------------------------------------------------------------------


def recomputed(state, examples):
    """Log-likelihood of choices, and posteriors of people, in plain loops."""
    value_of = [dict(zip(state["attributes"], row, strict=True)) for row in state["coefficients"]]
    people: dict[str, list[float]] = {}
    for example in examples:
        logs = people.setdefault(example.user, [0.0] * len(value_of))
        for k, values in enumerate(value_of):
            utilities = [
                sum(
                    values[part] if isinstance(part, str) else values[f"attribute {place}"] * part
                    for place, part in enumerate(listed, start=1)
                )
                for listed in example.columns["attributes"]
            ]
            taken = utilities[example.columns["position"]]
            logs[k] += taken - math.log(sum(map(math.exp, utilities)))
    total, posteriors = 0.0, {}
    for person, logs in people.items():
        joint = [s * math.exp(log) for s, log in zip(state["shares"], logs, strict=True)]
        total += math.log(sum(joint))
        posteriors[person] = [each / sum(joint) for each in joint]
    return total, posteriors


@pytest.fixture(scope="module")
def classes(registry):
    """People of three known classes, and the fit of three."""
    users, truth, examples = simulated(seed=11, num_people=300)
    clusterer = build(registry, name="latent_class", num_clusters=3, penalty=0.0)
    clusterer.fit(users, np.empty((len(users), 0)), examples)
    return users, truth, examples, clusterer


def test_latent_classes_of_a_simulated_panel_are_found(classes):
    users, truth, _, clusterer = classes
    labels = clusterer.assign(users, np.empty((len(users), 0)))
    # Twelve choices leave doubt about a few people: those of true coefficients would as well.
    assert adjusted_rand_score(truth, labels) > 0.9
    state = clusterer.state_dict()
    np.testing.assert_allclose(state["shares"], np.bincount(truth) / len(truth), atol=0.03)
    found = [dict(zip(state["attributes"], row, strict=True)) for row in state["coefficients"]]
    for values, taste in zip(found, TASTES, strict=True):
        # Brands are told apart by differences alone.
        assert values["attribute 1"] == pytest.approx(taste[0], abs=0.35)
        for brand in (1, 2):
            contrast = values[BRANDS[brand]] - values[BRANDS[0]]
            assert contrast == pytest.approx(taste[1 + brand] - taste[1], abs=0.6)


def test_log_likelihood_posteriors_and_bic_are_what_plain_loops_find(classes):
    users, _, examples, clusterer = classes
    state = clusterer.state_dict()
    log_likelihood, posteriors = recomputed(state, examples)
    assert clusterer.log_likelihood == pytest.approx(log_likelihood, rel=1e-12)
    for user, row in zip(users, clusterer.memberships(users, np.empty((300, 0))), strict=True):
        assert list(row.values()) == pytest.approx(posteriors[user], abs=1e-10)
    # Three classes of a price and two contrasts each, and two free shares.
    assert clusterer.bic == pytest.approx((3 * 3 + 2) * math.log(300) - 2 * log_likelihood)


def test_bic_knows_the_number_of_classes(registry, classes):
    users, _, examples, clusterer = classes
    bics = {3: clusterer.bic}
    for num_clusters in (1, 2, 4):
        other = build(registry, name="latent_class", num_clusters=num_clusters, n_init=3)
        other.fit(users, np.empty((300, 0)), examples)
        bics[num_clusters] = other.bic
    assert min(bics, key=lambda k: bics[k]) == 3


@pytest.mark.parametrize("penalty", [0.0, 5.0])
def test_em_never_decreases_what_it_raises(penalty):
    _, _, examples = simulated(seed=2, num_people=60)
    choices = latent_class._Choices.read(examples)
    for seed in range(3):
        start = 2 * np.random.default_rng(seed).normal(size=(4, choices.x.shape[2]))
        fits = list(itertools.islice(latent_class._em(choices, start, penalty), 60))
        gains = np.diff([fit.objective for fit in fits])
        assert gains.min() >= -1e-9 and gains[0] > 1
        for fit in (fits[0], fits[7]):
            squares = penalty / 2 * np.square(fit.coefficients).sum()
            assert fit.objective == pytest.approx(fit.log_likelihood - squares)
            assert fit.shares.sum() == pytest.approx(1)


def test_one_class_is_a_multinomial_logit(registry):
    users, _, examples = simulated(seed=4, num_people=80)
    nothing = np.empty((80, 0))
    clusterer = build(registry, name="latent_class", num_clusters=1, penalty=0.0)
    clusterer.fit(users, nothing, examples)

    def loss(b):
        """Minus the log-likelihood of a price and the second and third brand."""
        total = 0.0
        for example in examples:
            values = [utility([b[0], 0.0, b[1], b[2]], a) for a in example.columns["attributes"]]
            total += math.log(sum(map(math.exp, values))) - values[example.columns["position"]]
        return total

    oracle = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-4})
    state = clusterer.state_dict()
    assert clusterer.log_likelihood == pytest.approx(-oracle.fun, abs=1e-6)
    values = dict(zip(state["attributes"], state["coefficients"][0], strict=True))
    contrasts = [values["blue"] - values["red"], values["white"] - values["red"]]
    assert [values["attribute 1"], *contrasts] == pytest.approx(oracle.x, abs=1e-4)
    assert clusterer.assign(users, nothing) == [0] * 80
    assert state["shares"] == [1.0]


def test_a_penalty_keeps_a_rule_without_exception_finite(registry):
    rng = np.random.default_rng(0)
    offered = np.sort(rng.normal(size=(40, 3)), axis=1)
    # The dearest of three, always.
    examples = [
        Example("?", f"p{i % 8}", {"attributes": row[:, None].tolist(), "position": 2})
        for i, row in enumerate(offered)
    ]
    users = [f"p{i}" for i in range(8)]
    clusterer = build(registry, name="latent_class", num_clusters=1, penalty=2.0)
    clusterer.fit(users, np.empty((8, 0)), examples)
    centered = offered - offered.mean(axis=1, keepdims=True)
    x = centered / math.sqrt(np.square(centered).mean())

    def loss(b):
        return -sum(b * row[2] - math.log(np.exp(b * row).sum()) for row in x) + b * b

    oracle: Any = minimize_scalar(loss, bounds=(0, 50), method="bounded", options={"xatol": 1e-9})
    found = clusterer.state_dict()["coefficients"][0][0]
    assert found * math.sqrt(np.square(centered).mean()) == pytest.approx(oracle.x, rel=1e-4)


def test_attributes_that_never_differ_or_say_the_same_add_nothing(registry):
    users, _, examples = simulated(seed=6, num_people=60)

    def fitted(change):
        changed: Any = [
            Example(
                "?",
                e.user,
                {**e.columns, "attributes": [change(*a) for a in e.columns["attributes"]]},
            )
            for e in examples
        ]
        clusterer = build(registry, name="latent_class", num_clusters=2, penalty=0.0, n_init=3)
        clusterer.fit(users, np.empty((60, 0)), changed)
        return clusterer

    plain = fitted(lambda price, brand: [price, brand])
    padded = fitted(lambda price, brand: [1e3 * price, brand, "tin", 0.1, -price, f"not {brand}"])
    assert padded.log_likelihood == pytest.approx(plain.log_likelihood, abs=0.02)
    assert padded.bic - plain.bic == pytest.approx(0, abs=0.05)
    state = padded.state_dict()
    for row in state["coefficients"]:
        values = dict(zip(state["attributes"], row, strict=True))
        assert values["tin"] == values["attribute 4"] == 0
    agree = adjusted_rand_score(
        plain.assign(users, np.empty((60, 0))), padded.assign(users, np.empty((60, 0)))
    )
    assert agree > 0.95


def test_whoever_made_no_choice_belongs_to_classes_by_their_shares(registry):
    users, _, examples = simulated(seed=8, num_people=40)
    clusterer = build(registry, name="latent_class", num_clusters=2, n_init=2)
    # More silent people than others: the class they are assigned to is the largest.
    everybody = [*users, *(f"silent-{i}" for i in range(100))]
    clusterer.fit(everybody, np.empty((140, 0)), examples)
    shares = clusterer.state_dict()["shares"]
    asked = ["silent-3", "stranger"]
    for row in clusterer.memberships(asked, np.empty((2, 0))):
        assert list(row.values()) == shares
    assert clusterer.assign(asked, np.empty((2, 0))) == [0, 0] and shares[0] > shares[1]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"answer": "B"}, ["no column 'attributes'", "panel, movielens and feedback"]),
        ({"attributes": [["a"], ["b"]]}, ["no column 'position'"]),
        ({"attributes": [["a"], ["b"]], "position": 2}, ["position 2", "[['a'], ['b']]"]),
        ({"attributes": [["a"], ["b"]], "position": "A"}, ["position 'A'"]),
        ({"attributes": "ab", "position": 0}, ["attributes 'ab'"]),
        ({"attributes": ["a", "b"], "position": 0}, ["attributes 'a'", "words and finite numbers"]),
        ({"attributes": [["a"], [None]], "position": 0}, ["attributes [None]"]),
        ({"attributes": [["a"], [math.nan]], "position": 0}, ["attributes [nan]"]),
    ],
)
def test_latent_classes_refuse_what_is_no_choice(registry, columns, words):
    clusterer = build(registry, name="latent_class", num_clusters=1)
    with pytest.raises(DataError) as caught:
        clusterer.fit(["p"], np.empty((1, 0)), [Example("?", "p", columns)])
    assert all(word in str(caught.value) for word in ["user 'p'", *words]), caught.value


def test_latent_classes_refuse_choices_that_say_nothing(registry):
    clusterer = build(registry, name="latent_class", num_clusters=3)
    users, nothing = ["p", "q"], np.empty((2, 0))
    rows = [
        Example("?", user, {"attributes": [["a", 0.1]] * 3, "position": 1}) for user in users * 2
    ]
    with pytest.raises(DataError, match="no choices in the training period"):
        clusterer.fit(users, nothing, [])
    with pytest.raises(DataError, match="alternatives of the 4 choices .* do not differ"):
        clusterer.fit(users, nothing, rows)
    rows[0] = Example("?", "p", {"attributes": [["a"], ["b"]], "position": 1})
    with pytest.raises(DataError, match="num_clusters is 3, but only 2 people"):
        clusterer.fit(users, nothing, rows)
