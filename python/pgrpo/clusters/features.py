"""Features of users as points between which distances are taken, and as a clusterer's state.

Axes: U users, F features, K clusters. Features are standardised to mean 0 and standard deviation 1
over the fitted users before any distance is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pgrpo.errors import CheckpointError, DataError, PluginError
from pgrpo.types import FloatArray, Json

LearnedT = TypeVar("LearnedT")


class Scale:
    """Takes features to mean 0 and standard deviation 1; a constant feature becomes 0."""

    def __init__(self, mean: FloatArray, std: FloatArray) -> None:
        self.mean, self.std = mean, std

    @classmethod
    def of(cls, users: Sequence[str], features: FloatArray) -> Scale:
        """The scale of these users; raises DataError as calling it does, and without users."""
        _check_features(users, features)
        if not users:
            raise DataError("there are no users to cluster")
        return cls(features.mean(axis=0), deviation(features))

    @classmethod
    def from_state(cls, state: Mapping[str, Json]) -> Scale:
        """What `state_dict` said; raises CheckpointError where it is not there."""
        mean, std = state_array(state, "mean", 1), state_array(state, "std", 1)
        if len(mean) != len(std):
            raise CheckpointError(
                f"the state has the means of {len(mean)} features and the deviations of {len(std)}"
            )
        return cls(mean, std)

    def state_dict(self) -> dict[str, Json]:
        """Mean and standard deviation of every feature."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    def __call__(self, users: Sequence[str], features: FloatArray) -> FloatArray:
        """[U, F] standardised; raises DataError for a number that is none, or another F."""
        _check_features(users, features)
        if features.shape[1] != len(self.mean):
            raise DataError(f"users have {features.shape[1]} features, expected {len(self.mean)}")
        return np.ascontiguousarray((features - self.mean) / self.std)


def standardised(features: FloatArray) -> FloatArray:
    """[U, F] with mean 0 and standard deviation 1; a constant feature becomes 0."""
    return (features - features.mean(axis=0)) / deviation(features)


def deviation(features: FloatArray) -> FloatArray:
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


def nearest(points: FloatArray, centers: FloatArray) -> NDArray[np.intp]:
    """[U] index of the centre nearest to each point.

    Written as differences, not through a matrix product, whose rounding would depend on how many
    users are assigned together.
    """
    squared = [np.square(points - center).sum(axis=1) for center in centers]
    return np.argmin(np.stack(squared), axis=0)


def check_distinct(points: FloatArray, num_clusters: int) -> None:
    """Raise DataError where fewer users differ than there are to be clusters."""
    num_distinct = len(np.unique(points, axis=0))
    if num_distinct < num_clusters:
        raise DataError(
            f"num_clusters is {num_clusters}, but only {num_distinct} of {len(points)} users "
            "differ in their features"
        )


def by_size(labels: Sequence[int] | NDArray[np.intp], num_clusters: int) -> NDArray[np.intp]:
    """[K] the clusters by falling number of users; equally large ones keep their order."""
    sizes = np.bincount(np.asarray(labels, dtype=np.intp), minlength=num_clusters)
    return np.argsort(-sizes, kind="stable")


def fitted(learned: LearnedT | None, name: str) -> LearnedT:
    """What clusterer `name` has learned; raises PluginError where it is nothing yet."""
    if learned is None:
        raise PluginError(f"clusterer {name!r} was asked before it was fitted or restored")
    return learned


def state_array(state: Mapping[str, Json], key: str, ndim: int) -> FloatArray:
    """The numbers that a clusterer's state holds under a key.

    Raises:
        CheckpointError: there are none, or they have another number of axes.
    """
    try:
        array = np.array(state[key], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the clusterer's state has no numbers {key!r}") from error
    if array.ndim != ndim:
        raise CheckpointError(f"{key!r} of the clusterer's state has {array.ndim} axes, not {ndim}")
    return array
