"""People whose histories speak of like things."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast
from weakref import WeakValueDictionary

import numpy as np
from pydantic import Field

from pgrpo.clusters.features import Scale, nearest, state_array
from pgrpo.clusters.kmeans import KMeans
from pgrpo.errors import CheckpointError, DataError, PluginError
from pgrpo.types import ClusterId, Example, FloatArray, Json

from .encoder import Encoder, EncoderConfig, Vectors, direction, texts_of


class TextEmbeddings:
    """k-means on the mean embedding of each person's texts; cluster 0 is the largest.

    The different texts of a person's rows of the training period become unit vectors, a person the
    direction of their mean, and these [U, D] are standardised and clustered as `kmeans` does features.
    Whoever has no text, or was not there, is put by its features: to the cluster whose people have the
    nearest mean of them, standardised. `assign_texts` does it by texts.
    """

    reads_answers = True
    """Held-out rows tell what a person did later, so they are not asked for."""

    class Config(EncoderConfig):
        """How many clusters, and by which texts."""

        num_clusters: int = Field(ge=1)
        """Clusters to make (K)."""
        max_texts: int = Field(64, ge=1)
        """Different texts of a person that are read, the first of its rows."""
        n_init: int = Field(10, ge=1)
        """Random starts, of which the best is kept."""
        seed: int = Field(0, ge=0)
        """Seeds the starts; the same under every seed of the run."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._texts = _Texts.of(config)
        self._kmeans = KMeans(
            KMeans.Config(num_clusters=config.num_clusters, n_init=config.n_init, seed=config.seed)
        )
        self._cluster_of: dict[str, ClusterId] = {}
        self._scale: Scale | None = None
        self._centers: FloatArray = np.empty((0, 0))

    def fit(self, users: Sequence[str], features: FloatArray, examples: Sequence[Example]) -> None:
        """Encode the texts and find the clusters.

        Raises:
            ModelError: the model cannot be loaded.
            DataError: a column is missing or holds no texts, nobody has a text, or fewer than K people
                differ in theirs.
        """
        texts: dict[str, dict[str, None]] = {user: {} for user in users}
        for example in examples:
            known = texts.get(example.user)
            if known is not None and len(known) < self._config.max_texts:
                known.update(dict.fromkeys(texts_of(example, self._config.columns)))
        heard = [user for user in users if texts[user]]
        if not heard:
            raise DataError(f"none of {len(users)} users has a text to be clustered by")
        points = self._embed([list(texts[user]) for user in heard])
        self._kmeans.fit(heard, points, ())
        self._cluster_of = dict(zip(heard, self._kmeans.assign(heard, points), strict=True))
        self._scale, self._centers = None, np.empty((0, 0))
        if features.shape[1]:
            self._scale = Scale.of(users, features)
            scaled = self._scale(users, features)
            rows = np.array([user in self._cluster_of for user in users])
            of_row = np.array(list(self._cluster_of.values()))
            clusters = range(self._config.num_clusters)
            self._centers = np.array([scaled[rows][of_row == k].mean(axis=0) for k in clusters])

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] the cluster by a person's texts, or by features for one without; raises DataError where
        there are neither."""
        if not self._cluster_of:
            raise PluginError(
                "clusterer 'text_embeddings' was asked before it was fitted or restored"
            )
        new = [place for place, user in enumerate(users) if user not in self._cluster_of]
        by_features: dict[int, ClusterId] = {}
        if new:
            if self._scale is None:
                raise DataError(
                    f"user {users[new[0]]!r} had no text in the training period, and the data set has "
                    "no features to put it to a cluster by"
                )
            points = self._scale([users[place] for place in new], features[new])
            by_features = dict(zip(new, nearest(points, self._centers).tolist(), strict=True))
        return [
            by_features[place] if place in by_features else self._cluster_of[user]
            for place, user in enumerate(users)
        ]

    def assign_texts(self, texts: Sequence[Sequence[str]]) -> list[ClusterId]:
        """The cluster of each of some people, by their own texts, one at least for each."""
        points = self._embed(texts)
        return self._kmeans.assign([""] * len(points), points)

    def _embed(self, texts: Sequence[Sequence[str]]) -> FloatArray:
        """[U, D] the direction of each person's texts; each different text is encoded once."""
        different = list(dict.fromkeys(text for one in texts for text in one))
        row_of = {text: row for row, text in enumerate(different)}
        vectors = self._texts(different)
        return np.array([direction(vectors[[row_of[text] for text in one]]) for one in texts])

    def state_dict(self) -> dict[str, Json]:
        """User -> cluster; scale and centres of the embeddings, for `assign_texts`; and those of the
        features, for people without texts."""
        return {
            "cluster_of": dict(self._cluster_of),
            "embeddings": self._kmeans.state_dict(),
            "features": None
            if self._scale is None
            else {**self._scale.state_dict(), "centers": self._centers.tolist()},
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over what was fitted; raises CheckpointError where it is damaged."""
        cluster_of, embeddings = state.get("cluster_of"), state.get("embeddings")
        if not isinstance(cluster_of, Mapping) or not isinstance(embeddings, Mapping):
            raise CheckpointError("the state has no cluster_of or no embeddings")
        self._kmeans.load_state_dict(embeddings)
        self._cluster_of = {user: cast(int, cluster) for user, cluster in cluster_of.items()}
        self._scale, self._centers = None, np.empty((0, 0))
        features = state.get("features")
        if not isinstance(features, Mapping):
            return
        scale, centers = Scale.from_state(features), state_array(features, "centers", 2)
        if centers.shape != (self._config.num_clusters, len(scale.mean)):
            raise CheckpointError(
                f"the state holds {centers.shape[0]} centres of {centers.shape[1]} features, "
                f"expected {self._config.num_clusters} of {len(scale.mean)}"
            )
        self._scale, self._centers = scale, centers


class _Texts:
    """Vectors of texts, each made once, by a model that is loaded when the first of them is asked for:
    a run that goes on needs none.

    All clusterers with the same encoder share them as long as there is one: `pgrpo cluster` fits many,
    for each number of clusters and for halves of the people.
    """

    _shared: ClassVar[WeakValueDictionary[str, _Texts]] = WeakValueDictionary()

    def __init__(self, config: EncoderConfig) -> None:
        self._config = config
        self._encoder: Encoder | None = None
        self._vectors: dict[str, Vectors] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, config: EncoderConfig) -> _Texts:
        """Those of an encoder with these settings, whatever columns it is told to read."""
        settings = EncoderConfig.model_fields.keys() - {"columns"}
        key = config.model_dump_json(include=settings)
        return cls._shared.setdefault(key, cls(config))

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """[N, D] what an encoder makes of the texts."""
        with self._lock:
            if self._encoder is None:
                self._encoder = Encoder(self._config)
            new = [text for text in texts if text.strip() and text not in self._vectors]
            if new:
                self._vectors.update(zip(new, self._encoder(new), strict=True))
            blank = np.zeros_like(next(iter(self._vectors.values()), np.empty(0, np.float32)))
            return np.stack([self._vectors.get(text, blank) for text in texts])
