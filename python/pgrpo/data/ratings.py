"""MovieLens files, in the layouts they are published in, as arrays."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pgrpo.errors import DataError
from pgrpo.types import FloatArray

IntArray = NDArray[np.int64]

GENRES_OF_U_ITEM = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]
"""Order of the 19 genre flags that end a line of ml-100k's u.item."""


class Film(NamedTuple):
    """What the files tell of a film."""

    title: str
    genres: tuple[str, ...]
    """Never empty; the first one describes the film in a prompt."""


@dataclass(frozen=True, slots=True)
class Ratings:
    """R ratings in order of time; ties keep the file's order."""

    users: tuple[str, ...]
    films: tuple[Film, ...]
    user: IntArray
    """[R] index into users."""
    film: IntArray
    """[R] index into films."""
    value: FloatArray
    """[R] stars."""
    time: IntArray
    """[R] seconds."""


class Row(NamedTuple):
    """A line of a file, split."""

    place: str
    """`file:line`, for error messages."""
    fields: list[str]


def read_ratings(folder: Path) -> Ratings:
    """Read whichever MovieLens layout lies in `folder` or below it.

    ml-1m (`ratings.dat`, `movies.dat`), ml-100k (`u.data`, `u.item`), atomic (`*.inter`, `*.item`)
    and ml-latest (`ratings.csv`, `movies.csv`).
    """
    layouts: dict[str, Callable[[Path], tuple[Iterator[Row], Path, dict[str, Film]]]] = {
        "ratings.dat": _read_1m,
        "u.data": _read_100k,
        "*.inter": _read_atomic,
        "ratings.csv": _read_latest,
    }
    found = [(path, read) for name, read in layouts.items() for path in sorted(folder.rglob(name))]
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path, _ in found)
        raise DataError(
            f"{folder} holds several data sets ({names}): name the folder of one"
            if found
            else f"{folder} holds no MovieLens ratings; expected one of {', '.join(layouts)}"
        )
    path, read = found[0]
    rows, films_path, films = read(path)
    return _collect(rows, path, films_path, films)


def _read_1m(path: Path) -> tuple[Iterator[Row], Path, dict[str, Film]]:
    films_path = path.with_name("movies.dat")
    films = {
        row.fields[0]: _film(row.fields[1], row.fields[2].split("|"))
        for row in _rows(films_path, "::", _encoding(films_path), 3)
    }
    return _rows(path, "::", "ascii", 4), films_path, films


def _read_100k(path: Path) -> tuple[Iterator[Row], Path, dict[str, Film]]:
    films_path = path.with_name("u.item")
    films: dict[str, Film] = {}
    for row in _rows(films_path, "|", _encoding(films_path), 5 + len(GENRES_OF_U_ITEM)):
        flags = zip(GENRES_OF_U_ITEM, row.fields[5:], strict=True)
        films[row.fields[0]] = _film(row.fields[1], [genre for genre, flag in flags if flag == "1"])
    return _rows(path, "\t", "ascii", 4), films_path, films


def _read_latest(path: Path) -> tuple[Iterator[Row], Path, dict[str, Film]]:
    films_path = path.with_name("movies.csv")
    films = {
        row.fields[0]: _film(row.fields[1], row.fields[2].split("|"))
        for row in _table(films_path, ",", ["movieId", "title", "genres"])
    }
    return _table(path, ",", ["userId", "movieId", "rating", "timestamp"]), films_path, films


def _read_atomic(path: Path) -> tuple[Iterator[Row], Path, dict[str, Film]]:
    films_path = path.with_suffix(".item")
    films: dict[str, Film] = {}
    # The genres' column is `class` in ml-100k and `genre` in ml-1m.
    for row in _table(films_path, "\t", ["item_id", "movie_title", "release_year", "class|genre"]):
        film, title, year, genres = row.fields
        films[film] = _film(f"{title} ({year})" if year else title, genres.split())
    return _table(path, "\t", ["user_id", "item_id", "rating", "timestamp"]), films_path, films


def _film(title: str, genres: list[str]) -> Film:
    named = tuple(genre for genre in genres if genre and genre != "(no genres listed)")
    return Film(" ".join(title.split()), named or ("unknown",))


def _encoding(path: Path) -> str:
    """ml-1m and ml-100k are latin-1, ml-10m is UTF-8. What is valid UTF-8 is that: accented letters of
    latin-1 are not, but for pairs of signs that no title holds, such as A with tilde and a copyright
    sign."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    except OSError:
        pass  # whoever reads it next says what is wrong
    return "utf-8-sig"


def _lines(path: Path, encoding: str) -> Iterator[str]:
    try:
        with path.open(encoding=encoding, newline="") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not {encoding} text: {problem}") from None


def _rows(path: Path, separator: str, encoding: str, width: int) -> Iterator[Row]:
    """Lines of `path` as fields, each of the expected number; empty lines are skipped."""
    lines = _lines(path, encoding)
    split = csv.reader(lines) if separator == "," else (line.split(separator) for line in lines)
    for number, fields in enumerate(split, start=1):
        if len(fields) == width:
            yield Row(f"{path}:{number}", fields)
        elif any(fields):
            raise DataError(
                f"{path}:{number} splits at {separator!r} into {len(fields)}, expected {width} fields"
            )


def _table(path: Path, separator: str, columns: list[str]) -> Iterator[Row]:
    """Rows of a file whose first line names the columns, as `name` or `name:type`.

    Fields come in the order of `columns`, where `a|b` takes either one.
    """
    first = next(_lines(path, "utf-8-sig"), "")
    header = [name.partition(":")[0] for name in first.split(separator)]
    order: list[int] = []
    for column in columns:
        places = [header.index(name) for name in column.split("|") if name in header]
        if not places:
            raise DataError(f"{path}:1 has no column {column}; found {', '.join(header)}")
        order.append(places[0])
    rows = _rows(path, separator, "utf-8-sig", len(header))
    next(rows)
    return (Row(row.place, [row.fields[i] for i in order]) for row in rows)


def _collect(rows: Iterator[Row], path: Path, films_path: Path, films: dict[str, Film]) -> Ratings:
    film_index = {film: index for index, film in enumerate(films)}
    user_index: dict[str, int] = {}
    user: list[int] = []
    film: list[int] = []
    value: list[float] = []
    time: list[int] = []
    for place, (who, what, stars, when) in rows:
        if what not in film_index:
            raise DataError(f"{place} rates film {what}, which {films_path.name} does not list")
        try:
            value.append(float(stars))
            time.append(int(float(when)))
            valid = math.isfinite(value[-1])
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            raise DataError(f"{place} has rating {stars!r} at time {when!r}; expected two numbers")
        user.append(user_index.setdefault(who, len(user_index)))
        film.append(film_index[what])
    if not user:
        raise DataError(f"{path} holds no ratings")
    times = np.asarray(time, dtype=np.int64)
    order = np.argsort(times, kind="stable")
    return Ratings(
        users=tuple(user_index),
        films=tuple(films.values()),
        user=np.asarray(user, dtype=np.int64)[order],
        film=np.asarray(film, dtype=np.int64)[order],
        value=np.asarray(value, dtype=np.float64)[order],
        time=times[order],
    )
