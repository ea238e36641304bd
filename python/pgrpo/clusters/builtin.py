"""The built-in clusterers, registered as anybody's are."""

from collections.abc import Callable
from typing import Any

from pgrpo.clusters.given import Column, Single
from pgrpo.clusters.kmeans import KMeans
from pgrpo.clusters.saved import Saved
from pgrpo.clusters.sklearn import Sklearn
from pgrpo.plugins.hookspecs import hookimpl


@hookimpl
def pgrpo_register_clusterers(register: Callable[[str, Any], None]) -> None:
    """Offer what is built in."""
    register("kmeans", KMeans)
    register("column", Column)
    register("single", Single)
    register("saved", Saved)
    register("sklearn", Sklearn)
