"""Feedback as a data set: rows of every layout, made up after the sets' documentation."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgrpo.data import load_dataset
from pgrpo.data.feedback import FeedbackConfig
from pgrpo.errors import DataError
from pgrpo.rewards.builtin import likeness
from pgrpo.types import Dataset, Example, Prompt, Rollout


def load(folder: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Dataset:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_dataset(FeedbackConfig(name="feedback", path=str(folder / "rows.jsonl"), **options))


def thumb(user: str, number: int, label: object, **more: Any) -> dict[str, Any]:
    answer = {"prompt": f"Question {number}?", "completion": f"Answer {number}."}
    return {**answer, "label": label, "user": user, **more}


def test_thumbs_become_questions_with_what_the_person_said_before(tmp_path: Path) -> None:
    rows = [thumb("ann", n, n % 3 > 0, plan="free") for n in range(10)]
    rows += [thumb("bob", n, n % 2) for n in range(5)]
    dataset = load(tmp_path, rows, history=2)
    assert dataset.notes == ("15 rows are read as thumbs, task rate",)
    assert Counter(e.user for e in dataset.train) == {"ann": 8, "bob": 4}
    assert Counter(e.user for e in dataset.evaluation) == {"ann": 2, "bob": 1}
    third = dataset.train[2]
    assert third.text == (
        "Question 0?\nAnswer 0.: no\n\nQuestion 1?\nAnswer 1.: yes\n\nQuestion 2?\nAnswer 2.:"
    )
    assert third.choices == (" no", " yes")
    assert third.columns["answer"] == " yes"
    assert third.columns["values"] == [0.0, 1.0]
    assert third.columns["plan"] == "free"
    assert dataset.train[0].text == "Question 0?\nAnswer 0.:"
    # Held-out questions tell what was said in the training period, not of each other.
    assert [e.text.split("\n")[0] for e in dataset.evaluation] == ["Question 6?"] * 2 + [
        "Question 2?"
    ]
    assert dataset.train[0].columns["popularity"] == pytest.approx([5 / 12, 7 / 12])
    features = dict(zip(dataset.feature_names, dataset.users["ann"], strict=True))
    assert features["mean value"] == pytest.approx(5 / 8)
    assert features["log number"] == pytest.approx(np.log(9))


@pytest.mark.parametrize(
    ("up", "down"),
    [(True, False), (1, 0), (1.0, -1.0), ("up", "down"), ("👍", "👎"), ("Yes", "no")],
)
def test_thumbs_are_written_in_many_ways(tmp_path: Path, up: object, down: object) -> None:
    dataset = load(tmp_path, [thumb("u", 0, up), thumb("u", 1, down)], evaluation_share=0.0)
    assert [e.columns["answer"] for e in dataset.train] == [" yes", " no"]
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: column label is 'perhaps'; expected true or"
    ):
        load(tmp_path, [thumb("u", 0, "perhaps")])


def test_preferences_are_choices_in_an_order_that_tells_nothing(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": f"bad {n}", "user": n % 4}
        for n in range(400)
    ]
    dataset = load(tmp_path, rows, history=1)
    assert len(dataset.train) == 320
    positions = Counter(example.columns["position"] for example in dataset.train)
    assert abs(positions[0] - 160) < 40
    example = dataset.train[8]
    place: Any = example.columns["position"]
    options: Any = example.columns["options"]
    assert options[place] == "good 8" and options[1 - place] == "bad 8"
    assert example.columns["values"] == [float(n == place) for n in range(2)]
    assert example.columns["answer"] == f" {'AB'[place]}"
    before, now = example.text.split("\n\n")
    assert now == f"Q8\nA: {options[0]}\nB: {options[1]}\nBest:"
    label = before[-1]
    assert f"\n{label}: good 4\n" in before
    # The same question looks the same whatever else the file holds, and another seed turns it.
    alone = load(tmp_path, rows[8:9], history=0, evaluation_share=0.0)
    assert alone.train[0].text == now
    turned = [
        a.columns["position"] != b.columns["position"]
        for a, b in zip(dataset.train, load(tmp_path, rows, seed=1).train, strict=True)
    ]
    assert 100 < sum(turned) < 220


def test_chats_may_be_prompts_and_answers(tmp_path: Path) -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": asked, "chosen": said("Ho"), "rejected": said("He"), "user": "u"}] * 2
    rows[1] = {**rows[1], "prompt": [{"role": "user", "content": "Ha"}]}
    dataset = load(tmp_path, rows, task="write", evaluation_share=0.0)
    first, second = dataset.train
    assert first.turns == (("system", "Be kind."), ("user", "Hi"))
    assert second.turns == (("user", "Hi"), ("assistant", "Ho"), ("user", "Ha"))
    assert first.columns["liked"] == ["Ho"] and first.columns["disliked"] == ["He"]
    with pytest.raises(
        DataError, match=r"column chosen is .* of which the last is the assistant's"
    ):
        load(tmp_path, [{**rows[0], "chosen": asked}])


PRISM = [
    ("c1", 0, "Hello", [("m1", "Hi!", 80, True), ("m2", "Yes?", 20, False)]),
    ("c1", 1, "Tell me a joke", [("m1", "Knock.", 55, False), ("m1", "No.", 60, True)]),
    ("c2", 0, "Who are you?", [("m2", "A model.", 33, True)]),
]


def prism_rows() -> list[dict[str, Any]]:
    return [
        {
            "utterance_id": f"{thread}{turn}{place}",
            "interaction_id": f"{thread}{turn}",
            "conversation_id": thread,
            "user_id": "user7",
            "turn": turn,
            "within_turn_id": place,
            "conversation_type": "unguided",
            "user_prompt": prompt,
            "model_response": answer,
            "model_name": model,
            "model_provider": "x",
            "score": score,
            "if_chosen": chosen,
            "included_in_balanced_subset": True,
        }
        for thread, turn, prompt, answers in PRISM
        for place, (model, answer, score, chosen) in enumerate(answers)
    ]


def test_prism_is_read_with_its_conversations(tmp_path: Path) -> None:
    dataset = load(tmp_path, prism_rows(), history=0, evaluation_share=0.0)
    assert dataset.notes[1] == "left out 1 of 3 prompts, which have not answers of different worth"
    first, second = dataset.train
    assert sorted(zip(first.columns["options"], first.columns["values"], strict=True)) == [  # type: ignore[arg-type]
        ("Hi!", 80.0),
        ("Yes?", 20.0),
    ]
    assert second.text.startswith("user: Hello\nassistant: Hi!\nuser: Tell me a joke\nA: ")
    makers: Any = first.columns["attributes"]
    assert sorted(words[1] for words in makers) == ["m1", "m2"]
    assert second.columns["conversation_type"] == "unguided"
    many = [{**prism_rows()[0], "score": n, "turn": n} for n in range(60)]
    with pytest.raises(DataError, match="48 different values .* expected 2 to 11"):
        load(tmp_path, many, task="rate")


def community_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"conversation_id": 5, "annotator_id": "a1", "assigned_lang": "en"}
    for number, ordinal in enumerate(("first", "second", "third", "fourth")):
        row[f"{ordinal}_turn_prompt"] = f"P{number}" if number < 2 else ""
        for letter in "abcd":
            row[f"{ordinal}_turn_response_{letter}"] = f"{letter}{number}" if number < 2 else ""
        row[f"{ordinal}_turn_preferred_response"] = "response_c" if number < 2 else ""
        row[f"{ordinal}_turn_feedback"] = ""
    return {**row, "annotator_age": "25-34", "annotator_country": "india", **changes}


def test_community_alignment_is_read_turn_by_turn(tmp_path: Path) -> None:
    dataset = load(tmp_path, [community_row()], history=0, evaluation_share=0.0)
    first, second = dataset.train
    assert first.text.splitlines()[0] == "P0"
    assert sorted(first.columns["options"]) == ["a0", "b0", "c0", "d0"]  # type: ignore[type-var]
    assert first.columns["options"][first.columns["position"]] == "c0"  # type: ignore[index]
    assert second.text.startswith("user: P0\nassistant: c0\nuser: P1\nA: ")
    assert first.columns["annotator_country"] == "india"
    assert "second_turn_prompt" not in first.columns
    bad = community_row(second_turn_preferred_response="response_e")
    with pytest.raises(
        DataError, match="preferred_response is 'response_e'; expected one of respo"
    ):
        load(tmp_path, [bad])


def test_reviews_are_rated_by_their_writers(tmp_path: Path) -> None:
    amazon = [
        {
            "rating": float(1 + n % 5), "title": f"T{n}", "text": f"Text {n}", "images": [],
            "asin": "B0", "parent_asin": f"B{n}", "user_id": "AE", "timestamp": 1000 - n,
            "helpful_vote": 0, "verified_purchase": True,
        }
        for n in range(10)
    ]  # fmt: skip
    dataset = load(tmp_path, amazon, history=1)
    assert dataset.train[0].choices == (" 1", " 2", " 3", " 4", " 5")
    # The first row is the last in time.
    assert {e.text.splitlines()[-2] for e in dataset.evaluation} == {"T0", "T1"}
    third = next(e for e in dataset.train if e.text.endswith("T7\nText 7:"))
    assert third.text.startswith("T8\nText 8: 4\n\nT7")
    assert third.columns["values"] == [0.5, 0.75, 1.0, 0.75, 0.5]

    goodreads = [
        {
            "user_id": "8842", "book_id": str(n), "review_id": f"r{n}", "rating": n % 6,
            "review_text": f"Fine {n}", "date_added": f"Fri Aug 25 13:55:0{9 - n} -0700 2017",
            "date_updated": "", "read_at": "", "started_at": "", "n_votes": 7, "n_comments": 0,
        }
        for n in range(9)
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"rows.jsonl:1: column rating is 0, which is none"):
        load(tmp_path, goodreads)
    with gzip.open(tmp_path / "goodreads.json.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, goodreads)))
    path = str(tmp_path / "goodreads.json.gz")
    config = FeedbackConfig(name="feedback", path=path, on_bad_row="skip", evaluation_share=0.3)
    dataset = load_dataset(config)
    assert dataset.notes[1].startswith("2 of 9 rows of")
    assert [e.text.splitlines()[-2] for e in dataset.evaluation] == ["Book 1", "Book 2"]


def test_helpsteer_has_an_attribute_for_a_person(tmp_path: Path) -> None:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    rows = [
        {"prompt": "P", "response": f"R{n}", **{name: (n + k) % 5 for k, name in enumerate(names)}}
        for n in range(5)
    ]
    rated = load(tmp_path, rows, history=0, evaluation_share=0.0)
    assert len(rated.train) == 25 and set(rated.users) == set(names)
    chosen = load(tmp_path, rows, history=0, evaluation_share=0.0, task="choose")
    assert [e.user for e in chosen.train] == list(names)
    for k, example in enumerate(chosen.train):
        options: Any = example.columns["options"]
        assert options[example.columns["position"]] == f"R{(4 - k) % 5}"


def test_of_what_was_said_of_one_answer_several_times_the_last_counts(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "completion": text, "label": label, "user": "u", "at": at}
        for text, label, at in (("x", 1, 3), ("y", 1, 2), ("x", 0, 1), ("y", 1, 2), ("z", 0, 0))
    ]
    options: dict[str, Any] = {"evaluation_share": 0.0, "time_column": "at"}
    (example,) = load(tmp_path, rows, task="choose", **options).train
    assert sorted(zip(example.columns["options"], example.columns["values"], strict=True)) == [  # type: ignore[arg-type]
        ("x", 1.0),
        ("y", 1.0),
        ("z", 0.0),
    ]
    rated = {
        e.text.split("\n")[-1].removesuffix(":"): e for e in load(tmp_path, rows, **options).train
    }
    assert {text: e.columns["answer"] for text, e in rated.items()} == {
        "x": " yes",
        "y": " yes",
        "z": " no",
    }
    assert rated["x"].columns["at"] == 3
    (written,) = load(tmp_path, rows, task="write", **options).train
    assert set(written.columns["liked"]) == {"x", "y"}  # type: ignore[arg-type]
    assert written.columns["disliked"] == ["z"]


def test_a_question_does_not_stand_in_its_own_history(tmp_path: Path) -> None:
    """Neither an event that was logged twice nor the other half of a preference tells the answer."""
    rows = [thumb("u", n, n % 2) for n in (0, 1, 2, 3, 4, 4)]
    dataset = load(tmp_path, rows, evaluation_share=0.4)
    assert [e.text.split("\n")[-2] for e in dataset.evaluation] == ["Question 3?", "Question 4?"]
    assert len(dataset.train) == 3
    pairs = [
        {"prompt": f"P{n}", "chosen": f"good {n}", "rejected": f"bad {n}", "user": "u"}
        for n in range(10)
    ]
    dataset = load(tmp_path, pairs, task="rate", history=3)
    assert (len(dataset.train), len(dataset.evaluation)) == (16, 4)
    for example in [*dataset.train, *dataset.evaluation]:
        *before, now = (block.split("\n")[0] for block in example.text.split("\n\n"))
        assert now not in before and len(before) <= 3
    held_out = {e.text.split("\n\n")[-1].split("\n")[0] for e in dataset.evaluation}
    assert held_out == {"P8", "P9"}


def test_of_more_answers_than_letters_the_best_is_shown(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "completion": f"answer {n}", "label": n == 40, "user": "u"}
        for n in range(60)
    ]
    dataset = load(tmp_path, rows, task="choose", evaluation_share=0.0)
    (example,) = dataset.train
    assert dataset.notes[-1].startswith("1 of 1 prompts have more than 26 answers")
    for column in ("options", "labels", "values", "attributes", "popularity"):
        assert len(example.columns[column]) == 26  # type: ignore[arg-type]
    assert example.columns["options"][example.columns["position"]] == "answer 40"  # type: ignore[index]
    assert len(example.choices or ()) == 26


def test_rows_that_say_nothing_are_told_or_left_out(tmp_path: Path) -> None:
    good = [thumb("u", n, n % 2) for n in range(4)]
    for bad, message in (
        (thumb("u", 9, float("nan")), "column label is nan; expected true or false"),
        (thumb("u", 9, 0.9), "column label is 0.9; expected true or false"),
        ({"prompt": "Q", "user": "u"}, "has columns prompt, user, by which its layout is none"),
    ):
        with pytest.raises(DataError, match=message):
            load(tmp_path, [bad, *good])
        dataset = load(tmp_path, [bad, *good], on_bad_row="skip", evaluation_share=0.0)
        assert len(dataset.train) == 4
        assert message in dataset.notes[1]
    silent = community_row(first_turn_preferred_response="", second_turn_preferred_response=None)
    with pytest.raises(DataError, match="has 1 rows, and in none of them was anything said"):
        load(tmp_path, [silent])


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    rows = [thumb("u", n, n % 2) for n in range(5)]
    load(tmp_path, rows)
    paths = [str(tmp_path / "rows.jsonl"), str(tmp_path / "*.jsonl")]
    dataset = load_dataset(FeedbackConfig(name="feedback", path=paths))
    assert len(dataset.train) + len(dataset.evaluation) == 5


@pytest.mark.parametrize("task", ["rate", "choose", "write"])
def test_nothing_held_out_reaches_training(tmp_path: Path, task: str) -> None:
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {**thumb(f"u{u}", n, bool(random.random() < 0.5)), "at": float(random.random())}
        for u in range(8)
        for n in [n for n in range(12) for _ in range(2)]
    ]
    for place, row in enumerate(rows):
        row["completion"] = " ".join(["word"] * int(random.integers(1, 30)) + [str(place)])
    options: dict[str, Any] = {"task": task, "time_column": "at", "evaluation_share": 0.25}
    one = load(tmp_path, rows, **options)
    assert one.evaluation
    trained_on, held_out = (
        {(e.user, e.text.split("\n\n")[-1].split("\n")[0]) for e in examples}
        for examples in (one.train, one.evaluation)
    )
    assert not trained_on & held_out
    if task == "rate":
        # Thumbs of held-out questions are turned round.
        turned = [
            {**row, "label": row["label"] != ((row["user"], row["prompt"]) in held_out)}
            for row in rows
        ]
        other = load(tmp_path, turned, **options)
        assert one.train == other.train
        assert [e.text for e in one.evaluation] == [e.text for e in other.evaluation]
        assert {u: f.tolist() for u, f in one.users.items()} == {
            u: f.tolist() for u, f in other.users.items()
        }


def test_columns_that_no_layout_has_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"rows.jsonl:1 has columns prompt, user, by which its layo"
    ):
        load(tmp_path, [{"prompt": "a", "user": "b"}])
    with pytest.raises(DataError, match="layout is thumbs, preferences of those known"):
        load(tmp_path, [{**thumb("u", 1, 1), "chosen": "x", "rejected": "y"}])
    with pytest.raises(DataError, match=r"no column 'chosen'; found prompt, completion"):
        load(tmp_path, [thumb("u", 1, 1)], layout="preferences")
    with pytest.raises(
        DataError, match="has no prompt with answers of different worth; another da"
    ):
        load(tmp_path, [thumb("u", 1, 1)], task="choose")
    with pytest.raises(DataError, match="1 different values stand in what .* expected 2 to 11"):
        load(tmp_path, [thumb("u", 1, 1)])
    with pytest.raises(ValueError, match="user_column has no effect here"):
        FeedbackConfig(name="feedback", path="x", layout="helpsteer", user_column="u")


def test_likeness_is_the_f1_of_words_with_the_nearest_text() -> None:
    def score(said: str, liked: list[str], disliked: list[str]) -> float:
        columns = {"liked": liked, "disliked": disliked}
        prompt = Prompt(Example("?", "u", columns), 0, (1,))
        return likeness([Rollout(prompt, 0, (1,), said, (0.0,), False)])[0]

    assert score("The cat sat.", ["the CAT sat"], []) == 1.0
    assert score("a b c d", ["a b x", "z"], ["c c"]) == pytest.approx(2 * 2 / 7 - 2 * 1 / 6)
    assert score("", ["x"], []) == 0.0
    assert score("no", ["yes"], ["no"]) == -1.0
