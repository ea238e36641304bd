"""Plugins that behave, and every way in which they do not."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import logging
import math
import pickle
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch

from pgrpo.config.sections import RewardConfig
from pgrpo.errors import EngineError, PluginError
from pgrpo.rewards.scorer import Scorer
from pgrpo.types import Example, Group, Prompt, Rollout


def group(group_id: int, *completions: str, cluster: int | str = 0) -> Group:
    return Group.sampled(
        [
            Rollout(
                prompt=Prompt(Example(f"Question {group_id}?", user="u"), cluster, (1,)),
                group_id=group_id,
                completion_ids=(1,),
                completion=text,
                rollout_logprobs=(0.0,),
                truncated=False,
            )
            for text in completions
        ]
    )


def flat(groups: list[Group]) -> tuple[list[Rollout], np.ndarray]:
    """All rollouts of scored groups, and their rewards."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return rollouts, np.concatenate([np.zeros(0), *(group.rewards for group in groups)])


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
def test_the_score_is_the_weighted_sum(reward: Any):
    def shout(rollouts):
        return np.array([r.completion.isupper() for r in rollouts], dtype=np.float32)

    rewards: Any = [(section(weight=0.5), reward), (section(weight=-3.0), shout)]
    with Scorer(rewards) as scorer:
        groups = [group(0, "a", "BB"), group(1, "ccc")]
        rollouts, scores = flat(scorer.score(groups))
        assert rollouts == [*groups[0].rollouts, *groups[1].rollouts]
        assert scores.dtype == np.float64
        assert scores.tolist() == [0.5, -2.0, 1.5]
        rollouts, scores = flat(scorer.score([]))
        assert rollouts == [] and scores.shape == (0,) and scores.dtype == np.float64


def test_scalars_of_torch_are_numbers():
    given: Any = [
        torch.tensor(2.5),
        torch.tensor(3),
        np.float32(0.5),
        np.array(7),
        torch.tensor(True),
    ]
    with Scorer([(section(), lambda _: given)]) as scorer:
        _, scores = flat(scorer.score([group(0, *"abcde")]))
    assert scores.tolist() == [2.5, 3, 0.5, 7, 1]
    bad: Any
    for bad in (torch.tensor([1.0]), torch.tensor(math.nan), np.array("x")):
        with (
            Scorer([(section(), lambda _, bad=bad: [bad])]) as scorer,
            pytest.raises(PluginError, match="expected a finite number or None"),
        ):
            scorer.score([group(0, "a")])


def test_none_means_no_reward_and_is_no_failure(caplog):
    rewards = [(section(), length), (section(weight=0.0), lambda rs: [1, None, True])]
    with Scorer(rewards) as scorer:
        _, scores = flat(scorer.score([group(0, "a", "b", "c")]))
        np.testing.assert_array_equal(scores, [1, np.nan, 1])
    assert not caplog.records


@pytest.mark.parametrize("batch", ["group", "step"])
def test_a_reward_scores_the_clusters_that_it_is_for(batch: str, caplog):
    seen: list[str] = []

    def judge(rollouts):
        seen.extend(rollout.completion for rollout in rollouts)
        return [None if rollout.completion == "no" else 7 for rollout in rollouts]

    def second_fails(rollouts):
        return [1.0, ValueError("broken")][: len(rollouts)]

    rewards: Any = [
        (section("judge", clusters=["pro", 3], batch=batch, weight=10), judge),
        (section("length", batch=batch), length),
        (section("click", clusters=["free"], batch=batch, on_error="no_reward"), second_fails),
    ]
    with Scorer(rewards) as scorer:
        groups = [
            group(0, "aa", "no", cluster="pro"),
            group(1, "b", "c", cluster="free"),
            group(2, "ddd", cluster=3),
            group(3, "eeee", cluster="other"),
        ]
        _, scores = flat(scorer.score(groups))
    np.testing.assert_array_equal(scores, [72, np.nan, 2, np.nan, 73, 4])
    assert sorted(seen) == ["aa", "ddd", "no"]
    assert "group 1" in caplog.text and "'c'" in caplog.text


@pytest.mark.parametrize("batch", ["group", "step"])
def test_a_reward_shifts_after_a_step_of_training_and_nowhere_else(batch: str):
    shift = {"after": 3, "scale": -0.5, "offset": 0.25}

    def judge(rollouts):
        return [None if rollout.completion == "no" else 8.0 for rollout in rollouts]

    rewards: Any = [
        (section("judge", shift=shift, weight=10, clusters=[1], batch=batch), judge),
        (section("length", batch=batch), length),
    ]
    groups = [group(0, "a", "no", cluster=1), group(1, "ccc", cluster=2)]
    with Scorer(rewards) as scorer:
        for step in (1, 3, None):
            scored = scorer.score(groups, step)
            np.testing.assert_array_equal(flat(scored)[1], [81, math.nan, 3])
            np.testing.assert_array_equal(scored[0].scores["judge"], [8, math.nan])
        for step in (4, 5, 1000):
            scored = scorer.score(groups, step)
            # -0.5 * 8 + 0.25, times the weight.
            np.testing.assert_array_equal(flat(scored)[1], [-37.5 + 1, math.nan, 3])
            np.testing.assert_array_equal(scored[0].scores["judge"], [-3.75, math.nan])
            np.testing.assert_array_equal(scored[0].scores["length"], [1, 2])
            np.testing.assert_array_equal(scored[1].scores["judge"], [math.nan])


def test_an_async_plugin_keeps_one_event_loop():
    loops = set()

    async def reward(rollouts):
        loops.add(asyncio.get_running_loop())
        return [0.0] * len(rollouts)

    with Scorer([(section(), reward)]) as scorer:
        for _ in range(3):
            scorer.score([group(0, "a"), group(1, "b")])
    assert len(loops) == 1
    assert loops.pop().is_closed()


def test_rewards_are_called_at_once():
    together = threading.Barrier(2, timeout=20)

    def reward(rollouts):
        together.wait()  # breaks unless both calls get here
        return [1.0]

    with Scorer([(section("one"), reward), (section("two"), reward)]) as scorer:
        assert flat(scorer.score([group(0, "a")]))[1].tolist() == [2.0]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_groups_are_scored_while_further_ones_are_generated(kind):
    scored = [threading.Event() for _ in range(3)]

    def reward(rollouts):
        scored[rollouts[0].group_id].set()
        return [0.0] * len(rollouts)

    async def async_reward(rollouts):
        return reward(rollouts)

    def engine():
        for i in range(3):
            yield group(i, "a")
            assert scored[i].wait(20)  # before the next group is asked for

    with Scorer([(section(), reward if kind == "sync" else async_reward)]) as scorer:
        rollouts, _ = flat(scorer.score(engine()))
    assert [r.group_id for r in rollouts] == [0, 1, 2]


def test_order_of_arrival_and_speed_change_nothing():
    # Sums of these depend on the order of addition in their last bits.
    def noise(rollout, salt):
        return random.Random(f"{rollout.completion} {salt}").gauss(0, 1) * 10.0**salt

    def make(salt, shuffled):
        def sync(rollouts):
            time.sleep(shuffled.random() * 0.004)
            return [noise(r, salt) for r in rollouts]

        async def asynchronous(rollouts):
            await asyncio.sleep(shuffled.random() * 0.004)
            return [noise(r, salt) for r in rollouts]

        return sync if salt % 2 else asynchronous

    groups = [group(i, *(f"{i}-{k}" for k in range(1 + i % 4))) for i in range(24)]
    expected = []
    for r in (r for g in groups for r in g.rollouts):
        total = 0.0
        for salt in range(4):
            total += 0.1 * (salt + 1) * noise(r, salt)
        expected.append(total)

    for seed in range(4):
        shuffled = random.Random(seed)
        rewards = [
            (
                section(weight=0.1 * (salt + 1), batch="step" if salt == 2 else "group"),
                make(salt, shuffled),
            )
            for salt in range(4)
        ]
        with Scorer(rewards, max_waiting=seed * 8) as scorer:
            rollouts, scores = flat(scorer.score(shuffled.sample(groups, len(groups))))
        assert rollouts == [r for g in groups for r in g.rollouts]
        assert scores.tolist() == expected


def test_a_reward_of_the_step_gets_everything_in_order_at_the_end():
    calls, pulled = [], 0

    def engine():
        nonlocal pulled
        for i in (2, 0, 1):
            pulled += 1
            yield group(i, f"{i}a", f"{i}b")

    def reward(rollouts):
        calls.append(([r.completion for r in rollouts], pulled))
        return range(len(rollouts))

    with Scorer([(section(batch="step"), reward), (section(), length)]) as scorer:
        _, scores = flat(scorer.score(engine()))
    assert calls == [(["0a", "0b", "1a", "1b", "2a", "2b"], 3)]
    assert scores.tolist() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize("max_waiting", [0, 1, 5])
def test_the_engine_pauses_while_too_many_groups_wait(max_waiting):
    pulled, freed, seen = 0, threading.Event(), []

    def engine():
        nonlocal pulled
        for i in range(12):
            pulled += 1
            yield group(i, "a")

    def reward(rollouts):
        freed.wait(20)
        return [1.0]

    def watch():
        # The bound is reached, and some time later still not passed.
        deadline = time.monotonic() + 20
        while pulled < max_waiting + 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.1)
        seen.append(pulled)
        freed.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with Scorer([(section(num_workers=2), reward)], max_waiting=max_waiting) as scorer:
        _, scores = flat(scorer.score(engine()))
    watcher.join()
    assert seen == [max_waiting + 1]
    assert scores.tolist() == [1.0] * 12


class Crowd:
    """Counts the calls under way; each waits until so many are."""

    def __init__(self, enough):
        self.now, self.most, self.enough = 0, 0, enough
        self.lock, self.there = threading.Lock(), threading.Event()

    def enter(self):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now == self.enough:
                self.there.set()

    def leave(self):
        with self.lock:
            self.now -= 1

    def sync(self, rollouts):
        self.enter()
        assert self.there.wait(20)
        time.sleep(0.002)
        self.leave()
        return [0.0]

    async def asynchronous(self, rollouts):
        self.enter()
        while not self.there.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.002)
        self.leave()
        return [0.0]


@pytest.mark.parametrize("kind", ["sync", "asynchronous"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_num_workers_bounds_the_calls_under_way(kind, num_workers):
    crowd, other = Crowd(num_workers), Crowd(2)
    rewards = [
        (section(num_workers=num_workers), getattr(crowd, kind)),
        (section(num_workers=2), other.sync),
    ]
    with Scorer(rewards) as scorer:
        scorer.score(group(i, "a") for i in range(20))
    assert crowd.most == num_workers and other.most == 2


def test_time_runs_from_the_call_on_not_in_the_queue():
    def reward(rollouts):
        time.sleep(0.25)
        return [1.0]

    # The last one waits five times as long as a call takes, which is longer than one may take.
    config = section(num_workers=1, timeout_s=1.0)
    with Scorer([(config, reward)]) as scorer:
        assert flat(scorer.score(group(i, "a") for i in range(6)))[1].tolist() == [1.0] * 6


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hung_call_gives_its_place_back(kind, caplog):
    released = threading.Event()

    def hang(rollouts):
        if rollouts[0].group_id == 0:
            released.wait(20)
        return [1.0]

    async def async_hang(rollouts):
        if rollouts[0].group_id == 0:
            await asyncio.sleep(20)
        return [1.0]

    config = section(num_workers=1, timeout_s=1.0, on_error="no_reward")
    with Scorer([(config, hang if kind == "sync" else async_hang)]) as scorer:
        _, scores = flat(scorer.score(group(i, "a") for i in range(4)))
        np.testing.assert_array_equal(scores, [np.nan, 1.0, 1.0, 1.0])
    assert "timeout_s = 1" in caplog.text
    released.set()


def test_an_async_plugin_that_blocks_holds_up_nobody_else():
    seen, released = threading.Event(), threading.Event()

    async def blocker(rollouts):
        assert released.wait(20)
        return [0.0]

    async def other(rollouts):
        if rollouts[0].group_id == 2:
            seen.set()
        return [1.0]

    def engine():
        for i in range(3):
            yield group(i, "a")
        assert seen.wait(20)  # the other got through all groups meanwhile
        released.set()

    with Scorer([(section("blocker"), blocker), (section("other"), other)]) as scorer:
        assert flat(scorer.score(engine()))[1].tolist() == [1.0] * 3


def raises(rollouts):
    for rollout in rollouts:
        if rollout.completion == "bad":
            raise KeyError("oh no")
    return [0.0] * len(rollouts)


async def async_raises(rollouts):
    return raises(rollouts)


def quits(rollouts):
    sys.exit("good-bye")


async def async_quits(rollouts):
    quits(rollouts)


async def cancels(rollouts):
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (raises, "KeyError: 'oh no'"),
        (async_raises, "KeyError: 'oh no'"),
        (quits, "SystemExit: good-bye"),
        (async_quits, "SystemExit: good-bye"),
        (lambda rs: [next(iter(())) for _ in rs], "StopIteration: "),
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
        scorer.score([group(0, "good", "bad", "good")])
    message = str(caught.value)
    assert reason in message
    assert "'culprit'" in message and "fine" not in message
    assert "group 0" in message and "'Question 0?'" in message
    assert caught.value.__cause__ is not None
    assert "completion 'bad'" in message or "in a batch of 3 rollouts" in message


@pytest.mark.parametrize("fails", [True, False])
def test_tasks_that_a_reward_left_behind_are_told_of_only_where_nothing_else_is(fails, caplog):
    async def reward(rollouts):
        async def ask():
            raise ValueError("broken")

        tasks = [asyncio.create_task(ask()) for _ in rollouts]
        await asyncio.sleep(0.01)
        if fails:
            await tasks[0]
        return [1.0] * len(rollouts)

    with Scorer([(section(num_workers=1), reward)]) as scorer:
        groups = [group(0, "a", "b"), group(1, "c", "d")]
        if fails:
            with pytest.raises(PluginError, match="ValueError: broken"):
                scorer.score(groups)
        else:
            scorer.score(groups)
    gc.collect()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    expected = "reward 'plugin' left a task behind that failed: ValueError('broken')"
    assert said == [] if fails else set(said) == {expected}


WRITES: dict[str, Any] = {
    "a column": lambda columns: columns.update(answer="B"),
    "a new column": lambda columns: columns.setdefault("seen", True),
    "no column": lambda columns: columns.__delitem__("answer"),
    "an entry": lambda columns: columns["options"].append("C"),
    "an entry in place": lambda columns: columns["options"].sort(reverse=True),
    "an entry below": lambda columns: columns["nested"][0]["deep"].__setitem__(0, 2.0),
    "a key below": lambda columns: columns["nested"][0].pop("deep"),
    "the tuple's list": lambda columns: columns["pair"][1].clear(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_reward_cannot_change_the_columns_of_a_rollout(write):
    given: dict[str, Any] = {
        "answer": "A",
        "options": ["A", "B"],
        "nested": [{"deep": [1.0]}],
        "pair": (1, [2]),
    }
    before = copy.deepcopy(given)
    example = Example("Which?", user="u", columns=given)
    rollout = Rollout(Prompt(example, 0, (1,)), 0, (1,), "A", (0.0,), False)

    def reward(rollouts):
        write(rollouts[0].prompt.example.columns)
        return [1.0]

    with (
        Scorer([(section("writer"), reward)]) as scorer,
        pytest.raises(PluginError, match=r"'writer' failed on .*'Which\?'.*cannot be written to"),
    ):
        scorer.score([Group.sampled([rollout])])
    # They read, compare and print as what was given; copies can be written to, and what was given can.
    assert example.columns == before and str(example.columns) == str(before)
    assert json.loads(json.dumps(example.columns)) == json.loads(json.dumps(before))
    for copied in (copy.deepcopy(example.columns), pickle.loads(pickle.dumps(example.columns))):
        assert copied == before
        write(copied)
        assert copied != before
    write(given)
    assert example.columns == before


def test_the_rollout_in_the_message_is_the_one_that_failed():
    groups = [group(0, "good", "good"), group(1, "good", "bad")]
    named = r"group 1, prompt 'Question 1\?', completion 'bad'"
    with Scorer([(section(), raises)]) as scorer, pytest.raises(PluginError, match=named):
        scorer.score(groups)


def test_long_texts_are_shortened():
    def reward(rollouts):
        raise ValueError

    groups = [group(0, "x" * 5000 + "\n" * 99 + "end")]
    with Scorer([(section(), reward)]) as scorer, pytest.raises(PluginError) as caught:
        scorer.score(groups)
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
            scorer.score([group(0, "a")])
        assert time.monotonic() - start < 10
    assert time.monotonic() - start < 15


class Patient:
    def __init__(self):
        self.waiting, self.cancelled = threading.Event(), threading.Event()

    async def __call__(self, rollouts: object) -> Any:
        self.waiting.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def test_an_async_call_past_its_timeout_is_cancelled():
    patient = Patient()
    with Scorer([(section(timeout_s=0.1, on_error="no_reward"), patient)]) as scorer:
        scorer.score([group(0, "a")])
        assert patient.cancelled.wait(20)


class Stream:
    """An engine's iterator that remembers how far it got and whether it was closed."""

    def __init__(self, num_groups, before=lambda i: None):
        self.pulled, self.closed = 0, False
        self.num_groups, self.before = num_groups, before

    def __iter__(self):
        return self

    def __next__(self):
        self.before(self.pulled)
        if self.pulled == self.num_groups:
            raise StopIteration
        self.pulled += 1
        return group(self.pulled - 1, "a")

    def close(self):
        self.closed = True


def test_a_failure_stops_the_engine_and_the_other_calls():
    patient = Patient()

    def fails(rollouts):
        assert patient.waiting.wait(20)
        raise ValueError("no more")

    stream = Stream(1000)
    rewards: Any = [(section("patient"), patient), (section("culprit"), fails)]
    with Scorer(rewards, max_waiting=2) as scorer:
        with pytest.raises(PluginError, match="'culprit'.*no more"):
            scorer.score(stream)
        assert patient.cancelled.wait(20)
    assert stream.closed and stream.pulled <= 3


def test_a_generator_is_closed_by_who_pulled_it():
    ended = []

    def engine():
        try:
            while True:
                yield group(0, "bad")
        finally:
            ended.append(threading.current_thread())

    with Scorer([(section(), raises)]) as scorer, pytest.raises(PluginError):
        scorer.score(engine())
    assert ended == [threading.current_thread()]


@pytest.mark.parametrize("error", [EngineError("the server died"), KeyboardInterrupt()])
def test_a_failing_engine_ends_the_calls_under_way(error):
    patient = Patient()

    def before(i):
        if i == 2:
            assert patient.waiting.wait(20)
            raise error

    stream = Stream(5, before)
    with Scorer([(section(), patient)]) as scorer:
        with pytest.raises(type(error)) as caught:
            scorer.score(stream)
        assert caught.value is error and stream.closed
        assert patient.cancelled.wait(20)


def test_a_scorer_goes_on_after_a_failure():
    with Scorer([(section(num_workers=1), async_raises)]) as scorer:
        with pytest.raises(PluginError):
            scorer.score([group(i, "bad") for i in range(9)])
        assert flat(scorer.score([group(0, "good")]))[1].tolist() == [0.0]


@pytest.mark.parametrize("kind", ["sync", "async", "nothing but the engine"])
def test_another_thread_can_interrupt_the_scoring(kind):
    called, released, ended = threading.Event(), threading.Event(), []

    def hang(rollouts):
        called.set()
        released.wait(20)
        return [1.0]

    async def async_hang(rollouts):
        called.set()
        await asyncio.sleep(20)
        return [1.0]

    def engine():
        yield group(0, "a")
        if kind == "nothing but the engine":
            called.set()
            released.wait(20)
            yield group(1, "b")

    def score(scorer):
        with pytest.raises(CancelledError):
            scorer.score(engine())
        ended.append(True)

    reward = {"sync": hang, "async": async_hang}.get(kind, length)
    with Scorer([(section(), reward)]) as scorer:
        thread = threading.Thread(target=score, args=(scorer,))
        thread.start()
        assert called.wait(20)
        scorer.interrupt()
        scorer.interrupt()  # again is harmless
        if kind == "nothing but the engine":
            released.set()  # only the engine itself can be told to end
        thread.join(10)
        assert ended
        with pytest.raises(CancelledError):
            scorer.score([group(0, "a")])
    released.set()


def run(program: str) -> str:
    """What a process of its own prints; it must end long before a reward that hangs."""
    preamble = """
import os, signal, time
from pgrpo.config.sections import RewardConfig
from pgrpo.errors import PluginError
from pgrpo.rewards.scorer import Scorer
from pgrpo.types import Example, Group, Prompt, Rollout
rollout = Rollout(Prompt(Example("q", user="u"), 0, (1,)), 0, (1,), "a", (0.0,), False)
groups = [Group.sampled([rollout])]
"""
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", preamble + program],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert time.monotonic() - start < 40
    return result.stdout


def test_ctrl_c_interrupts_the_wait_for_a_reward():
    program = """
def hang(rollouts):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
try:
    Scorer([(RewardConfig(name="hang"), hang)]).score(groups)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert run(program) == "interrupted\n"


@pytest.mark.parametrize("kind", ["sync", "blocking async"])
def test_a_hung_plugin_does_not_keep_the_process(kind):
    program = f"""
{"async " if "async" in kind else ""}def hang(rollouts):
    time.sleep(60)
try:
    Scorer([(RewardConfig(name="hang", timeout_s=0.1), hang)]).score(groups)
except PluginError:
    print("noticed")
"""
    assert run(program) == "noticed\n"


def test_retry_tries_three_times_then_fails():
    times = []

    def flaky(rollouts, until):
        times.append(time.monotonic())
        if len(times) < until:
            raise OSError(f"attempt {len(times)}")
        return [1.0]

    config = section(on_error="retry")
    with Scorer([(config, lambda rs: flaky(rs, until=3))], pauses_s=(0.05, 0.15)) as scorer:
        assert flat(scorer.score([group(0, "a")]))[1].tolist() == [1.0]
    assert len(times) == 3
    assert times[1] - times[0] >= 0.05 and times[2] - times[1] >= 0.15

    times.clear()
    scorer = Scorer([(config, lambda rs: flaky(rs, until=9))], pauses_s=(0.0, 0.0))
    with scorer, pytest.raises(PluginError, match="OSError: attempt 3"):
        scorer.score([group(0, "a")])
    assert len(times) == 3


def test_a_pause_before_a_retry_holds_up_no_other_group():
    calls, others = [], threading.Event()

    def flaky(rollouts):
        calls.append(rollouts[0].group_id)
        if calls == [0]:
            raise OSError
        if calls[-1] == 2:
            others.set()
        return [float(rollouts[0].group_id)]

    def engine():
        yield group(0, "a")
        while not calls:
            time.sleep(0.001)
        yield group(1, "a")
        yield group(2, "a")
        assert others.wait(20)  # there is one place, and group 0 pauses for longer
        raise EngineError("enough")

    config = section(on_error="retry", num_workers=1)
    scorer = Scorer([(config, flaky)], pauses_s=(300.0,))
    with scorer, pytest.raises(EngineError, match="enough"):
        scorer.score(engine())
    assert calls == [0, 1, 2]

    calls.clear()
    with Scorer([(config, flaky)], pauses_s=(0.0,)) as scorer:
        _, scores = flat(scorer.score(group(i, "a") for i in range(3)))
    assert scores.tolist() == [0.0, 1.0, 2.0]
    assert sorted(calls) == [0, 0, 1, 2]


def test_no_reward_goes_on_counts_and_logs_once(caplog):
    rewards = [(section("weak", on_error="no_reward"), raises), (section(), length)]
    with Scorer(rewards) as scorer, caplog.at_level(logging.WARNING, logger="pgrpo"):
        _, scores = flat(scorer.score([group(0, "bad", "bb"), group(1, "a")]))
        np.testing.assert_array_equal(scores, [np.nan, np.nan, 1.0])
        _, scores = flat(scorer.score([group(0, "aaa", "bb")]))
        np.testing.assert_array_equal(scores, [3.0, 2.0])
        _, scores = flat(scorer.score([group(0, "aaa", "bad")]))
        np.testing.assert_array_equal(scores, [np.nan, np.nan])
    assert len(caplog.records) == 1
    assert "oh no" in caplog.text


def test_no_reward_costs_only_the_rollouts_with_a_bad_entry():
    def reward(rollouts):
        return [1.0, math.nan, ValueError("x"), None, 5]

    with Scorer([(section(on_error="no_reward"), reward)] * 2) as scorer:
        _, scores = flat(scorer.score([group(0, *"abcde")]))
        np.testing.assert_array_equal(scores, [2.0, np.nan, np.nan, np.nan, 10.0])
