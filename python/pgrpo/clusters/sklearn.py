"""Clusters that an estimator of scikit-learn finds."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from pgrpo.clusters.features import Scale, fitted, nearest, state_array
from pgrpo.config import Section
from pgrpo.config.checks import suggest
from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.types import ClusterId, Example, FloatArray, Json


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
        self._scale: Scale | None = None
        self._points: FloatArray = np.empty((0, 0))
        self._row_of: dict[str, int] = {}
        self._labels: list[int] = []

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Cluster the users.

        Raises:
            DataError: a feature is not finite, there are none, or the estimator refuses them.
        """
        scale = Scale.of(users, features)
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
        scale = fitted(self._scale, "sklearn")
        near = nearest(scale(users, features), self._points)
        rows = [self._row_of.get(user, int(row)) for user, row in zip(users, near, strict=True)]
        return [self._labels[row] for row in rows]

    def state_dict(self) -> dict[str, Json]:
        """Scale, and the fitted users with their standardised features [U, F] and labels [U]."""
        return {
            **fitted(self._scale, "sklearn").state_dict(),
            "users": list(self._row_of),
            "points": self._points.tolist(),
            "labels": list(self._labels),
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over what was fitted; raises CheckpointError where its parts do not fit together."""
        scale, points = Scale.from_state(state), state_array(state, "points", 2)
        labels = state_array(state, "labels", 1).astype(int).tolist()
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
