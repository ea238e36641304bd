"""Clusters of users whose features lie near each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
from pydantic import Field

from pgrpo.clusters.features import Scale, by_size, check_distinct, fitted, nearest, state_array
from pgrpo.config import Section
from pgrpo.errors import CheckpointError
from pgrpo.types import ClusterId, Example, FloatArray, Json


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

    _name: ClassVar[str] = "kmeans"
    _estimator: ClassVar[str] = "KMeans"
    """Class of scikit-learn that finds the centres; settings of a `Config` are its own by their names,
    but for the two that are called otherwise there."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._scale: Scale | None = None
        self._centers: FloatArray = np.empty((0, 0))

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Find the centres [K, F].

        Raises:
            DataError: a feature is not finite, there are none, or fewer than K users differ in any.
        """
        # Imported here, for it takes a second that the other clusterers save.
        from sklearn import cluster  # pyright: ignore[reportMissingTypeStubs]
        from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]

        scale = Scale.of(users, features)
        points = scale(users, features)
        config = self._config
        check_distinct(points, config.num_clusters)
        estimator: Any = getattr(cluster, self._estimator)(
            config.num_clusters,
            random_state=config.seed,
            **config.model_dump(exclude={"num_clusters", "seed"}),
        )
        # Threads add up a centre in the order they finish, which would differ from run to run.
        with threadpool_limits(limits=1):
            centers = cast(FloatArray, estimator.fit(points).cluster_centers_)
        order = by_size(nearest(points, centers), config.num_clusters)
        self._scale, self._centers = scale, centers[order]

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] number of the nearest centre; the first of equally near ones."""
        scale = fitted(self._scale, self._name)
        return list(nearest(scale(users, features), self._centers).tolist())

    def state_dict(self) -> dict[str, Json]:
        """Scale and centres."""
        scale = fitted(self._scale, self._name)
        return {**scale.state_dict(), "centers": self._centers.tolist()}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over scale and centres; raises CheckpointError where they do not fit together."""
        scale, centers = Scale.from_state(state), state_array(state, "centers", 2)
        if centers.shape != (self._config.num_clusters, len(scale.mean)):
            raise CheckpointError(
                f"the state holds {centers.shape[0]} centres of {centers.shape[1]} features, "
                f"expected {self._config.num_clusters} of {len(scale.mean)}"
            )
        self._scale, self._centers = scale, centers


class MiniBatchKMeans(KMeans):
    """k-means on samples of the users, for very many of them; cluster 0 is the largest, as there."""

    class Config(KMeans.Config):
        """How many clusters, how hard to search for them, and by how many users at a time."""

        batch_size: int = Field(1024, ge=1)
        """Users of a sample."""

    _name = "minibatch_kmeans"
    _estimator = "MiniBatchKMeans"
