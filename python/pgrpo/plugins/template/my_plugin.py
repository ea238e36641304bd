"""People who like words of the sea or of the hills: a reward, a clusterer, a data set."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pgrpo.config import Section
from pgrpo.errors import CheckpointError
from pgrpo.plugins import hookimpl
from pgrpo.types import ClusterId, Dataset, Example, FloatArray, Json, Rollout
from pydantic import Field

PGRPO_HOOKS = 1
"""Version of pgrpo's hooks that this module was written for."""

LIKED = {
    "sea": ["wave", "shore", "sail", "tide"],
    "hills": ["rock", "pine", "peak", "path"],
}
"""Taste -> the words that people of this taste like."""


class Liked:
    """Share of the first words of a completion that are words the person likes."""

    class Config(Section):
        """Keys of a `[[rewards]]` table; `pgrpo plugins` shows what they mean."""

        num_words: int = Field(default=3, ge=1)
        """Words that count, from the first one on."""

    def __init__(self, config: Config) -> None:
        self._num_words = config.num_words

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """One number for each rollout; None, no reward, where nobody knows what is liked."""
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> float | None:
        liked = rollout.prompt.example.columns.get("liked")
        if not isinstance(liked, list):
            return None
        said = rollout.completion.split()[: self._num_words]
        return sum(word in liked for word in said) / self._num_words


class Halves:
    """Two clusters, parted at the median of a feature."""

    class Config(Section):
        """Keys of the `[clustering]` table."""

        feature: int = Field(default=0, ge=0)
        """Number of the feature, counted from 0."""

    def __init__(self, config: Config) -> None:
        self._feature = config.feature
        self._median = 0.0

    def fit(
        self,
        users: Sequence[str],
        features: FloatArray,
        examples: Sequence[Example],
    ) -> None:
        """Learn from users [U] and their features [U, F] what the clusters are."""
        self._median = float(np.median(features[:, self._feature]))

    def assign(self, users: Sequence[str], features: FloatArray) -> list[ClusterId]:
        """[U] the cluster of each user."""
        values = features[:, self._feature]
        return ["high" if value > self._median else "low" for value in values]

    def state_dict(self) -> dict[str, Json]:
        """All that was learned, as JSON values: checkpoints keep it."""
        return {"median": self._median}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Take over what `state_dict` returned."""
        median = state.get("median")
        if not isinstance(median, float):
            raise CheckpointError(f"the median is {median!r}; expected a number")
        self._median = median


class Tastes:
    """People who ask for more of what they like: half of them the sea, half the hills."""

    class Config(Section):
        """Keys of the `[data]` table."""

        num_people: int = Field(default=24, ge=2)
        """Number of people."""
        seed: int = Field(default=0, ge=0)
        """Seeds their prompts and features."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __call__(self) -> Dataset:
        """The same each time, for a run that is resumed loads it again."""
        rng = np.random.default_rng(self._config.seed)
        examples: list[Example] = []
        users: dict[str, FloatArray] = {}
        for number in range(self._config.num_people):
            user, taste = f"user {number}", list(LIKED)[number % 2]
            # How many of twenty words that somebody wrote were of the sea.
            of_the_sea = rng.binomial(20, 0.8 if taste == "sea" else 0.2)
            users[user] = np.array([float(of_the_sea)])
            for _ in range(10):
                text = " ".join(rng.choice(LIKED[taste], size=2).tolist())
                columns: dict[str, Json] = {"liked": LIKED[taste]}
                examples.append(Example(text=text, user=user, columns=columns))
        # Of each person's ten prompts two are held out. The vocabulary is all the tiny model can say.
        return Dataset(
            train=[e for place, e in enumerate(examples) if place % 10 < 8],
            evaluation=[e for place, e in enumerate(examples) if place % 10 >= 8],
            users=users,
            feature_names=("words of the sea",),
            vocabulary=tuple(word for words in LIKED.values() for word in words),
        )


@hookimpl
def pgrpo_register_rewards(register: Callable[[str, Any], None]) -> None:
    """Offer rewards by the names that a config uses."""
    register("my-plugin", Liked)


@hookimpl
def pgrpo_register_clusterers(register: Callable[[str, Any], None]) -> None:
    """Offer clusterers."""
    register("my-plugin", Halves)


@hookimpl
def pgrpo_register_datasets(register: Callable[[str, Any], None]) -> None:
    """Offer data sets."""
    register("my-plugin", Tastes)
