"""Clusters that an estimator of scikit-learn finds."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pgrpo.clusters.features import Scale, by_size, fitted, nearest, state_array
from pgrpo.config import Section
from pgrpo.config.checks import suggest
from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.types import ClusterId, Example, FloatArray, Json


class _FittedUsers:
    """Users with the labels that an estimator of scikit-learn gave them.

    A fitted user keeps its label; anybody else gets that of the nearest fitted user, so that estimators
    without predict assign new users as well, and the state is plain numbers that survive a change of
    scikit-learn's version.
    """

    _name: ClassVar[str]
    """What a config calls the clusterer."""

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator
        self._scale: Scale | None = None
        self._points: FloatArray = np.empty((0, 0))
        self._row_of: dict[str, int] = {}
        self._labels: list[int] = []

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Cluster the users.

        Raises:
            DataError: a feature is not finite, there are none, or the estimator refuses them.
        """
        from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]

        scale = Scale.of(users, features)
        points = scale(users, features)
        try:
            # Sums of several threads differ by rounding from run to run.
            with threadpool_limits(limits=1):
                found = np.asarray(self._estimator.fit_predict(points)).astype(np.intp)
        except (ValueError, TypeError) as error:
            name = type(self._estimator).__name__
            raise DataError(f"{name} cannot cluster {len(users)} users: {error}") from error
        self._scale, self._points, self._labels = scale, points, self._named(points, found).tolist()
        self._row_of = {user: row for row, user in enumerate(users)}

    def _named(self, points: FloatArray, found: NDArray[np.intp]) -> NDArray[np.intp]:
        """[U] what the clusters are called that were found."""
        return found

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] the label a user was fitted with, or the nearest fitted user's."""
        scale = fitted(self._scale, self._name)
        points = scale(users, features)
        strangers = [row for row, user in enumerate(users) if user not in self._row_of]
        near = dict(zip(strangers, nearest(points[strangers], self._points).tolist(), strict=True))
        rows = [near[row] if row in near else self._row_of[user] for row, user in enumerate(users)]
        return [self._labels[row] for row in rows]

    def state_dict(self) -> dict[str, Json]:
        """Scale, and the fitted users with their standardised features [U, F] and labels [U]."""
        return {
            **fitted(self._scale, self._name).state_dict(),
            "users": list(self._row_of),
            "points": self._points.tolist(),
            "labels": list(self._labels),
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over what was fitted; raises CheckpointError where its parts do not fit together."""
        scale, points = Scale.from_state(state), state_array(state, "points", 2)
        labels = state_array(state, "labels", 1).astype(int).tolist()
        users = state.get("users")
        if points.shape[1] != len(scale.mean):
            raise CheckpointError(
                f"the state's points have {points.shape[1]} features, expected {len(scale.mean)}"
            )
        if not isinstance(users, list) or not len(users) == len(points) == len(labels):
            raise CheckpointError(
                f"the state's users, {len(points)} points and {len(labels)} labels differ in number"
            )
        self._scale, self._points, self._labels = scale, points, labels
        self._row_of = {str(user): row for row, user in enumerate(users)}


class Sklearn(_FittedUsers):
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

    _name = "sklearn"

    def __init__(self, config: Config) -> None:
        super().__init__(_build_estimator(config))


class Hdbscan(_FittedUsers):
    """Dense regions of the features, as many as there are, whatever their shape, by HDBSCAN.

    Users in no such region are noise. Cluster 0 is the largest, then by falling size. A fitted user
    keeps its cluster; anybody else gets that of the nearest fitted user.
    """

    class Config(Section):
        """What counts as a cluster, and where the others go."""

        min_cluster_size: int = Field(5, ge=2)
        """Fewest users that make a cluster."""
        min_samples: int | None = Field(None, ge=1)
        """Users, itself included, that a user must have near for its place to count as dense; as many
        as `min_cluster_size` if not given. More of them make more users noise."""
        noise: Literal["nearest", "own"] = "nearest"
        """Where noise goes: to the cluster of the nearest user who is none, or into a cluster of its
        own, -1."""

    _name = "hdbscan"

    def __init__(self, config: Config) -> None:
        from sklearn import cluster  # pyright: ignore[reportMissingTypeStubs]

        self._noise = config.noise
        super().__init__(
            cast(Any, cluster.HDBSCAN)(
                min_cluster_size=config.min_cluster_size,
                min_samples=config.min_samples,
                copy=True,
            )
        )

    def _named(self, points: FloatArray, found: NDArray[np.intp]) -> NDArray[np.intp]:
        dense = found >= 0
        if not dense.any():
            raise DataError(
                f"HDBSCAN found no cluster, all {len(points)} users are noise; expected a lower "
                "min_cluster_size or min_samples"
            )
        if self._noise == "nearest":
            found[~dense] = found[dense][nearest(points[~dense], points[dense])]
        order = by_size(found[found >= 0], int(found.max()) + 1)
        # The place of a cluster in that order is its name.
        return np.where(found >= 0, np.argsort(order)[found], -1)


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
