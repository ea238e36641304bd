"""MovieLens with rewards on people's own scales: of films a user has rated, which one did it like most?

The candidates of an example are films that one user rated one after the other, and a film is worth the
user's own rating of it: harsh and generous users are rewarded on scales of their own. Every user's
ratings are split by time: the latest `evaluation_share` of them are held out. A film is told by how it
is rated on the mean and by its first genre, the user by the word and the genre that it rates above its
own mean, as far as its earlier ratings in the training period tell:

    great Crime: A
    poor Comedy: B
    good Drama: C
    fair Action: D
    great Drama:
"""

from __future__ import annotations

import string
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from pgrpo.data.movielens import MovieLensConfig
from pgrpo.data.packages import resolve
from pgrpo.data.ratings import IntArray, Ratings, read_ratings
from pgrpo.errors import DataError
from pgrpo.types import Dataset, Example, FloatArray

QUALITY = (("poor", 0.0), ("fair", 0.25), ("good", 0.5), ("great", 0.75))
"""A film takes the last word whose quantile of the films' mean ratings it exceeds."""

PRIOR_RATINGS = 5
"""Ratings of the mean of all films that are added to a film's own, so that few ratings say little."""


def load_rated(config: MovieLensConfig) -> Dataset:
    """Read the ratings; examples are in order of users and of time.

    `columns` of an example: `answer` (the best rated film's completion, the first one of equals),
    `options`, `labels` and `position` as for the other task, `values` (the user's rating of each film),
    `attributes` (each film's word and genre) and `popularity` (its mean rating in the training period).
    A user's features are the mean and the standard deviation of its ratings in the training period and
    the logarithm of their number.

    Raises:
        DataError: files are missing, ambiguous, empty or malformed (names file and line), or leave
            no training example or no held-out example.
    """
    ratings = read_ratings(resolve(config.path))
    of_user = [np.flatnonzero(ratings.user == user) for user in range(len(ratings.users))]
    early = [rows[: round(len(rows) * (1 - config.evaluation_share))] for rows in of_user]
    films = _Films(ratings, np.concatenate(early), config.template)
    train: list[Example] = []
    evaluation: list[Example] = []
    users: dict[str, FloatArray] = {}
    few: list[str] = []
    for user, (rows, before) in enumerate(zip(of_user, early, strict=True)):
        asked = _blocks(before, config.history, config.candidates)
        later = _blocks(rows, len(before), config.candidates)
        if not asked or not later:
            few.append(ratings.users[user])
            continue
        name = ratings.users[user]
        train += [films.example(config, name, block, before[:start]) for start, block in asked]
        evaluation += [films.example(config, name, block, before) for _, block in later]
        values = ratings.value[before]
        users[name] = np.array([values.mean(), values.std(), np.log1p(len(values))])
    if not users:
        raise DataError(
            f"{config.path} has nobody with {config.history} ratings and {config.candidates} after "
            f"them to train on, and {config.candidates} later ones to hold out"
        )
    left_out = (
        f"left out {len(few)} of {len(ratings.users)} users, whose ratings are too few to be trained "
        "on and held out"
    )
    names = ("mean rating", "std rating", "log ratings")
    return Dataset(train, evaluation, users, names, notes=(left_out,) if few else ())


def _blocks(rows: IntArray, start: int, size: int) -> list[tuple[int, IntArray]]:
    """Whole blocks of consecutive rows from `start` on, each with the place it begins at."""
    return [
        (place, rows[place : place + size]) for place in range(start, len(rows) - size + 1, size)
    ]


class _Films:
    """What the training period knows of the films.

    Args:
        ratings: all of them.
        early: rows of the training period.
        template: how a film is told.
    """

    def __init__(self, ratings: Ratings, early: IntArray, template: str) -> None:
        self._ratings = ratings
        film, value = ratings.film[early], ratings.value[early]
        counts = np.bincount(film, minlength=len(ratings.films))
        sums = np.bincount(film, weights=value, minlength=len(ratings.films))
        self._mean = (sums + PRIOR_RATINGS * value.mean()) / (counts + PRIOR_RATINGS)
        edges = np.quantile(self._mean[counts > 0], [share for _, share in QUALITY[1:]])
        levels: NDArray[np.intp] = np.searchsorted(edges, self._mean, side="left")
        self._words = [
            (QUALITY[level][0], entry.genres[0])
            for level, entry in zip(levels.tolist(), ratings.films, strict=True)
        ]
        self._texts = [
            {"facts": " ".join(words), "titles": entry.title}.get(
                template, f"{entry.title}, {' '.join(words)}"
            )
            for words, entry in zip(self._words, ratings.films, strict=True)
        ]

    def example(
        self, config: MovieLensConfig, user: str, block: IntArray, before: IntArray
    ) -> Example:
        """The choice among a block's films, by a user who has rated some before."""
        rng = np.random.default_rng((config.seed, int(block[0])))
        block = block[rng.permutation(len(block))]
        films = self._ratings.film[block].tolist()
        values = self._ratings.value[block]
        labels = list(string.ascii_uppercase[: len(block)])
        position = int(values.argmax())
        answer, choices = labels[position], None
        if config.answer == "label":
            answer, choices = f" {answer}", tuple(f" {label}" for label in labels)
        texts = [self._texts[film] for film in films]
        taste = self._taste(before)
        if config.answer == "label":
            lines = [f"{text}: {label}" for text, label in zip(texts, labels, strict=True)]
            query = f"{taste}:"
        else:
            lines = [f"{label}. {text}" for text, label in zip(texts, labels, strict=True)]
            query = f"Which film would I like most? My taste: {taste}. Answer with its letter."
        return Example(
            text="\n".join([*lines, query]),
            user=user,
            columns={
                "answer": answer,
                "options": texts,
                "labels": labels,
                "position": position,
                "values": values.tolist(),
                "attributes": [list(self._words[film]) for film in films],
                "popularity": [float(self._mean[film]) for film in films],
            },
            choices=choices,
        )

    def _taste(self, before: IntArray) -> str:
        """The word and the genre whose films got most above the user's own mean, all in all."""
        values = self._ratings.value[before]
        above: list[defaultdict[str, float]] = [defaultdict(float), defaultdict(float)]
        for film, value in zip(
            self._ratings.film[before].tolist(), values - values.mean(), strict=True
        ):
            for word, sums in zip(self._words[film], above, strict=True):
                sums[word] += float(value)
        return " ".join(max(sums.items(), key=lambda item: item[1])[0] for sums in above)
