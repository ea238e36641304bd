"""The Rust core: rewards to advantages over the plainest of arrays."""

from typing import Any, final, type_check_only

import numpy as np
from numpy.typing import NDArray

from pgrpo.normalizer.options import Options
from pgrpo.types import ClusterId

__all__ = [
    "RULES",
    "Normalizer",
    "Rule",
    "Several",
    "__version__",
    "_noop",
    "check",
    "expected",
    "layout",
]

__version__: str

RULES: dict[str, Rule]
"""Every estimator, by its name."""

_Id = ClusterId | dict[str, ClusterId]

_Columns = tuple[
    list[_Id],
    NDArray[np.float64],
    list[_Id],
    NDArray[np.float64],
    tuple[float, float, float, float],
    int,
]

def check(options: Options, /) -> None:
    """Refuse options out of their ranges, or of other types, with a ConfigError."""

def expected(option: str, /) -> str | None:
    """What an option may be, as errors tell it; None if there is no such option."""

def layout(options: Options, capacity: int, agreed: str, /) -> tuple[int, bytes]:
    """Bytes of a shared table, and its header."""

def _noop(
    rewards: Any,
    clusters: Any,
    groups: Any,
    weights: Any,
    score_norms: Any,
    lengths: Any,
    parents: Any,
    out: Any,
    /,
) -> None:
    """What calling costs: the arguments of a normalizer's method, and nothing done."""

@final
class Rule:
    """What there is to know of an estimator."""

    @property
    def name(self) -> str:
        """The name users write."""
    @property
    def formula(self) -> str:
        """The advantage of a reward r, in one line."""
    @property
    def source(self) -> str:
        """Where it was published."""
    @property
    def reads_histories(self) -> bool:
        """Whether advantages depend on the histories of clusters."""
    @property
    def needs_groups(self) -> bool:
        """Whether rewards are compared within groups, which a batch must have then."""
    @property
    def zero_alone(self) -> bool:
        """Whether a group of one always gives 0."""
    @property
    def keeps_parts(self) -> bool:
        """Whether it keeps sums of groups, for which updates need groups as well."""
    @property
    def reads_score_norms(self) -> bool:
        """Whether score norms have an effect."""
    @property
    def needs_lengths(self) -> bool:
        """Whether rewards are weighed by lengths of completions, which a batch must have then."""
    @property
    def whitens(self) -> bool:
        """Whether it standardises the advantages of the whole call."""
    def without_effect(self, frequency_weight: float) -> list[str]:
        """Options that have no effect on advantages, with this `frequency_weight`."""

@type_check_only
class _Calls:
    """The methods that are given a batch. Each returns `NotImplemented`, and has done nothing, where an
    argument is not of the plainest kind."""

    def advantages(
        self,
        rewards: Any,
        clusters: Any,
        groups: Any,
        weights: Any,
        score_norms: Any,
        lengths: Any,
        parents: Any,
        out: Any,
        /,
    ) -> Any: ...
    def update(
        self,
        rewards: Any,
        clusters: Any,
        groups: Any,
        weights: Any,
        score_norms: Any,
        lengths: Any,
        parents: Any,
        /,
    ) -> Any: ...
    def normalize(
        self,
        rewards: Any,
        clusters: Any,
        groups: Any,
        weights: Any,
        score_norms: Any,
        lengths: Any,
        parents: Any,
        out: Any,
        /,
    ) -> Any: ...
    def retract(self, rewards: Any, clusters: Any, weights: Any, parents: Any, /) -> Any: ...

@final
class Several(_Calls):
    """The same for several rewards of each rollout, which have an axis more: [N, R] or [P, G, R]."""

    def __new__(
        cls,
        options: Options,
        names: list[str],
        weights: list[float],
        sums_first: bool,
        parts: list[Normalizer],
        /,
    ) -> Several:
        """`parts` keep the histories: one of the weighted sum if `sums_first`, else one of each reward.
        Their options have neither a `clip` nor an estimator that whitens, which are of the whole."""

@final
class Normalizer(_Calls):
    """What `pgrpo.ClusterNormalizer` holds, and documents.

    Rewards and `out` are arrays of float32 or float64, ids arrays of int32 or int64 or lists or tuples
    of ints and strings, weights, score norms and lengths arrays of float64; arrays are contiguous,
    aligned and in native byte order. All are [N]; or rewards and `out` are [P, G], and the others [P]
    or [P, G]. Given anything else, a method returns `NotImplemented` and has done nothing.
    """

    def __new__(
        cls,
        options: Options,
        memory: tuple[str, NDArray[np.uint8], int, str, bool] | None = None,
        /,
    ) -> Normalizer:
        """`memory` is that of a shared table: its path, its bytes, which are kept, its capacity, the
        options that all processes must agree on, and whether nobody else has it mapped."""
    @property
    def num_nonfinite(self) -> int: ...
    def delta(self) -> bytes: ...
    def columns(self) -> _Columns:
        """Ids [K] and columns [K, 13] of all clusters and parents, the id of a parent as
        `{"parent": id}`; the same of what the next delta holds; count, origin, offset and m2 of all
        clusters together, or zeros; number of non-finite rewards."""
    def restore_columns(self, state: _Columns) -> None: ...
    def forget(self, clusters: Any, /) -> Any: ...
    def keep(self, clusters: Any, /) -> Any: ...
    def encode(self) -> bytes: ...
    def restore(self, snapshot: bytes) -> None: ...
    def merge(self, snapshot: bytes) -> None: ...
