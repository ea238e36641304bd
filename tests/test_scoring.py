"""Plugins that behave, and every way in which they do not."""

from __future__ import annotations

import asyncio
import logging
import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from pgrpo.config import RewardConfig
from pgrpo.errors import PluginError
from pgrpo.scoring import Scorer
from pgrpo.types import Example, Prompt, Rollout


def make_rollouts(*completions: str) -> list[Rollout]:
    """Two rollouts a group."""
    return [
        Rollout(
            prompt=Prompt(Example(f"Question {i // 2}?", user="u"), 0, (1,)),
            group_id=i // 2,
            completion_ids=(1,),
            completion=text,
            rollout_logprobs=(0.0,),
            truncated=False,
        )
        for i, text in enumerate(completions)
    ]


def section(name: str = "plugin", **settings: object) -> RewardConfig:
    return RewardConfig.model_validate({"name": name, **settings})


def length(rollouts):
    return [float(len(r.completion)) for r in rollouts]


async def async_length(rollouts):
    await asyncio.sleep(0)
    return length(rollouts)


class Object:
    async def __call__(self, rollouts):
        return await async_length(rollouts)


@pytest.mark.parametrize("reward", [length, async_length, Object()])
def test_the_score_is_the_weighted_sum(reward):
    def shout(rollouts):
        return np.array([r.completion.isupper() for r in rollouts], dtype=np.float32)

    rewards = [(section(weight=0.5), reward), (section(weight=-3.0), shout)]
    with Scorer(rewards) as scorer:
        scores = scorer.score(make_rollouts("a", "BB", "ccc"))
        assert scores.dtype == np.float64
        assert scores.tolist() == [0.5, -2.0, 1.5]
        assert scorer.score([]).shape == (0,)


def test_none_means_no_reward_and_is_no_failure():
    rewards = [(section(), length), (section(weight=0.0), lambda rs: [1, None, True])]
    with Scorer(rewards) as scorer:
        np.testing.assert_array_equal(scorer.score(make_rollouts("a", "b", "c")), [1, np.nan, 1])
        assert scorer.num_unrewarded == 0
        assert scorer.last_error is None


def test_an_async_plugin_keeps_one_event_loop():
    loops = set()

    async def reward(rollouts):
        loops.add(asyncio.get_running_loop())
        return [0.0] * len(rollouts)

    with Scorer([(section(), reward)]) as scorer:
        for _ in range(3):
            scorer.score(make_rollouts("a"))
    assert len(loops) == 1
    assert loops.pop().is_closed()


def test_rewards_are_called_at_once():
    together = threading.Barrier(2, timeout=20)

    def reward(rollouts):
        together.wait()  # breaks unless both calls get here
        return [1.0]

    with Scorer([(section("one"), reward), (section("two"), reward)]) as scorer:
        assert scorer.score(make_rollouts("a")).tolist() == [2.0]


def raises(rollouts):
    for rollout in rollouts:
        if rollout.completion == "bad":
            raise KeyError("oh no")
    return [0.0] * len(rollouts)


async def async_raises(rollouts):
    return raises(rollouts)


def quits(rollouts):
    sys.exit("good-bye")


async def cancels(rollouts):
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (raises, "KeyError: 'oh no'"),
        (async_raises, "KeyError: 'oh no'"),
        (quits, "SystemExit: good-bye"),
        (cancels, "cancelled itself"),
        (lambda rs: [1.0], "returned 1 rewards for 3 rollouts"),
        (lambda rs: None, "returned a NoneType, expected one reward per rollout"),
        (lambda rs: 1.0, "returned a float"),
        (lambda rs: "abc", "returned a str"),
        (lambda rs: async_length(rs), "returned a coroutine"),
        (lambda rs: [1.0, "2", 3.0], "returned '2', expected a finite number or None"),
        (lambda rs: [1.0, math.nan, 3.0], "returned nan"),
        (lambda rs: [1.0, math.inf, 3.0], "returned inf"),
        (lambda rs: [1.0, 10**400, 3.0], "expected a finite number"),
        (lambda rs: [1.0, ValueError("no verdict"), 3.0], "ValueError: no verdict"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_failure_names_plugin_reason_and_rollout(reward, reason):
    rewards = [(section("fine"), length), (section("culprit"), reward)]
    with Scorer(rewards) as scorer, pytest.raises(PluginError) as caught:
        scorer.score(make_rollouts("good", "bad", "good"))
    message = str(caught.value)
    assert reason in message
    assert "'culprit'" in message and "fine" not in message
    assert "group 0" in message and "'Question 0?'" in message
    assert caught.value.__cause__ is not None
    assert "completion 'bad'" in message or "in a batch of 3 rollouts" in message


def test_the_rollout_in_the_message_is_the_one_that_failed():
    rollouts = make_rollouts("good", "good", "good", "bad")
    named = r"group 1, prompt 'Question 1\?', completion 'bad'"
    with Scorer([(section(), raises)]) as scorer, pytest.raises(PluginError, match=named):
        scorer.score(rollouts)


def test_long_texts_are_shortened():
    def reward(rollouts):
        raise ValueError

    rollout = make_rollouts("x" * 5000 + "\n" * 99 + "end")
    with Scorer([(section(), reward)]) as scorer, pytest.raises(PluginError) as caught:
        scorer.score(rollout)
    assert len(str(caught.value)) < 250 and "end'" in str(caught.value)


def sleeps(rollouts):
    time.sleep(20)


async def async_sleeps(rollouts):
    await asyncio.sleep(20)


async def blocks(rollouts):
    time.sleep(20)


@pytest.mark.parametrize("reward", [sleeps, async_sleeps, blocks])
def test_a_hang_is_found(reward):
    start = time.monotonic()
    with Scorer([(section("slow", timeout_s=0.2), reward)]) as scorer:
        with pytest.raises(PluginError, match=r"'slow'.*no answer within timeout_s = 0\.2"):
            scorer.score(make_rollouts("a"))
        assert time.monotonic() - start < 10
    assert time.monotonic() - start < 15


def test_an_async_call_past_its_timeout_is_cancelled():
    cancelled = threading.Event()

    async def reward(rollouts):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with Scorer([(section(timeout_s=0.1), reward)]) as scorer, pytest.raises(PluginError):
        scorer.score(make_rollouts("a"))
    assert cancelled.wait(5)


@pytest.mark.parametrize("kind", ["sync", "blocking async"])
def test_a_hung_plugin_does_not_keep_the_process(kind):
    program = f"""
import time
from pgrpo.config import RewardConfig
from pgrpo.errors import PluginError
from pgrpo.scoring import Scorer
{"async " if "async" in kind else ""}def hang(rollouts):
    time.sleep(60)
section = RewardConfig(name="hang", timeout_s=0.1)
try:
    Scorer([(section, hang)]).score([None])
except AttributeError:  # describing a rollout that is None
    print("noticed")
"""
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True
    )
    assert result.stdout == "noticed\n"
    assert time.monotonic() - start < 40


def test_retry_tries_three_times_then_fails():
    times = []

    def flaky(rollouts, until):
        times.append(time.monotonic())
        if len(times) < until:
            raise OSError(f"attempt {len(times)}")
        return [1.0]

    config = section(on_error="retry")
    with Scorer([(config, lambda rs: flaky(rs, until=3))], pauses_s=(0.05, 0.15)) as scorer:
        assert scorer.score(make_rollouts("a")).tolist() == [1.0]
    assert len(times) == 3
    assert times[1] - times[0] >= 0.05 and times[2] - times[1] >= 0.15

    times.clear()
    scorer = Scorer([(config, lambda rs: flaky(rs, until=9))], pauses_s=(0.0, 0.0))
    with scorer, pytest.raises(PluginError, match="OSError: attempt 3"):
        scorer.score(make_rollouts("a"))
    assert len(times) == 3


def test_no_reward_goes_on_counts_and_logs_once(caplog):
    rewards = [(section("weak", on_error="no_reward"), raises), (section(), length)]
    with Scorer(rewards) as scorer, caplog.at_level(logging.WARNING, logger="pgrpo"):
        np.testing.assert_array_equal(scorer.score(make_rollouts("bad", "bb")), [np.nan, np.nan])
        np.testing.assert_array_equal(scorer.score(make_rollouts("aaa", "bb")), [3.0, 2.0])
        scorer.score(make_rollouts("aaa", "bad"))
        assert scorer.num_unrewarded == 4
        assert "'weak' failed" in scorer.last_error and "oh no" in scorer.last_error
    assert len(caplog.records) == 1
    assert "oh no" in caplog.text


def test_no_reward_costs_only_the_rollouts_with_a_bad_entry():
    def reward(rollouts):
        return [1.0, math.nan, ValueError("x"), None, 5]

    with Scorer([(section(on_error="no_reward"), reward)] * 2) as scorer:
        scores = scorer.score(make_rollouts(*"abcde"))
        np.testing.assert_array_equal(scores, [2.0, np.nan, np.nan, np.nan, 10.0])
        assert scorer.num_unrewarded == 2  # None is no failure, and two rewards count once
