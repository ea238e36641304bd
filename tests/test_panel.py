"""Panels against files that the tests write themselves, and baselines against people with known taste."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from conftest import write_config

from pgrpo.cli import main
from pgrpo.clusters.division import divide
from pgrpo.clusters.membership import Membership
from pgrpo.config.checks import check
from pgrpo.config.sections import ClusteringConfig
from pgrpo.config.toml import resolved_toml
from pgrpo.data import load_dataset
from pgrpo.data.panel import PanelConfig
from pgrpo.errors import ConfigError, DataError
from pgrpo.plugins.registry import load_registry
from pgrpo.runs.config import load_config
from pgrpo.train.baselines import baselines
from pgrpo.train.evaluation import held_out
from pgrpo.types import Dataset

Row = dict[str, Any]


def words(**rules: list[Any]) -> list[dict[str, Any]]:
    """`[[data.words]]`, by attribute."""
    return [{"attribute": name, "rules": listed} for name, listed in rules.items()]


WORDS = words(
    price=[
        {"word": "cheap", "when": {"price": [0, 5]}},
        {"word": "fair", "when": {"price": [5, 10]}},
        {"word": "dear"},
    ],
    brand=[
        {"word": "red", "when": {"brand": "R"}},
        {"word": "blue", "when": {"brand": "B", "old": 0}},
        {"word": "faded"},
    ],
)
LONG = {
    "name": "panel",
    "file": "rows.csv",
    "person": "who",
    "situation": "task",
    "alternative": "alt",
    "chosen": "took",
    "words": WORDS,
}


def made_up(seed: int, num_people: int = 30, num_tasks: int = 9, taste: float = 3.0) -> list[Row]:
    """Long rows: half of the people like what is cheap, the others what is red."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for person in range(num_people):
        for task in range(num_tasks):
            options: list[Row] = [
                {"price": int(rng.integers(0, 15)), "brand": str(rng.choice(["R", "B"])), "old": int(rng.random() < 0.3)}
                for _ in range(int(rng.integers(2, 5)))
            ]  # fmt: skip
            liked = [
                taste * (option["price"] < 5 if person % 2 else option["brand"] == "R")
                for option in options
            ]
            took = int(np.argmax(np.array(liked) + rng.gumbel(size=len(options))))
            rows += [
                {"who": f"p{person}", "task": f"{person}-{task}", "alt": i, "took": int(i == took), **option}
                for i, option in enumerate(options)
            ]  # fmt: skip
    return rows


def write(folder: Path, rows: list[Row], name: str = "rows.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def load(folder: Path, tree: Row | None = None, **changed: Any) -> Dataset:
    tree = {**(tree or LONG), "path": str(folder), **changed}
    return load_dataset(check(PanelConfig, tree, "test"))


def word_of(row: Row) -> tuple[str, str]:
    price = "cheap" if row["price"] < 5 else "fair" if row["price"] < 10 else "dear"
    return price, "red" if row["brand"] == "R" else "faded" if row["old"] else "blue"


def tasks_of(rows: list[Row]) -> dict[str, list[list[Row]]]:
    people: dict[str, dict[str, list[Row]]] = defaultdict(dict)
    for row in rows:
        people[row["who"]].setdefault(row["task"], []).append(row)
    return {who: list(tasks.values()) for who, tasks in people.items()}


def lifts(tasks: list[list[Row]]) -> dict[str, float]:
    """Share of what was chosen minus share of what was offered, word by word."""
    found: Counter[str] = Counter()
    for task in tasks:
        for row in task:
            for word in word_of(row):
                found[word] += row["took"] / len(tasks) - 1 / len(task) / len(tasks)
    return dict(found)


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.jsonl", "rows.parquet"])
def test_a_panel_is_what_its_rows_say(tmp_path, name):
    rows = made_up(0)
    dataset = load(write(tmp_path, rows, name), file=name, profile_words=2)
    people = tasks_of(rows)
    assert len(dataset.train) == 30 * 2
    assert len(dataset.evaluation) == 30 * 3
    assert len(dataset.observed) == 30 * 6
    assert list(dataset.users) == list(people)
    places = {"train": range(4, 6), "evaluation": range(6, 9), "observed": range(6)}
    for part, where in places.items():
        examples = iter(getattr(dataset, part))
        for who, tasks in people.items():
            for place in where:
                example = next(examples)
                task = tasks[place]
                texts = {" ".join(word_of(row)) for row in task}
                columns: Any = example.columns
                assert example.user == who
                assert columns["situation"] == task[0]["task"]
                assert sorted(columns["options"]) == sorted(" ".join(word_of(row)) for row in task)
                assert columns["attributes"] == [text.split() for text in columns["options"]]
                (right,) = (row for row in task if row["took"])
                assert columns["options"][columns["position"]] == " ".join(word_of(right))
                assert columns["answer"] == f" {'ABCD'[columns['position']]}"
                assert example.choices == tuple(f" {label}" for label in "ABCD"[: len(task)])
                *lines, query = example.text.split("\n")
                assert lines == [
                    f"{text}: {label}"
                    for text, label in zip(columns["options"], "ABCD", strict=False)
                ]
                assert {line.rpartition(":")[0] for line in lines} == texts
                # Of the held-out choices, none is in the profile of another.
                found = lifts(tasks[: min(place, 6)])
                favourites = sorted(found, key=lambda word: -found[word])[:2]
                best = {word for word in favourites if found[word] > 1e-12}
                margin = sorted(found.values(), reverse=True)
                if len(margin) < 3 or margin[1] - margin[2] > 1e-9:
                    assert set(query[:-1].split()) == best
    known = ["cheap", "fair", "dear", "red", "blue", "faded"]
    assert dataset.feature_names == tuple(f"chooses {word}" for word in known)
    for who, tasks in people.items():
        found = lifts(tasks[:6])
        assert dataset.users[who] == pytest.approx([found.get(word, 0.0) for word in known])


def test_a_profile_is_in_the_order_of_an_alternatives_words(tmp_path):
    dataset = load(write(tmp_path, made_up(1)), profile_words=6)
    order = ["cheap", "fair", "dear", "red", "blue", "faded"]
    for example in dataset.train:
        query = example.text.split("\n")[-1].removesuffix(":").split()
        assert query == sorted(query, key=order.index)


def test_popularity_is_how_often_a_text_was_taken_before_the_held_out_choices(tmp_path):
    rows = made_up(2)
    dataset = load(write(tmp_path, rows))
    taken, offered = Counter[str](), Counter[str]()
    first: dict[str, float] = {}
    for tasks in tasks_of(rows).values():
        for task in tasks[:6]:
            for row in task:
                text = " ".join(word_of(row))
                first.setdefault(text, 1 / len(task))
                taken[text] += row["took"]
                offered[text] += 1
    for example in dataset.evaluation:
        columns: Any = example.columns
        wanted = [(taken[text] + first[text]) / (offered[text] + 1) for text in columns["options"]]
        assert columns["popularity"] == pytest.approx(wanted)


def test_alternatives_are_shown_in_an_order_that_only_the_seed_decides(tmp_path):
    folder = write(tmp_path, made_up(3))
    first, again, other = (load(folder, seed=seed) for seed in (0, 0, 1))
    assert list(first.train) == list(again.train)
    assert list(first.train) != list(other.train)
    positions = Counter(
        str(example.columns["position"])
        for example in first.observed
        if len(example.choices or ()) == 3
    )
    assert min(positions[place] for place in "012") > 0


def wide_rows(rows: list[Row]) -> list[Row]:
    """The same with a row for each situation of two alternatives; names as in WIDE."""
    found: list[Row] = []
    for tasks in tasks_of(rows).values():
        for task in tasks:
            wide: Row = {"who": task[0]["who"], "task": task[0]["task"], "hot": 1, "took": "none"}
            for name, row in zip(("x", "y", "z"), (*task[:2], *task[2:3]), strict=False):
                wide |= {f"{name}_{key}": row[key] for key in ("price", "brand", "old")}
                wide[f"{name}_there"] = 1
                if row["took"]:
                    wide["took"] = name
            for name in ("x", "y", "z"):
                wide = {f"{name}_price": "", f"{name}_brand": "", f"{name}_old": "", f"{name}_there": 0} | wide  # fmt: skip
            found.append({key: wide[key] for key in sorted(wide)})
    return found


WIDE = {
    **{key: value for key, value in LONG.items() if key != "alternative"},
    "wide": {name: f"{name}_{{}}" for name in ("x", "y", "z")},
    "available": "there",
}


def test_a_row_may_be_a_whole_situation(tmp_path):
    rows = [row for row in made_up(4) if row["alt"] < 3]
    complete = {row["task"] for row in rows if row["took"]}
    rows = [row for row in rows if row["task"] in complete]
    kept = {who for who, tasks in tasks_of(rows).items() if len(tasks) >= 8}
    rows = [row for row in rows if row["who"] in kept]
    long = load(write(tmp_path / "long", rows))
    wide = load(write(tmp_path / "wide", wide_rows(rows)), WIDE)
    assert [e.text for e in wide.train] == [e.text for e in long.train]
    assert [e.columns["answer"] for e in wide.evaluation] == [
        e.columns["answer"] for e in long.evaluation
    ]


def test_columns_without_an_alternative_and_its_name_can_be_asked_for(tmp_path):
    by_name = words(
        name=[
            {"word": "first", "when": {"alternative": "x"}},
            {"word": "later", "when": {"hot": 1}},
        ]
    )
    wide = load(
        write(tmp_path, wide_rows(made_up(5))),
        WIDE,
        words=by_name,
        where={"took": "x"},
        earlier=1,
        evaluation_choices=1,
    )
    for example in wide.observed:
        assert set(example.columns["options"]) == {"first", "later"}  # pyright: ignore
        assert example.columns["options"][example.columns["position"]] == "first"  # pyright: ignore


def test_relative_columns_are_shares_of_the_situations_mean(tmp_path):
    rows = made_up(6)
    shares = words(price=[{"word": "less", "when": {"price_relative": [-1, 1]}}, {"word": "more"}])
    dataset = load(write(tmp_path, rows), relative=["price"], words=shares)
    wanted: list[list[str]] = []
    for tasks in tasks_of(rows).values():
        for task in tasks[6:9]:
            mean = np.mean([row["price"] for row in task])
            wanted.append(
                sorted("less" if mean and row["price"] / mean < 1 else "more" for row in task)
            )
    assert [sorted(e.columns["options"]) for e in dataset.evaluation] == wanted  # pyright: ignore


def test_a_row_without_a_situation_is_one(tmp_path):
    rows = wide_rows([row for row in made_up(4) if row["alt"] < 3])
    tree = {key: value for key, value in WIDE.items() if key != "situation"}
    wide = load(write(tmp_path, rows), tree, where={"took": "x"}, earlier=1, evaluation_choices=1)
    taken = Counter(row["who"] for row in rows if row["took"] == "x")
    assert len(wide.evaluation) == sum(count > 2 for count in taken.values())
    assert {str(e.columns["situation"]) for e in wide.observed} > {"0", "1"}


def test_situations_are_in_order_of_time_where_there_is_one(tmp_path):
    rows = made_up(7)
    plain = load(write(tmp_path / "plain", rows))
    for row in rows:
        row["when"] = -int(row["task"].split("-")[1])
    turned = load(write(tmp_path / "turned", rows), time="when")
    assert [e.columns["situation"] for e in turned.evaluation[:3]] == ["0-2", "0-1", "0-0"]
    assert [e.columns["situation"] for e in plain.evaluation[:3]] == ["0-6", "0-7", "0-8"]


def test_people_with_too_few_choices_are_left_out_and_named(tmp_path):
    rows = [row for row in made_up(8) if row["who"] != "p3" or row["task"] in ("3-0", "3-1")]
    dataset = load(write(tmp_path, rows))
    assert "p3" not in dataset.users
    assert len(dataset.users) == 29
    (note,) = dataset.notes
    assert "1 of 30 people" in note
    assert "p3" in note
    with pytest.raises(DataError, match="nobody with 17 choices.*the most is 9"):
        load(tmp_path, evaluation_choices=12)


def test_unused_choices_are_not_read(tmp_path):
    rows = made_up(9)
    whole, short = load(write(tmp_path, rows), evaluation_choices=2), None
    short = load(tmp_path, evaluation_choices=2, unused_choices=2)
    assert len(short.evaluation) == len(whole.evaluation)
    assert [e.columns["situation"] for e in short.evaluation[:2]] == ["0-5", "0-6"]
    cut = [row for row in rows if int(row["task"].split("-")[1]) < 7]
    assert list(load(write(tmp_path / "cut", cut), evaluation_choices=2).train) == list(short.train)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"person": "whom"}, "no column 'whom'; found who"),
        ({"chosen": "price"}, "column price is '.*'; expected 1 or 0"),
        ({"words": words(p=[{"word": "x", "when": {"brand": 1}}])}, "column brand is '[RB]'; expected a finite number"),
        ({"words": words(p=[{"word": "x", "when": {"price": -1}}])}, "data.words has no word of 'p' for price = "),
        ({"words": words(p=[{"word": "x", "when": {"colour": "R"}}])}, "no column 'colour'"),
        ({"file": "none.csv"}, "none.csv does not exist"),
        ({"where": {"price": 1000}}, "nobody with 8 choices"),
        ({"where": {"took": 0}}, "took 0 of the"),
        ({"available": "took"}, None),
        ({"situation": "who"}, "has alternative 0 of situation p0 twice"),
    ],
)  # fmt: skip
def test_faulty_panels_are_refused_by_name(tmp_path, change, message):
    folder = write(tmp_path, made_up(10))
    if message is None:
        # Nothing but what was taken: no situation is left.
        with pytest.raises(DataError, match="the most is 0"):
            load(folder, **change)
    else:
        with pytest.raises(DataError, match=message):
            load(folder, **change)


def test_a_choice_of_what_was_not_available_is_refused(tmp_path):
    rows = wide_rows(made_up(11))
    taken = next(row for row in rows if row["took"] != "none")
    taken[f"{taken['took']}_there"] = 0
    with pytest.raises(DataError, match="was not available by column there"):
        load(write(tmp_path, rows), WIDE, where={"took": taken["took"]})
    rows[0]["took"] = "w"
    with pytest.raises(DataError, match="column took is 'w'; expected one of x, y, z"):
        load(write(tmp_path, rows), WIDE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": []}, "data.words|words"),
        ({"words": 2 * words(a=[{"word": "x"}])}, "has the attribute 'a' twice"),
        ({"words": words(a=[{"word": "x"}], b=[{"word": "x"}])}, "the word 'x' stands in"),
        ({"words": words(a=[{"word": "x", "when": {"p": [2, 1]}}])}, "low < high"),
        ({"words": words(a=[{"word": "x", "when": {"p": [1]}}])}, "low < high"),
        ({"wide": {"x": "x_"}}, "expected a name with one {}"),
        ({"situation": None}, "situation is missing"),
        ({"where": {"a": [3, 3]}}, "low < high"),
    ],
)
def test_faulty_settings_are_refused_at_load(change, message):
    tree = {**LONG, "path": "somewhere", **change}
    tree = {key: value for key, value in tree.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        check(PanelConfig, tree, "test")


def clusters_of(dataset: Dataset, num_clusters: int = 2) -> Any:
    section = ClusteringConfig.model_validate({"name": "kmeans", "num_clusters": num_clusters})
    return Membership(divide(load_registry().clusterer(section), dataset)).histories("cluster", 0)


def test_baselines_tell_taste_of_all_from_taste_of_clusters_and_people(tmp_path):
    """Half like cheap things, half red ones: one rule cannot serve both, and two can."""
    dataset = load(write(tmp_path, made_up(12, num_people=120, num_tasks=12, taste=6.0)))
    taste_of = {user: int(user[1:]) % 2 for user in dataset.users}
    found = {
        name: float(rewards.mean())
        for name, rewards in baselines(dataset, dataset.evaluation, taste_of).items()
    }
    assert list(found) == [
        "chance",
        "most popular",
        "one rule for all",
        "one rule per cluster",
        "one rule per person",
    ]
    sizes = [len(example.choices or ()) for example in dataset.evaluation]
    assert found["chance"] == pytest.approx(np.mean([1 / size for size in sizes]))
    # What knowing everybody's taste is worth: the option that has it, any of those that tie.
    truth: list[float] = []
    for example in dataset.evaluation:
        columns: Any = example.columns
        liked = "cheap" if taste_of[example.user] else "red"
        scores = [liked in words for words in columns["attributes"]]
        best = [score == max(scores) for score in scores]
        truth.append(best[columns["position"]] / sum(best))
    assert found["chance"] < found["one rule for all"] - 0.1
    assert found["one rule for all"] < np.mean(truth) - 0.05
    assert found["one rule per cluster"] == pytest.approx(np.mean(truth), abs=0.03)
    assert found["one rule per person"] == pytest.approx(np.mean(truth), abs=0.05)


def test_baselines_of_people_alike_are_alike(tmp_path):
    """Where everybody has one taste, weights of their own must not cost much."""
    rows = made_up(13, num_people=80, num_tasks=10)
    for row in rows:
        row["who"] = row["who"].replace("p", "q")
    rng = np.random.default_rng(0)
    for tasks in tasks_of(rows).values():
        for task in tasks:
            score = [3.0 * (row["price"] < 5) + rng.gumbel() for row in task]
            for place, row in enumerate(task):
                row["took"] = int(place == int(np.argmax(score)))
    dataset = load(write(tmp_path, rows))
    found = baselines(dataset, dataset.evaluation, clusters_of(dataset))
    pooled = found["one rule for all"].mean()
    assert found["one rule per cluster"].mean() > pooled - 0.05
    assert found["one rule per person"].mean() > pooled - 0.05


def test_the_most_popular_option_is_the_one_that_columns_say(tmp_path):
    dataset = load(write(tmp_path, made_up(14)))
    found = baselines(dataset, dataset.evaluation, clusters_of(dataset))["most popular"]
    for example, reward in zip(dataset.evaluation, found, strict=True):
        columns: Any = example.columns
        best = max(columns["popularity"])
        ties = [i for i, value in enumerate(columns["popularity"]) if value > best - 1e-9]
        assert reward == pytest.approx((columns["position"] in ties) / len(ties))


def test_baselines_do_not_look_at_held_out_choices(tmp_path):
    dataset = load(write(tmp_path, made_up(15)))
    clusters = clusters_of(dataset)
    one = baselines(dataset, dataset.evaluation[:10], clusters)
    all_of_them = baselines(dataset, dataset.evaluation, clusters)
    for name, rewards in one.items():
        assert rewards == pytest.approx(all_of_them[name][:10]), name


def test_a_run_on_a_panel_tells_its_baselines(tmp_path):
    rows = made_up(16, num_people=20)
    folder = write(tmp_path / "data", rows)
    config = {
        "run": {"num_steps": 2, "prompts_per_step": 4, "eval_every": 2, "eval_prompts": 30},
        "model": {"name": "tiny"},
        "data": {**LONG, "path": str(folder)},
        "clustering": {"name": "kmeans", "num_clusters": 3},
        "rewards": [{"name": "choice", "weight": 2.0}],
        "generation": {"group_size": 2},
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(config))
    run = tmp_path / "run"
    assert main(["train", str(path), "--out", str(run)]) == 0
    info = json.loads((run / "run.json").read_text())
    dataset = load(folder)
    evaluation = held_out(dataset, 30)
    members = clusters_of(dataset, 3)
    wanted = baselines(dataset, evaluation, members)
    assert info["baselines"] == pytest.approx({k: 2 * v.mean() for k, v in wanted.items()})
    for name, cluster in info["clusters"].items():
        own = [str(members[example.user]) == name for example in evaluation]
        assert cluster["baselines"] == pytest.approx(
            {rule: 2 * v[own].mean() for rule, v in wanted.items()} if any(own) else {}
        )
    samples = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 24 + [2] * 24
    of_last = samples[24:]
    assert [s["prompt"] for s in of_last] == [s["prompt"] for s in samples[:24]]
    present = {str(members[example.user]) for example in evaluation}
    assert {str(sample["cluster_id"]) for sample in of_last[: len(present)]} == present
    assert "most popular" in (run / "report.html").read_text()


def test_data_that_does_not_say_what_there_was_to_choose_has_no_baselines(tmp_path):
    path, held_out = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    for file in (path, held_out):
        file.write_text('{"prompt": "x", "user": "u"}\n')
    from pgrpo.data.table import TableConfig

    dataset = load_dataset(TableConfig(name="jsonl", path=str(path), evaluation_path=str(held_out)))
    assert baselines(dataset, dataset.evaluation, {"u": 0}) == {}


def test_what_a_run_folder_keeps_of_a_config_gives_the_same_prompts(tmp_path):
    """Writers of TOML put what fills one line before what does not, and readers need not keep the order
    of keys: an order that shows in prompts must not hang on either."""
    # Of several lines when written, unlike the attribute after it.
    price = [{"word": "cheap", "when": {"price": [0, 5]}}, {"word": "dear"}]
    told = [*words(price=price), WORDS[1]]
    data: Row = {**LONG, "path": str(write(tmp_path, made_up(0))), "words": told}
    config = load_config(write_config(tmp_path, {"data": data, "rewards": [{"name": "choice"}]}))
    (tmp_path / "kept.toml").write_text(resolved_toml(config), "utf-8")
    kept = load_config(tmp_path / "kept.toml")
    assert isinstance(config.data, PanelConfig) and isinstance(kept.data, PanelConfig)
    first, again = load_dataset(config.data), load_dataset(kept.data)
    for before, after in (first.train, again.train), (first.evaluation, again.evaluation):
        assert before
        assert [example.text for example in before] == [example.text for example in after]
