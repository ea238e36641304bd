"""Rewards in, advantages out: per-cluster reward histories around any training loop.

The border of the Rust core. Ids of any kind become dense ones, arrays of any kind become float64,
and advantages go back as what the rewards were. NumPy is all it needs; torch is recognised, never
imported.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from pgrpo import _core
from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.types import ClusterId, FloatArray

if TYPE_CHECKING:
    import torch

    Ids: TypeAlias = Sequence[ClusterId] | NDArray[Any] | torch.Tensor

FloatT = TypeVar("FloatT", np.float32, np.float64)

STATE_VERSION = 1
STATE_COLUMNS = {"clusters": (int, str), "count": (int,), "mean": (float,), "m2": (float,)}
"""What a state holds of each cluster, and as what."""


@dataclass(frozen=True, slots=True)
class ClusterStats:
    """The reward history of one cluster, in units of the raw reward."""

    count: int
    """Finite rewards seen."""
    mean: float
    """Their mean."""
    std: float
    """Their standard deviation, dividing by count - ddof; 0 where count <= ddof."""


class ClusterNormalizer:
    """Turns raw rewards [N] into advantages [N], keeping a reward history per cluster.

    Each cluster p has a history of all its finite rewards: count, mean_p, sigma_p (Welford's
    algorithm; Chan's merge). A call folds its batch into the histories and applies `estimator`:

    - `pgrpo`: (r - mean_p) / (sigma_p + eps), arXiv 2603.10009
    - `grpo`: (r - mean_G) / (sigma_G + eps), of the group G, arXiv 2402.03300
    - `dr_grpo`: r - mean_G, arXiv 2503.20783
    - `rloo`: r - mean of the group's other rewards, arXiv 2402.14740
    - `batch`: (r - mean_B) / (sigma_B + eps), of all rewards of the call, arXiv 2501.03262

    Histories are kept under every estimator and read by `pgrpo` alone. Groups may be ragged and in
    any order; a group of one gives 0; equal rewards give exactly 0.

    Rewards are a list, a NumPy array or a torch tensor, and advantages come back as the same kind, a
    tensor on the same device: float64 for float64 and integers, float32 for float32 and narrower
    floats. Anything else NumPy can read gives a NumPy array. Everything is computed in float64.

    Cluster and group ids are ints or strings, also mixed: `1` and `"1"` are different.

    Many threads may use one normalizer without a lock of their own; each history is read and
    updated as a whole. (The core takes short locks: it is not lock-free.) Large batches are worked on
    outside the interpreter; do not write to an array while it is being used.

    Args:
        estimator: the rule, one of the above.
        ddof: standard deviations divide by count - ddof; 0 or 1.
        eps: added to the standard deviation; positive.
        order: `update_then_normalize` reads histories that hold the batch, so that
            |advantage| <= sqrt(count - 1); `normalize_then_update` reads them as they were before:
            unbiased, but a young history can give advantages in the thousands. A cluster without
            any history gives 0. Without effect unless the estimator is `pgrpo`.
        nan_policy: what to do about rewards that are NaN, None, infinite or from 1e140 on, which
            never enter a history or a mean: `raise` refuses the batch, `zero` gives them advantage
            0, `propagate` NaN.

    Raises:
        ConfigError: an option is unknown, of the wrong type or out of range.
    """

    def __init__(
        self,
        estimator: str = "pgrpo",
        *,
        ddof: int = 0,
        eps: float = 1e-4,
        order: str = "update_then_normalize",
        nan_policy: str = "raise",
    ) -> None:
        self._options = (estimator, ddof, eps, order, nan_policy)
        self._ddof = ddof
        # Ids and histories are replaced together, as one object, lest a thread mix old with new.
        self._table = self._empty_table()

    def _empty_table(self) -> _Table:
        try:
            return _Table(_core.Normalizer(*self._options))
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"{self!r}: {error}") from None

    def __repr__(self) -> str:
        estimator, ddof, eps, order, nan_policy = self._options
        return (
            f"ClusterNormalizer({estimator!r}, ddof={ddof!r}, eps={eps!r}, order={order!r}, "
            f"nan_policy={nan_policy!r})"
        )

    @overload
    def __call__(
        self, rewards: NDArray[FloatT], clusters: Ids, groups: Ids | None = None
    ) -> NDArray[FloatT]: ...
    @overload
    def __call__(
        self, rewards: torch.Tensor, clusters: Ids, groups: Ids | None = None
    ) -> torch.Tensor: ...
    @overload
    def __call__(
        self, rewards: Sequence[float | None], clusters: Ids, groups: Ids | None = None
    ) -> list[float]: ...
    def __call__(self, rewards: Any, clusters: Ids, groups: Ids | None = None) -> Any:
        """Fold a batch into the histories and return its advantages.

        Args:
            rewards: [N], raw.
            clusters: [N] cluster ids, ints or strings.
            groups: [N] group ids, ints or strings; required by `grpo`, `dr_grpo` and `rloo`.

        Returns:
            [N] advantages, of the kind and precision of `rewards`.

        Raises:
            DataError: lengths differ, an id or a reward is not one, or groups are missing. Nothing
                was updated then.
        """
        values, give_back = _read_rewards(rewards)
        table = self._table
        return give_back(table.core.advantages(values, table.dense(clusters), _group_ids(groups)))

    def update(self, rewards: Any, clusters: Ids) -> None:
        """Fold rewards [N] of clusters [N] into the histories: the first half of a call.

        Raises:
            DataError: as for a call. Nothing was updated then.
        """
        values, _ = _read_rewards(rewards)
        table = self._table
        table.core.update(values, table.dense(clusters))

    @overload
    def normalize(
        self, rewards: NDArray[FloatT], clusters: Ids, groups: Ids | None = None
    ) -> NDArray[FloatT]: ...
    @overload
    def normalize(
        self, rewards: torch.Tensor, clusters: Ids, groups: Ids | None = None
    ) -> torch.Tensor: ...
    @overload
    def normalize(
        self, rewards: Sequence[float | None], clusters: Ids, groups: Ids | None = None
    ) -> list[float]: ...
    def normalize(self, rewards: Any, clusters: Ids, groups: Ids | None = None) -> Any:
        """Advantages [N] by the histories as they are, which stay so: the other half of a call.

        Arguments, result and errors are those of a call.
        """
        values, give_back = _read_rewards(rewards)
        table = self._table
        return give_back(table.core.normalize(values, table.dense(clusters), _group_ids(groups)))

    @property
    def num_nonfinite(self) -> int:
        """Non-finite rewards that calls and updates have left out of the histories."""
        return self._table.core.num_nonfinite

    def snapshot(self) -> dict[ClusterId, ClusterStats]:
        """Count, mean and standard deviation of each cluster with a history, oldest cluster first."""

        def std(count: int, m2: float) -> float:
            return math.sqrt(m2 / (count - self._ddof)) if count > self._ddof else 0.0

        rows = self._table.rows()
        return {cluster: ClusterStats(n, mean, std(n, m2)) for cluster, n, mean, m2 in rows}

    def state_dict(self) -> dict[str, Any]:
        """The histories as plain lists of ints, strings and floats.

        `load_state_dict` restores them bit for bit, also after a trip through JSON. Options are not
        part of it: histories mean the same to every estimator.
        """
        table = self._table
        rows = table.rows()
        columns = {key: [row[at] for row in rows] for at, key in enumerate(STATE_COLUMNS)}
        return {"version": STATE_VERSION, **columns, "num_nonfinite": table.core.num_nonfinite}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all histories by those of a `state_dict`.

        Raises:
            CheckpointError: it is not the state of a normalizer; the histories stay as they were.
        """
        table = self._empty_table()
        rows, num_nonfinite = _read_state(state)
        try:
            table.absorb(rows, num_nonfinite)
        except (DataError, OverflowError) as error:
            raise CheckpointError(f"normalizer state: {error}") from None
        self._table = table

    def merge(self, other: ClusterNormalizer) -> None:
        """Fold the histories of another normalizer into these, cluster by cluster."""
        self._table.absorb(other._table.rows(), other.num_nonfinite)


_Row = tuple[ClusterId, int, float, float]
"""Cluster, count, mean, m2."""


class _Table:
    """Histories under the ids that users gave them: where ids become dense."""

    def __init__(self, core: _core.Normalizer) -> None:
        self.core = core
        self._dense: dict[ClusterId, int] = {}
        self._growing = threading.Lock()

    def dense(self, ids: Ids) -> NDArray[np.uint32]:
        """[N] ids as numbers 0, 1, 2, ..., new ids taking the next ones."""
        known, plain = self._dense, _plain_ids(ids, "clusters")
        try:
            return np.fromiter(map(known.__getitem__, plain), np.uint32, len(plain))
        except KeyError:
            with self._growing:
                for cluster in plain:
                    known.setdefault(cluster, len(known))
            return np.fromiter(map(known.__getitem__, plain), np.uint32, len(plain))

    def rows(self) -> list[_Row]:
        """Every cluster with a history, in the order of their numbers."""
        # Ids only grow in number: read after the histories, they cover them.
        counts, means, m2s = self.core.snapshot()
        with self._growing:
            ids = list(self._dense)
        rows = zip(ids, counts.tolist(), means.tolist(), m2s.tolist(), strict=False)
        return [row for row in rows if row[1] > 0]

    def absorb(self, rows: Sequence[_Row], num_nonfinite: int) -> None:
        """Merge rows into the histories."""
        self.core.absorb(
            self.dense([row[0] for row in rows]),
            np.array([row[1] for row in rows], np.uint64),
            np.array([row[2] for row in rows], np.float64),
            np.array([row[3] for row in rows], np.float64),
            num_nonfinite,
        )


def _read_rewards(rewards: Any) -> tuple[FloatArray, Callable[[FloatArray], Any]]:
    """Rewards as float64 [N], and the way back from advantages to what the rewards came as."""
    # A tensor can only have come from a torch that is imported already.
    torch: Any = sys.modules.get("torch")
    if isinstance(rewards, getattr(torch, "Tensor", ())):
        narrow = rewards.is_floating_point() and rewards.itemsize <= 4
        dtype = torch.float32 if narrow else torch.float64
        values, _ = _read_rewards(rewards.detach().to("cpu", torch.float64).numpy())
        return values, lambda advantages: torch.from_numpy(advantages).to(rewards.device, dtype)
    try:
        array: NDArray[Any] = np.asarray(rewards)
        # None is no reward, and NumPy's float64 for it is NaN.
        if array.dtype.kind not in "fiubO":
            raise TypeError
        values = np.ascontiguousarray(array, np.float64)
    except (TypeError, ValueError):
        raise DataError(f"rewards is {_short(rewards)}; expected [N] numbers") from None
    if array.ndim != 1:
        raise DataError(f"rewards has shape {array.shape}; expected one dimension, [N]")
    if isinstance(rewards, Sequence):
        return values, lambda advantages: advantages.tolist()
    narrow = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    return values, lambda advantages: advantages.astype(
        np.float32 if narrow else np.float64, copy=False
    )


def _group_ids(groups: Ids | None) -> NDArray[np.int64] | None:
    """Group ids as numbers; they mean nothing beyond the call."""
    if groups is None:
        return None
    plain, dense = _plain_ids(groups, "groups"), dict[ClusterId, int]()
    return np.array([dense.setdefault(group, len(dense)) for group in plain], np.int64)


def _plain_ids(ids: Any, name: str) -> list[ClusterId]:
    """Ids as built-in ints and strings, which hash alike wherever they came from."""
    try:
        if isinstance(ids, str):
            raise TypeError
        values = list(ids.tolist() if hasattr(ids, "tolist") else ids)
    except TypeError:
        raise DataError(f"{name} is {_short(ids)}; expected [N] ints or strings") from None
    if set(map(type, values)) <= {int, str}:
        return values
    return [_plain_id(value, f"{name}[{index}]") for index, value in enumerate(values)]


def _plain_id(value: Any, where: str) -> ClusterId:
    # True and 1.0 hash like 1: taken as they are, they would share its history in silence.
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(cast(int, value))
    if isinstance(value, str):
        return str.__str__(value)
    raise DataError(f"{where} is {_short(value)}; expected an int or a string")


def _read_state(state: Any) -> tuple[list[_Row], int]:
    """Rows and number of non-finite rewards of a state_dict whose parts have the right types."""

    def expect(condition: bool, complaint: str) -> None:
        if not condition:
            raise CheckpointError(f"normalizer state: {complaint}")

    keys = ["version", *STATE_COLUMNS, "num_nonfinite"]
    expect(isinstance(state, Mapping), f"it is {_short(state)}; expected a dict")
    found = ", ".join(map(str, cast(Mapping[Any, Any], state))) or "nothing"
    expect(set(state) == set(keys), f"it holds {found}; expected {', '.join(keys)}")
    version, num_nonfinite = state["version"], state["num_nonfinite"]
    expect(version == STATE_VERSION, f"version is {version!r}; expected {STATE_VERSION}")
    expect(type(num_nonfinite) is int, f"num_nonfinite is {num_nonfinite!r}; expected int")
    columns: list[Any] = [state[key] for key in STATE_COLUMNS]
    for (key, types), column in zip(STATE_COLUMNS.items(), columns, strict=True):
        expect(isinstance(column, list), f"{key} is {_short(column)}; expected a list")
        names = " or ".join(kind.__name__ for kind in types)
        for index, value in enumerate(column):
            expect(type(value) in types, f"{key}[{index}] is {_short(value)}; expected {names}")
    sizes = [len(column) for column in columns]
    expect(len(set(sizes)) == 1, f"columns have {sizes} entries; expected as many of each")
    expect(len(set(columns[0])) == sizes[0], "clusters names one of them twice")
    return list(zip(*columns, strict=True)), num_nonfinite


def _short(value: object) -> str:
    """A value as a message can hold it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
