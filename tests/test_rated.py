"""MovieLens with people's own ratings as rewards, against a brute-force reading of the same ratings."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data import NUM_FILMS, film_of, made_up_ratings, movielens, write

from pgrpo.config.checks import check
from pgrpo.config.sections import RewardConfig
from pgrpo.data import load_dataset
from pgrpo.data.movielens import MovieLensConfig
from pgrpo.data.rated import PRIOR_RATINGS, QUALITY
from pgrpo.errors import ConfigError, DataError
from pgrpo.plugins.registry import load_registry
from pgrpo.train.baselines import baselines
from pgrpo.types import Example, Prompt, Rollout

RATINGS = made_up_ratings(3)
OF_USER: dict[str, list[tuple[int, int]]] = {}
"""User -> films and stars, in order of time; ties as in the file."""
for who, film, stars, _ in sorted(RATINGS, key=lambda row: row[3]):
    OF_USER.setdefault(str(who), []).append((film, stars))

HISTORY, SIZE = 6, 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    folder = write(tmp_path_factory.mktemp("world"), "ml-1m", RATINGS)
    config = movielens(folder, task="rated", history=HISTORY, candidates=SIZE, template="both")
    return load_dataset(config)


def split_of(user: str) -> int:
    return round(len(OF_USER[user]) * 0.8)


def blocks(user: str, start: int, end: int) -> list[list[tuple[int, int]]]:
    rows = OF_USER[user][start:end]
    return [rows[i : i + SIZE] for i in range(0, len(rows) - SIZE + 1, SIZE)]


def quality() -> dict[int, str]:
    """Each film's word, from what the training period knows of it."""
    given: defaultdict[int, list[int]] = defaultdict(list)
    for user, rows in OF_USER.items():
        for film, stars in rows[: split_of(user)]:
            given[film].append(stars)
    known = list(given)
    everything = np.mean([stars for found in given.values() for stars in found])
    mean = {
        film: (sum(given[film]) + PRIOR_RATINGS * everything) / (len(given[film]) + PRIOR_RATINGS)
        for film in range(1, NUM_FILMS + 1)
    }
    edges = np.quantile([mean[film] for film in known], [share for _, share in QUALITY[1:]])
    return {film: QUALITY[sum(value > edges)][0] for film, value in mean.items()}


def test_examples_are_blocks_of_films_that_a_user_has_rated(dataset) -> None:
    words = quality()
    for examples, held_out in ((dataset.train, False), (dataset.evaluation, True)):
        wanted: list[tuple[str, list[tuple[int, int]]]] = []
        for user in dataset.users:
            split = split_of(user)
            ends = (split, len(OF_USER[user])) if held_out else (HISTORY, split)
            wanted += [(user, block) for block in blocks(user, *ends)]
        assert len(examples) == len(wanted)
        for example, (user, block) in zip(examples, wanted, strict=True):
            columns: Any = example.columns
            assert example.user == user
            told = {
                f"{film_of(film)[0]}, {words[film]} {film_of(film)[1][0]}": stars
                for film, stars in block
            }
            assert dict(zip(columns["options"], columns["values"], strict=True)) == told
            assert columns["values"][columns["position"]] == max(told.values())
            assert columns["answer"] == f" {'ABC'[columns['position']]}"
            assert [" ".join(pair) for pair in columns["attributes"]] == [
                text.rpartition(", ")[2] for text in columns["options"]
            ]


def test_the_query_is_what_earlier_ratings_say(dataset) -> None:
    words = quality()

    def told(rows: list[tuple[int, int]]) -> tuple[set[str], set[str]]:
        mean = np.mean([stars for _, stars in rows])
        sums: list[defaultdict[str, float]] = [defaultdict(float), defaultdict(float)]
        for film, stars in rows:
            sums[0][words[film]] += stars - mean
            sums[1][film_of(film)[1][0]] += stars - mean
        best = [max(found.values()) for found in sums]
        first, second = (
            {word for word, total in found.items() if total > top - 1e-9}
            for found, top in zip(sums, best, strict=True)
        )
        return first, second

    met: defaultdict[str, int] = defaultdict(int)
    for examples, held_out in ((dataset.train, False), (dataset.evaluation, True)):
        for example in examples:
            start = HISTORY + SIZE * met[example.user]
            met[example.user] += not held_out
            rows = OF_USER[example.user][: split_of(example.user) if held_out else start]
            word, genre = example.text.split("\n")[-1].removesuffix(":").split()
            first, second = told(rows)
            assert word in first
            assert genre in second


def test_features_are_of_the_training_period(dataset) -> None:
    assert dataset.feature_names == ("mean rating", "std rating", "log ratings")
    for user, features in dataset.users.items():
        stars = [stars for _, stars in OF_USER[user][: split_of(user)]]
        assert features == pytest.approx([np.mean(stars), np.std(stars), np.log1p(len(stars))])


def test_users_with_few_ratings_are_left_out_and_counted(dataset, tmp_path: Path) -> None:
    kept = {
        user
        for user in OF_USER
        if blocks(user, HISTORY, split_of(user))
        and blocks(user, split_of(user), len(OF_USER[user]))
    }
    assert set(dataset.users) == kept
    folder = write(tmp_path, "ml-1m", RATINGS)
    assert len(kept) == len(OF_USER)
    fewer = load_dataset(movielens(folder, task="rated", history=HISTORY, candidates=6))
    assert len(fewer.users) < len(OF_USER)
    assert fewer.notes == (
        f"left out {len(OF_USER) - len(fewer.users)} of {len(OF_USER)} users, whose ratings are too few to "
        "be trained on and held out",
    )
    with pytest.raises(DataError, match="nobody with 500 ratings"):
        load_dataset(movielens(folder, task="rated", history=500))


@pytest.mark.parametrize(
    "setting", [{"negatives": "popularity"}, {"liked_from": 3.0}, {"answer": "text"}]
)
def test_settings_of_the_other_task_are_refused(setting: dict[str, Any]) -> None:
    tree = {"name": "movielens", "path": "x", "task": "rated", **setting}
    with pytest.raises(ConfigError, match=next(iter(setting))):
        check(MovieLensConfig, tree, "test")


def test_a_free_answer_names_a_letter(tmp_path: Path) -> None:
    folder = write(tmp_path, "ml-1m", RATINGS)
    dataset = load_dataset(movielens(folder, task="rated", answer="free", candidates=3))
    example = dataset.train[0]
    assert example.choices is None
    assert example.text.split("\n")[0].startswith("A. ")
    assert example.columns["answer"] in ("A", "B", "C")


def rollout(completion: str, **columns: Any) -> Rollout:
    prompt = Prompt(Example("?", user="u", columns=columns), 0, (1,))
    return Rollout(prompt, 0, (1,), completion, (0.0,), False)


def test_the_reward_is_the_users_rating_of_what_is_named() -> None:
    reward: Any = load_registry().reward(RewardConfig(name="rated"))
    columns = {"labels": ["A", "B"], "options": ["fair War", "good War"], "values": [2.5, 4]}
    said = [" A", "B", "good War", "The best is B.", "none of them"]
    assert reward([rollout(text, **columns) for text in said]) == [2.5, 4.0, 4.0, 4.0, 0.0]
    with pytest.raises(DataError, match="no column 'values'"):
        reward([rollout("A", labels=["A"])])
    with pytest.raises(DataError, match="column values holds 'x'; expected numbers"):
        reward([rollout("A", labels=["A"], options=["y"], values=["x"])])


def test_baselines_get_ratings(dataset) -> None:
    found = baselines(dataset, dataset.evaluation, dict.fromkeys(dataset.users, 0))
    values = [example.columns["values"] for example in dataset.evaluation]
    assert found["chance"] == pytest.approx([np.mean(stars) for stars in values])
    best = [
        np.mean(np.array(example.columns["values"])[np.array(example.columns["popularity"]) > max(example.columns["popularity"]) - 1e-9])
        for example in dataset.evaluation
    ]  # fmt: skip
    assert found["most popular"] == pytest.approx(best)
    # Everything is worth the same to everybody: no rule prefers anything.
    level = [replace(e, columns={**e.columns, "values": [3.0] * SIZE}) for e in dataset.train]
    equal = baselines(
        replace(dataset, train=level), dataset.evaluation, dict.fromkeys(dataset.users, 0)
    )
    assert equal["one rule for all"] == pytest.approx(found["chance"])
