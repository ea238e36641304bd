"""Clusters that `pgrpo cluster` saved: the file they are in, and the clusterer that reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from pgrpo.config import Section
from pgrpo.config.sections import ClusteringConfig
from pgrpo.errors import CheckpointError, DataError, PgrpoError, PluginError
from pgrpo.plugins.hookspecs import Clusterer
from pgrpo.plugins.registry import load_registry
from pgrpo.types import ClusterId, Example, FloatArray, Json

FILE = "clusters.json"
"""What `pgrpo cluster` calls it."""

UNSEEN = "unseen"
"""The cluster of people that a saved assignment does not know, with `unseen = "pooled"`."""

VERSION = 2


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Pipeline(_Part):
    """A fitted clusterer, as it can be built again."""

    name: str
    """What the plugin is called."""
    options: dict[str, Any]
    """Its settings, as a config has them."""
    state: dict[str, Any]
    """What it learned."""


class SavedClusters(_Part):
    """All that is read of the file; it holds the measures besides."""

    version: Literal[2]
    """Of the layout."""
    data: dict[str, Any]
    """The section `[data]` that they were found with, seed and split included, defaults too."""
    clusterer: Pipeline
    """What divided the people, and will divide others."""
    feature_names: list[str]
    """Names of the features that it reads, in its order."""
    assignment: dict[str, int | str]
    """User -> cluster."""


def read_clusters(path: Path) -> SavedClusters:
    """Read what `pgrpo cluster` saved.

    Args:
        path: the file, or the folder it is in.

    Raises:
        DataError: it does not exist, is damaged, or is of another version.
    """
    file = path / FILE if path.is_dir() else path
    try:
        content: object = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file} does not exist; pgrpo cluster writes it") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{file} is damaged, or not of pgrpo cluster: {error}") from None
    version = cast(Any, content).get("version") if isinstance(content, dict) else None
    if version is not None and version != VERSION:
        raise DataError(
            f"{file} has version {version!r}, expected {VERSION}; write it anew with pgrpo cluster"
        )
    try:
        return SavedClusters.model_validate(content)
    except ValidationError as error:
        reason = _complaint(error)
        raise DataError(f"{file} is damaged, or not of pgrpo cluster: {reason}") from None


def other_data(state: Mapping[str, Json], data: Mapping[str, Any]) -> str | None:
    """What is to be known where a run reads other data than saved clusters were found in, such as
    another split: answers that it holds out may be among those that they were made from.

    Args:
        state: what `Saved.state_dict` returned.
        data: the run's section `[data]`, as JSON values.

    Returns:
        A sentence; None where the two are alike.
    """
    found = cast(Mapping[str, Any], state["data"])
    # Where a section has no such key, the other one's is nothing to compare.
    keys = [key for key in {**found, **data} if found.get(key, ...) != data.get(key, ...)]
    if not keys:
        return None
    told = [f"{key} = {_short(found.get(key))}, here {_short(data.get(key))}" for key in keys[:3]]
    more = f"; and {len(keys) - 3} more settings" if len(keys) > 3 else ""
    return (
        f"the saved clusters were found in other data: [data] had {'; '.join(told)}{more}. What is "
        "held out here may be among what they were made from"
    )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Saved:
    """The clusters that `pgrpo cluster` saved: who is in them stays there.

    Whoever they do not know is assigned by the clusterer that made them, as it was fitted then, or
    with `unseen = "pooled"` belongs to a cluster `unseen`. The file is read when a run begins, and its
    checkpoints hold what was in it.
    """

    class Config(Section):
        """Where the clusters are, and what becomes of others."""

        path: str
        """The folder that `pgrpo cluster` wrote, or its `clusters.json`."""
        unseen: Literal["assign", "pooled"] = "assign"
        """People who are in none of them: `assign` lets the saved clusterer divide them, by the same
        features; `pooled` puts them into a cluster `unseen`, whose history is read as if it held
        `estimator.prior_count` more rewards of all clusters pooled."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._saved: SavedClusters | None = None
        self._pipeline: Clusterer | None = None

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Read the file.

        Raises:
            DataError: it cannot be read, or a cluster of its own is called `unseen`.
        """
        self._take(read_clusters(Path(self._config.path).expanduser()))

    def check_features(self, names: Sequence[str]) -> None:
        """Refuse features by which new people would be assigned that are not those of the clusters.

        Raises:
            DataError: says what differs. Where new people are not assigned, nothing need be alike.
        """
        expected = self._known.feature_names
        if self._config.unseen == "pooled" or expected == [*names]:
            return
        lacking = [name for name in expected if name not in names]
        others = [name for name in names if name not in expected]
        said = "they are in another order"
        if lacking:
            said = f"the data set has no {lacking[0]!r}"
        elif others:
            said = f"{others[0]!r} is none of theirs"
        raise DataError(
            f"the saved clusters read {len(expected)} features, and the data set has {len(names)}: "
            f"{said}; expected the same in the same order, or unseen = 'pooled', which reads none"
        )

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] the saved cluster, or that of somebody new.

        Raises:
            DataError: somebody new cannot be assigned, by the saved clusterer's own words.
        """
        new = [place for place, user in enumerate(users) if user not in self._known.assignment]
        found: list[ClusterId] = [self._known.assignment.get(user, UNSEEN) for user in users]
        if new and self._config.unseen == "assign":
            try:
                assigned = self._built().assign([users[place] for place in new], features[new])
            except PgrpoError as error:
                raise DataError(
                    f"{len(new)} of {len(users)} users are not in the saved clusters, and their "
                    f"clusterer {self._known.clusterer.name!r} cannot assign them: {error}; unseen = "
                    "'pooled' needs no features"
                ) from error
            for place, cluster in zip(new, assigned, strict=True):
                found[place] = cluster
        return found

    def state_dict(self) -> dict[str, Json]:
        """All that was read: the file is not needed any more."""
        return self._known.model_dump()

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over what was read; raises CheckpointError where it is damaged."""
        try:
            self._take(SavedClusters.model_validate(dict(state)))
        except ValidationError as error:
            raise CheckpointError(
                f"the clusterer's state is damaged: {_complaint(error)}"
            ) from None

    @property
    def _known(self) -> SavedClusters:
        if self._saved is None:
            raise PluginError("clusterer 'saved' was asked before it was fitted or restored")
        return self._saved

    def _take(self, saved: SavedClusters) -> None:
        if self._config.unseen == "pooled" and UNSEEN in saved.assignment.values():
            raise DataError(
                f"the saved clusters have one called {UNSEEN!r}, which unseen = 'pooled' would mix "
                "with people they do not know; expected another name, or unseen = 'assign'"
            )
        self._saved, self._pipeline = saved, None

    def _built(self) -> Clusterer:
        """The clusterer that made the clusters, as it was fitted."""
        if self._pipeline is None:
            made = self._known.clusterer
            section = ClusteringConfig.model_validate({**made.options, "name": made.name})
            self._pipeline = load_registry().clusterer(section)
            self._pipeline.load_state_dict(made.state)
        return self._pipeline


def _complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    return f"{key or 'it'} is {first['input']!r:.60}: {first['msg']}"
