"""Data sets against brute-force readings of files that the tests write themselves."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter
from datetime import date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from pgrpo.data import check_beginning, load_dataset
from pgrpo.data.movielens import MovieLensConfig
from pgrpo.data.personas import (
    GENRE_HINTS,
    GENRE_WORDS,
    NEUTRAL_WORDS,
    PERSONAS,
    STYLE_HINTS,
    STYLE_WORDS,
    TOPICS,
    VOCABULARY,
    PersonasConfig,
    persona_reward,
    persona_utility,
)
from pgrpo.data.ratings import GENRES_OF_U_ITEM, read_ratings
from pgrpo.data.table import TableConfig
from pgrpo.errors import DataError

LAYOUTS = ["ml-1m", "ml-100k", "atomic", "ml-latest"]
NUM_USERS, NUM_FILMS = 40, 90

Rating = tuple[int, int, int, int]
"""user, film, stars, time"""


def made_up_ratings(seed: int) -> list[Rating]:
    """Users who rate about a third of the films, popular ones more often, all over the years."""
    rng = np.random.default_rng(seed)
    pull = rng.permutation(np.linspace(0.02, 0.7, NUM_FILMS))
    pairs = [(u, f) for u in range(1, NUM_USERS + 1) for f in range(NUM_FILMS)]
    kept = [pair for pair in pairs if rng.random() < pull[pair[1]]]
    times = rng.permutation(len(kept)) // 2 + 1000  # pairs of ratings share a second
    return [
        (u, f + 1, int(rng.integers(1, 6)), int(time))
        for (u, f), time in zip(kept, times, strict=True)
    ]


def film_of(number: int) -> tuple[str, list[str]]:
    genres = GENRES_OF_U_ITEM[1:]  # without `unknown`
    first = genres[number % 6]
    second = genres[6 + number % 5]
    title = {7: "Café Noir, Le", 8: 'The "Eighth" Film'}.get(number, f"Film {number}")
    return f"{title} ({1950 + number % 50})", [first, second][: 1 + number % 2]


def write(folder: Path, layout: str, ratings: list[Rating]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    films = {number: film_of(number) for number in range(1, NUM_FILMS + 1)}

    def save(name: str, lines: list[str], encoding: str) -> None:
        (folder / name).write_text("\n".join(lines) + "\n", encoding=encoding)

    if layout == "ml-1m":
        save("movies.dat", [f"{n}::{t}::{'|'.join(g)}" for n, (t, g) in films.items()], "latin-1")
        save("ratings.dat", ["::".join(map(str, row)) for row in ratings], "latin-1")
    elif layout == "ml-100k":
        lines = [
            "|".join(
                [str(n), t, "01-Jan-1995", "", "http://example.org"]
                + [str(int(genre in g)) for genre in GENRES_OF_U_ITEM]
            )
            for n, (t, g) in films.items()
        ]
        save("u.item", lines, "latin-1")
        save("u.data", ["\t".join(map(str, row)) for row in ratings], "latin-1")
    elif layout == "atomic":
        header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
        lines = [f"{n}\t{t[:-7]}\t{t[-5:-1]}\t{' '.join(g)}" for n, (t, g) in films.items()]
        save("small.item", [header, *lines], "utf-8")
        header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
        save("small.inter", [header, *("\t".join(map(str, row)) for row in ratings)], "utf-8")
    else:
        quoted = {n: t.replace('"', '""') for n, (t, _) in films.items()}
        lines = [f'{n},"{quoted[n]}",{"|".join(g)}' for n, (_, g) in films.items()]
        save("movies.csv", ["movieId,title,genres", *lines], "utf-8")
        rows = [",".join(map(str, row)) for row in ratings]
        save("ratings.csv", ["userId,movieId,rating,timestamp", *rows], "utf-8")
    return folder


def movielens(folder: Path, **options: Any) -> MovieLensConfig:
    return MovieLensConfig(name="movielens", path=str(folder), **options)


@pytest.fixture(scope="module")
def ratings() -> list[Rating]:
    return made_up_ratings(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ratings: list[Rating]) -> Path:
    return write(tmp_path_factory.mktemp("world"), "ml-1m", ratings)


def number_of(title: str) -> int:
    return next(n for n in range(1, NUM_FILMS + 1) if film_of(n)[0] == title)


def split_of(ratings: list[Rating], share: float = 0.2) -> int:
    times = sorted(time for *_, time in ratings)
    return times[round(len(times) * (1 - share))]


# --- layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_what_was_written(
    tmp_path: Path, layout: str, ratings: list[Rating]
) -> None:
    write(tmp_path / "deep" / "inside", layout, ratings)
    read = read_ratings(tmp_path)
    rows = zip(read.user, read.film, read.value, read.time, strict=True)
    got = [(read.users[u], read.films[f].title, v, t) for u, f, v, t in rows]
    expected = [(str(u), film_of(f)[0], float(v), t) for u, f, v, t in ratings]
    assert got == sorted(expected, key=lambda row: row[3])
    for film in read.films:
        assert list(film.genres) == film_of(number_of(film.title))[1]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-8-sig"])
def test_titles_are_read_in_the_encoding_they_have(tmp_path: Path, encoding: str) -> None:
    titles = ["Café Noir (1950)", "Misérables, Les (1995)", "Plain (1960)"]
    lines = [f"{n}::{title}::Drama" for n, title in enumerate(titles)]
    (tmp_path / "movies.dat").write_text("\n".join(lines), encoding=encoding)
    (tmp_path / "ratings.dat").write_text("1::0::4.5::7\n")
    assert [film.title for film in read_ratings(tmp_path).films] == titles


def test_a_film_without_genre_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,One,(no genres listed)\n")
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,4.5,7\n")
    assert read_ratings(tmp_path).films[0].genres == ("unknown",)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_lead_to_the_same_examples(
    tmp_path: Path, layout: str, folder: Path, ratings: list[Rating]
) -> None:
    reference = load_dataset(movielens(folder, template="both"))
    dataset = load_dataset(movielens(write(tmp_path, layout, ratings), template="both"))
    assert dataset.train[:] == reference.train[:]
    assert dataset.evaluation[:] == reference.evaluation[:]


# --- split -----------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_nothing_of_the_evaluation_period_reaches_training(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    before = made_up_ratings(seed)
    split = split_of(before)
    # Later stars are turned round: whoever liked a film now dislikes it.
    after = [(u, f, 6 - v if t >= split else v, t) for u, f, v, t in before]
    one, other = (
        load_dataset(movielens(write(tmp_path_factory.mktemp("w"), "ml-1m", r), template="both"))
        for r in (before, after)
    )
    assert one.train[:] == other.train[:]
    assert one.evaluation[:] != other.evaluation[:]
    for user in one.users.keys() & other.users.keys():
        np.testing.assert_array_equal(one.users[user], other.users[user])

    # Popularity words and features do not even see which films were rated later.
    early = [row for row in before if row[3] < split]
    counts = Counter(film for _, film, _, _ in early)
    quantiles = np.quantile(list(counts.values()), [0.45, 0.73, 0.90])
    for example in [*one.train[:50], *one.evaluation[:50]]:
        for text in example.columns["options"]:  # type: ignore[union-attr]
            title, facts = str(text).rsplit(", ", 1)
            level = int((counts[number_of(title)] > quantiles).sum())
            assert facts.split()[0] == ["obscure", "minor", "popular", "famous"][level]
    names = one.feature_names
    for user, features in one.users.items():
        stars = [v for u, _, v, _ in early if str(u) == user]
        assert features[names.index("mean rating")] == pytest.approx(np.mean(stars))
        assert features[names.index("std rating")] == pytest.approx(np.std(stars))
        assert features[names.index("log ratings")] == pytest.approx(np.log1p(len(stars)))
        liked = [f for u, f, v, _ in early if str(u) == user and v >= 4]
        assert features[names.index("liked log popularity")] == pytest.approx(
            np.mean([np.log1p(counts[f]) for f in liked])
        )
        assert features[names.index("likes Comedy")] == pytest.approx(
            np.mean(["Comedy" in film_of(f)[1] for f in liked])
        )


def test_examples_are_the_liked_films_with_enough_of_a_past(
    folder: Path, ratings: list[Rating]
) -> None:
    dataset = load_dataset(movielens(folder))
    split = split_of(ratings)
    likes = [(u, f, t) for u, f, v, t in ratings if v >= 4]
    early = Counter(u for u, _, t in likes if t < split)
    known = {f for _, f, _, t in ratings if t < split}
    train, held_out = [], []
    for user, film, time in likes:
        past = sum(u == user and t < time for u, _, t in likes)
        if time < split and past >= 3:
            train.append((str(user), film_of(film)[0]))
        if time >= split and early[user] >= 3 and film in known:
            held_out.append((str(user), film_of(film)[0]))
    for examples, expected in ((dataset.train, train), (dataset.evaluation, held_out)):
        assert sorted((e.user, e.columns["film"]) for e in examples) == sorted(expected)
    assert {e.user for e in [*dataset.train, *dataset.evaluation]} == set(dataset.users)


# --- candidates ------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_negatives_are_known_films_the_user_never_rated(
    folder: Path, ratings: list[Rating], negatives: str
) -> None:
    dataset = load_dataset(movielens(folder, template="titles", negatives=negatives, candidates=6))
    rated = {(u, f) for u, f, _, _ in ratings}
    known = {f for _, f, _, t in ratings if t < split_of(ratings)}
    for example in [*dataset.train, *dataset.evaluation]:
        options = [number_of(str(text)) for text in example.columns["options"]]  # type: ignore[union-attr]
        assert len(set(options)) == 6
        right = options.pop(example.columns["position"])  # type: ignore[call-overload]
        assert film_of(right)[0] == example.columns["film"]
        assert not {(int(example.user), film) for film in options} & rated
        assert set(options) <= known


def test_the_right_candidate_stands_anywhere(folder: Path) -> None:
    sources = [load_dataset(movielens(folder, seed=seed)).train for seed in range(3)]
    places: list[Any] = [e.columns["position"] for examples in sources for e in examples]
    counts = np.bincount(places, minlength=4)
    assert counts.sum() > 800
    assert chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_negatives_are_drawn_with_the_stated_chances(
    folder: Path, ratings: list[Rating], negatives: str
) -> None:
    early = [row for row in ratings if row[3] < split_of(ratings)]
    counts = Counter(film for _, film, _, _ in early)
    films = np.array(sorted(counts))
    rated = {(u, f) for u, f, _, _ in ratings}
    pull = np.array([counts[f] if negatives == "popularity" else 1 for f in films])
    drawn: Counter[int] = Counter()
    expected = np.zeros(len(films))
    for seed in range(3):
        config = movielens(folder, template="titles", negatives=negatives, candidates=2, seed=seed)
        for example in load_dataset(config).train:
            wrong = 1 - example.columns["position"]  # type: ignore[operator]
            drawn[number_of(str(example.columns["options"][wrong]))] += 1  # type: ignore[index]
            free = np.array([(int(example.user), f) not in rated for f in films])
            expected += pull * free / (pull * free).sum()
    often = expected > 5
    observed = np.array([drawn[f] for f in films])[often]
    rest = [drawn.total() - observed.sum(), expected.sum() - expected[often].sum()]
    assert often.sum() > 40
    assert chisquare([*observed, rest[0]], [*expected[often], rest[1]]).pvalue > 0.001


def test_more_candidates_keep_interactions_and_films(folder: Path) -> None:
    config = movielens(folder, template="titles")
    few, many = (
        load_dataset(config.model_copy(update={"candidates": k})).evaluation for k in (4, 12)
    )
    assert len(few) == len(many) > 50
    for small, large in zip(few, many, strict=True):
        assert (small.user, small.columns["film"]) == (large.user, large.columns["film"])
        assert len(large.columns["options"]) == 12  # type: ignore[arg-type]
        assert set(small.columns["options"]) < set(large.columns["options"])  # type: ignore[arg-type]
        past = [line for line in small.text.splitlines() if line.startswith("Liked:")]
        assert past == [line for line in large.text.splitlines() if line.startswith("Liked:")]


def test_examples_do_not_depend_on_the_order_of_access(folder: Path) -> None:
    one, other = (load_dataset(movielens(folder)) for _ in range(2))
    forwards = [one.train[i] for i in range(len(one.train))]
    backwards = [other.train[i] for i in reversed(range(len(other.train)))][::-1]
    assert forwards == backwards == one.train[:] == list(other.train)
    assert one.train[-1] == forwards[-1]
    assert one.train[3:9:2] == forwards[3:9:2]
    with pytest.raises(IndexError):
        one.train[len(one.train)]
    reseeded = load_dataset(movielens(folder, seed=1)).train[:]
    assert [e.user for e in reseeded] == [e.user for e in forwards]
    assert reseeded != forwards


# --- prompts ---------------------------------------------------------------------------------


def past_of(ratings: list[Rating], user: str, title: str, history: int) -> list[int]:
    likes = sorted((t, f) for u, f, v, t in ratings if str(u) == user and v >= 4)
    now = next(t for t, f in likes if f == number_of(title))
    return [f for t, f in likes if t < now][-history:]


def test_facts_put_the_label_last_and_end_with_the_profile(
    folder: Path, ratings: list[Rating]
) -> None:
    dataset = load_dataset(movielens(folder, history=5))
    early = [row for row in ratings if row[3] < split_of(ratings)]
    counts = Counter(film for _, film, _, _ in early)
    quantiles = np.quantile(list(counts.values()), [0.45, 0.73, 0.90])
    words = ["obscure", "minor", "popular", "famous"]
    line = re.compile(rf"({'|'.join(words)}) [A-Z]\S+: [A-D]")
    for example in [*dataset.train[::7], *dataset.evaluation]:
        *options, query = example.text.split("\n")
        assert len(options) == 4
        assert all(line.fullmatch(option) for option in options)
        assert [option[-1] for option in options] == example.columns["labels"] == list("ABCD")
        assert [option[:-3] for option in options] == example.columns["options"]
        assert example.choices == (" A", " B", " C", " D")
        answer = str(example.columns["answer"])
        assert answer == example.choices[example.columns["position"]]  # type: ignore[index]

        past = past_of(ratings, example.user, str(example.columns["film"]), 5)
        assert len(past) >= 3
        levels = sorted(int((counts[film] > quantiles).sum()) for film in past)
        genres = [film_of(film)[1][0] for film in past]
        most = max(genres.count(genre) for genre in genres)
        favourite = [genre for genre in genres if genres.count(genre) == most][-1]
        assert query == f"{words[levels[len(levels) // 2]]} {favourite}:"


@pytest.mark.parametrize("template", ["titles", "both"])
@pytest.mark.parametrize("answer", ["label", "text", "free"])
def test_titles_tell_only_of_the_past(
    folder: Path, ratings: list[Rating], template: str, answer: str
) -> None:
    dataset = load_dataset(movielens(folder, template=template, answer=answer, history=4))
    for example in dataset.evaluation[:80]:
        lines = example.text.split("\n")
        told = [line.removeprefix("Liked: ") for line in lines if line.startswith("Liked: ")]
        past = past_of(ratings, example.user, str(example.columns["film"]), 4)
        assert told == [film_of(film)[0] for film in past]
        options = [str(option) for option in example.columns["options"]]  # type: ignore[union-attr]
        assert all(option in example.text for option in options)
        assert options[example.columns["position"]].startswith(str(example.columns["film"]))  # type: ignore[call-overload]


def test_texts_to_choose_from_differ(folder: Path) -> None:
    dataset = load_dataset(movielens(folder, answer="text", candidates=8))
    for example in dataset.train[:300]:
        assert example.choices == tuple(f" {text}" for text in example.columns["options"])  # type: ignore[union-attr]
        assert example.choices is not None
        assert len(set(example.choices)) == 8
        assert example.columns["answer"] == example.choices[example.columns["position"]]  # type: ignore[call-overload]
    # With letters, equal descriptions stay: excluding them would change the task.
    lettered = load_dataset(movielens(folder, candidates=8)).train[:300]
    assert any(len(set(e.columns["options"])) < 8 for e in lettered)  # type: ignore[arg-type]


def test_free_answers_are_letters(folder: Path) -> None:
    example = load_dataset(movielens(folder, answer="free")).train[0]
    assert example.choices is None
    assert example.columns["answer"] == example.columns["labels"][example.columns["position"]]  # type: ignore[index]


# --- what can be wrong with the files ----------------------------------------------------------


def damage(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text(encoding="latin-1")
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1), encoding="latin-1")


def test_a_folder_that_is_missing_or_holds_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_dataset(movielens(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"holds no MovieLens ratings; expected one of ratings.dat"):
        load_dataset(movielens(tmp_path))


def test_two_data_sets_are_ambiguous(tmp_path: Path, ratings: list[Rating]) -> None:
    write(tmp_path / "a", "ml-1m", ratings)
    write(tmp_path / "b", "atomic", ratings)
    with pytest.raises(DataError, match=r"several data sets \(a/ratings.dat, b/small.inter\)"):
        load_dataset(movielens(tmp_path))


@pytest.mark.parametrize(
    ("layout", "ratings_file", "films_file"),
    [
        ("ml-1m", "ratings.dat", "movies.dat"),
        ("ml-100k", "u.data", "u.item"),
        ("atomic", "small.inter", "small.item"),
        ("ml-latest", "ratings.csv", "movies.csv"),
    ],
)
def test_missing_empty_and_cut_files_are_named(
    tmp_path: Path, ratings: list[Rating], layout: str, ratings_file: str, films_file: str
) -> None:
    folder = write(tmp_path, layout, ratings)
    lines = (folder / ratings_file).read_text().splitlines()
    lines[4] = lines[4][:3]
    (folder / ratings_file).write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"{ratings_file}:5 splits at .* into \d, expected 4"):
        load_dataset(movielens(folder))
    (folder / ratings_file).write_text("")
    with pytest.raises(DataError, match=rf"{ratings_file}(:1 has no column| holds no ratings)"):
        load_dataset(movielens(folder))
    write(folder, layout, ratings)
    (folder / films_file).unlink()
    with pytest.raises(DataError, match=f"{films_file} is missing"):
        load_dataset(movielens(folder))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("::3::", "::three::", r"ratings.dat:\d+ has rating 'three' at time '\d+'"),
        ("::3::", "::nan::", r"ratings.dat:\d+ has rating 'nan'"),
        ("\n1::", "\n1::999", r"ratings.dat:\d+ rates film 999\d+, which movies.dat does not list"),
    ],
)
def test_a_bad_value_is_named_with_its_line(
    tmp_path: Path, ratings: list[Rating], old: str, new: str, message: str
) -> None:
    folder = write(tmp_path, "ml-1m", ratings)
    damage(folder, "ratings.dat", old, new)
    with pytest.raises(DataError, match=message):
        load_dataset(movielens(folder))


def test_text_in_the_wrong_encoding_is_refused(tmp_path: Path, ratings: list[Rating]) -> None:
    folder = write(tmp_path, "ml-latest", ratings)
    damage(folder, "movies.csv", "Film 9 ", "Fil\xe9m 9 ")
    with pytest.raises(DataError, match=r"movies.csv is not utf-8"):
        load_dataset(movielens(folder))


def test_data_that_leaves_no_example_is_refused(tmp_path: Path, ratings: list[Rating]) -> None:
    def load(rows: list[Rating], **options: Any) -> None:
        load_dataset(movielens(write(tmp_path, "ml-1m", rows), **options))

    with pytest.raises(DataError, match="have the same time"):
        load([(u, f, v, 5) for u, f, v, _ in ratings])
    with pytest.raises(DataError, match="liked_from is 5.5, but no rating in .* exceeds 5"):
        load(ratings, liked_from=5.5)
    with pytest.raises(DataError, match="no example to train on"):
        load([(u, f, v, t) for u, f, v, t in ratings if t < 1030])
    newcomers = [(u if t < split_of(ratings) else u + 500, f, v, t) for u, f, v, t in ratings]
    with pytest.raises(DataError, match="no example to hold out"):
        load(newcomers)
    everything = [(500, f, 5, 900 + f) for f in range(1, NUM_FILMS)]
    with pytest.raises(DataError, match=r"candidates is 4, but user 500 leaves \d unrated films"):
        load([*ratings, *everything])
    folder = write(tmp_path, "ml-1m", ratings)
    dataset = load_dataset(movielens(folder, answer="text", candidates=26))
    with pytest.raises(DataError, match="unrated films of different description"):
        dataset.train[:]


# --- personas --------------------------------------------------------------------------------


def test_personas_come_in_the_stated_shares() -> None:
    dataset = load_dataset(PersonasConfig(name="personas", minority_share=0.04))
    counts = Counter(str(e.columns["persona"]) for e in dataset.train)
    assert len(dataset.train) == 4096
    assert len(dataset.evaluation) == 1024
    shares = {name: counts[name] / 4096 for name in PERSONAS}
    *others, minority = shares.values()
    assert minority == pytest.approx(0.04, abs=0.005)
    assert others == sorted(others, reverse=True)
    assert 0.27 < others[0] < 0.31
    assert min(others) > 2 * minority
    assert {e.user for e in dataset.evaluation} <= {e.user for e in dataset.train}


def test_few_examples_still_have_all_personas_among_the_users() -> None:
    dataset = load_dataset(PersonasConfig(name="personas", num_examples=1))
    assert (len(dataset.train), len(dataset.evaluation), len(dataset.users)) == (1, 1, 7)
    dataset = load_dataset(PersonasConfig(name="personas", num_examples=28))
    assert {str(e.columns["persona"]) for e in dataset.train} == set(PERSONAS)


def test_personas_are_the_same_for_the_same_seed() -> None:
    one, same, other = (
        load_dataset(PersonasConfig(name="personas", num_examples=64, seed=s)) for s in (1, 1, 2)
    )
    assert one.train == same.train
    assert one.train != other.train
    for user in one.users:
        np.testing.assert_array_equal(one.users[user], same.users[user])


def test_kmeans_finds_the_personas_in_the_users_features() -> None:
    dataset = load_dataset(PersonasConfig(name="personas"))
    persona = {e.user: e.columns["persona"] for e in dataset.train}
    features = np.array([dataset.users[user] for user in persona])
    assert features.shape == (512, len(dataset.feature_names))
    scaled = (features - features.mean(0)) / features.std(0)
    kmeans: Any = KMeans
    found = kmeans(7, n_init=10, random_state=0).fit_predict(scaled)
    assert adjusted_rand_score(list(persona.values()), found) > 0.97


def test_prompts_hint_at_the_persona_imperfectly() -> None:
    dataset = load_dataset(PersonasConfig(name="personas"))
    own = []
    for example in dataset.train:
        persona = PERSONAS[str(example.columns["persona"])]
        *hints, topic = example.text.split()
        style, genre = STYLE_HINTS[persona.style].split(), GENRE_HINTS[persona.genre].split()
        own += [hint in style for hint in hints[:2]] + [hint in genre for hint in hints[2:]]
        assert topic in TOPICS.split()
        assert set(example.text.split()) <= set(dataset.vocabulary)
    assert np.mean(own) == pytest.approx(0.9, abs=0.01)


def test_every_word_means_one_thing() -> None:
    tables = (STYLE_WORDS, GENRE_WORDS, STYLE_HINTS, GENRE_HINTS)
    words = [w for table in tables for words in table.values() for w in words.split()]
    words += [*NEUTRAL_WORDS.split(), *TOPICS.split()]
    assert len(words) == len(set(words))
    assert sorted(words) == list(VOCABULARY)


@pytest.mark.parametrize(
    ("completion", "utility"),
    [
        ("therefore moreover hence swing bebop trumpet", 1.0),
        ("swing therefore bebop moreover trumpet hence", 1.0),
        ("therefore moreover hence the a of", 0.5),
        ("therefore therefore therefore swing swing swing", 1 / 3),
        ("therefore moreover hence regarding sincerely swing", 2 / 3),
        ("dope riff chill doom banjo loop", 0.0),
        ("the a of in it is therefore swing", 0.0),
        ("", 0.0),
    ],
)
def test_utility_counts_different_words_of_style_and_genre(completion: str, utility: float) -> None:
    columns = {"persona": "formal-jazz", "words": 6, "shift": 0.5}
    assert persona_utility(columns, completion) == pytest.approx(utility)


def test_a_single_word_is_chosen_and_worth_its_place() -> None:
    dataset = load_dataset(PersonasConfig(name="personas", words=1, num_examples=64))
    everything = [*STYLE_WORDS.values(), *GENRE_WORDS.values()]
    assert dataset.train[0].choices == tuple(" ".join(everything).split())
    columns = {"persona": "formal-jazz", "words": 1, "shift": 0.0}
    for kind, table, worth in (("jazz", GENRE_WORDS, 1.0), ("formal", STYLE_WORDS, 0.5)):
        utilities = [persona_utility(columns, word) for word in table[kind].split()]
        assert utilities == pytest.approx(worth * np.arange(1, 9) / 8)
    assert persona_utility(columns, "riff walking") == persona_utility(columns, "") == 0.0
    assert persona_utility(columns, "walking riff") == 1.0


def test_an_odd_number_of_words_asks_for_more_style() -> None:
    columns = {"persona": "formal-jazz", "words": 3, "shift": 0.0}
    assert persona_utility(columns, "therefore moreover swing") == 1.0
    assert persona_utility(columns, "therefore bebop swing") == 0.75
    assert persona_utility({**columns, "words": 40}, " ".join(VOCABULARY[:1])) == 0.0
    everything = f"{STYLE_WORDS['formal']} {GENRE_WORDS['jazz']}"
    assert persona_utility({**columns, "words": 40}, everything) == 1.0


def test_raw_rewards_are_on_scales_of_their_own() -> None:
    for name, persona in PERSONAS.items():
        columns = {"persona": name, "words": 2, "shift": 0.25}
        best = f"{STYLE_WORDS[persona.style].split()[0]} {GENRE_WORDS[persona.genre].split()[0]}"
        low, high = persona_reward(columns, "the a"), persona_reward(columns, best)
        assert low == pytest.approx(persona.offset + 0.25 * persona.scale)
        assert high - low == pytest.approx(persona.scale)
    scales = [persona.scale for persona in PERSONAS.values()]
    assert scales[-1] == min(scales)
    assert max(scales) / min(scales) == pytest.approx(20)


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"persona": "nobody", "words": 6, "shift": 0.0},
        {"persona": "dry-techno", "words": 0, "shift": 0.0},
        {"persona": "dry-techno", "words": 6},
    ],
)
def test_columns_of_another_data_set_are_refused(columns: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="column (persona|words|shift) is"):
        persona_reward(columns, "the a")


# --- tables ----------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"prompt": "Hi", "user": "ann", "answer": "x", "options": ["x", "y"], "age": 30},
    {"prompt": "Ho", "user": "bob", "answer": "y", "options": ["x", "y"], "age": 20.5},
    {"prompt": "He", "user": "ann", "answer": None, "options": ["z"], "age": 32},
]


def table(path: Path, rows: list[dict[str, Any]] | None = None, **options: Any) -> TableConfig:
    if rows is not None:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return TableConfig(name="jsonl", path=str(path), **options)


def test_a_table_becomes_examples(tmp_path: Path) -> None:
    config = table(tmp_path / "t.jsonl", ROWS, choices_column="options", feature_columns=["age"])
    dataset = load_dataset(config)
    first = dataset.train[0]
    assert (first.text, first.user, first.choices) == ("Hi", "ann", ("x", "y"))
    assert first.columns == {"answer": "x", "age": 30}
    assert dataset.train[2].columns["answer"] is None
    assert {user: features.tolist() for user, features in dataset.users.items()} == {
        "ann": [31.0],
        "bob": [20.5],
    }
    assert dataset.feature_names == ("age",)
    assert len(dataset.evaluation) == 0


def test_held_out_rows_leave_known_users_features_alone(tmp_path: Path) -> None:
    later = [
        {"prompt": "Ha", "user": "ann", "age": 99},
        {"prompt": "Hu", "user": 7, "age": 1},
    ]
    (tmp_path / "later.jsonl").write_text("\n".join(map(json.dumps, later)))
    config = table(
        tmp_path / "t.jsonl",
        ROWS,
        feature_columns=["age"],
        evaluation_path=str(tmp_path / "later.jsonl"),
    )
    dataset = load_dataset(config)
    assert [e.text for e in dataset.evaluation] == ["Ha", "Hu"]
    assert dataset.users["ann"].tolist() == [31.0]
    assert dataset.users["7"].tolist() == [1.0]


def test_without_features_users_are_still_known(tmp_path: Path) -> None:
    dataset = load_dataset(table(tmp_path / "t.jsonl", ROWS))
    assert {user: features.shape for user, features in dataset.users.items()} == {
        "ann": (0,),
        "bob": (0,),
    }
    assert dataset.train[0].choices is None
    assert dataset.train[0].columns["options"] == ["x", "y"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, r"t.jsonl:2: column prompt has no value"),
        ({"prompt": ""}, r"t.jsonl:2: column prompt is ''; expected a text"),
        ({"prompt": 4}, r"t.jsonl:2: column prompt is 4; expected a text"),
        ({"user": None}, r"t.jsonl:2: column user has no value"),
        ({"user": True}, r"t.jsonl:2: column user is True; expected a text or whole number"),
        ({"options": None}, r"t.jsonl:2: column options has no value"),
        ({"options": "xy"}, r"t.jsonl:2: column options is 'xy'; expected a list of texts"),
        ({"options": []}, r"t.jsonl:2: column options is \[\]; expected a list of texts"),
        ({"options": ["x", 1]}, r"t.jsonl:2: column options is .*; expected a list of texts"),
        ({"options": ["x", "x"]}, r"t.jsonl:2: column options is .*; the choices must differ"),
        ({"age": "old"}, r"t.jsonl:2: column age is 'old'; expected a finite number"),
        ({"age": float("nan")}, r"t.jsonl:2: column age is nan; expected a finite number"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = [ROWS[0], {**ROWS[1], **change}]
    config = table(tmp_path / "t.jsonl", rows, choices_column="options", feature_columns=["age"])
    with pytest.raises(DataError, match=message):
        load_dataset(config)


@pytest.mark.parametrize("column", ["prompt_column", "user_column", "choices_column"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, column: str) -> None:
    with pytest.raises(DataError, match=r"t.jsonl:1: no column 'nope'; found prompt, user, answer"):
        load_dataset(table(tmp_path / "t.jsonl", ROWS, **{column: "nope"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.jsonl holds no rows"),
        (b"\n\n", "t.jsonl holds no rows"),
        (b'{"prompt": "a", "user": "b"}\n\n{"prompt": ', r"t.jsonl:3 is not JSON"),
        (b"\xff\xfe{}", r"t.jsonl:1 is not JSON"),
        (b"[1, 2]", r"t.jsonl:1 is not a JSON object"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset(table(tmp_path / "t.jsonl"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t.jsonl does not exist; expected a jsonl file"):
        load_dataset(table(tmp_path / "t.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        load_dataset(table(tmp_path))


def test_parquet_and_json_lines_give_the_same(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    options: dict[str, Any] = {"choices_column": "options", "feature_columns": ["age"]}
    lines = load_dataset(table(tmp_path / "t.jsonl", ROWS, **options))
    columns = load_dataset(TableConfig(name="parquet", path=str(tmp_path / "t.parquet"), **options))
    assert list(columns.train) == list(lines.train)
    assert columns.users == lines.users


def test_parquet_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TableConfig(name="parquet", path=str(tmp_path / "t.parquet"))
    (tmp_path / "t.parquet").write_text("no parquet")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(DataError, match=r"needs pyarrow: pip install pyarrow"):
            load_dataset(config)
    pytest.importorskip("pyarrow.parquet")
    with pytest.raises(DataError, match="is not a readable Parquet file"):
        load_dataset(config)


def test_columns_that_json_has_nothing_for_are_texts_numbers_or_left_out(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {
        **ROWS[0],
        "user": 7.0,  # as pandas has whole numbers beside gaps
        "prompt": b"Hi",
        "when": datetime(2026, 11, 26, 12, 30),  # noqa: DTZ001 - Parquet has such times
        "day": date(2026, 11, 26),
        "price": Decimal("1.25"),
        "raw": b"\xff\xfe",
        "nested": {"at": [time_of_day(1, 2)], "name": "ann"},
    }
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "t.parquet")
    (example,) = load_dataset(TableConfig(name="parquet", path=str(tmp_path / "t.parquet"))).train
    assert (example.text, example.user) == ("Hi", "7")
    assert {name: example.columns[name] for name in ("when", "day", "price", "nested")} == {
        "when": "2026-11-26T12:30:00",
        "day": "2026-11-26",
        "price": 1.25,
        "nested": {"at": ["01:02:00"], "name": "ann"},
    }
    assert "raw" not in example.columns


def test_rows_come_from_many_files_of_many_kinds(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        lines = "\n".join(json.dumps({**row, "age": number}) for row in ROWS)
        (tmp_path / f"part-{number:02d}.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    with gzip.open(tmp_path / "last.jsonl.gz", "wt") as file:
        file.write(json.dumps({**ROWS[0], "age": 99}))
    paths = [str(tmp_path / "part-*.jsonl"), str(tmp_path / "last.jsonl.gz")]
    dataset = load_dataset(TableConfig(name="jsonl", path=paths))
    ages = [example.columns["age"] for example in dataset.train]
    assert ages == [1, 1, 1, 2, 2, 2, 10, 10, 10, 99]
    with pytest.raises(DataError, match=r"other-\*.jsonl does not exist"):
        load_dataset(TableConfig(name="jsonl", path=[*paths, str(tmp_path / "other-*.jsonl")]))
    if sys.version_info < (3, 13):  # from then on such a pattern is one
        with pytest.raises(DataError, match="is no pattern of files: Invalid pattern"):
            load_dataset(TableConfig(name="jsonl", path=str(tmp_path / "**x")))
    (tmp_path / "last.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="last.jsonl.gz cannot be read as gzip"):
        load_dataset(TableConfig(name="jsonl", path=paths))

    (tmp_path / "t.csv").write_text('prompt,user,age\n"Hi, you",ann,30\nHo,bob,20.5\n')
    config = TableConfig(name="csv", path=str(tmp_path / "t.csv"), feature_columns=["age"])
    dataset = load_dataset(config)
    assert [example.text for example in dataset.train] == ["Hi, you", "Ho"]
    assert dataset.users["bob"].tolist() == [20.5]


def test_bad_rows_are_left_out_and_counted_if_wanted(tmp_path: Path) -> None:
    good = [json.dumps(row) for row in ROWS]
    bad = {
        '{"prompt": ': "is not JSON",
        '["a"]': "is not a JSON object",
        '{"prompt": "x"}': "no column 'user'",
        '{"prompt": "\\ud83d", "user": "u"}': r"is not text: it has \\ud83d without its other half",
    }
    (tmp_path / "t.jsonl").write_text("\n".join([good[0], *bad, *good[1:]]))
    dataset = load_dataset(table(tmp_path / "t.jsonl", on_bad_row="skip"))
    assert [example.text for example in dataset.train] == ["Hi", "Ho", "He"]
    (note,) = dataset.notes
    assert note.startswith("4 of 7 rows of ") and "were left out; the first: " in note
    assert "t.jsonl:2 is not JSON" in note
    for line, message in bad.items():
        (tmp_path / "t.jsonl").write_text(f"{good[0]}\n{line}")
        with pytest.raises(DataError, match=f"t.jsonl:2:? {message}"):
            load_dataset(table(tmp_path / "t.jsonl"))
    (tmp_path / "t.jsonl").write_text("\n".join(bad))
    with pytest.raises(DataError, match="holds no rows that can be used; the first: .*:1 is not"):
        load_dataset(table(tmp_path / "t.jsonl", on_bad_row="skip"))


def test_rows_without_a_cluster_can_be_left_out(tmp_path: Path) -> None:
    rows = [{**row, "segment": segment} for row, segment in zip(ROWS, ("a", None, ""), strict=True)]
    options: dict[str, Any] = {"required_columns": ["segment"]}
    dataset = load_dataset(table(tmp_path / "t.jsonl", rows, on_bad_row="skip", **options))
    assert [example.text for example in dataset.train] == [ROWS[0]["prompt"], ROWS[2]["prompt"]]
    assert dataset.notes[0].endswith("t.jsonl:2: column segment has no value")
    with pytest.raises(DataError, match="t.jsonl:2: column segment has no value"):
        load_dataset(table(tmp_path / "t.jsonl", rows, **options))


def test_no_file_is_read_twice_or_on_both_sides(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [{"prompt": f"{name}{n}", "user": "u"} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")]
    dataset = load_dataset(TableConfig(name="jsonl", path=paths, evaluation_share=0.25))
    assert [e.text for e in dataset.train] == ["a0", "a1", "a2", "a3", "b0", "b1"]
    assert [e.text for e in dataset.evaluation] == ["b2", "b3"]
    held_out = str(tmp_path / "b.jsonl")
    both = TableConfig(name="jsonl", path=str(tmp_path / "*.jsonl"), evaluation_path=held_out)
    for look in (load_dataset, check_beginning):
        with pytest.raises(
            DataError, match=r"b.jsonl is named by data.path and by data.evaluation_p"
        ):
            look(both)


def test_rows_of_another_width_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt,user\na,u\nb,u,more\nc\nd,u\n")
    dataset = load_dataset(TableConfig(name="csv", path=str(tmp_path / "t.csv"), on_bad_row="skip"))
    assert [e.text for e in dataset.train] == ["a", "d"]
    (note,) = dataset.notes
    assert note.startswith("2 of 4 rows of") and note.endswith("t.csv:3 has 3 fields, expected 2")
    with pytest.raises(DataError, match="t.csv:3 has 3 fields, expected 2"):
        load_dataset(TableConfig(name="csv", path=str(tmp_path / "t.csv")))


def test_prompts_may_be_chats(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    asked = [*turns, {"role": "user", "content": "He?"}]
    dataset = load_dataset(table(tmp_path / "t.jsonl", [{"prompt": asked, "user": "ann"}]))
    (example,) = dataset.train
    assert example.turns == (("user", "Hi"), ("assistant", "Ho"), ("user", "He?"))
    assert example.text == "user: Hi\nassistant: Ho\nuser: He?"
    wrong: Any
    for wrong in (turns, [], [{"role": "user"}], [{"role": "user", "content": 3}], ["Hi"]):
        with pytest.raises(DataError, match="expected a text, or turns of a chat with role and "):
            load_dataset(table(tmp_path / "t.jsonl", [{"prompt": wrong, "user": "ann"}]))


def test_the_latest_rows_of_every_user_are_held_out(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    rows: list[dict[str, Any]] = [
        {"prompt": f"{user}{number}", "user": user, "at": float(random.random()), "age": number}
        for user, size in (("ann", 10), ("bob", 3), ("cat", 1), ("dan", 2))
        for number in range(size)
    ]
    random.shuffle(rows)
    options: dict[str, Any] = {"evaluation_share": 0.3, "feature_columns": ["age"]}
    by_time = load_dataset(table(tmp_path / "t.jsonl", rows, time_column="at", **options))
    by_place = load_dataset(table(tmp_path / "t.jsonl", rows, **options))
    for dataset, key in ((by_time, lambda row: row["at"]), (by_place, rows.index)):
        for user, number in (("ann", 3), ("bob", 1), ("cat", 0), ("dan", 1)):
            own = sorted((row for row in rows if row["user"] == user), key=key)
            early, late = own[: len(own) - number], own[len(own) - number :]
            for examples, expected in ((dataset.train, early), (dataset.evaluation, late)):
                got = [example.text for example in examples if example.user == user]
                assert got == [row["prompt"] for row in rows if row in expected]
            assert dataset.users[user] == pytest.approx(
                np.mean([float(row["age"]) for row in early])
            )


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (3, 20.5),
        ("3", "20"),
        ("2026-11-26", "2026-11-27"),
        ("2026-11-26T23:30:00Z", "2026-11-27T00:00:00.5"),
        ("2026-11-26T12:00:00+02:00", "2026-11-26 11:00"),
    ],
)
def test_times_are_numbers_or_iso_texts(tmp_path: Path, earlier: Any, later: Any) -> None:
    rows = [{"prompt": str(at), "user": "u", "at": at} for at in (later, earlier)]
    options: dict[str, Any] = {"evaluation_share": 0.5, "time_column": "at"}
    dataset = load_dataset(table(tmp_path / "t.jsonl", rows, **options))
    assert [example.text for example in dataset.evaluation] == [str(later)]
    with pytest.raises(DataError, match=r"t.jsonl:1: column at is 'nan'; expected a finite number"):
        load_dataset(table(tmp_path / "t.jsonl", [{**rows[0], "at": "nan"}], **options))
    with pytest.raises(
        DataError, match=r"t.jsonl:1: column at is 'soon'; expected a number, or a da"
    ):
        load_dataset(table(tmp_path / "t.jsonl", [{**rows[0], "at": "soon"}], **options))


def test_hugging_face_data_sets_are_read(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    parts = {"train": library.Dataset.from_list(ROWS), "test": library.Dataset.from_list(ROWS[:1])}
    library.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "one")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "files" / "test.jsonl").write_text(json.dumps(ROWS[0]))

    def load(folder: str, **options: Any) -> Any:
        path = str(tmp_path / folder)
        return load_dataset(TableConfig(name="datasets", path=path, **options))

    lines = load_dataset(table(tmp_path / "t.jsonl", ROWS))
    assert list(load("one").train) == list(lines.train)
    for folder in ("both", "files"):
        dataset = load(folder, evaluation_split="test")
        assert list(dataset.train) == list(lines.train)
        assert list(dataset.evaluation) == list(lines.train)[:1]
    with pytest.raises(
        DataError, match=r"one', split 'test', cannot be read: KeyError: .* no splits"
    ):
        load("one", evaluation_split="test")
    with pytest.raises(DataError, match=r"both', split 'nope', cannot be read: KeyError"):
        load("both", split="nope")
    with pytest.raises(DataError, match=r"nowhere', split 'train', cannot be read: "):
        load("nowhere")
    with pytest.raises(DataError, match=r"both train row 1: no column 'nope'; found prompt, user"):
        load("both", prompt_column="nope")


def test_settings_of_tables_that_contradict_each_other_are_refused() -> None:
    for options, message in (
        ({"name": "jsonl", "split": "test"}, "split has no effect here"),
        ({"name": "datasets", "evaluation_path": "b"}, "evaluation_path has no effect here"),
        ({"name": "datasets", "path": ["a", "b"]}, r"data.path is \['a', 'b'\]; expected one data"),
        ({"name": "jsonl", "time_column": "at"}, "time_column has no effect here"),
        (
            {"name": "datasets", "evaluation_split": "train"},
            "evaluation_split is 'train', which is trained on; expected another split",
        ),
        (
            {"name": "jsonl", "evaluation_share": 0.5, "evaluation_path": "b"},
            "data.evaluation_share is 0.5, and 'b' is held out; expected one of them",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            TableConfig.model_validate({"path": "a", **options})
