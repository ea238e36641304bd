"""Clusters that are given: by a column of the data, or one for everybody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

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
        """Take over user -> cluster."""
        clusters = state.get("cluster_of")
        if not isinstance(clusters, Mapping):
            raise CheckpointError("the clusterer's state has no 'cluster_of'")
        self._cluster_of = dict(cast(Mapping[str, ClusterId], clusters))


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
