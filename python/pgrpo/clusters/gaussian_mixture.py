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
        (`tied`). Correlations of many features want very many users, for a spread that is learned from
        fewer users than features has none in some directions: `full` is refused for fewer than
        K (F + 1) users, `tied` for fewer than K + F."""
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
        self._factors: FloatArray = np.empty((0, 0))

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Fit shares [K], means [K, F] and covariances by EM.

        Raises:
            DataError: a feature is not finite, there are none, fewer than K users differ in any, there
                are too few for the covariances, or one of these cannot be inverted.
        """
        # Imported here, for it takes a second that the other clusterers save.
        from sklearn import mixture  # pyright: ignore[reportMissingTypeStubs]
        from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingTypeStubs]

        scale = Scale.of(users, features)
        points = scale(users, features)
        config = self._config
        check_distinct(points, config.num_clusters)
        self._check_size(*points.shape)
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
        self._factors = estimator.precisions_cholesky_
        order = by_size(self._posteriors(points).argmax(axis=1), config.num_clusters)
        self._shares, self._means = self._shares[order], self._means[order]
        if config.covariance != "tied":
            self._factors = self._factors[order]

    def _check_size(self, num_users: int, num_features: int) -> None:
        """Refuse covariances that are sure to be singular but for `reg`: what is learned of F features
        from N users varies in at most N - 1 directions."""
        covariance, num_clusters = self._config.covariance, self._config.num_clusters
        fewest = {
            "full": num_clusters * (num_features + 1),
            "tied": num_clusters + num_features,
        }.get(covariance, 0)
        if num_users < fewest:
            raise DataError(
                f"covariance is {covariance!r}, and {num_users} users are too few for {num_clusters} "
                f"clusters of {num_features} features; expected at least {fewest} users, or 'diag'"
            )

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
        for k, (share, mean) in enumerate(zip(self._shares, self._means, strict=True)):
            factor = self._factors if self._config.covariance == "tied" else self._factors[k]
            away = points - mean
            if factor.ndim == 2:
                # Below the diagonal of a factor there are zeros.
                columns = enumerate(factor.T, start=1)
                scaled = np.stack([(away[:, :n] * c[:n]).sum(axis=1) for n, c in columns], axis=1)
                diagonal = np.diag(factor)
            else:
                scaled, diagonal = away * factor, np.broadcast_to(factor, mean.shape)
            log_density = np.log(diagonal).sum() - np.square(scaled).sum(axis=1) / 2
            logs[:, k] = np.log(share) + log_density
        weights = np.exp(logs - logs.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def state_dict(self) -> dict[str, Json]:
        """Scale, shares [K], means [K, F] and factors of the inverse covariances: the upper triangles P
        of P P^T [K, F, F] of `full` and [F, F] of `tied`, what stands on their diagonals [K, F] of
        `diag`, and the one number that stands there [K] of `spherical`."""
        return {
            **fitted(self._scale, "gaussian_mixture").state_dict(),
            "shares": self._shares.tolist(),
            "means": self._means.tolist(),
            "factors": self._factors.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over what was fitted; raises CheckpointError where its parts do not fit together."""
        scale, shares = Scale.from_state(state), state_array(state, "shares", 1)
        num_clusters, num_features = self._config.num_clusters, len(scale.mean)
        of_factors: dict[Covariance, tuple[int, ...]] = {
            "diag": (num_clusters, num_features),
            "full": (num_clusters, num_features, num_features),
            "spherical": (num_clusters,),
            "tied": (num_features, num_features),
        }
        expected = of_factors[self._config.covariance]
        means = state_array(state, "means", 2)
        factors = state_array(state, "factors", len(expected))
        for key, array, shape in (
            ("shares", shares, (num_clusters,)),
            ("means", means, (num_clusters, num_features)),
            ("factors", factors, expected),
        ):
            if array.shape != shape:
                raise CheckpointError(
                    f"{key!r} of the state has shape {list(array.shape)}, expected {list(shape)}"
                )
        self._scale, self._shares, self._means, self._factors = scale, shares, means, factors
