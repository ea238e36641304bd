"""A reward whose calls are answered by processes of a Ray cluster, on whichever machines they are."""

from __future__ import annotations

import asyncio
import inspect
import logging
import pickle
import traceback
from collections.abc import Awaitable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn

from pgrpo.config.sections import RewardConfig
from pgrpo.errors import PluginError, RemoteError
from pgrpo.on_ray import ray
from pgrpo.plugins.hookspecs import Rewards
from pgrpo.rewards.scorer import rollout_met_by
from pgrpo.types import Rollout

_log = logging.getLogger("pgrpo")

_START_S = 600.0
"""How long a process may take until its reward is there, which may load a large model, or wait for a
GPU that others have."""


class RewardOnRay:
    """A reward of `section.num_workers` actors, each of which has one call at a time.

    Each builds the reward by itself, from the plugins that are installed where it is. Where the process
    of a call is lost, or its machine, another one is started, and the call made again by the next that
    is free; when it is lost again, that is an error of the call, for a rollout may be what kills its
    judge. A call that outlasts its `timeout_s` ends with its process. Results do not depend on who
    answers, where the reward is a function of the rollouts.

    Args:
        section: of the reward.
        seed: the run's.

    Raises:
        PgrpoError: the reward cannot be built there.
    """

    def __init__(self, section: RewardConfig, seed: int) -> None:
        self._section = section
        self._seed = seed
        self._is_closed = False
        self._ray = ray()
        wanted = section.num_workers * section.num_gpus
        free = self._ray.available_resources().get("GPU", 0)
        if free < wanted:
            _log.warning(
                "Ray has %g GPUs free, and reward %s waits for %g", free, section.name, wanted
            )
        self._actor = self._ray.remote(
            # No processors of their own, so that they find a place beside a run that has taken all.
            num_cpus=0,
            num_gpus=section.num_gpus,
            scheduling_strategy="SPREAD",
        )(_Actor)
        self._actors = [self._actor.remote(section, seed) for _ in range(section.num_workers)]
        self._free: SimpleQueue[Any] = SimpleQueue()
        for actor in self._actors:
            self._free.put(actor)
        try:
            for outcome in self._ray.get(
                [actor.build.remote() for actor in self._actors], timeout=_START_S
            ):
                _made(outcome, ())
        except self._ray.exceptions.RayError as error:
            self.close()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise PluginError(
                f"reward {section.name!r} could not be built on Ray: {reason}"
            ) from error
        except BaseException:
            self.close()
            raise

    def __call__(self, rollouts: Sequence[Rollout]) -> Rewards:
        """Score them on whichever process is free.

        Raises:
            TimeoutError: no answer came within `timeout_s`, which begins when the reward is there; or a
                process that replaces another did not have it within ten minutes.
        """
        try:
            return self._call(rollouts)
        except self._ray.exceptions.RayActorError:
            return self._call(rollouts)

    def _call(self, rollouts: Sequence[Rollout]) -> Rewards:
        actor = self._free.get()
        timeout_s = self._section.timeout_s
        late = f"a new process did not have the reward within {_START_S:g} s"
        try:
            _made(self._ray.get(actor.build.remote(), timeout=_START_S), ())
            late = f"no answer within timeout_s = {timeout_s:g}"
            outcome = self._ray.get(actor.score.remote(rollouts), timeout=timeout_s)
        except self._ray.exceptions.RayError as error:
            if not self._is_closed:
                actor = self._replaced(actor)
            if isinstance(error, self._ray.exceptions.GetTimeoutError):
                raise TimeoutError(late) from error
            raise
        finally:
            self._free.put(actor)
        return _made(outcome, rollouts)

    def _replaced(self, actor: Any) -> Any:
        """A new actor in the place of one that is lost, or does not answer."""
        self._ray.kill(actor)
        self._actors[self._actors.index(actor)] = new = self._actor.remote(
            self._section, self._seed
        )
        return new

    def close(self) -> None:
        """End the processes."""
        self._is_closed = True
        for actor in self._actors:
            self._ray.kill(actor)


class _Outcome(NamedTuple):
    """What a call on another process made, or the error that it ended in."""

    made: Any
    error: BaseException | None = None
    traceback: str = ""
    place: int | None = None
    """Of the rollout that it was at."""


class _Actor:
    """One process's reward."""

    def __init__(self, section: RewardConfig, seed: int) -> None:
        self._section = section
        self._seed = seed
        self._reward: Any = None
        self._loop = asyncio.new_event_loop()

    def build(self) -> _Outcome:
        """Build the reward, if it is not there yet."""
        from pgrpo.plugins.registry import load_registry

        try:
            if self._reward is None:
                self._reward = load_registry().reward(self._section, self._seed)
        except Exception as error:
            return _failed(error, ())
        return _Outcome(None)

    def score(self, rollouts: Sequence[Rollout]) -> _Outcome:
        """Call what was built; an async one, in an event loop that lives as long as the process."""
        try:
            made: Any = self._reward(rollouts)
            if inspect.isawaitable(made):
                made = self._loop.run_until_complete(_awaited(made))
            # What others cannot read would be an error of Ray's in the place of an answer.
            pickle.dumps(made)
        except BaseException as error:
            return _failed(error, rollouts)
        return _Outcome(made)


async def _awaited(made: Awaitable[Any]) -> Any:
    return await made


def _failed(error: BaseException, rollouts: Sequence[Rollout]) -> _Outcome:
    """An error as others are told of it."""
    where = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    met = rollout_met_by(error)
    place = next((n for n, rollout in enumerate(rollouts) if rollout is met), None)
    try:
        error = pickle.loads(pickle.dumps(error))  # noqa: S301 - of our own
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return _Outcome(None, error, where, place)


def _made(outcome: _Outcome, rollouts: Sequence[Rollout]) -> Any:
    """What was made, or its error raised anew."""
    if outcome.error is not None:
        outcome.error.__cause__ = RemoteError(outcome.traceback)
        _raise(outcome.error, None if outcome.place is None else rollouts[outcome.place])
    return outcome.made


def _raise(error: BaseException, rollout: Rollout | None) -> NoReturn:
    """Raise an error that was met at a rollout, which the scorer finds among the variables here."""
    raise error
