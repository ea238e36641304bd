"""The built-in clusterers, registered as anybody's are."""

from collections.abc import Callable
from typing import Any

from pgrpo.clusters.gaussian_mixture import GaussianMixture
from pgrpo.clusters.given import Column, Random, Single
from pgrpo.clusters.kmeans import KMeans, MiniBatchKMeans
from pgrpo.clusters.latent_class import LatentClass
from pgrpo.clusters.saved import Saved
from pgrpo.clusters.sklearn import Hdbscan, Sklearn
from pgrpo.plugins.hookspecs import hookimpl


@hookimpl
def pgrpo_register_clusterers(register: Callable[[str, Any], None]) -> None:
    """Offer what is built in."""
    register("kmeans", KMeans)
    register("minibatch_kmeans", MiniBatchKMeans)
    register("gaussian_mixture", GaussianMixture)
    register("hdbscan", Hdbscan)
    register("latent_class", LatentClass)
    register("column", Column)
    register("random", Random)
    register("single", Single)
    register("saved", Saved)
    register("sklearn", Sklearn)
