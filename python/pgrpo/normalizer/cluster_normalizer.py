"""Rewards in, advantages out: per-cluster reward histories around any training loop.

The public face of the Rust core. Arrays of the plainest kind go to it directly; others are turned
into such by `pgrpo.normalizer.arrays`. NumPy is all it needs.
"""

from __future__ import annotations

import array
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.normalizer import _core
from pgrpo.normalizer.arrays import (
    MAX_ID,
    is_plain,
    read_ids,
    read_numbers,
    read_out,
    read_rewards,
    short,
)
from pgrpo.normalizer.diagnostics import SUMS, Diagnostics, deviation, diagnose
from pgrpo.normalizer.shared_memory import mapped, shared_path
from pgrpo.types import ClusterId, FloatArray

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    Ids: TypeAlias = Sequence[ClusterId] | NDArray[Any] | torch.Tensor
    Numbers: TypeAlias = Sequence[float] | NDArray[Any] | torch.Tensor
    FloatT = TypeVar("FloatT", np.float32, np.float64)
    OutT = TypeVar(
        "OutT", NDArray[np.float32], NDArray[np.float64], torch.Tensor, array.array[float]
    )

STATE_VERSION = 2

_OPTION_TYPES: dict[str, tuple[type, str]] = {
    "estimator": (str, "a string"),
    "ddof": (Integral, "an integer"),
    "eps": (Real, "a number"),
    "order": (str, "a string"),
    "nan_policy": (str, "a string"),
    "forgetting": (Real, "a number"),
    "prior_count": (Real, "a number"),
    "sigma_floor": (Real, "a number"),
    "clip": (Real, "a number or None"),
    "min_count": (Real, "a number"),
    "frequency_weight": (Real, "a number"),
    "track_diagnostics": (bool, "True or False"),
    "track_delta": (bool, "True or False"),
    "num_threads": (Integral, "an integer"),
}


@dataclass(frozen=True, slots=True)
class ClusterStats:
    """The reward history of one cluster, in units of the raw reward."""

    count: float
    """Finite rewards seen, an int; a float where they were weighted or forgotten into a fraction."""
    mean: float
    """Their mean."""
    std: float
    """Their standard deviation, dividing by count - ddof; 0 where count <= ddof."""


class ClusterNormalizer(_core.Normalizer):
    """Turns raw rewards [N] into advantages [N], keeping a reward history per cluster.

    Each cluster p has a history of all its finite rewards: count n_p, mean_p, sigma_p (Welford's
    algorithm; Chan's merge). A call folds its batch into the histories and applies `estimator`:

    - `pgrpo`: (r - mean_p) / (sigma_p + eps), arXiv 2603.10009
    - `grpo`: (r - mean_G) / (sigma_G + eps), of the group G, arXiv 2402.03300
    - `dr_grpo`: r - mean_G, arXiv 2503.20783
    - `rloo`: r - mean of the group's other rewards, arXiv 2402.14740
    - `batch`: (r - mean_B) / (sigma_B + eps), of all rewards of the call, arXiv 2501.03262
    - `two_way`: (e - mean_G(e)) / (sigma_p + eps), of e = r - mean_p; for groups that mix clusters
    - `shrinkage`: (r - b) / (s_p + eps), b = w mean_G + (1 - w) mean_p, w = G / (G + k), of k, the
      variance within groups over that between groups of the cluster, and s_p, the root mean square
      of r - b in the cluster: `pgrpo` where prompts do not differ, and the nearer to `grpo` the more
      they do
    - `auto`: as `shrinkage`, but b = lambda_p mean_p + (1 - lambda_p) mean of the group's others;
      lambda_p starts at 1 and follows the slope of a running regression that makes the variance of
      the gradient least

    `shrinkage` and `auto` take as a group its rollouts of one cluster. Histories are kept under every
    estimator. Groups may be ragged and in any order; a group of one gives 0 in the estimators that
    read groups alone; equal rewards give exactly 0. Everything is computed in float64.

    **Arrays.** Rewards are a list, a NumPy array, a torch tensor, anything else with DLPack, or a
    buffer, and advantages come back as the same kind, on the same device: float64 for float64 and
    integers, float32 for float32 and narrower floats. (Buffers other than `array.array` give a
    memoryview; whatever else NumPy can read, and subclasses of its arrays, a NumPy array.) Nothing is
    copied on the CPU where it is contiguous, aligned and in native byte order; from a GPU, each
    array makes one trip, and advantages one back. Gradients do not flow through. `None` and masked
    rewards are NaN. With `out=`, an array of the advantages' type and length (or a CPU tensor, or a
    buffer), they are written there, and it is returned; it may be `rewards` itself.

    **Ids** of clusters and groups are ints of 64 bits or strings, also mixed: `1` and `"1"` are
    different. Bools and floats are refused.

    **Weights** [N], from 0 to below 2^20, let a reward count as so many, in its history and in its
    group. Where the others of a group are averaged (`rloo`, `auto`), each rollout is taken to weigh
    the weighted mean of the weights of its cluster's rollouts in that group, sum w^2 / sum w. A
    history of less weight than `min_count` gives 0.

    **Threads.** Any number may use one normalizer without a lock of their own, and the interpreter is
    not needed by batches from 4096 rewards on; do not write to an array while it is being used. It
    declares itself free of the interpreter's lock for free-threaded Python. Reading and merging
    histories is lock-free: a thread stopped anywhere delays no other. Two things are not: a string,
    or an int outside of [0, 2^22), is looked up under a lock that readers share and a new one takes
    alone; and memory for new clusters comes from the allocator. Each history is read and updated as a
    whole; other threads may be between two clusters, or between a history and the other sums that
    `shrinkage`, `auto` and diagnostics keep of it. Results of racing threads depend on the order of
    their merges, by rounding; those of one thread, whatever `num_threads`, do not. Threads must not
    share one `out`.

    Args:
        estimator: the rule, one of the above.
        ddof: standard deviations divide by count - ddof; 0 or 1.
        eps: added to the standard deviation, never put under a root; positive.
        order: `update_then_normalize` reads histories that hold the batch, so that |advantage| of
            `pgrpo` is <= sqrt(n_p - 1); `normalize_then_update` reads them as they were before:
            unbiased, but a young history can give advantages in the thousands. Without effect on
            estimators that read no history.
        nan_policy: what to do about rewards that are NaN, None, infinite or from 1e140 on, which
            never enter a history or a mean: `raise` refuses the batch, `zero` gives them advantage
            0, `propagate` NaN.
        forgetting: rho in (0, 1]; before a batch is merged into a cluster, all that was kept of that
            cluster counts rho times as much (n_p and the sums of squares; the mean stays).
        prior_count: pseudo-samples, >= 0, of all clusters pooled (the variance between their means
            included) with which each history is read. Above 0, every call looks at all clusters.
        sigma_floor: least standard deviation read from a history, >= 0.
        clip: bound of |advantage|, positive; None for none.
        min_count: a history of fewer samples, the prior included, gives 0. The default, 1, makes a
            cold cluster give 0.
        frequency_weight: alpha, from -10 to 10; advantages are multiplied by q_p^-alpha, q_p = n_p /
            sum of all n_p. Other than 0, every call looks at all clusters.
        track_diagnostics: keep the sums that `diagnostics` reads beside the histories: of advantages
            and, where groups are given, of groups.
        track_delta: keep what was folded since the last `delta`; not with `forgetting` below 1.
        num_threads: threads that a batch of more than 262,144 rewards is worked on by.

    Raises:
        ConfigError: an option is unknown, of the wrong type or out of range.
    """

    _options: dict[str, Any]
    _shared: tuple[str, int] | None = None
    """Path and capacity of a table of several processes."""

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
        memory: Any = None,  # what `shared` maps
    ) -> Self:
        options: dict[str, Any] = {
            "estimator": estimator,
            "ddof": ddof,
            "eps": eps,
            "order": order,
            "nan_policy": nan_policy,
            "forgetting": forgetting,
            "prior_count": prior_count,
            "sigma_floor": sigma_floor,
            "clip": clip,
            "min_count": min_count,
            "frequency_weight": frequency_weight,
            "track_diagnostics": track_diagnostics,
            "track_delta": track_delta,
            "num_threads": num_threads,
        }
        for name, (kind, expected) in _OPTION_TYPES.items():
            value = options[name]
            if not isinstance(value, kind) and not (name == "clip" and value is None):
                raise ConfigError(f"{name} is {short(value)}; expected {expected}")
        try:
            self = super().__new__(cls, **options, memory=memory)
        except OverflowError as error:
            given = ", ".join(f"{name} is {short(value)}" for name, value in options.items())
            raise ConfigError(f"an option is out of range ({error}): {given}") from None
        self = cast("Self", self)
        self._options = options
        return self

    @classmethod
    def shared(
        cls,
        path_or_name: str | os.PathLike[str],
        estimator: str = "pgrpo",
        *,
        capacity: int = 65536,
        **options: Any,
    ) -> Self:
        """A normalizer whose histories are those of every process that opens the same table.

        Processes update it at once, lock-free, as threads do. One that is killed, at whichever
        instant, blocks nobody and leaves every history as it was before or after a whole call (of a
        call that touches several clusters, some may have been updated). Deltas are each process's own.

        Args:
            path_or_name: a file, or a name without a path separator: memory of this machine
                (`/dev/shm/pgrpo-NAME` on Linux). Made if it is not there; it stays until it is deleted.
            estimator: as of a normalizer of its own; processes may use different ones, as long as
                they keep the same sums.
            capacity: clusters there is room for: some hundreds of bytes of a sparse file each, from
                2 KiB in small tables down to 0.3 KiB in those of one history each.
            **options: as of a normalizer of its own.

        Raises:
            ConfigError: as usual; or the table is of another capacity, other sums or another
                `forgetting`, or no table.
        """
        if isinstance(cast(object, capacity), bool) or not isinstance(cast(object, capacity), int):
            raise ConfigError(f"capacity is {short(capacity)}; expected an int")
        path = shared_path(path_or_name)
        # Refuses wrong options before a file is made of them.
        checked = cls(estimator, **options)._options
        agreed = f"forgetting={float(checked['forgetting'])!r}"
        try:
            length, header = cls._layout(estimator, checked["track_diagnostics"], capacity, agreed)
        except OverflowError:
            raise ConfigError(f"capacity is {capacity}; expected a positive int") from None
        with mapped(path, length, header) as (mapping, alone):
            self = cls(estimator, **options, memory=(mapping, capacity, agreed, alone))
        self._shared = (str(path.resolve()), capacity)
        return self

    @property
    def is_shared(self) -> bool:
        """Whether its histories are those of several processes."""
        return self._shared is not None

    def __repr__(self) -> str:
        """As it would be made again; options left alone are left out."""
        options = dict(self._options)
        arguments = [repr(options.pop("estimator"))]
        usual = cast(dict[str, Any], ClusterNormalizer.__new__.__kwdefaults__)
        arguments += [f"{name}={v!r}" for name, v in options.items() if v != usual[name]]
        made = type(self).__name__
        if self._shared:
            path, capacity = self._shared
            made, arguments = f"{made}.shared", [repr(path), *arguments, f"capacity={capacity}"]
        return f"{made}({', '.join(arguments)})"

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            rewards: Any,
            clusters: Ids,
            groups: Ids | None = None,
            *,
            weights: Numbers | None = None,
            score_norms: Numbers | None = None,
            out: OutT,
        ) -> OutT: ...
        @overload
        def __call__(
            self,
            rewards: NDArray[FloatT],
            clusters: Ids,
            groups: Ids | None = None,
            *,
            weights: Numbers | None = None,
            score_norms: Numbers | None = None,
            out: None = None,
        ) -> NDArray[FloatT]: ...
        @overload
        def __call__(
            self,
            rewards: torch.Tensor,
            clusters: Ids,
            groups: Ids | None = None,
            *,
            weights: Numbers | None = None,
            score_norms: Numbers | None = None,
            out: None = None,
        ) -> torch.Tensor: ...
        @overload
        def __call__(
            self,
            rewards: list[float] | list[float | None] | tuple[float | None, ...],
            clusters: Ids,
            groups: Ids | None = None,
            *,
            weights: Numbers | None = None,
            score_norms: Numbers | None = None,
            out: None = None,
        ) -> list[float]: ...
        @overload
        def __call__(
            self,
            rewards: Any,
            clusters: Ids,
            groups: Ids | None = None,
            *,
            weights: Numbers | None = None,
            score_norms: Numbers | None = None,
            out: None = None,
        ) -> Any: ...
        def __call__(self, rewards: Any, clusters: Any, groups: Any = None, **columns: Any) -> Any:
            """Fold a batch into the histories and return its advantages.

            Args:
                rewards: [N], raw.
                clusters: [N] cluster ids, ints or strings.
                groups: [N] group ids, ints or strings; required by all estimators but `pgrpo` and
                    `batch`.
                weights: [N] what each reward counts for, from 0 to below 2^20; 1 by default.
                score_norms: [N] squared norm of each completion's score, in the same range, which
                    weighs it in the regression of `auto`: for tokens sum_t (1 - pi_t)^2; 1 by default.
                out: [N] where to write the advantages.
                **columns: the last three.

            Returns:
                [N] advantages, of the kind and precision of `rewards`; or `out`.

            Raises:
                DataError: lengths differ, an id, reward or weight is not one, or groups are missing.
                    Nothing was updated then.
            """

        @overload
        def normalize(
            self,
            rewards: Any,
            clusters: Ids,
            groups: Ids | None = None,
            *,
            weights: Numbers | None = None,
            score_norms: Numbers | None = None,
            out: OutT,
        ) -> OutT: ...
        @overload
        def normalize(
            self,
            rewards: NDArray[FloatT],
            clusters: Ids,
            groups: Ids | None = None,
            *,
            weights: Numbers | None = None,
            score_norms: Numbers | None = None,
            out: None = None,
        ) -> NDArray[FloatT]: ...
        @overload
        def normalize(
            self,
            rewards: torch.Tensor,
            clusters: Ids,
            groups: Ids | None = None,
            *,
            weights: Numbers | None = None,
            score_norms: Numbers | None = None,
            out: None = None,
        ) -> torch.Tensor: ...
        @overload
        def normalize(
            self,
            rewards: list[float] | list[float | None] | tuple[float | None, ...],
            clusters: Ids,
            groups: Ids | None = None,
            *,
            weights: Numbers | None = None,
            score_norms: Numbers | None = None,
            out: None = None,
        ) -> list[float]: ...
        @overload
        def normalize(
            self,
            rewards: Any,
            clusters: Ids,
            groups: Ids | None = None,
            *,
            weights: Numbers | None = None,
            score_norms: Numbers | None = None,
            out: None = None,
        ) -> Any: ...
        def normalize(self, rewards: Any, clusters: Any, groups: Any = None, **columns: Any) -> Any:
            """Advantages [N] by the histories as they are, which stay so: the other half of a call.

            Arguments, result and errors are those of a call.
            """

        def update(
            self,
            rewards: Any,
            clusters: Ids,
            groups: Ids | None = None,
            *,
            weights: Numbers | None = None,
            score_norms: Numbers | None = None,
        ) -> None:
            """Fold rewards [N] of clusters [N] into the histories: the first half of a call.

            `groups` are required by `shrinkage` and `auto` alone.

            Raises:
                DataError: as for a call. Nothing was updated then.
            """

        def retract(self, rewards: Any, clusters: Ids, *, weights: Numbers | None = None) -> None:
            """Take rewards [N] of clusters [N] out of the histories again, which must be in them.

            Exact up to rounding: what is left is what was never added. Not with `shrinkage`, `auto`,
            `track_diagnostics` or `track_delta`, which keep more than can be taken back, nor with
            `forgetting` below 1. Non-finite rewards are refused or passed over, by `nan_policy`.

            Raises:
                ConfigError: the normalizer is of one of those kinds.
                DataError: as for a call, or a history has fewer samples. Nothing was taken out then.
            """

        def delta(self) -> bytes:
            """What was folded since the last call of this, for `merge` elsewhere; it needs
            `track_delta=True`.

            Each sample is in exactly one delta. Merged in any order, deltas of shards make up the
            history of one stream. What was merged is in none, nor are counts of non-finite rewards
            and sums of advantages.

            Raises:
                ConfigError: deltas are not tracked.
            """
            return b""

        @property
        def num_nonfinite(self) -> int:
            """Non-finite rewards that calls and updates have left out of the histories."""
            return 0

    def _convert(
        self,
        method: str,
        rewards: Any,
        clusters: Any,
        groups: Any,
        weights: Any,
        score_norms: Any,
        out: Any,
    ) -> Any:
        """A call that the core handed back, for its arguments are not of the plainest kind."""
        values, give_back = read_rewards(rewards)
        inputs: list[Any] = [values, read_ids(clusters, "clusters"), read_ids(groups, "groups")]
        weights = read_numbers(weights, "weights")
        if method == "retract":
            return super().retract(*inputs[:2], weights=weights)
        score_norms = read_numbers(score_norms, "score_norms")
        columns = {"weights": weights, "score_norms": score_norms}
        if method == "update":
            return super().update(*inputs, **columns)
        compute = super().__call__ if method == "__call__" else super().normalize
        if out is None:
            return give_back(compute(*inputs, **columns))
        view = read_out(out, values)
        if is_plain(view, [*inputs, weights, score_norms]):
            compute(*inputs, **columns, out=view)
        else:
            view[...] = compute(*inputs, **columns)
        return out

    def snapshot(self) -> dict[ClusterId, ClusterStats]:
        """Count, mean and standard deviation of each cluster with a history.

        Ints in [0, 2^22) come first, in ascending order; then all other ids, in the order in which
        they were first met.
        """
        ids, columns, *_ = self._columns()
        counts, origin, offset, m2 = columns[:, :4].T
        std = deviation(counts, m2, self._options["ddof"])
        rows = zip(ids, counts.tolist(), (origin + offset).tolist(), std.tolist(), strict=True)
        return {
            cluster: ClusterStats(int(n) if n.is_integer() else n, mean, sigma)
            for cluster, n, mean, sigma in rows
        }

    def diagnostics(self) -> Diagnostics:
        """What the running sums tell about the clusters, and warnings where something may go wrong.

        Fields that need sums which are not kept are None, and what they would warn of is not warned
        of: those of advantages need `track_diagnostics=True`, those of groups need it, or `shrinkage`
        or `auto`, and groups in every call. Whether groups mix clusters is not told by sums of
        clusters: who has the groups has to look.
        """
        ids, columns, _, _, num_nonfinite = self._columns()
        sums = dict(zip(SUMS, columns.T, strict=True))
        chosen = {key: self._options[key] for key in ("estimator", "ddof", "eps", "sigma_floor")}
        return diagnose(ids, sums, num_nonfinite, **chosen)

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as plain lists of ints, strings and floats.

        `load_state_dict` restores it bit for bit, also after a trip through JSON. Options are not part
        of it: histories mean the same to every estimator.
        """
        ids, columns, pending_ids, pending, num_nonfinite = self._columns()
        return {
            "version": STATE_VERSION,
            **_lists(ids, columns),
            "pending": _lists(pending_ids, pending),
            "num_nonfinite": num_nonfinite,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all that is remembered by a `state_dict`.

        Threads in the middle of a call finish it with what was there before.

        What it replaces takes up memory until the normalizer goes: other threads may be reading it.
        A shared table must be empty, for it is not this process's alone.

        Raises:
            CheckpointError: it is not the state of a normalizer; everything stays as it was.
        """
        keys = ["version", "clusters", *SUMS, "pending", "num_nonfinite"]
        _expect_keys(state, keys, "")
        version, num_nonfinite = state["version"], state["num_nonfinite"]
        _expect(version == STATE_VERSION, f"version is {short(version)}; expected {STATE_VERSION}")
        whole = type(num_nonfinite) is int and 0 <= num_nonfinite < 2**63
        _expect(whole, f"num_nonfinite is {short(num_nonfinite)}; expected an int of at least 0")
        pending = state["pending"]
        _expect_keys(pending, ["clusters", *SUMS], "pending ")
        table = (*_read_lists(state, ""), *_read_lists(pending, "pending "))
        try:
            self._restore_columns((*table, num_nonfinite))
        except (CheckpointError, UnicodeError) as error:
            raise CheckpointError(f"normalizer state: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that is remembered to a file: versioned, checksummed, without pickle.

        The file is there as a whole or not at all: it is written beside, flushed to the disk and
        renamed, in place of an earlier one.

        Raises:
            CheckpointError: it cannot be written.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
        try:
            try:
                with open(partial, "xb") as file:
                    file.write(self._encode())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
            _flush_folder(target.parent)
        except OSError as error:
            raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from None

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace all that is remembered by what `save` wrote. Options stay.

        Raises:
            CheckpointError: it cannot be read, is damaged or no such file; everything stays as it was.
        """
        try:
            snapshot = Path(path).read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
        try:
            self._restore(snapshot)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def merge(self, other: ClusterNormalizer | bytes) -> None:
        """Fold in the histories of another normalizer, or a `delta`, cluster by cluster.

        Histories and the sums of groups come out as those of one stream, in any order of merging;
        counts exactly, means and m2 up to rounding.

        Raises:
            CheckpointError: it is not a delta, or a damaged one; nothing was merged then.
            DataError: it is something else.
        """
        if isinstance(other, ClusterNormalizer):
            self._merge(other._encode())
        elif isinstance(cast(object, other), bytes):
            self._merge(other)
        else:
            raise DataError(f"other is {short(other)}; expected a ClusterNormalizer or bytes")

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy: the options and all that is remembered, what is pending included.

        Of a shared table only where it is: a copy in another process opens it again.
        """
        if self._shared:
            return type(self)._reopened, (*self._shared, self._options)
        return type(self)._remade, (self._options, self._encode()), self.__dict__

    @classmethod
    def _reopened(cls, path: str, capacity: int, options: dict[str, Any]) -> Self:
        return cls.shared(Path(path), capacity=capacity, **options)

    @classmethod
    def _remade(cls, options: dict[str, Any], snapshot: bytes) -> Self:
        made = cls(**options)
        made._restore(snapshot)
        return made


def _lists(ids: list[ClusterId], columns: FloatArray) -> dict[str, list[Any]]:
    return {"clusters": ids, **dict(zip(SUMS, columns.T.tolist(), strict=True))}


def _expect(condition: bool, complaint: str) -> None:
    if not condition:
        raise CheckpointError(f"normalizer state: {complaint}")


def _expect_keys(state: Any, keys: Sequence[str], where: str) -> None:
    what = where.strip() or "it"
    _expect(isinstance(state, Mapping), f"{what} is {short(state)}; expected a dict")
    found = ", ".join(map(str, cast(Mapping[Any, Any], state))) or "nothing"
    _expect(set(state) == set(keys), f"{what} holds {found}; expected {', '.join(keys)}")


def _read_lists(state: Mapping[str, Any], where: str) -> tuple[list[ClusterId], FloatArray]:
    """Ids [K] and columns [K, 13] of lists that have the right types and lengths."""
    for key in ("clusters", *SUMS):
        column = state[key]
        _expect(isinstance(column, list), f"{where}{key} is {short(column)}; expected a list")
        types, names = ((int, str), "int or str") if key == "clusters" else ((float, int), "float")
        for index, value in enumerate(cast(list[Any], column)):
            kind = type(value)
            if kind not in types or (kind is int and not -MAX_ID <= value < MAX_ID):
                _expect(False, f"{where}{key}[{index}] is {short(value)}; expected {names}")
    ids = cast(list[ClusterId], state["clusters"])
    sizes = {key: len(state[key]) for key in SUMS if len(state[key]) != len(ids)}
    for key, size in sizes.items():
        _expect(False, f"{where}clusters has {len(ids)} entries, {where}{key} has {size}")
    _expect(len(set(ids)) == len(ids), f"{where}clusters names one of them twice")
    columns = np.array([state[key] for key in SUMS], np.float64)
    return ids, np.ascontiguousarray(columns.reshape(len(SUMS), len(ids)).T)


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a loss of power, where folders can be flushed."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
