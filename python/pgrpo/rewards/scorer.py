"""Calls the reward plugins while rollouts are still being generated, and survives them.

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
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_result,
    stop_after_attempt,
    wait_chain,
    wait_fixed,
)

from pgrpo.config.sections import RewardConfig, reward_names
from pgrpo.errors import PgrpoError, PluginError, UnreadableError
from pgrpo.plugins.hookspecs import Reward
from pgrpo.types import FloatArray, Group, Rollout, split_by_group

_log = logging.getLogger("pgrpo")

_CLOSE_S = 1.0
"""How long closing an event loop waits for calls that were told to stop."""


_ANSWERS = 64
"""Fewer answers tell little of a share: of ten, a single unreadable one would be a tenth."""


class Scorer:
    """Scores rollouts by the weighted sum of several rewards.

    Each group goes to all rewards with `batch` "group" as soon as it is there; those with "step" are
    called at the end, with everything. At most `num_workers` calls of a reward are under way; the
    others wait, and only then does their time start. A sync reward gets a thread per call, an async
    one an event loop of its own that lives as long as the scorer. Threads are daemons, so a plugin
    that hangs for ever does not keep the process from ending. A call that hangs is left to itself
    and its place is given away, so a retry, too, runs beside it.

    Args:
        rewards: each reward's section (weight, timeout_s, on_error, ...) and the reward itself.
        pauses_s: waits before the second, third, ... attempt where on_error is "retry".
        max_waiting: groups that may wait for rewards, or be with them, while a further one is
            pulled. An engine far ahead of its rewards would take the processor from them, and have
            worked in vain when one stops the run.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[RewardConfig, Reward]],
        pauses_s: Sequence[float] = (0.5, 2.0),
        max_waiting: int = 64,
    ) -> None:
        self._interrupted: Future[None] = Future()
        self._pauses_s = tuple(pauses_s)
        self._max_waiting = max_waiting
        self._logged: set[_Worker] = set()
        self._workers = [_Worker(section, reward) for section, reward in rewards]
        self._names = reward_names([section for section, _ in rewards])

    @property
    def weights(self) -> dict[str, float]:
        """Reward -> its factor in the sum, in the order of the config."""
        sections = (worker.section for worker in self._workers)
        return {name: one.weight for name, one in zip(self._names, sections, strict=True)}

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the event loops; a call still under way is cancelled or, if sync, abandoned."""
        for worker in self._workers:
            worker.close()

    def interrupt(self) -> None:
        """Make a `score` that another thread is in end at once, with a CancelledError; so will any
        later one."""
        if not self._interrupted.done():
            self._interrupted.set_exception(CancelledError())

    def score(self, groups: Iterable[Group], step: int | None = None) -> list[Group]:
        """Score groups while this thread pulls them, in whatever order they come.

        A plugin that returns None gives a rollout no reward, which is no error; nor is an
        UnreadableError, while they are no more than `max_unreadable` of a step's answers, or of the
        last 64. Under on_error "no_reward" a failing call leaves its rollouts NaN: all of them where it
        raised, hung or returned another number of rewards, else those with a bad one.

        Args:
            groups: of different group_ids. It is closed at the end if it can be. Whatever ends the
                scoring early also ends the calls under way.
            step: of the training they are for, where rewards have a `shift`; None where they are for
                none, and rewards are as they were before it.

        Returns:
            The groups by group_id, with raw rewards: sum over rewards of weight * reward, NaN where
            one is missing that the rollout's cluster should have; and with the `scores` that they are
            made of. Neither depends on who is faster.

        Raises:
            PluginError: a reward with on_error "fail" or "retry" raised, outlasted timeout_s,
                returned anything but one finite number or None per rollout, or too many
                UnreadableErrors. Chained to the cause.
                No further group is pulled; one that is being pulled is waited for.
        """
        iterator = iter(groups)
        source = closing(cast(Any, iterator)) if hasattr(iterator, "close") else nullcontext()
        # The supervisor takes all that it runs with it when it is closed.
        with source, closing(_EventLoop()) as supervisor:
            places = {w: asyncio.Semaphore(w.section.num_workers) for w in self._workers}
            parts: list[tuple[Group, Future[_Answers]]] = []
            under_way: set[Future[_Answers]] = set()
            for group in iterator:
                call = supervisor.start(self._ask("group", places, group.rollouts))
                parts.append((group, call))
                under_way.add(call)
                self._wait(under_way, at_most=self._max_waiting)
            if not parts:
                return []
            parts.sort(key=lambda part: part[0].group_id)
            scored = [group for group, _ in parts]
            rollouts = [rollout for group in scored for rollout in group.rollouts]
            call = supervisor.start(self._ask("step", places, tuple(rollouts)))
            self._wait(under_way | {call}, at_most=0)
            by_step, by_group = call.result(), [call.result() for _, call in parts]

        total = np.zeros(len(rollouts))
        scores: dict[str, list[FloatArray]] = {}
        # In the order of the config, for floating-point sums depend on it.
        for name, worker in zip(self._names, self._workers, strict=True):
            answers = [by_step[worker]] if worker in by_step else [a[worker] for a in by_group]
            self._check_unreadable(worker, rollouts, answers)
            given = _shifted(np.concatenate([a.rewards for a in answers]), worker.section, step)
            wanted = np.array([worker.scores(rollout) for rollout in rollouts])
            total += worker.section.weight * np.where(wanted, given, 0.0)
            scores[name] = split_by_group(given, scored)
        return [
            replace(group, rewards=r, scores={name: parts[place] for name, parts in scores.items()})
            for place, (group, r) in enumerate(
                zip(scored, split_by_group(total, scored), strict=True)
            )
        ]

    def _wait(self, calls: set[Future[_Answers]], *, at_most: int) -> None:
        """Take out calls that are done until so few are left; raise what one of them raised."""
        while True:
            enough = len(calls) <= at_most
            done, _ = wait(
                cast(set[Future[Any]], {*calls, self._interrupted}),
                timeout=0 if enough else None,
                return_when=FIRST_COMPLETED,
            )
            for call in done:
                call.result()
            calls -= done
            if enough:
                return

    async def _ask(
        self, batch: str, places: Mapping[_Worker, asyncio.Semaphore], rollouts: Sequence[Rollout]
    ) -> _Answers:
        """Call all rewards that want such a batch."""
        workers = [worker for worker in self._workers if worker.section.batch == batch]
        calls = [self._ask_one(worker, places[worker], rollouts) for worker in workers]
        return dict(zip(workers, await asyncio.gather(*calls), strict=True))

    async def _ask_one(
        self, worker: _Worker, places: asyncio.Semaphore, rollouts: Sequence[Rollout]
    ) -> _Answer:
        """Call one reward on the rollouts that it scores, as often as its policy wants it."""
        scored = [place for place, rollout in enumerate(rollouts) if worker.scores(rollout)]
        rewards = np.full(len(rollouts), math.nan)
        if not scored:
            return _Answer(rewards, {})
        rollouts = [rollouts[place] for place in scored]
        attempt = worker.call
        if worker.section.on_error == "retry":
            # No place is kept during a pause: other groups go on.
            attempt = AsyncRetrying(
                retry=retry_if_result(
                    lambda answer: any(map(_is_failure, answer.failures.values()))
                ),
                wait=wait_chain(*map(wait_fixed, self._pauses_s)),
                stop=stop_after_attempt(1 + len(self._pauses_s)),
                retry_error_callback=_last_answer,
            ).wraps(worker.call)
        answer = await attempt(rollouts, places)
        no_reward = worker.section.on_error == "no_reward"
        failures = {i: e for i, e in answer.failures.items() if no_reward or _is_failure(e)}
        if failures:
            self._apply_policy(worker, rollouts, failures)
        rewards[scored] = answer.rewards
        unreadable = answer.failures.items() - failures.items()
        return _Answer(rewards, {scored[index]: cause for index, cause in unreadable})

    def _apply_policy(
        self, worker: _Worker, rollouts: Sequence[Rollout], failures: dict[int, BaseException]
    ) -> None:
        """Raise, or note that some rollouts go without."""
        index, cause = next(iter(failures.items()))
        rollout, extent = rollout_met_by(cause) or rollouts[index], ""
        if len(failures) == len(rollouts) > 1:
            extent = f", in a batch of {len(rollouts)} rollouts"
        message = _failed(worker, rollout, cause, extent)
        if worker.section.on_error != "no_reward":
            raise PluginError(message) from cause
        self._warn(worker, message, len(failures))

    def _check_unreadable(
        self, worker: _Worker, rollouts: Sequence[Rollout], answers: Sequence[_Answer]
    ) -> None:
        """Note that some rollouts of a step go without a reward that could not be read; raise where
        they are too many."""
        causes: dict[int, BaseException] = {}
        start = 0
        for answer in answers:
            causes |= {start + index: cause for index, cause in answer.failures.items()}
            start += len(answer.rewards)
        worker.count(len(causes), sum(map(worker.scores, rollouts)))
        if not causes:
            return
        first = min(causes)
        message = _failed(worker, rollouts[first], causes[first])
        limit = worker.section.max_unreadable
        num_unreadable, num_scored = map(sum, zip(*worker.answered, strict=True))
        if num_unreadable > limit * max(num_scored, _ANSWERS):
            raise PluginError(
                f"{message} ({num_unreadable} of the last {num_scored} answers could not be read, "
                f"which is too many for max_unreadable = {limit:g})"
            ) from causes[first]
        self._warn(worker, message, len(causes))

    def _warn(self, worker: _Worker, message: str, num_unrewarded: int) -> None:
        if worker not in self._logged:
            self._logged.add(worker)
            _log.warning("%s (%d unrewarded; not logged again)", message, num_unrewarded)


def _shifted(rewards: FloatArray, section: RewardConfig, step: int | None) -> FloatArray:
    shift = section.shift
    if shift is None or step is None or step <= shift.after:
        return rewards
    return shift.scale * rewards + shift.offset


def _is_failure(error: BaseException) -> bool:
    """Whether `on_error` says what happens now."""
    return not isinstance(error, UnreadableError)


def _failed(worker: _Worker, rollout: Rollout, cause: BaseException, extent: str = "") -> str:
    reason = str(cause) if isinstance(cause, PgrpoError) else f"{type(cause).__name__}: {cause}"
    return f"reward {worker.section.name!r} failed on {_describe(rollout)}{extent}: {reason}"


def _last_answer(state: RetryCallState) -> _Answer:
    assert state.outcome is not None
    return cast(_Answer, state.outcome.result())


class _Answer(NamedTuple):
    """What came of a call."""

    rewards: FloatArray
    """[N] NaN where there is none."""
    failures: dict[int, BaseException]
    """Place in the batch -> what went wrong there; of the scorer's own answers only what `on_error`
    has nothing to say about, which is what could not be read."""


class _Worker:
    """Where one reward runs."""

    def __init__(self, section: RewardConfig, reward: Reward) -> None:
        self.section = section
        self._reward = reward
        is_async = any(map(inspect.iscoroutinefunction, (reward, reward.__call__)))
        self._failed = False
        self._loop = _EventLoop(self._left_behind) if is_async else None
        self.answered: list[tuple[int, int]] = []
        self._clusters = {str(cluster) for cluster in section.clusters}

    def count(self, num_unreadable: int, num_scored: int) -> None:
        """Note a step's answers, and forget earlier steps as soon as later ones have _ANSWERS."""
        self.answered.append((num_unreadable, num_scored))
        while sum(scored for _, scored in self.answered[1:]) >= _ANSWERS:
            del self.answered[0]

    def scores(self, rollout: Rollout) -> bool:
        """Whether the rollout is of a cluster that this reward is for."""
        return not self._clusters or str(rollout.prompt.cluster_id) in self._clusters

    async def call(self, rollouts: Sequence[Rollout], places: asyncio.Semaphore) -> _Answer:
        """Call the reward when there is a place, and wait for its answer until its time is over."""
        # On Ray it begins when a process is ready, which may have to be started again.
        timeout_s = self.section.timeout_s if self.section.workers == "threads" else None
        async with places:
            if self._loop is None:
                future = _run_in_thread(self._reward, rollouts)
            else:
                future = self._loop.start(_run_in_loop(self._reward, rollouts))
            try:
                answer = await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
            except asyncio.TimeoutError:
                cause = TimeoutError(f"no answer within timeout_s = {self.section.timeout_s:g}")
                answer = _all_failed(len(rollouts), cause)
            self._failed |= bool(answer.failures)
            return answer

    def _left_behind(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What went wrong in a task that the reward started and did not wait for: nothing to be told
        where a call of it has failed, for then that has been told."""
        level = logging.DEBUG if self._failed else logging.WARNING
        what = context.get("exception") or context.get("message")
        _log.log(level, "reward %r left a task behind that failed: %r", self.section.name, what)

    def close(self) -> None:
        """Cancel what runs in the event loop, and end it."""
        if self._loop is not None:
            self._loop.close()


_Answers = dict[_Worker, _Answer]


class _EventLoop:
    """An event loop in a daemon thread; `handler` gets what nobody waits for."""

    def __init__(
        self,
        handler: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None] | None = None,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(handler)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run it there; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what runs there, and end."""
        if not self._thread.is_alive():
            return
        self.start(_stop_loop())
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


def _run_in_thread(reward: Reward, rollouts: Sequence[Rollout]) -> Future[_Answer]:
    """Call in a daemon thread, which an executor cannot offer: it would join a hung one at exit."""
    future: Future[_Answer] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            answer = _check(reward(rollouts), len(rollouts))
        except BaseException as error:  # StopIteration, too, which no event loop would take over
            answer = _all_failed(len(rollouts), error)
        future.set_result(answer)

    threading.Thread(target=run, daemon=True).start()
    return future


async def _run_in_loop(reward: Reward, rollouts: Sequence[Rollout]) -> _Answer:
    try:
        return _check(await cast(Awaitable[object], reward(rollouts)), len(rollouts))
    except asyncio.CancelledError:
        return _all_failed(len(rollouts), RuntimeError("the call cancelled itself"))
    except BaseException as error:  # sys.exit() would end the event loop
        return _all_failed(len(rollouts), error)


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
        if getattr(entry, "ndim", None) == 0:
            # A scalar of torch or NumPy.
            entry = cast(Any, entry).item()  # noqa: PLW2901
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


def rollout_met_by(error: BaseException) -> Rollout | None:
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
