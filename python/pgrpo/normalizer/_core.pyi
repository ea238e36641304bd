"""The Rust core: rewards to advantages over the plainest of arrays."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

from pgrpo.types import ClusterId

__all__ = ["Normalizer", "__version__", "_noop"]

__version__: str

_Columns = tuple[list[ClusterId], NDArray[np.float64], list[ClusterId], NDArray[np.float64], int]

class _Noop(Protocol):
    def __call__(
        self,
        rewards: Any,
        clusters: Any,
        groups: Any = None,
        *,
        weights: Any = None,
        score_norms: Any = None,
        out: Any = None,
    ) -> None: ...

_noop: _Noop
"""What calling costs: the signature of a normalizer, and nothing done."""

@disjoint_base
class Normalizer:
    """What `pgrpo.ClusterNormalizer` is made of, and documents.

    Rewards and `out` are arrays of float32 or float64, ids arrays of int32 or int64 or lists or tuples
    of ints and strings, weights and score norms arrays of float64; arrays are [N], contiguous,
    aligned and in native byte order. Anything else is handed to the method `_convert` of the
    subclass, which calls back.
    """

    def __new__(
        cls,
        estimator: str = "pgrpo",
        *,
        ddof: int = 0,
        eps: float = 1e-4,
        order: str = "update_then_normalize",
        nan_policy: str = "raise",
        forgetting: float = 1.0,
        prior_count: float = 0.0,
        sigma_floor: float = 0.0,
        clip: float | None = None,
        min_count: float = 1.0,
        frequency_weight: float = 0.0,
        track_diagnostics: bool = False,
        track_delta: bool = False,
        num_threads: int = 1,
        memory: tuple[NDArray[np.uint8], int, str, bool] | None = None,
    ) -> Normalizer:
        """`memory` is that of a shared table: its bytes, which are kept, its capacity, the options that
        all processes must agree on, and whether nobody else has it mapped."""
    @staticmethod
    def _layout(
        estimator: str, track_diagnostics: bool, capacity: int, agreed: str
    ) -> tuple[int, bytes]:
        """Bytes of a shared table, and its header."""
    def __call__(
        self,
        rewards: Any,
        clusters: Any,
        groups: Any = None,
        *,
        weights: Any = None,
        score_norms: Any = None,
        out: Any = None,
    ) -> Any: ...
    def update(
        self,
        rewards: Any,
        clusters: Any,
        groups: Any = None,
        *,
        weights: Any = None,
        score_norms: Any = None,
    ) -> None: ...
    def normalize(
        self,
        rewards: Any,
        clusters: Any,
        groups: Any = None,
        *,
        weights: Any = None,
        score_norms: Any = None,
        out: Any = None,
    ) -> Any: ...
    def retract(self, rewards: Any, clusters: Any, *, weights: Any = None) -> None: ...
    @property
    def num_nonfinite(self) -> int: ...
    def delta(self) -> bytes: ...
    def _columns(self) -> _Columns:
        """Ids [K] and columns [K, 13] of all clusters; the same of what the next delta holds; number of
        non-finite rewards."""
    def _restore_columns(self, state: _Columns) -> None: ...
    def _encode(self) -> bytes: ...
    def _restore(self, snapshot: bytes) -> None: ...
    def _merge(self, snapshot: bytes) -> None: ...
