"""A run whose processes Ray places and starts again, by Ray Train's TorchTrainer.

The driver is the process that a user started: it takes no part in the run, prints what the others say,
tells them of an interrupt, and meets the error that the run ended in.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TextIO, TypeVar, cast

from pgrpo.errors import ParallelError, PgrpoError
from pgrpo.on_ray import ray
from pgrpo.runs.terminal import InterruptedRunError, discard_output, interrupt

T = TypeVar("T")

_log = logging.getLogger("pgrpo")

_LAST_S = 10.0
"""How long is waited for the end of a run that nothing is heard of any more."""


def run_on_ray(
    work: Callable[[], T], *, num_workers: int, num_cpus: int, max_failures: int, timeout_s: float
) -> T:
    """Do the same on several processes of Ray's, which torch.distributed connects; where one of them is
    lost, once more on new ones.

    Args:
        work: what each process does, in the driver's working directory.
        num_workers: how many processes there are.
        num_cpus: how many processors each has for itself. Where there are as many GPUs as processes,
            each has a GPU.
        max_failures: how often the processes may be started again.
        timeout_s: how long they wait for each other.

    Returns:
        What the first process makes.

    Raises:
        PgrpoError: what `work` raised on all processes.
        InterruptedRunError: the same, after a signal.
        ParallelError: the processes were lost more often than `max_failures`.
    """
    # Ray Train would print what the processes say once more, and have each in a folder of its own.
    os.environ |= {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    module, train, torch = ray(), ray("ray.train"), ray("ray.train.torch")
    wanted, found = num_workers * num_cpus, module.cluster_resources().get("CPU", 0)
    if found < wanted:
        _log.warning("Ray has %d processors, and the run waits for %d", found, wanted)
    on_gpus = module.cluster_resources().get("GPU", 0) >= num_workers
    # The desk is as safe as the driver on whose machine it is.
    here = ray("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy(
        module.get_runtime_context().get_node_id(), soft=False
    )
    desk = module.remote(num_cpus=0, scheduling_strategy=here)(_Desk).remote()
    folder = Path.cwd()

    def part() -> Any:
        return _take_part(work, desk, folder)

    with TemporaryDirectory(prefix="pgrpo-") as kept:
        # Checkpoints are ours, so nothing is ever kept there; the default is a folder in HOME.
        trainer = torch.TorchTrainer(
            part,
            torch_config=torch.TorchConfig(
                backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo",
                timeout_s=math.ceil(timeout_s),
            ),
            scaling_config=train.ScalingConfig(
                num_workers=num_workers, use_gpu=on_gpus, resources_per_worker={"CPU": num_cpus}
            ),
            run_config=train.RunConfig(
                storage_path=kept, failure_config=train.FailureConfig(max_failures=max_failures)
            ),
        )
        # Elsewhere than in the main thread, where Ray Train would take Ctrl-C over.
        ending = _in_thread(trainer.fit)
        try:
            try:
                _attend(desk, ending)
            except module.exceptions.RayError:
                # What took the desk may have ended the run, whose own error says more.
                if not wait([ending], timeout=_LAST_S).done:
                    raise
            outcome = cast(_Outcome, ending.result().return_value)
        except (train.TrainingFailedError, module.exceptions.RayError) as error:
            raise _told(error, max_failures) from error
    if outcome.error is not None:
        raise outcome.error
    return outcome.made


class _Outcome(NamedTuple):
    """What a process's work made, or the error that it ended in and would end in again."""

    made: Any
    error: Exception | None


class _Desk:
    """Between the driver and the processes of a run: an actor, whose calls wait without keeping others
    from theirs."""

    def __init__(self) -> None:
        self._said: list[tuple[bool, str]] = []
        self._taken = 0
        self._news = asyncio.Condition()
        self._interrupted = asyncio.Event()
        self._any_started = False

    async def say(self, text: str, on_stderr: bool) -> None:
        """Note what a process says."""
        async with self._news:
            self._said.append((on_stderr, text))
            self._news.notify_all()

    async def heard(self, start: int, wait_for_some: bool) -> list[tuple[bool, str]]:
        """What was said after the first `start` pieces, none of which is asked for again; where there
        is nothing, it is waited for or not."""
        async with self._news:
            if wait_for_some:
                await self._news.wait_for(lambda: self._taken + len(self._said) > start)
            if start > self._taken:
                del self._said[: start - self._taken]
                self._taken = start
            return list(self._said)

    async def interrupt(self) -> bool:
        """Have all processes interrupted; whether any has started yet."""
        self._interrupted.set()
        return self._any_started

    async def interrupted(self) -> None:
        """Return once they are to be."""
        self._any_started = True
        await self._interrupted.wait()


class _Voice:
    """A stream whose text the driver prints.

    Args:
        desk: the actor that takes it.
        on_stderr: whether the driver prints it there.
    """

    encoding = "utf-8"

    def __init__(self, desk: Any, on_stderr: bool) -> None:
        self._desk = desk
        self._on_stderr = on_stderr

    def write(self, text: str) -> int:
        """Send it."""
        if text:
            self._desk.say.remote(text, self._on_stderr)
        return len(text)

    def flush(self) -> None:
        """Everything was sent as it was written."""

    def isatty(self) -> bool:
        """It is none, so no table is redrawn."""
        return False


def _take_part(work: Callable[[], Any], desk: Any, folder: Path) -> _Outcome:
    """One process's work, on Ray."""
    os.chdir(folder)
    module = ray()

    def wait_for_interrupt() -> None:
        try:
            module.get(desk.interrupted.remote())
        except module.exceptions.RayError:
            return  # the driver is gone, and Ray ends what it started
        interrupt()

    threading.Thread(target=wait_for_interrupt, daemon=True).start()
    with (
        redirect_stdout(cast(TextIO, _Voice(desk, on_stderr=False))),
        redirect_stderr(cast(TextIO, _Voice(desk, on_stderr=True))),
    ):
        # Ray Train has the root's handlers write to its own logs.
        _log.addHandler(handler := logging.StreamHandler())
        handler.setFormatter(logging.Formatter("pgrpo: %(message)s"))
        try:
            return _Outcome(work(), None)
        except (PgrpoError, InterruptedRunError) as error:
            # Another attempt may find what this one lost; anything else would come again.
            if isinstance(error, ParallelError) and str(error):
                raise
            return _Outcome(None, error)
        finally:
            # Calls are answered in their order, so all before it are with the driver.
            module.get(desk.say.remote("", False))


def _attend(desk: Any, ending: Future[Any]) -> None:
    """Print what the processes say until the run has ended, and tell them of an interrupt; at a second
    one nobody waits for them."""
    interrupted = False
    count = 0
    while True:
        try:
            ended = ending.done()
            said: Future[list[tuple[bool, str]]] = desk.heard.remote(count, not ended).future()
            wait([said] if ended else [said, ending], return_when=FIRST_COMPLETED)
            if not said.done():
                continue
            for on_stderr, text in said.result():
                count += 1
                _print(text, sys.stderr if on_stderr else sys.stdout)
            if ended:
                return
        except KeyboardInterrupt:
            # A cluster without a place for the processes would be waited for.
            if interrupted or not ray().get(desk.interrupt.remote()):
                raise
            interrupted = True


def _print(text: str, stream: TextIO) -> None:
    try:
        print(text, end="", file=stream, flush=True)
    except BrokenPipeError:
        # That nobody reads any more ends no run.
        discard_output()


def _in_thread(call: Callable[[], T]) -> Future[T]:
    """A call in a daemon thread, which does not keep the driver from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _told(error: Exception, max_failures: int) -> ParallelError:
    """Why Ray Train gave up, in a sentence."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    # Of a process that is killed the others only know that it is lost.
    ranks = sorted(failures, key=lambda rank: (isinstance(failures[rank], ParallelError), rank))
    cause = failures[ranks[0]] if ranks else error
    said = " ".join(str(cause).split())[:300]
    sentence = said if isinstance(cause, PgrpoError) else f"{type(cause).__name__}: {said}"
    which = f"rank {ranks[0]}: " if ranks else ""
    return ParallelError(
        f"the run was given up after --max-failures {max_failures}: {which}{sentence}"
    )
