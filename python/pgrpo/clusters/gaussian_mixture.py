"""Clusters that overlap, each an ellipsoid of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import Field

from pgrpo.clusters.features import Scale, by_size, check_distinct, fitted, state_array
from pgrpo.config import Section
from pgrpo.errors import CheckpointError, DataError
from pgrpo.types import ClusterId, Example, FloatArray, Json

Covariance: TypeAlias = Literal["diag", "full", "spherical", "tied"]

MAX_ITERATIONS = 1000
"""Steps of EM at most; mixtures of users come to rest long before."""


class GaussianMixture:
    """A mixture of normal distributions of standardised features, with soft membership.

    Users belong to each cluster by their posterior probability of it, and are assigned to the most
    probable one. Cluster 0 has the most users assigned, then by falling number.
    """

    class Config(Section):
        """How many clusters, of which shapes, and how hard to search for them."""

        num_clusters: int = Field(ge=1)
        """Clusters to make (K)."""
        covariance: Covariance = "diag"
        """What a cluster's spread may be: of its own in each feature (`diag`), correlated as well
        (`full`), equal in all features (`spherical`), or correlated and the same for all clusters
        (`tied`). `full` has F^2 / 2 numbers to learn for each cluster, and wants many users."""
        reg: float = Field(1e-6, ge=0)
        """Added to all variances, in units of a feature's own over all users, so that none becomes 0
        where users of a cluster are alike."""
        n_init: int = Field(10, ge=1)
        """Random starts, of which the best is kept."""
        seed: int = Field(0, ge=0)
        """Seeds the starts; the same under every seed of the run."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._scale: Scale | None = None
        self._shares: FloatArray = np.empty(0)
        self._means: FloatArray = np.empty((0, 0))
        self._factors: FloatArray = np.empty((0, 0, 0))

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Fit shares [K], means [K, F] and covariances by EM.

        Raises:
            DataError: a feature is not finite, there are none, fewer than K users differ in any, or a
                covariance cannot be inverted.
        """
        # Imported here, for it takes a second that the other clusterers save.
        from sklearn import mixture  # pyright: ignore[reportMissingTypeStubs]
        from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]

        scale = Scale.of(users, features)
        points = scale(users, features)
        config = self._config
        check_distinct(points, config.num_clusters)
        estimator: Any = mixture.GaussianMixture(
            config.num_clusters,
            covariance_type=config.covariance,
            reg_covar=config.reg,
            n_init=config.n_init,
            max_iter=MAX_ITERATIONS,
            random_state=config.seed,
        )
        try:
            # Sums of several threads differ by rounding from run to run.
            with threadpool_limits(limits=1):
                estimator.fit(points)
        except ValueError as error:
            raise DataError(
                f"reg is {config.reg:g} and the {config.covariance} covariances of "
                f"{config.num_clusters} clusters of {len(users)} users cannot be inverted; expected a "
                "larger reg or fewer clusters"
            ) from error
        self._scale, self._shares, self._means = scale, estimator.weights_, estimator.means_
        self._factors = _factors(
            config.covariance, estimator.precisions_cholesky_, self._means.shape
        )
        order = by_size(self._posteriors(points).argmax(axis=1), config.num_clusters)
        self._shares, self._means = self._shares[order], self._means[order]
        self._factors = self._factors[order]

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] the most probable cluster; the first of equally probable ones."""
        scale = fitted(self._scale, "gaussian_mixture")
        return list(self._posteriors(scale(users, features)).argmax(axis=1).tolist())

    def memberships(
        self, users: Sequence[str], features: FloatArray
    ) -> list[Mapping[ClusterId, float]]:
        """[U] posterior probability of each cluster."""
        scale = fitted(self._scale, "gaussian_mixture")
        return [dict(enumerate(row)) for row in self._posteriors(scale(users, features)).tolist()]

    def _posteriors(self, points: FloatArray) -> FloatArray:
        """[U, K]; what is the same for all clusters is left out of the densities.

        Written as sums along features, not through a matrix product, whose rounding would depend on
        how many users are asked for together.
        """
        logs = np.empty((len(points), len(self._means)))
        for k, (share, mean, factor) in enumerate(
            zip(self._shares, self._means, self._factors, strict=True)
        ):
            away = points - mean
            squared = [np.square((away * column).sum(axis=1)) for column in factor.T]
            log_density = np.log(np.diag(factor)).sum() - np.stack(squared, axis=1).sum(axis=1) / 2
            logs[:, k] = np.log(share) + log_density
        weights = np.exp(logs - logs.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def state_dict(self) -> dict[str, Json]:
        """Scale, shares [K], means [K, F] and factors [K, F, F] of the inverse covariances, each the
        upper triangle P of P P^T."""
        return {
            **fitted(self._scale, "gaussian_mixture").state_dict(),
            "shares": self._shares.tolist(),
            "means": self._means.tolist(),
            "factors": self._factors.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over what was fitted; raises CheckpointError where its parts do not fit together."""
        scale, shares = Scale.from_state(state), state_array(state, "shares", 1)
        means, factors = state_array(state, "means", 2), state_array(state, "factors", 3)
        num_clusters, num_features = self._config.num_clusters, len(scale.mean)
        for key, array, shape in (
            ("shares", shares, (num_clusters,)),
            ("means", means, (num_clusters, num_features)),
            ("factors", factors, (num_clusters, num_features, num_features)),
        ):
            if array.shape != shape:
                raise CheckpointError(
                    f"{key!r} of the state has shape {list(array.shape)}, expected {list(shape)}"
                )
        self._scale, self._shares, self._means, self._factors = scale, shares, means, factors


def _factors(covariance: Covariance, cholesky: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """[K, F, F] the factors of clusters whose means have `shape` [K, F], out of what scikit-learn
    keeps of them, without zeros and nothing twice."""
    num_clusters, num_features = shape
    match covariance:
        case "spherical":
            return cholesky[:, None, None] * np.eye(num_features)
        case "diag":
            return cholesky[:, :, None] * np.eye(num_features)
        case "tied":
            return np.repeat(cholesky[None], num_clusters, axis=0)
        case "full":
            return cholesky
