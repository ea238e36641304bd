"""Calls the reward plugins, and survives them.

A plugin may be slow, hang, raise or answer nonsense. Each call therefore runs beside the caller and
is waited for no longer than the plugin's own timeout; what goes wrong meets its `on_error` policy.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import numbers
import sys
import threading
import time
import traceback
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple, cast

import numpy as np

from pgrpo.config import RewardConfig
from pgrpo.errors import PgrpoError, PluginError
from pgrpo.hookspecs import Reward
from pgrpo.types import FloatArray, Rollout

_log = logging.getLogger("pgrpo")

_CLOSE_S = 1.0
"""How long `close` waits for async plugins that were told to stop."""


class Scorer:
    """Scores rollouts by the weighted sum of several rewards.

    All rewards are called at once, each with the whole batch. A sync one gets a thread per call, an
    async one an event loop of its own that lives as long as the scorer. Threads are daemons, so a
    plugin that hangs for ever does not keep the process from ending; a retry after a hang runs
    beside the call that hangs.

    Args:
        rewards: each reward's section (weight, timeout_s, on_error) and the reward itself.
        pauses_s: waits before the second, third, ... attempt where on_error is "retry".
    """

    num_unrewarded: int
    """Rollouts that went without a reward because a plugin failed on them."""
    last_error: str | None
    """What the latest of those failures was; each plugin's first one is also logged."""

    def __init__(
        self,
        rewards: Sequence[tuple[RewardConfig, Reward]],
        pauses_s: Sequence[float] = (0.5, 2.0),
    ) -> None:
        self.num_unrewarded = 0
        self.last_error = None
        self._pauses_s = tuple(pauses_s)
        self._logged: set[_Worker] = set()
        self._workers = [_Worker(section, reward) for section, reward in rewards]

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the event loops; a call still under way is cancelled or, if sync, abandoned."""
        for worker in self._workers:
            worker.close()

    def score(self, rollouts: Sequence[Rollout]) -> FloatArray:
        """Return raw rewards [N]: sum over rewards of weight * reward, NaN where one is missing.

        A plugin that returns None gives a rollout no reward, which is no error. Under on_error
        "no_reward" a failing call leaves its rollouts NaN: all of them where it raised, hung or
        returned another number of rewards, else those with a bad one.

        Raises:
            PluginError: a reward with on_error "fail" or "retry" raised, outlasted timeout_s, or
                returned anything but one finite number or None per rollout. Chained to the cause.
        """
        total = np.zeros(len(rollouts))
        failed = np.zeros(len(rollouts), dtype=bool)
        if not rollouts:
            return total
        calls = [(worker, worker.start(rollouts)) for worker in self._workers]
        for worker, call in calls:
            answer = worker.finish(call)
            for pause_s in self._pauses_s if worker.section.on_error == "retry" else ():
                if answer.failures:
                    time.sleep(pause_s)
                    answer = worker.finish(worker.start(rollouts))
            if answer.failures:
                self._apply_policy(worker, rollouts, answer.failures)
                failed[list(answer.failures)] = True
            total += worker.section.weight * answer.rewards
        self.num_unrewarded += int(failed.sum())
        return total

    def _apply_policy(
        self, worker: _Worker, rollouts: Sequence[Rollout], failures: dict[int, BaseException]
    ) -> None:
        """Raise, or note that some rollouts go without."""
        index, cause = next(iter(failures.items()))
        rollout, extent = _rollout_met_by(cause) or rollouts[index], ""
        if len(failures) == len(rollouts) > 1:
            extent = f", in a batch of {len(rollouts)} rollouts"
        reason = str(cause) if isinstance(cause, PgrpoError) else f"{type(cause).__name__}: {cause}"
        message = f"reward {worker.section.name!r} failed on {_describe(rollout)}{extent}: {reason}"
        if worker.section.on_error != "no_reward":
            raise PluginError(message) from cause
        self.last_error = message
        if worker not in self._logged:
            self._logged.add(worker)
            _log.warning("%s (%d unrewarded; not logged again)", message, len(failures))


class _Call(NamedTuple):
    """A call under way."""

    future: Future[Any]
    deadline: float
    num_rollouts: int


class _Answer(NamedTuple):
    """What came of a call."""

    rewards: FloatArray
    """[N] NaN where there is none."""
    failures: dict[int, BaseException]
    """Position in the batch -> what went wrong there."""


class _Worker:
    """Where one reward runs."""

    def __init__(self, section: RewardConfig, reward: Reward) -> None:
        self.section = section
        self._reward = reward
        self._loop: asyncio.AbstractEventLoop | None = None
        if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(reward.__call__):
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()

    def start(self, rollouts: Sequence[Rollout]) -> _Call:
        """Call the reward in the background."""
        if self._loop is None:
            future: Future[Any] = _run_in_thread(self._reward, rollouts)
        else:
            coroutine = cast(Coroutine[Any, Any, Any], self._reward(rollouts))
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return _Call(future, time.monotonic() + self.section.timeout_s, len(rollouts))

    def finish(self, call: _Call) -> _Answer:
        """Wait for the call until its deadline, and check what it returned."""
        wait([call.future], timeout=max(0.0, call.deadline - time.monotonic()))
        cause: BaseException | None
        if not call.future.done():
            call.future.cancel()
            cause = TimeoutError(f"no answer within timeout_s = {self.section.timeout_s:g}")
        elif call.future.cancelled():
            cause = RuntimeError("the call cancelled itself")
        else:
            cause = call.future.exception()
        if cause is None:
            return _check(call.future.result(), call.num_rollouts)
        return _all_failed(call.num_rollouts, cause)

    def close(self) -> None:
        """Cancel what runs in the event loop, and end it."""
        if self._loop is None or not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(_stop_loop(), self._loop)
        # A plugin that blocks its loop is left behind, as a daemon.
        self._thread.join(timeout=2 * _CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _stop_loop() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_CLOSE_S)
    asyncio.get_running_loop().stop()


def _run_in_thread(reward: Reward, rollouts: Sequence[Rollout]) -> Future[Any]:
    """Call in a daemon thread, which an executor cannot offer: it would join a hung one at exit."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            values = reward(rollouts)
        except BaseException as error:  # sys.exit() in a plugin too must reach the waiting side
            future.set_exception(error)
        else:
            future.set_result(values)

    threading.Thread(target=run, daemon=True).start()
    return future


def _check(values: object, num_rollouts: int) -> _Answer:
    """Accept one finite number, None or exception per rollout."""
    if hasattr(values, "tolist"):
        values = cast(Any, values).tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        message = f"it returned a {type(values).__name__}, expected one reward per rollout"
        return _all_failed(num_rollouts, TypeError(message))
    entries = cast(Sequence[object], values)
    if len(entries) != num_rollouts:
        message = f"it returned {len(entries)} rewards for {num_rollouts} rollouts"
        return _all_failed(num_rollouts, ValueError(message))
    rewards = np.full(num_rollouts, math.nan)
    failures: dict[int, BaseException] = {}
    for index, entry in enumerate(entries):
        if isinstance(entry, BaseException):
            failures[index] = entry
        elif isinstance(entry, numbers.Real) and abs(cast(Any, entry)) <= sys.float_info.max:
            rewards[index] = float(entry)
        elif entry is not None:
            message = f"it returned {_shorten(repr(entry))}, expected a finite number or None"
            failures[index] = ValueError(message)
    return _Answer(rewards, failures)


def _all_failed(num_rollouts: int, cause: BaseException) -> _Answer:
    return _Answer(np.full(num_rollouts, math.nan), dict.fromkeys(range(num_rollouts), cause))


def _rollout_met_by(error: BaseException) -> Rollout | None:
    """The rollout a plugin was at when it raised, read off the variables of the innermost frame
    that holds one; a batch cannot be repeated piecewise to find it, for it may cost money."""
    found: Rollout | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        local = [value for value in frame.f_locals.values() if isinstance(value, Rollout)]
        found = local[-1] if local else found
    return found


def _describe(rollout: Rollout) -> str:
    prompt, completion = rollout.prompt.example.text, rollout.completion
    return (
        f"a rollout of group {rollout.group_id}, prompt {_shorten(prompt)!r}, "
        f"completion {_shorten(completion)!r}"
    )


def _shorten(text: str, length: int = 60) -> str:
    """The text's beginning and end, on one line."""
    text = " ".join(text.split())
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"
