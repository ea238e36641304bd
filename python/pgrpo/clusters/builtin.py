"""The built-in clusterers, registered as anybody's are, and a description of what they found.

Axes: U users, F features, K clusters. Features are standardised to mean 0 and standard deviation 1
over the fitted users before any distance is taken.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pgrpo.config import Section
from pgrpo.config.checks import suggest
from pgrpo.errors import CheckpointError, ConfigError, DataError, PgrpoError, PluginError
from pgrpo.plugins.hookspecs import Clusterer, hookimpl
from pgrpo.types import ClusterId, Dataset, Example, FloatArray, Json

_NOTABLE_Z = 0.1
"""Nearer to the mean of all users than this, a feature tells nothing of a cluster."""


@hookimpl
def pgrpo_register_clusterers(register: Callable[[str, Any], None]) -> None:
    """Offer what is built in."""
    register("kmeans", KMeans)
    register("column", Column)
    register("single", Single)
    register("sklearn", Sklearn)


def cluster_users(
    clusterer: Clusterer, dataset: Dataset, state: Mapping[str, Json] | None = None
) -> dict[str, ClusterId]:
    """Fit a clusterer to a data set, or restore it, and say every user's cluster.

    What a plugin returns is checked here, before the first step: one int or string per user, no two
    of them alike in print, and a state that JSON can hold.

    Raises:
        PluginError: the clusterer raised, or returned something else.
    """
    users = list(dataset.users)
    features = np.array([dataset.users[user] for user in users], dtype=np.float64)
    features = features.reshape(len(users), len(dataset.feature_names))
    name = type(clusterer).__name__
    try:
        if state is None:
            clusterer.fit(users, features, _AllExamples(dataset))
        else:
            clusterer.load_state_dict(state)
        assigned = [_cluster_id(cluster) for cluster in clusterer.assign(users, features)]
        json.dumps(clusterer.state_dict(), allow_nan=False)
    except PgrpoError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"clusterer {name} failed: {type(error).__name__}: {reason}") from error
    if len(assigned) != len(users):
        raise PluginError(
            f"clusterer {name} returned {len(assigned)} clusters for {len(users)} users"
        )
    if len({str(cluster) for cluster in assigned}) < len(set(assigned)):
        raise PluginError(
            f"clusterer {name} returned clusters that differ only in type, as 1 and '1'"
        )
    return dict(zip(users, assigned, strict=True))


def _cluster_id(cluster: object) -> ClusterId:
    """A plain int or string, also out of NumPy's types."""
    if isinstance(cluster, np.generic):
        cluster = cast(object, cluster.item())
    if isinstance(cluster, bool) or not isinstance(cluster, int | str):
        raise TypeError(f"a cluster is an int or a string, not {cluster!r}")
    return cluster


class _AllExamples(Sequence[Example]):
    """Training and held-out examples behind one another, made as they are read."""

    def __init__(self, dataset: Dataset) -> None:
        self._parts = (dataset.train, dataset.evaluation)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        train, evaluation = self._parts
        return train[place] if place < len(train) else evaluation[place - len(train)]


class KMeans:
    """k-means on standardised features; cluster 0 is the largest, then by falling size."""

    class Config(Section):
        """How many clusters, and how hard to search for them."""

        num_clusters: int = Field(ge=1)
        """Clusters to make (K)."""
        n_init: int = Field(10, ge=1)
        """Random starts, of which the best is kept."""
        seed: int = Field(0, ge=0)
        """Seeds the starts; the same under every seed of the run."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._scale: _Scale | None = None
        self._centers: FloatArray = np.empty((0, 0))

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Find the centres [K, F].

        Raises:
            DataError: a feature is not finite, there are none, or fewer than K users differ in any.
        """
        # Imported here, for it takes a second that the other clusterers save.
        from sklearn import cluster  # pyright: ignore[reportMissingTypeStubs]
        from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]

        scale = _Scale.of(users, features)
        points = scale(users, features)
        num_clusters, num_distinct = self._config.num_clusters, len(np.unique(points, axis=0))
        if num_distinct < num_clusters:
            raise DataError(
                f"num_clusters is {num_clusters}, but only {num_distinct} of {len(users)} users "
                "differ in their features"
            )
        # Threads add up a centre in the order they finish, which would differ from run to run.
        kmeans: Any = cluster.KMeans(
            num_clusters, n_init=cast(Any, self._config.n_init), random_state=self._config.seed
        )
        with threadpool_limits(limits=1):
            centers = cast(FloatArray, kmeans.fit(points).cluster_centers_)
        sizes = np.bincount(_nearest(points, centers), minlength=num_clusters)
        self._scale, self._centers = scale, centers[np.argsort(-sizes, kind="stable")]

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] number of the nearest centre; the first of equally near ones."""
        scale = _fitted(self._scale, "kmeans")
        return list(_nearest(scale(users, features), self._centers).tolist())

    def state_dict(self) -> dict[str, Json]:
        """Scale and centres."""
        scale = _fitted(self._scale, "kmeans")
        return {**scale.state_dict(), "centers": self._centers.tolist()}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over scale and centres; raises CheckpointError where they do not fit together."""
        scale, centers = _Scale.from_state(state), _array(state, "centers", 2)
        if centers.shape != (self._config.num_clusters, len(scale.mean)):
            raise CheckpointError(
                f"the state holds {centers.shape[0]} centres of {centers.shape[1]} features, "
                f"expected {self._config.num_clusters} of {len(scale.mean)}"
            )
        self._scale, self._centers = scale, centers


class Column:
    """The cluster stands in a column of the examples, the same in all rows of a user."""

    class Config(Section):
        """Which column."""

        column: str
        """Column with the cluster's name, a string or a whole number."""

    def __init__(self, config: Config) -> None:
        self._column = config.column
        self._cluster_of: dict[str, ClusterId] = {}

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Read off each user's cluster.

        Raises:
            DataError: a user's rows lack the column, disagree, or hold something else.
        """
        column = self._column
        rows: dict[str, Counter[ClusterId]] = {}
        gaps: Counter[str] = Counter()
        for example in examples:
            value = example.columns.get(column)
            if value is None:
                gaps[example.user] += 1
            elif type(value) is str or type(value) is int:
                rows.setdefault(example.user, Counter())[value] += 1
            else:
                raise DataError(
                    f"column {column!r} of user {example.user!r} holds {value!r}; a cluster is a "
                    "string or a whole number"
                )
        for user, num_gaps in gaps.items():
            num_rows = num_gaps + sum(rows.get(user, Counter()).values())
            raise DataError(
                f"column {column!r} of user {user!r} is missing in {num_gaps} of {num_rows} rows; "
                "expected one cluster in all of them"
            )
        for user, counts in rows.items():
            if len(counts) > 1:
                held = " and ".join(f"{value!r} in {n} rows" for value, n in counts.most_common(3))
                raise DataError(
                    f"column {column!r} of user {user!r} holds {held}; expected one cluster in all "
                    "of them"
                )
        self._cluster_of = {user: next(iter(counts)) for user, counts in rows.items()}

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] what the column said; raises DataError for a user without rows."""
        for user in users:
            if user not in self._cluster_of:
                raise DataError(
                    f"user {user!r} has no row that column {self._column!r} is read from"
                )
        return [self._cluster_of[user] for user in users]

    def state_dict(self) -> dict[str, Json]:
        """User -> cluster."""
        return {"cluster_of": dict(self._cluster_of)}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over user -> cluster."""
        clusters = state.get("cluster_of")
        if not isinstance(clusters, Mapping):
            raise CheckpointError("the clusterer's state has no 'cluster_of'")
        self._cluster_of = dict(cast(Mapping[str, ClusterId], clusters))


class Single:
    """Everybody in cluster 0."""

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Nothing to learn."""

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] zeros."""
        return [0] * len(users)

    def state_dict(self) -> dict[str, Json]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Nothing to take over."""


class Sklearn:
    """Any clusterer of scikit-learn, or with its fit_predict, on standardised features.

    Keys beyond the ones here are the estimator's own parameters. A fitted user keeps the label that
    fit_predict gave (-1 is noise where the estimator knows it); anybody else gets the label of the
    nearest fitted user, so that estimators without predict assign new users as well, and the state
    is plain numbers that survive a change of scikit-learn's version.
    """

    class Config(Section, extra="allow"):
        """Which estimator, and its parameters."""

        estimator: str
        """Dotted path of the class, such as sklearn.cluster.AgglomerativeClustering."""
        seed: int = Field(0, ge=0)
        """Becomes random_state where the estimator has one."""

    def __init__(self, config: Config) -> None:
        self._estimator = _build_estimator(config)
        self._scale: _Scale | None = None
        self._points: FloatArray = np.empty((0, 0))
        self._row_of: dict[str, int] = {}
        self._labels: list[int] = []

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Cluster the users.

        Raises:
            DataError: a feature is not finite, there are none, or the estimator refuses them.
        """
        scale = _Scale.of(users, features)
        points = scale(users, features)
        try:
            labels = np.asarray(self._estimator.fit_predict(points))
        except (ValueError, TypeError) as error:
            name = type(self._estimator).__name__
            raise DataError(f"{name} cannot cluster {len(users)} users: {error}") from error
        self._scale, self._points, self._labels = scale, points, labels.astype(int).tolist()
        self._row_of = {user: row for row, user in enumerate(users)}

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] the label a user was fitted with, or the nearest fitted user's."""
        scale = _fitted(self._scale, "sklearn")
        nearest = _nearest(scale(users, features), self._points)
        rows = [self._row_of.get(user, int(row)) for user, row in zip(users, nearest, strict=True)]
        return [self._labels[row] for row in rows]

    def state_dict(self) -> dict[str, Json]:
        """Scale, and the fitted users with their standardised features [U, F] and labels [U]."""
        return {
            **_fitted(self._scale, "sklearn").state_dict(),
            "users": list(self._row_of),
            "points": self._points.tolist(),
            "labels": list(self._labels),
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over what was fitted; raises CheckpointError where its parts do not fit together."""
        scale, points = _Scale.from_state(state), _array(state, "points", 2)
        labels = _array(state, "labels", 1).astype(int).tolist()
        users = state.get("users")
        if not isinstance(users, list) or not len(users) == len(points) == len(labels):
            raise CheckpointError(
                f"the state's users, {len(points)} points and {len(labels)} labels differ in number"
            )
        self._scale, self._points, self._labels = scale, points, labels
        self._row_of = {str(user): row for row, user in enumerate(users)}


def _build_estimator(config: Sklearn.Config) -> Any:
    module, _, name = config.estimator.rpartition(".")
    try:
        cls: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"estimator {config.estimator!r} cannot be imported: {error}") from error
    if not inspect.isclass(cls) or not hasattr(cls, "fit_predict"):
        raise ConfigError(f"estimator {config.estimator!r} is no class with fit_predict")
    known = list(inspect.signature(cls).parameters)
    parameters = dict(config.model_extra or {})
    for key in parameters:
        if key not in known:
            raise ConfigError(f"{name} has no parameter {key!r}{suggest(key, known)}")
    if "random_state" in known:
        parameters.setdefault("random_state", config.seed)
    return cls(**parameters)


class _Scale:
    """Takes features to mean 0 and standard deviation 1; a constant feature becomes 0."""

    def __init__(self, mean: FloatArray, std: FloatArray) -> None:
        self.mean, self.std = mean, std

    @classmethod
    def of(cls, users: Sequence[str], features: FloatArray) -> _Scale:
        _check_features(users, features)
        if not users:
            raise DataError("there are no users to cluster")
        return cls(features.mean(axis=0), _std(features))

    @classmethod
    def from_state(cls, state: Mapping[str, Json]) -> _Scale:
        return cls(_array(state, "mean", 1), _array(state, "std", 1))

    def state_dict(self) -> dict[str, Json]:
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    def __call__(self, users: Sequence[str], features: FloatArray) -> FloatArray:
        _check_features(users, features)
        if features.shape[1] != len(self.mean):
            raise DataError(f"users have {features.shape[1]} features, expected {len(self.mean)}")
        return np.ascontiguousarray((features - self.mean) / self.std)


def _std(features: FloatArray) -> FloatArray:
    """[F] standard deviation; 1 for a constant feature, whose own would be rounding."""
    return np.where(np.ptp(features, axis=0) > 0, features.std(axis=0), 1.0)


def _check_features(users: Sequence[str], features: FloatArray) -> None:
    if features.ndim != 2 or len(features) != len(users):
        raise DataError(f"features have shape {list(features.shape)}, expected [{len(users)}, F]")
    if features.shape[1] == 0:
        raise DataError("the users of this data set have no features to be clustered by")
    for user, column in np.argwhere(~np.isfinite(features)).tolist():
        value = features[user, column]
        raise DataError(f"feature {column} of user {users[user]!r} is {value}, expected a number")


def _nearest(points: FloatArray, centers: FloatArray) -> NDArray[np.intp]:
    """[U] index of the centre nearest to each point.

    Written as differences, not through a matrix product, whose rounding would depend on how many
    users are assigned together.
    """
    squared = [np.square(points - center).sum(axis=1) for center in centers]
    return np.argmin(np.stack(squared), axis=0)


def _fitted(scale: _Scale | None, name: str) -> _Scale:
    if scale is None:
        raise PluginError(f"clusterer {name!r} was asked before it was fitted or restored")
    return scale


def _array(state: Mapping[str, Json], key: str, ndim: int) -> FloatArray:
    try:
        array = np.array(state[key], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the clusterer's state has no numbers {key!r}") from error
    if array.ndim != ndim:
        raise CheckpointError(f"{key!r} of the clusterer's state has {array.ndim} axes, not {ndim}")
    return array


class Description(TypedDict):
    """What a report tells of a cluster."""

    num_users: int
    share: float
    """Share of all users."""
    about: str
    """How its users differ from all users, such as `above average in likes War`."""


def describe(
    features: FloatArray, assignment: Sequence[ClusterId], feature_names: Sequence[str]
) -> dict[ClusterId, Description]:
    """Describe the clusters of users with features [U, F], the largest first.

    `about` names up to two features each whose mean in the cluster lies furthest above and below
    the mean of all users, in standard deviations z; |z| under 0.1 is not worth a word.
    """
    z = (features - features.mean(axis=0)) / _std(features)
    members: dict[ClusterId, list[int]] = {}
    for index, cluster_id in enumerate(assignment):
        members.setdefault(cluster_id, []).append(index)
    descriptions: dict[ClusterId, Description] = {}
    for cluster_id, rows in sorted(members.items(), key=lambda item: -len(item[1])):
        means = z[rows].mean(axis=0)
        order = np.argsort(means, kind="stable")
        above = [feature_names[int(i)] for i in order[::-1][:2] if means[i] > _NOTABLE_Z]
        below = [feature_names[int(i)] for i in order[:2] if means[i] < -_NOTABLE_Z]
        sides = (("above", above), ("below", below))
        about = "; ".join(f"{side} average in {', '.join(names)}" for side, names in sides if names)
        descriptions[cluster_id] = {
            "num_users": len(rows),
            "share": len(rows) / len(assignment),
            "about": about or "like all users",
        }
    return descriptions
