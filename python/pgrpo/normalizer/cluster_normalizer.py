"""Rewards in, advantages out: per-cluster reward histories around any training loop.

The public face of the Rust core. Arrays of the plainest kind go to it directly; it hands others back,
and `pgrpo.normalizer.arrays` turns them into such. NumPy is all it needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from numpy.typing import NDArray

from pgrpo.errors import CheckpointError, ConfigError, DataError
from pgrpo.normalizer import state
from pgrpo.normalizer.arrays import (
    call_plainly,
    named_as_given,
    read_columns,
    read_ids,
    read_rewards,
    short,
)
from pgrpo.normalizer.diagnostics import Diagnostics, diagnose
from pgrpo.normalizer.options import Options, made_of_options
from pgrpo.normalizer.several import Histories, RewardOptions, core_of
from pgrpo.normalizer.shared_memory import open_table, shared_path
from pgrpo.normalizer.state import ClusterStats
from pgrpo.types import ClusterId

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self, Unpack

    from pgrpo.normalizer.arrays import Columns, FloatT, Ids, Numbers, OutT

MethodT = TypeVar("MethodT", bound=Callable[..., Any])


def _typed_like(_: MethodT, /) -> Callable[[Callable[..., Any]], MethodT]:
    """Give a method the overloads of another one, to type checkers."""
    return lambda method: cast(MethodT, method)


class ClusterNormalizer:
    """Turns raw rewards [N] or [P, G] into advantages of the same shape, keeping a reward history per
    cluster.

    Each cluster p has a history of all its finite rewards: count n_p, mean_p, sigma_p (Welford's
    algorithm; Chan's merge). A call folds its batch into the histories and applies an estimator;
    `__init__` lists all of them. `shrinkage` and `auto` take as a group its rollouts of one cluster.
    Histories are kept under every estimator. Groups may be ragged and in any order; a group of one
    gives 0 in the estimators that read groups alone; equal rewards give exactly 0, except under `rae`.
    Everything is computed in float64.

    **Arrays.** Rewards are a list, a NumPy array, a torch tensor, a Series of pandas or polars, an
    array of Arrow, anything else with DLPack (as JAX's arrays), or a buffer, and advantages come back
    as the same kind: on the same device, with the index and the name of a Series; float64 for float64
    and integers, float32 for float32 and narrower floats, those of ml_dtypes among them. (Buffers other
    than `array.array` give a memoryview; whatever else NumPy can read, and subclasses of its arrays, a
    NumPy array. JAX makes float64 what it is set to.) Nothing is copied on the CPU where it is
    contiguous, aligned and in native byte order; from a GPU, each array makes one trip, and advantages
    one back. Gradients do not flow through. `None`, nulls and masked rewards are NaN, which is what
    `nan_policy` is for. With `out=`, an array of the advantages' type and shape (or a CPU tensor, or a
    buffer), they are written there, and it is returned; it may be `rewards` itself.

    **Shapes.** Rewards are [N], with a cluster id for each, or [P, G]: P groups of G rollouts, one a
    row. Clusters are then [P] or [P, G], and so are all other columns; groups are the rows if none are
    given. Rewards that lie in rows are those of their rows put one after another.

    **Several rewards** of each rollout are [N, R] or [P, G, R], with `reward_weights` [R]; advantages
    stay [N] or [P, G]. `combine` tells what is normalised: their weighted sum, or each reward by a
    history of its own (`rewards`), so that none drowns another by its spread. A reward that is missing
    in a rollout is refused by the `nan_policy` `raise`; with `zero` the sum is over the others, and
    with `propagate` the advantage is NaN. Histories of several rewards are saved, loaded and merged
    together, and only where names and order are the same.

    **Ids** of clusters and groups are ints of 64 bits or strings, also mixed, categories too: `1` and
    `"1"` are different. Bools, floats and missing ids are refused, and so is whatever else could be
    meant in two ways, as UUIDs and tuples.

    **Weights** [N], from 0 to below 2^20, let a reward count as so many, in its history and in its
    group. Where the others of a group are averaged (`rloo`, `auto`), each rollout is taken to weigh
    the weighted mean of the weights of its cluster's rollouts in that group, sum w^2 / sum w. A
    history of less weight than `min_count` gives 0.

    **Threads.** Any number may use one normalizer without a lock of their own, and the interpreter is
    not needed by batches from 4096 rewards on; do not write to an array while it is being used. It
    declares itself free of the interpreter's lock for free-threaded Python. Finding, reading and
    merging histories is lock-free: a thread stopped anywhere delays no other. (Memory for new clusters
    comes from the allocator, which may lock.) `load`, `load_state_dict`, `forget` and `keep` wait for
    the calls that have begun, and calls that begin meanwhile wait for them. Each history is read and
    updated as a whole; other threads may be between two clusters, or between a history and the other
    sums that `shrinkage`, `auto`, `prior_count` and diagnostics keep. Results of racing threads depend
    on the order of their merges, by rounding; those of one thread, whatever `num_threads`, do not.
    Threads must not share one `out`. A child that is forked in the middle of other threads' calls goes
    on with the histories as they were at that moment.

    Its arguments are those of `pgrpo.normalizer.Options`, and those of several rewards.
    """

    _shared: tuple[str, int] | None = None
    """Path and capacity of a table of several processes."""

    @made_of_options(RewardOptions)
    def __init__(self, options: RewardOptions) -> None:
        self._options = options
        parts = options.parts()
        self._rewards = {name: type(self)(**asdict(part)) for name, part in parts.items()}
        cores = {name: part._histories for name, part in self._rewards.items()}
        self._several = len(options.reward_weights) if options.reward_weights else None
        self._core: Any = core_of(options, cores)
        self._histories: Any = Histories(options, cores) if cores else self._core

    @classmethod
    def shared(
        cls,
        path_or_name: str | os.PathLike[str],
        estimator: str = Options.estimator,
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
                `forgetting`, or no table; or its file is a symbolic link, another user's, or one that
                others may write to. Its methods raise a DataError once the file has become shorter.
        """
        path = shared_path(path_or_name)
        self = cls(estimator, **options)
        if self._rewards:
            raise ConfigError("reward_weights are given; a shared table is of one reward")
        self._core = self._histories = open_table(path, self._options, capacity)
        self._shared = (str(path.resolve()), capacity)
        return self

    @property
    def options(self) -> RewardOptions:
        """What it was told when it was made."""
        return self._options

    @property
    def estimator(self) -> str:
        """Name of the rule that makes advantages, one of `pgrpo.normalizer.RULES`."""
        return self._options.estimator

    @property
    def rewards(self) -> Mapping[str, ClusterNormalizer]:
        """By reward: its own histories, to be read and watched; they are those of the whole.

        With `sum_then_normalize` there is one entry, `"sum"`; without `reward_weights` none.
        """
        return MappingProxyType(self._rewards)

    @property
    def is_shared(self) -> bool:
        """Whether its histories are those of several processes."""
        return self._shared is not None

    def __repr__(self) -> str:
        """As it would be made again; options left alone are left out."""
        made = type(self).__name__
        if self._shared:
            path, capacity = self._shared
            return f"{made}.shared({path!r}, {self._options}, capacity={capacity})"
        return f"{made}({self._options})"

    @overload
    def advantages(
        self,
        rewards: Any,
        clusters: Ids,
        groups: Ids | None = None,
        *,
        out: OutT,
        **columns: Unpack[Columns],
    ) -> OutT: ...
    @overload
    def advantages(
        self,
        rewards: NDArray[FloatT],
        clusters: Ids,
        groups: Ids | None = None,
        *,
        out: None = None,
        **columns: Unpack[Columns],
    ) -> NDArray[FloatT]: ...
    @overload
    def advantages(
        self,
        rewards: torch.Tensor,
        clusters: Ids,
        groups: Ids | None = None,
        *,
        out: None = None,
        **columns: Unpack[Columns],
    ) -> torch.Tensor: ...
    @overload
    def advantages(
        self,
        rewards: list[float] | list[float | None] | tuple[float | None, ...],
        clusters: Ids,
        groups: Ids | None = None,
        *,
        out: None = None,
        **columns: Unpack[Columns],
    ) -> list[float]: ...
    @overload
    def advantages(
        self,
        rewards: Any,
        clusters: Ids,
        groups: Ids | None = None,
        *,
        out: None = None,
        **columns: Unpack[Columns],
    ) -> Any: ...
    # Python takes longer over keywords that have to be named: a tenth of a short call.
    def advantages(
        self,
        rewards: Any,
        clusters: Any,
        groups: Any = None,
        weights: Any = None,
        score_norms: Any = None,
        lengths: Any = None,
        parents: Any = None,
        out: Any = None,
    ) -> Any:
        """Fold a batch into the histories and return its advantages. Calling the normalizer is the
        same, but for the tenth of a microsecond that Python takes longer to call an object.

        Args:
            rewards: [N] or [P, G], raw. Columns of rewards [P, G] are [P] or [P, G].
            clusters: [N] cluster ids, ints or strings.
            groups: [N] group ids, ints or strings; required by all estimators but `pgrpo`,
                `batch` and `rae`. Those of rewards [P, G] are their rows by default.
            weights: [N] what each reward counts for, from 0 to below 2^20; 1 by default.
            score_norms: [N] squared norm of each completion's score, in the same range, which weighs
                it in the regression of `auto`: for tokens sum_t (1 - pi_t)^2; 1 by default.
            lengths: [N] length of each completion, in the same range, in tokens or any other unit;
                required by `opo`.
            parents: [N] ids of what the clusters belong to, as the cluster that a person is in where
                `clusters` are persons; one for each cluster. A history is then read with
                `prior_count` rewards of its parent's, and that one with as many of all clusters
                pooled. A parent's history is of all rewards that came with it, and its id has
                nothing to do with a cluster of that id. They need a `prior_count`.
            out: where to write the advantages; of the shape of `rewards`.

        Returns:
            Advantages of the shape, kind and precision of `rewards`; or `out`.

        Raises:
            ConfigError: parents are given, and `prior_count` is 0. Nothing was updated then.
            DataError: arrays differ in length or shape, an id, reward or weight is not one, a cluster
                has two parents, or groups or lengths are missing. Nothing was updated then.
        """
        found = self._core.advantages(
            rewards, clusters, groups, weights, score_norms, lengths, parents, out
        )
        if found is NotImplemented:
            core = self._core.advantages
            columns = weights, score_norms, lengths, parents
            found = call_plainly(core, self._several, rewards, clusters, groups, *columns, out)
        return found

    __call__ = advantages

    @_typed_like(advantages)
    def normalize(
        self,
        rewards: Any,
        clusters: Any,
        groups: Any = None,
        weights: Any = None,
        score_norms: Any = None,
        lengths: Any = None,
        parents: Any = None,
        out: Any = None,
    ) -> Any:
        """Advantages by the histories as they are, which stay so: the other half of a call.

        Arguments, result and errors are those of `advantages`.
        """
        found = self._core.normalize(
            rewards, clusters, groups, weights, score_norms, lengths, parents, out
        )
        if found is NotImplemented:
            core = self._core.normalize
            columns = weights, score_norms, lengths, parents
            found = call_plainly(core, self._several, rewards, clusters, groups, *columns, out)
        return found

    def update(
        self,
        rewards: Any,
        clusters: Ids,
        groups: Ids | None = None,
        weights: Numbers | None = None,
        score_norms: Numbers | None = None,
        lengths: Numbers | None = None,
        parents: Ids | None = None,
    ) -> None:
        """Fold rewards of clusters into the histories: the first half of a call.

        Arguments are those of `advantages`; `groups` are required by `shrinkage` and `auto` alone.

        Raises:
            DataError: as for `advantages`. Nothing was updated then.
        """
        columns = clusters, groups, weights, score_norms, lengths, parents
        if self._core.update(rewards, *columns) is NotImplemented:
            values, shape, _ = read_rewards(rewards, self._several)
            plain = read_columns(shape, *columns)
            with named_as_given(rewards):
                self._core.update(values, *plain)

    def retract(
        self,
        rewards: Any,
        clusters: Ids,
        *,
        weights: Numbers | None = None,
        parents: Ids | None = None,
    ) -> None:
        """Take rewards of clusters out of the histories again, which must be in them; and out of those
        of their parents, which are the ones they were folded with.

        Exact up to rounding: what is left is what was never added. Not with `shrinkage`, `auto`, `rae`,
        `track_diagnostics` or `track_delta`, which keep more than can be taken back, nor with
        `forgetting` below 1. Non-finite rewards are refused or passed over, by `nan_policy`.

        Raises:
            ConfigError: the normalizer is of one of those kinds.
            DataError: as for `advantages`, or a history has fewer samples. Nothing was taken out then.
        """
        if self._core.retract(rewards, clusters, weights, parents) is NotImplemented:
            values, shape, _ = read_rewards(rewards, self._several)
            columns = read_columns(shape, clusters, None, weights, None, None, parents)
            ids, _, numbers, *_, parents = columns
            with named_as_given(rewards):
                self._core.retract(values, ids, numbers, parents)

    def delta(self) -> bytes:
        """What was folded since the last call of this, for `merge` elsewhere; it needs
        `track_delta=True`.

        Each sample is in exactly one delta. Merged in any order, deltas of shards make up the
        history of one stream. What was merged is in none, nor are counts of non-finite rewards
        and sums of advantages.

        Raises:
            ConfigError: deltas are not tracked.
        """
        return self._histories.delta()

    @property
    def num_nonfinite(self) -> int:
        """Non-finite rewards that calls and updates have left out of the histories."""
        return self._histories.num_nonfinite

    def snapshot(self) -> dict[ClusterId, ClusterStats]:
        """Count, mean and standard deviation of each cluster with a history.

        Ints in [0, 2^22) come first, in ascending order; then all other ids, in the order in which
        they were first met.
        """
        return state.stats(self._histories.columns(), self._options.ddof)

    def parents(self) -> dict[ClusterId, ClusterStats]:
        """Count, mean and standard deviation of each parent of clusters, as `snapshot` has those of
        clusters: of all rewards that came with it."""
        return state.stats(self._histories.columns(), self._options.ddof, of_parents=True)

    def diagnostics(self) -> Diagnostics:
        """What the running sums tell about the clusters, and warnings where something may go wrong.

        Fields that need sums which are not kept are None, and what they would warn of is not warned
        of: those of advantages need `track_diagnostics=True`, those of groups need it, or `shrinkage`
        or `auto`, and groups in every call. Whether groups mix clusters is not told by sums of
        clusters: who has the groups has to look.
        """
        ids, columns, *_, num_nonfinite = self._histories.columns()
        clusters, columns = state.part(ids, columns)
        sums = dict(zip(state.SUMS, columns.T, strict=True))
        return diagnose(clusters, sums, num_nonfinite, self._options)

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as plain lists of ints, strings and floats.

        `load_state_dict` restores it bit for bit, also after a trip through JSON. Options are not part
        of it: histories mean the same to every estimator.
        """
        if self._rewards:
            return self._histories.to_dict()
        return state.to_dict(self._core.columns())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace all that is remembered by a `state_dict`.

        It waits for the calls that other threads have begun, and calls that begin meanwhile wait for
        it. A shared table must be empty, for it is not this process's alone.

        Raises:
            CheckpointError: it is not the state of a normalizer; everything stays as it was.
        """
        try:
            if self._rewards:
                self._histories.restore_dict(state_dict)
            else:
                self._core.restore_columns(state.from_dict(state_dict))
        except (CheckpointError, UnicodeError) as error:
            raise CheckpointError(f"normalizer state: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that is remembered to a file: versioned, checksummed, without pickle.

        The file is there as a whole or not at all: it is written beside, flushed to the disk and
        renamed, in place of an earlier one.

        Raises:
            CheckpointError: it cannot be written.
        """
        state.write_file(path, self._histories.encode())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace all that is remembered by what `save` wrote. Options stay.

        Raises:
            CheckpointError: it cannot be read, is damaged or no such file; everything stays as it was.
        """
        snapshot = state.read_file(path)
        try:
            self._histories.restore(snapshot)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def forget(self, clusters: Ids) -> int:
        """Drop the histories of clusters, as if none of their rewards had ever been folded.

        What the next `delta` would hold of them goes too, and what `prior_count` and
        `frequency_weight` read of all clusters together is that of the clusters that stay. Their
        memory is given back. It takes as long as a snapshot; it waits for the calls that other threads
        have begun, and calls that begin meanwhile wait for it.

        Where clusters have parents, all clusters can be dropped, and their parents with them, but not
        some: what a parent holds is not known to be anybody's.

        In a shared table histories are emptied one by one, beside the calls of other processes, and the
        room of their names stays taken.

        Args:
            clusters: ids; those without a history are passed over.

        Returns:
            Number of histories that were dropped.

        Raises:
            ConfigError: some clusters would stay, and there are parents; nothing was dropped then.
            DataError: an id is not one; nothing was dropped then.
        """
        dropped = self._histories.forget(clusters)
        return (
            self._histories.forget(read_ids(clusters, "clusters"))
            if dropped is NotImplemented
            else dropped
        )

    def keep(self, clusters: Ids) -> int:
        """Drop the histories of all clusters but these; everything else is as for `forget`."""
        dropped = self._histories.keep(clusters)
        return (
            self._histories.keep(read_ids(clusters, "clusters"))
            if dropped is NotImplemented
            else dropped
        )

    def reset(self) -> None:
        """Forget everything: histories, sums of groups, what the next `delta` would hold, and
        `num_nonfinite`. It is then as it was made; waiting is as for `load_state_dict`.

        Raises:
            ConfigError: its table is shared, and not this process's to empty.
        """
        if self._shared:
            raise ConfigError(
                "a shared table is not this process's alone to reset; keep([]) drops its histories"
            )
        self._histories.restore(type(self)(**asdict(self._options))._histories.encode())

    def merge(self, other: ClusterNormalizer | bytes) -> None:
        """Fold in the histories of another normalizer, or a `delta`, cluster by cluster.

        Histories and the sums of groups come out as those of one stream, in any order of merging;
        counts exactly, means and m2 up to rounding. Only the exponential means of `rae` need a
        normalizer that has seen nothing.

        Raises:
            CheckpointError: it is not a delta, or a damaged one; nothing was merged then.
            ConfigError: exponential means would have to be merged; nothing was merged then.
            DataError: it is something else.
        """
        if isinstance(other, ClusterNormalizer):
            self._histories.merge(other._histories.encode())
        elif isinstance(cast(object, other), bytes):
            self._histories.merge(other)
        else:
            raise DataError(f"other is {short(other)}; expected a ClusterNormalizer or bytes")

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy: the options and all that is remembered, what is pending included.

        Of a shared table only where it is: a copy in another process opens it again.
        """
        options = asdict(self._options)
        if self._shared:
            return type(self)._made_again, (options, *self._shared)
        made = "_core", "_histories", "_rewards", "_several"
        kept = {name: value for name, value in self.__dict__.items() if name not in made}
        return type(self)._made_again, (options, self._histories.encode()), kept

    @classmethod
    def _made_again(cls, options: dict[str, Any], source: bytes | str, capacity: int = 0) -> Self:
        if isinstance(source, str):
            return cls.shared(Path(source), capacity=capacity, **options)
        made = cls(**options)
        made._histories.restore(source)
        return made
