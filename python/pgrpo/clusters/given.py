"""Clusters that are not looked for: by a column of the data, one for everybody, or dealt at random."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from pydantic import Field, model_validator

from pgrpo.config import Section
from pgrpo.errors import CheckpointError, DataError
from pgrpo.types import ClusterId, Example, FloatArray, Json


class Column:
    """The cluster stands in a column of the examples, the same in all rows of a user."""

    class Config(Section):
        """Which column."""

        column: str
        """Column with the cluster's name, a string or a whole number."""

    def __init__(self, config: Config) -> None:
        self._column = config.column
        self._cluster_of: dict[str, ClusterId] = {}

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Read off each user's cluster.

        Raises:
            DataError: a user's rows lack the column, disagree, or hold something else.
        """
        column = self._column
        rows: dict[str, Counter[ClusterId]] = {}
        gaps: Counter[str] = Counter()
        for example in examples:
            value = example.columns.get(column)
            if isinstance(value, float) and value.is_integer():
                # Whole numbers beside gaps become such in pandas.
                value = int(value)
            if value is None:
                gaps[example.user] += 1
            elif type(value) is str or type(value) is int:
                rows.setdefault(example.user, Counter())[value] += 1
            else:
                raise DataError(
                    f"column {column!r} of user {example.user!r} holds {value!r}; a cluster is a "
                    "string or a whole number"
                )
        for user, num_gaps in gaps.items():
            num_rows = num_gaps + sum(rows.get(user, Counter()).values())
            raise DataError(
                f"column {column!r} of user {user!r} is missing in {num_gaps} of {num_rows} rows; "
                "expected one cluster in all of them"
            )
        for user, counts in rows.items():
            if len(counts) > 1:
                held = " and ".join(f"{value!r} in {n} rows" for value, n in counts.most_common(3))
                raise DataError(
                    f"column {column!r} of user {user!r} holds {held}; expected one cluster in all "
                    "of them"
                )
        self._cluster_of = {user: next(iter(counts)) for user, counts in rows.items()}

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] what the column said; raises DataError for a user without rows."""
        for user in users:
            if user not in self._cluster_of:
                raise DataError(
                    f"user {user!r} has no row that column {self._column!r} is read from"
                )
        return [self._cluster_of[user] for user in users]

    def state_dict(self) -> dict[str, Json]:
        """User -> cluster."""
        return {"cluster_of": dict(self._cluster_of)}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over user -> cluster; raises CheckpointError where there is none."""
        self._cluster_of = dict(_cluster_of(state))


class Single:
    """Everybody in cluster 0."""

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Nothing to learn."""

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] zeros."""
        return [0] * len(users)

    def state_dict(self) -> dict[str, Json]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Nothing to take over."""


class Random:
    """Users dealt at random; what clusters of a run do not do better than these, chance does.

    The users that are fitted are dealt in the order of a hash of their names, so that clusters have the
    sizes that were asked for, whatever order the users come in. Anybody else gets a cluster by its own
    hash, with the probability of the cluster's size. Features and examples are not looked at.
    """

    class Config(Section):
        """How many clusters, and how large."""

        num_clusters: int = Field(ge=1)
        """Clusters to make (K)."""
        sizes: list[float] = Field(default=[])
        """Their sizes, as numbers of users or as shares, for it is the ratios that count: those of
        another clusterer, to be compared with it. Equal ones if none are given."""
        seed: int = Field(0, ge=0)
        """Seeds the hash; the same under every seed of the run."""

        @model_validator(mode="after")
        def _check_sizes(self) -> Random.Config:
            if self.sizes and len(self.sizes) != self.num_clusters:
                raise ValueError(
                    f"sizes has {len(self.sizes)} entries, expected num_clusters = "
                    f"{self.num_clusters}"
                )
            for size in self.sizes:
                if size <= 0:
                    raise ValueError(f"sizes has {size}, expected numbers above 0")
            return self

    def __init__(self, config: Config) -> None:
        sizes = sorted(config.sizes, reverse=True) or [1.0] * config.num_clusters
        self._seed, self._sizes = config.seed, np.array(sizes, dtype=np.float64)
        self._cluster_of: dict[str, int] = {}

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Deal the users; raises DataError where that leaves a cluster without any."""
        wanted = self._sizes * len(users) / self._sizes.sum()
        counts = np.floor(wanted).astype(int)
        # The users left over go to the clusters that lack the largest parts of one.
        most = np.argsort(counts - wanted, kind="stable")
        counts[most[: len(users) - counts.sum()]] += 1
        if not counts.all():
            raise DataError(
                f"{len(users)} users are too few for {len(counts)} clusters of sizes "
                f"{self._sizes.tolist()}: cluster {int(np.argmin(counts))} would be empty"
            )
        clusters = np.repeat(np.arange(len(counts)), counts).tolist()
        self._cluster_of = dict(zip(sorted(users, key=self._draw), clusters, strict=True))

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] the cluster a user was dealt to, or that of its hash."""
        edges = np.cumsum(self._sizes)[:-1] / self._sizes.sum()
        return [
            self._cluster_of[user]
            if user in self._cluster_of
            else int(np.searchsorted(edges, self._draw(user), side="right"))
            for user in users
        ]

    def _draw(self, user: str) -> float:
        """A number of [0, 1) that is the user's own."""
        digest = hashlib.blake2b(f"{self._seed} {user}".encode(), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48

    def state_dict(self) -> dict[str, Json]:
        """User -> cluster, of the users that were dealt."""
        return {"cluster_of": dict(self._cluster_of)}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over user -> cluster; raises CheckpointError where there is none."""
        cluster_of = cast(Mapping[str, int], _cluster_of(state))
        for user, cluster in cluster_of.items():
            if cluster not in range(len(self._sizes)):
                raise CheckpointError(
                    f"the state has user {user!r} in cluster {cluster!r}, expected one of "
                    f"{len(self._sizes)}"
                )
        self._cluster_of = dict(cluster_of)


def _cluster_of(state: Mapping[str, Json]) -> Mapping[str, ClusterId]:
    clusters = state.get("cluster_of")
    if not isinstance(clusters, Mapping):
        raise CheckpointError("the clusterer's state has no 'cluster_of'")
    return cast(Mapping[str, ClusterId], clusters)
