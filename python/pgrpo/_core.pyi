"""The Rust core: advantages over dense cluster ids 0, 1, 2, ...; all arrays C-contiguous."""

from typing import final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Normalizer", "__version__"]

__version__: str

@final
class Normalizer:
    """Rewards to advantages over dense cluster ids; all arrays are C-contiguous.

    Thread-safe; large batches are worked on detached from the interpreter, and must not be written
    to meanwhile. `pgrpo.errors.ConfigError` and `DataError` are raised as documented there.
    """

    def __new__(
        cls, estimator: str, ddof: int, eps: float, order: str, nan_policy: str
    ) -> Normalizer: ...
    def advantages(
        self,
        rewards: NDArray[np.float64],
        clusters: NDArray[np.uint32],
        groups: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]: ...
    def update(self, rewards: NDArray[np.float64], clusters: NDArray[np.uint32]) -> None: ...
    def normalize(
        self,
        rewards: NDArray[np.float64],
        clusters: NDArray[np.uint32],
        groups: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]: ...
    def snapshot(
        self,
    ) -> tuple[NDArray[np.uint64], NDArray[np.float64], NDArray[np.float64]]:
        """Counts, means and m2 by dense cluster id, each [K]."""
    def absorb(
        self,
        clusters: NDArray[np.uint32],
        counts: NDArray[np.uint64],
        means: NDArray[np.float64],
        m2s: NDArray[np.float64],
        num_nonfinite: int,
    ) -> None:
        """Merge histories kept elsewhere; into an empty history an exact copy."""
    @property
    def num_nonfinite(self) -> int: ...
