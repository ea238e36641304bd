"""What a plugin can add, and what it must look like: all that a plugin's author has to read.

A plugin is a module that implements one of the hooks or several, marked with `hookimpl`, and that its
distribution names in the entry-point group `pgrpo`:

    from pgrpo.plugins import hookimpl

    @hookimpl
    def pgrpo_register_rewards(register):
        register("length", lambda rollouts: [float(len(r.completion)) for r in rollouts])

A data set or clusterer is added likewise, by the hooks below.

A plugin with settings is a class whose attribute `Config` is a subclass of `pgrpo.config.Section`.
It is built once per run as `Cls(config)`, without `Config` as `Cls()`. Where the `Config` of
a reward has a field `seed`, the run's seed is its value unless the TOML file gives another; a field
`timeout_s` is told how long one call may take.

A module may say by `PGRPO_HOOKS = 1` which `VERSION` of the hooks it was written for. A pgrpo that does
not know that version yet then says so, where it would else complain of what it does not understand.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import pluggy

from pgrpo.types import ClusterId, Dataset, Example, FloatArray, Json, Rollout

VERSION = 1
"""Of the hooks: one more whenever a hook is added, or a plugin may do what it might not before."""

hookspec = pluggy.HookspecMarker("pgrpo")
hookimpl = pluggy.HookimplMarker("pgrpo")

Rewards: TypeAlias = Sequence[float | Exception | None]
"""[N] raw, finite rewards; None where a rollout gets none; an exception where scoring it failed, of
which an `UnreadableError` says that an answer came and could not be read (`max_unreadable`)."""


class Reward(Protocol):
    """A function, async function, or object whose `__call__` is either."""

    def __call__(self, rollouts: Sequence[Rollout], /) -> Rewards | Awaitable[Rewards]:
        """Score the rollouts [N] of one group, or of all groups of a step (`batch`), group by group.

        Called while earlier calls are under way, from other threads where it is not async, unless
        `num_workers` is 1; a call that outlasted its `timeout_s` is not waited for even then.
        """
        ...


class Clusterer(Protocol):
    """A class that divides users [U] by their features [U, F], after the habit of scikit-learn.

    Two things may be added to what every clusterer has. With a class attribute `reads_answers = True`
    the clusters are learned from what users answered, and `fit` gets no held-out examples. With the
    method `memberships` of `SoftClusterer` users may belong to several clusters; without it each
    belongs wholly to the one that `assign` says.
    """

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Learn the clusters.

        `examples` are the rows of these users, for clusterers that read: training and held-out ones,
        since a column such as a segment is no answer. A clusterer with `reads_answers = True` gets
        the training period alone instead (`Dataset.observed`, else `Dataset.train`), for clusters
        that had seen the held-out answers would be judged by what they were made from.
        """
        ...

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] the cluster of each user, always the same for the same user and state."""
        ...

    def state_dict(self) -> Mapping[str, Json]:
        """All that `fit` learned, as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over what `state_dict` returned, also after a trip through JSON."""
        ...


@runtime_checkable
class SoftClusterer(Clusterer, Protocol):
    """A clusterer whose users may belong to several clusters."""

    def memberships(
        self, users: Sequence[str], features: FloatArray
    ) -> list[Mapping[ClusterId, float]]:
        """[U] the weight of each cluster in a user: none below 0, and their sum is 1.

        Always the same for the same user and state. `assign` gives a cluster of the largest weight,
        and clusters that are not named have weight 0.
        """
        ...


class DatasetLoader(Protocol):
    """A function, or an object whose `__call__` is one."""

    def __call__(self) -> Dataset:
        """Load the data set: equal examples each time, for a resumed run loads it again."""
        ...


@hookspec
def pgrpo_register_datasets(register: Callable[[str, Any], None]) -> None:
    """Call `register(name, loader)` with a function, or a class whose instances are loaders."""


@hookspec
def pgrpo_register_rewards(register: Callable[[str, Any], None]) -> None:
    """Call `register(name, reward)` with a function, or a class whose instances are rewards."""


@hookspec
def pgrpo_register_clusterers(register: Callable[[str, Any], None]) -> None:
    """Call `register(name, cls)` with a class whose instances are clusterers."""
