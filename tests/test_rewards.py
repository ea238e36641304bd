"""The built-in rewards; the judge talks to a real HTTP server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import Answer, say
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pgrpo.config.sections import RewardConfig
from pgrpo.errors import ConfigError, ModelError, PluginError
from pgrpo.plugins.registry import load_registry
from pgrpo.rewards.scorer import Scorer
from pgrpo.rewards.verdict import read_verdict
from pgrpo.types import Example, Group, Prompt, Rollout

REGISTRY = load_registry()


def rollout(completion: str, text: str = "Why?", **columns: Any) -> Rollout:
    prompt = Prompt(Example(text, user="u7", columns=columns), 0, (1,))
    return Rollout(prompt, 0, (1,), completion, (0.0,), False)


def build(**settings: object):
    return REGISTRY.reward(RewardConfig.model_validate(settings))


LABELS = ["A", "B", "C", "D"]
FACTS = ["famous Comedy", "obscure Drama", "Drama", "famous Comedy"]
TITLES = ["Toy Story (1995)", "Plan B (1999)", "A Bug's Life (1998)", "The Shining (1980)"]


@pytest.mark.parametrize(
    ("completion", "options", "named"),
    [
        (" B", FACTS, "B"),
        ("B", FACTS, "B"),
        ("b", FACTS, "B"),
        ("**B**", FACTS, "B"),
        ("(B)\n", FACTS, "B"),
        ("The answer is B.", FACTS, "B"),
        ("I think it is B, because I like it.", FACTS, "B"),
        ("A", FACTS, "A"),
        ("A is best", FACTS, "A"),
        ("A.", FACTS, "A"),
        ("Answer: A, a film.", FACTS, "A"),
        ("A film worth seeing", FACTS, None),
        ("A good film is B", FACTS, "B"),
        ("B. obscure Drama", FACTS, "B"),
        ("A: famous Comedy", FACTS, "A"),
        ("famous comedy", FACTS, None),  # A and D look alike
        ("obscure drama", FACTS, "B"),
        ("Drama!", FACTS, "C"),
        ("obscure Drama, or Drama", FACTS, None),
        ("B. famous Comedy", FACTS, None),  # says two things
        ("A or B", FACTS, None),
        ("A or B? obscure Drama", FACTS, None),
        ("A B", FACTS, None),
        ("A and C", FACTS, None),
        ("Neither", FACTS, None),
        ("Because", FACTS, None),
        ("", FACTS, None),
        ("C'est la vie", FACTS, None),
        ("Plan B (1999)", TITLES, "B"),
        ("I would watch plan b (1999).", TITLES, "B"),
        ("A Bug's Life (1998)", TITLES, "C"),
        ("C. A Bug's Life (1998)", TITLES, "C"),
        ("Toy Story (1995) and The Shining (1980)", TITLES, None),
        ("A Toy Story (1995)", TITLES, "A"),
    ],
)
def test_choice_understands_exactly_one_option(completion, options, named):
    choice = build(name="choice")
    for label, text in zip(LABELS, options, strict=True):
        columns: Any = {"labels": LABELS, "options": options}
        as_label = rollout(completion, answer=f" {label}", **columns)
        assert choice([as_label]) == [float(label == named)]
        # Where the answer is a text, any option that reads the same is right.
        right = completion.strip() == text
        if named is not None:
            right |= options[LABELS.index(named)] == text
        assert choice([rollout(completion, answer=f" {text}", **columns)]) == [float(right)]


def test_choice_without_labels_compares():
    choice = build(name="choice")
    assert choice([rollout(" yes ", answer="yes"), rollout("yes!", answer="yes")]) == [1.0, 0.0]
    with pytest.raises(PluginError, match="no column 'answer'; it has other"):
        score(RewardConfig(name="choice"), rollout("yes", other=1))


def test_choice_scores_the_movielens_columns_of_every_answer_style(tmp_path):
    from pgrpo.data.movielens import MovieLensConfig, load_movielens

    rng = np.random.default_rng(0)
    ratings = [
        f"{user}::{film}::{rng.integers(3, 6)}::{1000 + 60 * order}"
        for user in range(1, 13)
        for order, film in enumerate(rng.permutation(np.arange(1, 61))[:30])
    ]
    films = [
        f"{film}::Film {film} (1990)::{'Drama|War'[: 5 + 4 * (film % 2)]}" for film in range(1, 61)
    ]
    (tmp_path / "ratings.dat").write_text("\n".join(ratings))
    (tmp_path / "movies.dat").write_text("\n".join(films))
    choice = build(name="choice")
    for answer in ("label", "text", "free"):
        config = MovieLensConfig(
            name="movielens", path=str(tmp_path), answer=answer, template="titles"
        )
        for example in load_movielens(config).train[:20]:
            columns: Any = example.columns
            label = columns["labels"][columns["position"]]
            said = [*(example.choices or ()), f"It is {label}."]
            said += [f"I choose {option}" for option in columns["options"]]
            prompt = Prompt(example, 0, (1,))
            scores: Any = choice([Rollout(prompt, 0, (1,), text, (0.0,), False) for text in said])
            num_ways = 2 if example.choices is None else 3
            assert sum(scores) == num_ways


def test_exact_match():
    completions = [rollout(text, answer="Yes", other=" 7 ") for text in ("Yes", " Yes\n", "yes")]
    assert build(name="exact_match")(completions) == [1.0, 1.0, 0.0]
    assert build(name="exact_match", strip=False)(completions) == [1.0, 0.0, 0.0]
    assert build(name="exact_match", casefold=True)(completions) == [1.0, 1.0, 1.0]
    assert build(name="exact_match", column="other")([rollout("7", other=7)]) == [1.0]


def test_regex():
    regex = build(name="regex", pattern=r"^\d+$", reward=-0.5)
    assert regex([rollout("42"), rollout("42 or so")]) == [-0.5, 0.0]
    with pytest.raises(ConfigError, match="no regular expression"):
        build(name="regex", pattern="(")


def test_persona_rewards_each_example_by_its_own_columns():
    from pgrpo.data.personas import PersonasConfig, load_personas, persona_reward

    example = load_personas(PersonasConfig(name="personas", num_examples=8)).train[0]
    completions = ["", example.text, "entirely different words"]
    prompt = Prompt(example, 0, (1,))
    rollouts = [Rollout(prompt, 0, (1,), text, (0.0,), False) for text in completions]
    expected = [persona_reward(example.columns, text) for text in completions]
    assert build(name="persona")(rollouts) == expected


# --- the judge -------------------------------------------------------------------------------


def judge_section(url: str, **settings: object) -> RewardConfig:
    defaults = {"template": "Rate {completion}", "model": "m", "pause_s": 0.01, "retries": 2}
    return RewardConfig.model_validate({"name": "judge", "url": url, **defaults, **settings})


def score(section: RewardConfig, *rollouts: Rollout) -> list[float]:
    with Scorer([(section, REGISTRY.reward(section))]) as scorer:
        (group,) = scorer.score([Group.sampled(rollouts)])
        return group.rewards.tolist()


def test_the_judge_is_asked_the_filled_template_and_answers_a_number(serve, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    server = serve(lambda question, _: say(f" Score: {len(question) % 10}/10.\n"))
    section = judge_section(
        server.url,
        template='{prompt}|{completion}|{user}|{taste}|{"json"}',
        api_key_env="SOME_KEY",
        parameters={"temperature": 0.5},
    )
    texts = [" {taste}", "{completion}"]
    rollouts = [rollout(text, text="{user} says {", taste="jazz") for text in texts]
    questions = [f'{{user}} says {{|{text}|u7|jazz|{{"json"}}' for text in texts]
    assert score(section, *rollouts) == [float(len(question) % 10) for question in questions]
    assert sorted(r[2]["messages"][0]["content"] for r in server.requests) == sorted(questions)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret"
    assert body["model"] == "m" and body["temperature"] == 0.5


def test_a_busy_server_is_asked_again(serve):
    def answer(question: str, times: int) -> Answer:
        if times < 2:
            return (429, {"Retry-After": "0"}, "busy") if times == 0 else (503, {}, "down")
        return say("7")

    server = serve(answer)
    assert score(judge_section(server.url), rollout("x"), rollout("y")) == [7.0, 7.0]
    assert len(server.requests) == 6


def test_pauses_grow_and_retry_after_is_kept(serve):
    times: list[float] = []

    def answer(question: str, count: int) -> Answer:
        times.append(time.monotonic())
        headers = {"Retry-After": "1"} if count == 2 else {}
        return (429, headers, "busy") if count < 3 else say("3")

    server = serve(answer)
    assert score(judge_section(server.url, retries=3, pause_s=0.1), rollout("x")) == [3.0]
    pauses = np.diff(times)
    assert pauses[0] >= 0.1 and pauses[1] >= 0.2 and pauses[2] >= 1.0


def test_concurrency_is_bounded(serve):
    def answer(question: str, times: int) -> Answer:
        time.sleep(0.05)
        return say("1")

    server = serve(answer)
    rollouts = [rollout(str(i)) for i in range(12)]
    assert score(judge_section(server.url, max_concurrency=3), *rollouts) == [1.0] * 12
    assert 2 <= server.most_at_once <= 3


def test_connections_are_kept_between_calls_and_closed_with_the_scorer(serve):
    server = serve(lambda *_: say("1"))
    section = judge_section(server.url, max_concurrency=2)
    judge = REGISTRY.reward(section)
    for _ in range(2):  # two event loops, one after the other
        with Scorer([(section, judge)]) as scorer:
            for _ in range(3):
                (group,) = scorer.score([Group.sampled([rollout("x"), rollout("y")])])
                assert group.rewards.tolist() == [1.0, 1.0]
            assert 1 <= server.num_connections <= 2
        deadline = time.monotonic() + 5
        while server.num_connections and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.num_connections == 0


REPLIES: list[tuple[str, float | None]] = [
    ("7", 7.0),
    ("7.", 7.0),
    ("#7", 7.0),
    ("7/10", 7.0),
    ("7.5 / 10", 7.5),
    ("I give it a 7.", 7.0),
    ("7, that is: 7", 7.0),
    ("10/10", 10.0),
    ("0", 0.0),
    # scales
    ("8 out of 10", 8.0),
    ("3 out of 4.", 7.5),
    ("7/100", 0.7),
    ("4/5", 8.0),
    ("70%", 7.0),
    ("On a scale from 0 to 10, I give 7.", 7.0),
    ("Score (0-10): 7", 7.0),
    ("I rate it 7 (out of 10)", 7.0),
    ("I give 7/10 since 3 of 4 facts hold", 7.0),
    ('{"score": 7, "max": 10}', 7.0),
    ('{"score": 4, "max_score": 5, "confidence": 3}', 8.0),
    ("24/7", None),
    ("11/10", None),
    ("120%", None),
    # JSON
    ('{"score": 7}', 7.0),
    ('Here you are:\n```json\n{\n  "reason": "3 errors in 9 lines",\n  "score": 6\n}\n```', 6.0),
    ('{"evaluation": {"score": "8/10", "reason": "2 errors"}}', 8.0),
    ('{"helpfulness": 3, "clarity_score": 5, "overall_score": 6}', 6.0),
    ('{"verdict": "good", "rating": 9, "year": 1999}', 9.0),
    ('[{"score": 7}, {"score": 7}]', 7.0),
    ('[{"score": 7}, {"score": 8}]', None),
    ('{"helpfulness": 3, "clarity": 5}', None),
    ('{"score": "7-8"}', None),
    ('{"score": true}', None),
    ('{"score": null}', None),
    ('{"score": NaN}', None),
    ('{"score": 7', 7.0),
    # behind some reasoning
    ("<think>maybe 3, maybe 9/10; Score: 2</think>\n\n7", 7.0),
    ("3 claims hold, 4 do not ...</think>7", 7.0),
    ("<think>\n\n</think>\n\nScore: 7", 7.0),
    ("<think>The score is 7.</think>", 7.0),
    ("Reasoning: 3 of the 5 facts are right, from 1999 to 2001.\nScore: 7", 7.0),
    ("**Reasoning:** 2 good points.\n\n**Score:** 7/10", 7.0),
    ("Rating: [[7]] and 3 remarks", 7.0),
    ("4 points are right. $\\boxed{7}$", 7.0),
    ("<reason>2 errors</reason><score>7</score>", 7.0),
    ("Helpfulness score: 3\nClarity score: 4\nOverall score: 6", 6.0),
    ("My score is 7 out of 10, as 2 facts are wrong.", 7.0),
    ("Score: 3 out of 5, with 1 error", 6.0),
    ("<think>It may be a 7, but", None),
    ("<think>It may be", None),
    # what nothing tells apart, and what is no number
    ("-1", None),
    ("11", None),
    ("Score: 11", None),
    ("between 3 and 4", None),
    ("7-8", None),
    ("7\u20138/10", None),
    ("7 to 8 out of 10", None),
    ("Score: 7 or 8", None),
    ("Score: 7\nScore: 8", None),
    ('Score: 6\n{"score": 7}', None),
    ("It deserves 7/10, not 8/10", None),
    ("2 out of 3 points are covered: 7", None),
    ("A score of 10 would need perfection; I give it a 7", None),
    ("7,5", None),
    ("7,5/10", None),
    ("7/10/2024", None),
    ("1.2.3", None),
    ("As GPT-4, I cannot say", None),
    ("GPT4 says nothing", None),
    ("great", None),
    ("", None),
    ("1e5", None),
    ("nan", None),
]


def test_a_reply_holds_one_number_in_range_or_is_unreadable(serve):
    server = serve(lambda question, _: say(REPLIES[int(question.split()[1])][0]))
    section = judge_section(server.url, max_unreadable=1.0)
    read = score(section, *(rollout(str(place)) for place in range(len(REPLIES))))
    for (reply, expected), reward in zip(REPLIES, read, strict=True):
        assert reward == pytest.approx(np.nan if expected is None else expected, nan_ok=True), reply
    for place in (index for index, (_, expected) in enumerate(REPLIES) if expected is None):
        with pytest.raises(
            PluginError,
            match=r"(?s)'judge' failed .*judge replied .*expected one number from 0 to 10.*last 1 ",
        ):
            score(judge_section(server.url, max_unreadable=0.0), rollout(str(place)))


@given(
    value=st.integers(0, 10),
    form=st.sampled_from(
        ["{}", "{}/10", "{} out of 10", "Score: {}", '{{"score": {}}}', "<score>{}"]
    ),
    other=st.integers(0, 10),
    between=st.sampled_from(["\n", ". ", " - ", " or ", " and then "]),
)
def test_two_verdicts_of_one_form_are_read_only_where_they_agree(value, form, other, between):
    reply = f"{form.format(value)}{between}{form.format(other)}"
    assert read_verdict(reply, 0, 10) in ({value, None} if value == other else {None})
    assert read_verdict(form.format(value), 0, 10) == value


@pytest.mark.parametrize("text", ["1" * 9000 + "x", "1," * 9000 + "x", "{" * 9000, "7 or " * 9000])
def test_a_reply_that_goes_on_and_on_is_read_at_once(text):
    start = time.monotonic()
    assert read_verdict(text, 0, 10, cut=True) is None
    assert time.monotonic() - start < 1.0  # in seconds; squares of its length take several


@given(value=st.floats(-99, 99), low=st.floats(-99, 0), high=st.floats(1, 99))
def test_a_number_counts_where_it_is_within_the_range(value, low, high):
    value, low, high = (round(number, 2) for number in (value, low, high))
    inside = low <= value <= high
    assert read_verdict(f"Score: {value:.2f}", low, high) == (value if inside else None)
    assert read_verdict(f'{{"score": {value:.2f}, "why": "1 of 9"}}', low, high) == (
        value if inside else None
    )


@pytest.mark.parametrize(
    ("message", "finish_reason", "reward"),
    [
        ({"content": None, "reasoning_content": "2 errors. Score: 7"}, "stop", 7.0),
        ({"content": "", "reasoning": "7/10"}, "stop", 7.0),
        ({"reasoning": "7/10"}, "stop", 7.0),
        ({"content": "3", "reasoning_content": "Score: 7"}, "stop", 3.0),
        ({"content": [{"type": "text", "text": "Score: 7"}]}, "stop", 7.0),
        ({"content": None}, "stop", None),
        ({"content": None, "refusal": "I will not give it a 3."}, "stop", None),
        # cut off: a number inside unfinished reasoning is none, nor is half a number
        ({"content": None, "reasoning_content": "2 errors. Score: 7"}, "length", None),
        ({"content": "Score: 1"}, "length", None),
        ({"content": "Score: 7/1"}, "length", None),
        ({"content": "Score: 7 out of"}, "length", None),
        ({"content": "7"}, "length", 7.0),
        ({"content": "1 because"}, "length", 1.0),
    ],
)
def test_reasoning_beside_the_reply_and_cut_replies(serve, message, finish_reason, reward):
    body = json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}]})
    section = judge_section(serve(lambda *_: (200, {}, body)).url, max_unreadable=0.0)
    if reward is not None:
        assert score(section, rollout("x")) == [reward]
        return
    match = "max_tokens ended" if finish_reason == "length" else "judge replied ''"
    with pytest.raises(PluginError, match=match):
        score(section, rollout("x"))


@pytest.mark.parametrize("batch", ["group", "step"])
def test_unreadable_verdicts_end_a_run_only_where_they_are_many(serve, caplog, batch):
    server = serve(lambda question, _: say("dunno" if "odd" in question else "2"))

    def step(num_odd: int, **settings: object) -> list[float]:
        section = judge_section(server.url, batch=batch, **settings)
        texts = ["odd"] * num_odd + ["even"] * (64 - num_odd)
        rollouts = [replace(rollout(text), group_id=i // 4) for i, text in enumerate(texts)]
        groups = [Group.sampled(rollouts[start : start + 4]) for start in range(0, 64, 4)]
        with Scorer([(section, REGISTRY.reward(section))]) as scorer:
            scorer.score(groups)
            scored = scorer.score(groups)
        return [reward for group in scored for reward in group.rewards.tolist()]

    for num_odd, settings in ((1, {}), (6, {}), (1, {"on_error": "retry"})):
        caplog.clear()
        before = len(server.requests)
        expected = [np.nan] * num_odd + [2.0] * (64 - num_odd)
        np.testing.assert_array_equal(step(num_odd, **settings), expected)
        (record,) = caplog.records  # once, with an example, however many steps
        said = record.getMessage()
        assert "completion 'odd': judge replied 'dunno'" in said
        assert f"({num_odd} unrewarded" in said
        assert len(server.requests) - before == 2 * 64  # what cannot be read is not asked again
    with pytest.raises(PluginError, match=r"'dunno'.*7 of the last 64.*max_unreadable = 0.1"):
        step(7)
    with pytest.raises(PluginError, match=r"1 of the last 64"):
        step(1, max_unreadable=0.0)


def test_of_small_steps_the_last_answers_count_together(serve):
    server = serve(lambda question, _: say("dunno" if "odd" in question else "2"))
    section = judge_section(server.url)
    with Scorer([(section, REGISTRY.reward(section))]) as scorer:

        def step(*texts: str) -> list[float]:
            (group,) = scorer.score([Group.sampled([rollout(text) for text in texts])])
            return group.rewards.tolist()

        np.testing.assert_array_equal(step("odd"), [np.nan])
        for _ in range(2):  # 1 of 4 for so long that the first ones are no longer counted
            for _ in range(3):
                np.testing.assert_array_equal(step("odd", *"abc"), [np.nan, 2, 2, 2])
            for _ in range(8):
                assert step(*"abcdefgh") == [2.0] * 8
        for _ in range(6):
            step("odd", "a")
        with pytest.raises(PluginError, match=r"[78] of the last \d+ answers could not be read"):
            for _ in range(2):
                step("odd", "a")


def test_a_limit_that_no_reward_makes_idle_is_refused():
    with pytest.raises(ValidationError, match="max_unreadable has no effect"):
        RewardConfig(name="judge", on_error="no_reward", max_unreadable=0.5)


@pytest.mark.parametrize("asked_for", ["3600", "99999999999999999999"])
def test_a_long_retry_after_is_bounded_by_the_time_there_is(serve, asked_for):
    def answer(question: str, times: int) -> Answer:
        busy = "busy" in question or ("once" in question and not times)
        return (429, {"Retry-After": asked_for}, "busy") if busy else say("3")

    server = serve(answer)
    section = judge_section(
        server.url, retries=50, timeout_s=2.0, on_error="no_reward", request_timeout_s=1.0
    )
    start = time.monotonic()
    rewards = score(section, rollout("busy"), rollout("once"), rollout("free"))
    # The others keep theirs, since the busy one gives up by itself before all are out of time.
    np.testing.assert_array_equal(rewards, [np.nan, 3.0, 3.0])
    assert time.monotonic() - start < 10
    assert 2 <= sum("busy" in r[2]["messages"][0]["content"] for r in server.requests) <= 51


def test_a_server_that_hangs_for_one_leaves_the_others_their_verdicts(serve, caplog):
    def answer(question: str, _: int) -> Answer:
        time.sleep(5.0 if "slow" in question else 0.0)
        return say("3")

    section = judge_section(serve(answer).url, timeout_s=3.0, on_error="no_reward")
    np.testing.assert_array_equal(score(section, rollout("slow"), rollout("x")), [np.nan, 3.0])
    assert "did not answer in time (1 attempts)" in caplog.text


def test_requests_that_failed_together_do_not_come_back_together(serve):
    second: list[float] = []

    def answer(question: str, times: int) -> Answer:
        if times:
            second.append(time.monotonic())
        return say("3") if times else (429, {"Retry-After": "1"}, "busy")

    section = judge_section(serve(answer).url, max_concurrency=16)
    assert score(section, *(rollout(str(i)) for i in range(16))) == [3.0] * 16
    assert max(second) - min(second) > 0.1  # drawn from half a second


def test_one_garbage_reply_leaves_the_others_their_verdicts(serve):
    server = serve(lambda question, _: say("dunno" if "odd" in question else "2"))
    rollouts = [rollout("even"), rollout("odd"), rollout("even")]
    section = judge_section(server.url, on_error="no_reward")
    np.testing.assert_array_equal(score(section, *rollouts), [2.0, np.nan, 2.0])
    with pytest.raises(PluginError, match="completion 'odd': judge replied 'dunno'"):
        score(judge_section(server.url, max_unreadable=0.0), *rollouts)


def test_a_turn_that_comes_too_late_is_not_waited_for(serve, caplog):
    server = serve(lambda *_: say("3"))
    section = judge_section(
        server.url, timeout_s=4.0, max_per_second=0.2, max_concurrency=4, on_error="no_reward"
    )
    rewards = score(section, *(rollout(str(i)) for i in range(3)))
    # Had it been waited for, the time of the call would have been over for all three.
    assert sorted(np.isnan(rewards).tolist()) == [False, True, True]
    assert len(server.requests) == 1
    assert "over before the judge could be asked" in caplog.text
    assert "max_per_second = 0.2" in caplog.text


@pytest.mark.parametrize(
    "body",
    ["<html>", "[]", '{"choices": []}', '{"choices": [{"text": "7"}]}', "[" * 200_000],
    ids=lambda body: body[:20],
)
def test_an_answer_that_is_no_chat_completion_is_refused(serve, body):
    server = serve(lambda *_: (200, {}, body))
    with pytest.raises(PluginError, match="no chat completion"):
        score(judge_section(server.url), rollout("x"))


def test_an_unreachable_judge_is_named(serve):
    server = serve(lambda *_: say("7"))
    server.close()
    with pytest.raises(
        PluginError, match=rf"{server.url}.* cannot be reached: Connect.*3 attempts"
    ):
        score(judge_section(server.url), rollout("x"))


def everything_an_error_says(error: BaseException | None) -> str:
    said = ""
    while error is not None:
        said += f"{error} {error!r} {error.args} "
        error = error.__cause__ or error.__context__
    return said


@pytest.mark.parametrize("status", [200, 401, 429, 500])
def test_the_key_never_appears_in_errors(serve, monkeypatch, status):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    cut = "key" + "." * 192 + "sk-secret"
    for body in ("Incorrect API key: sk-secret", say("your key is sk-secret")[2], cut):
        server = serve(lambda *_, body=body: (status, {}, body))
        with pytest.raises(PluginError) as caught:
            section = judge_section(server.url, api_key_env="SOME_KEY", max_unreadable=0.0)
            score(section, rollout("x"))
        assert "sk-" not in everything_an_error_says(caught.value)
        assert "key" in str(caught.value)
        assert len(server.requests) == (1 if status in (200, 401) else 3)


def test_a_judge_is_checked_before_the_run(monkeypatch):
    url = "http://127.0.0.1:9/v1"
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="SOME_KEY, named by api_key_env, is not set"):
        REGISTRY.reward(judge_section(url, api_key_env="SOME_KEY"))
    monkeypatch.setenv("SOME_KEY", "sk-\nsecret")
    with pytest.raises(ConfigError, match="SOME_KEY does not hold a key") as caught:
        REGISTRY.reward(judge_section(url, api_key_env="SOME_KEY"))
    assert "secret" not in str(caught.value)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"url": "localhost:8000"}, "http://"),
        ({"url": "http://me:sk-secret@host/v1"}, "api_key_env"),
        ({"template": "Rate {prompt}"}, r"\{completion\}"),
        ({"low": 5.0, "high": 5.0}, "expected low < high"),
        ({"max_concurrency": 0}, "max_concurrency"),
    ]
    for settings, complaint in cases:
        with pytest.raises(ConfigError, match=complaint) as caught:
            REGISTRY.reward(judge_section(**{"url": url, **settings}))
        assert "sk-secret" not in str(caught.value)


def test_an_unknown_word_in_the_template_is_named():
    section = judge_section("http://127.0.0.1:9/v1", template="{completion} {tast}")
    with pytest.raises(
        PluginError, match=r"template names \{tast\}.* completion, prompt, taste, user"
    ):
        score(section, rollout("x", taste="jazz"))


# --- the reward model ------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(40)]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
)


def save_reward_model(folder: Path, family: str, **settings: Any) -> Path:
    """An untrained classifier over whole words, with weights large enough to tell rollouts apart."""
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "<user>", "<system>", "<assistant>", "<end>"]
    words = {word: place for place, word in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if family == "bert":
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=settings.pop("model_max_length", 64),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"][
            :: 1 if family == "bert" else 2
        ],
    )
    tokenizer.chat_template = settings.pop("chat_template", None)
    usual: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
    }
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 96,
    }
    torch.manual_seed(3)
    if family == "bert":
        config: Any = BertConfig(**{**usual, **heads, **settings}, initializer_range=0.3)
        model: Any = BertForSequenceClassification(config)
    else:
        config = LlamaConfig(**{**usual, **heads, **settings}, initializer_range=0.3)
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def some_rollouts(num: int = 23) -> list[Rollout]:
    rng = np.random.default_rng(5)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    made: list[Rollout] = []
    for place in range(num):
        example = Example(words(12), user="u", turns=())
        if place % 3 == 0:
            turns = (("system", words(4)), ("user", words(9)), ("assistant", "w1"), ("user", "w2"))
            example = Example(" ".join(text for _, text in turns), user="u", turns=turns)
        prompt = Prompt(example, 0, (1,))
        made.append(Rollout(prompt, place, (1,), " " + words(15), (0.0,), False))
    return made


def one_by_one(folder: Path, texts: Sequence[tuple[str, ...]], **special: Any) -> torch.Tensor:
    """[N, K] logits, computed without batches, padding or anything of pgrpo."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows: list[torch.Tensor] = []
    for parts in texts:
        with torch.no_grad():
            rows.append(model(**tokenizer(*parts, return_tensors="pt", **special)).logits[0])
    return torch.stack(rows).double()


def in_chat(rollout: Rollout) -> str:
    example = rollout.prompt.example
    turns = [*(example.turns or (("user", example.text),)), ("assistant", rollout.completion)]
    return "".join(f"<{role}> {content} <end> " for role, content in turns)


@pytest.mark.parametrize("batch", ["group", "step"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_reward_model_scores_as_it_does_one_by_one(family, batch, tmp_path):
    rollouts = some_rollouts()
    folder = save_reward_model(tmp_path / "m", family, num_labels=1)
    plain = one_by_one(folder, [(r.prompt.example.text + r.completion,) for r in rollouts])[:, 0]
    assert plain.std() > 0.1, "scores that hardly differ would show nothing"
    for budget in (1, 40, 100, 8192):
        section = RewardConfig.model_validate(
            {"name": "reward_model", "model": str(folder), "token_budget": budget, "batch": batch}
        )
        with Scorer([(section, REGISTRY.reward(section))]) as scorer:
            scored = scorer.score([Group.sampled([rollout]) for rollout in rollouts])
        rewards = np.concatenate([group.rewards for group in scored])
        np.testing.assert_allclose(rewards, plain, rtol=0, atol=1e-5)
    pairs = one_by_one(folder, [(r.prompt.example.text, r.completion) for r in rollouts])[:, 0]
    reward: Any = build(name="reward_model", model=str(folder), format="pair", token_budget=64)
    np.testing.assert_allclose(reward(rollouts), pairs, rtol=0, atol=1e-5)
    if family == "bert":
        assert (pairs - plain).abs().max() > 0.1


def test_the_chat_template_of_the_reward_model_has_the_prompts_turns(tmp_path):
    rollouts = some_rollouts()
    folder = save_reward_model(tmp_path, "llama", num_labels=1, chat_template=TEMPLATE)
    texts = [(in_chat(rollout),) for rollout in rollouts]
    expected = one_by_one(folder, texts, add_special_tokens=False)[:, 0]
    for form in ("auto", "chat"):
        reward: Any = build(name="reward_model", model=str(folder), format=form, token_budget=90)
        np.testing.assert_allclose(reward(rollouts), expected, rtol=0, atol=1e-5)
    plain: Any = build(name="reward_model", model=str(folder), format="text")
    assert np.abs(np.array(plain(rollouts)) - expected.numpy()).max() > 0.1


def test_of_several_labels_the_named_one_counts(tmp_path):
    rollouts = some_rollouts()
    texts = [(r.prompt.example.text + r.completion,) for r in rollouts]
    names = {0: "bad", 1: "fair", 2: "good"}
    for kind in ("single_label_classification", "multi_label_classification"):
        folder = save_reward_model(tmp_path / kind, "llama", id2label=names, problem_type=kind)
        logits = one_by_one(folder, texts)
        p = logits.softmax(1) if kind.startswith("single") else logits.sigmoid()
        for place, label in names.items():
            of_label: dict[str, Any] = {"model": str(folder), "label": label}
            odds: Any = build(name="reward_model", **of_label)
            expected = (p[:, place] / (1 - p[:, place])).log()
            np.testing.assert_allclose(odds(rollouts), expected, rtol=0, atol=1e-5)
            share: Any = build(name="reward_model", output="probability", **of_label)
            np.testing.assert_allclose(share(rollouts), p[:, place], rtol=0, atol=1e-5)
        for settings, complaint in (
            ({}, "label is None; .* has bad, fair, good"),
            ({"label": "great"}, "label is 'great'; .* has bad, fair, good"),
            ({"output": "probability"}, "output has no effect"),
        ):
            with pytest.raises(ConfigError, match=complaint):
                build(name="reward_model", model=str(folder), **settings)


def test_nothing_is_cut_off(tmp_path):
    texts = ["w1", "w2 " * 18, "w3 " * 19, "w4"]  # behind a prompt of one word
    rollouts = [rollout(" " + text, text="w0") for text in texts]
    limits = {
        "fits": {},
        "tokenizer": {"model_max_length": 19},
        "model": {"max_position_embeddings": 19},
    }
    expected = np.zeros(len(texts))
    for name, limit in limits.items():
        folder = str(save_reward_model(tmp_path / name, "llama", num_labels=1, **limit))
        section = RewardConfig.model_validate({"name": "reward_model", "model": folder})
        if name == "fits":
            expected = one_by_one(Path(folder), [(f"w0 {text}",) for text in texts])[:, 0].numpy()
            assert score(section, *rollouts) == pytest.approx(expected, abs=1e-5)
            expected[2] = np.nan
            continue
        with pytest.raises(PluginError, match=r"completion 'w3 .* 20 tokens, more than the 19 "):
            score(section, *rollouts)
        section = RewardConfig.model_validate(
            {"name": "reward_model", "model": folder, "too_long": "no_reward"}
        )
        np.testing.assert_allclose(score(section, *rollouts), expected, rtol=0, atol=1e-5)


def test_without_a_padding_token_rollouts_are_asked_about_alone(tmp_path):
    rollouts = some_rollouts(6)
    folder = save_reward_model(tmp_path, "llama", num_labels=1, pad_token_id=None)
    expected = one_by_one(folder, [(r.prompt.example.text + r.completion,) for r in rollouts])
    reward: Any = build(name="reward_model", model=str(folder))
    np.testing.assert_allclose(reward(rollouts), expected[:, 0], rtol=0, atol=1e-5)


def test_a_reward_model_bears_many_threads(tmp_path):
    rollouts = some_rollouts()
    folder = save_reward_model(tmp_path, "bert", num_labels=1)
    reward: Any = build(name="reward_model", model=str(folder), token_budget=50)
    expected = reward(rollouts)
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda _: reward(rollouts), range(16)):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_reward_model_is_checked_before_the_run(tmp_path):
    folder = save_reward_model(tmp_path / "one", "llama", num_labels=1)
    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(base)
    AutoTokenizer.from_pretrained(folder).save_pretrained(base)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (ModelError, {"model": str(base)}, "no weights for score.weight"),
        (ModelError, {"model": str(folder), "format": "chat"}, "no chat template"),
        (ModelError, {"model": str(tmp_path / "nowhere")}, "nowhere"),
        (ConfigError, {"model": str(folder), "label": "good"}, "a single label"),
        (ConfigError, {"model": str(folder), "device": "toaster"}, "device is 'toaster'"),
    ]
    for error, settings, complaint in cases:
        with pytest.raises(error, match=complaint):
            build(name="reward_model", **settings)


def test_registering_rewards_imports_no_torch():
    program = (
        "import sys; from pgrpo.plugins.registry import load_registry; "
        "assert 'reward_model' in load_registry().rewards; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
