"""A run on one process or on several: who does what, what all are told, how weights lie on them.

`torchrun` starts the processes, torch.distributed carries what they tell each other, and FSDP2 splits
the weights (`LanguageModel.shard`). Every rank builds the same parts from the same config and takes
whole groups; what it makes of them is told to all in the order of the groups, so histories, decisions
and logs are the same on every rank, and the same as on one. Nobody else asks for a rank.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pgrpo.config.sections import ParallelConfig
from pgrpo.errors import ConfigError, ParallelError, PgrpoError, RemoteError
from pgrpo.model.language_model import device_type
from pgrpo.rollout.engines import Peers
from pgrpo.runs.launch import num_processes, num_restarts
from pgrpo.runs.terminal import held, take_interrupt

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Ranks(Peers, Protocol):
    """The processes of a run.

    All of them make the same calls in the same order. What fails on one of them fails on all, so that
    they stop or go on together.
    """

    def share(self, costs: Sequence[float]) -> range:
        """Which of these things are this process's: consecutive ones, of about the same cost as any
        other process's."""
        ...

    def alone(self, make: Callable[[], AbstractContextManager[T]]) -> AbstractContextManager[T]:
        """A context that only the one that writes enters. What the others get must not be used."""
        ...

    def heed(self) -> None:
        """Raise KeyboardInterrupt on all if one was told to end."""
        ...

    def agrees(self, error: BaseException) -> bool:
        """Whether all processes met this error, so that they may go on to save together."""
        ...

    def beside(self) -> Ranks:
        """The same processes, for another thread's calls."""
        ...

    @property
    def mesh(self) -> DeviceMesh | None:
        """What models' weights are split over, [replicate, shard]; None where they are whole. All
        processes ask for it at the same time."""
        ...


class Single:
    """A run of one process."""

    size = 1
    leads = True
    mesh = None

    def share(self, costs: Sequence[float]) -> range:
        """See `Ranks.share`."""
        return range(len(costs))

    def gather(self, make: Callable[[], Sequence[T]]) -> list[T]:
        """See `Peers.gather`."""
        return list(make())

    def first(self, make: Callable[[], T]) -> T:
        """See `Peers.first`."""
        return make()

    def alone(self, make: Callable[[], AbstractContextManager[T]]) -> AbstractContextManager[T]:
        """See `Ranks.alone`."""
        return make()

    def heed(self) -> None:
        """See `Ranks.heed`. Signals raise where the process is."""

    def agrees(self, error: BaseException) -> bool:
        """See `Ranks.agrees`."""
        return True

    def beside(self) -> Single:
        """See `Ranks.beside`."""
        return self


SINGLE = Single()


class Sharded:
    """One of several processes, which torch.distributed connects.

    Args:
        config: the section `[parallel]`.
        agreed: the errors that all processes met; those that are beside each other share them.
    """

    def __init__(self, config: ParallelConfig, agreed: list[BaseException] | None = None) -> None:
        self._config = config
        self._timeout = timedelta(seconds=config.timeout_s)
        self._rank, self.size = dist.get_rank(), dist.get_world_size()
        # What is told is told through the processors, whatever carries gradients.
        self._group: Any = dist.new_group(backend="gloo", timeout=self._timeout)
        self._agreed: list[BaseException] = [] if agreed is None else agreed
        self._mesh: DeviceMesh | None = None
        self.leads = self._rank == 0

    def share(self, costs: Sequence[float]) -> range:
        """See `Ranks.share`."""
        ends = np.cumsum([0.0, *costs])
        cuts = np.searchsorted(ends, ends[-1] * np.arange(self.size + 1) / self.size)
        # Things without cost at the end belong to the last.
        cuts[-1] = len(costs)
        return range(int(cuts[self._rank]), int(cuts[self._rank + 1]))

    def gather(self, make: Callable[[], Sequence[T]]) -> list[T]:
        """See `Peers.gather`."""
        outcomes: list[Any] = [None] * self.size
        mine = _outcome(make)
        dist.all_gather_object(outcomes, mine.told(), group=self._group)
        self._raise_together(mine, outcomes)
        return [thing for made, _ in outcomes for thing in made]

    def first(self, make: Callable[[], T]) -> T:
        """See `Peers.first`."""
        mine = _outcome(make) if self.leads else _Outcome(None, None)
        told = [mine.told()]
        dist.broadcast_object_list(told, src=0, group=self._group)
        self._raise_together(mine, told)
        return cast(T, mine.made if self.leads else told[0][0])

    @contextmanager
    def alone(self, make: Callable[[], AbstractContextManager[T]]) -> Generator[T]:
        """See `Ranks.alone`."""
        opened = ExitStack()
        entered: list[T] = []
        self.first(lambda: entered.append(opened.enter_context(make())))
        try:
            yield cast(T, entered[0] if entered else None)
        except BaseException as error:
            if not opened.__exit__(type(error), error, error.__traceback__):
                raise
        else:
            self.first(opened.close)

    def heed(self) -> None:
        """See `Ranks.heed`."""
        if any(self.gather(lambda: [take_interrupt()])):
            self._agreed.append(KeyboardInterrupt())
            raise self._agreed[-1]

    def agrees(self, error: BaseException) -> bool:
        """See `Ranks.agrees`."""
        return any(error is each for each in self._agreed)

    def beside(self) -> Sharded:
        """See `Ranks.beside`."""
        return Sharded(self._config, self._agreed)

    @property
    def mesh(self) -> DeviceMesh:
        """See `Ranks.mesh`."""
        if self._mesh is None:
            from torch.distributed.device_mesh import DeviceMesh

            grid = torch.arange(self.size).view(self._config.replicate, -1)
            # A mesh that makes its groups itself has them wait for ten or thirty minutes.
            groups: list[Any] = [
                dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=self._timeout)[0]
                for ranks in (grid.T, grid)
            ]
            self._mesh = DeviceMesh.from_group(
                groups, device_type(), mesh=grid, mesh_dim_names=("replicate", "shard")
            )
        return self._mesh

    def _raise_together(self, mine: _Outcome, told: Sequence[tuple[Any, _Said | None]]) -> None:
        """Raise an error on every rank if there is one on any: that of the first rank that has a
        sentence, or else any."""
        found = [(n, said) for n, (_, said) in enumerate(told) if said is not None]
        if not found:
            return
        # Whoever only lost the others, or did not understand an error, has less to tell.
        rank, said = min(found, key=lambda each: (not each[1].is_sentence, each[0]))
        error = mine.error
        if rank != self._rank or error is None:
            error = said.kind(f"rank {rank}: {said.sentence}")
            error.__cause__ = RemoteError(said.traceback)
        if not self.leads and isinstance(error, PgrpoError):
            # The process that leads tells of it.
            error = ParallelError("")
        self._agreed.append(error)
        raise error


class _Said(NamedTuple):
    """An error as other processes are told of it."""

    kind: type[Exception]
    sentence: str
    traceback: str

    @property
    def is_sentence(self) -> bool:
        """Whether it is one of ours, and not of a lost process."""
        return issubclass(self.kind, PgrpoError) and not issubclass(self.kind, ParallelError)


class _Outcome:
    """What a call made, or the error that it ended in."""

    def __init__(self, made: Any, error: Exception | None) -> None:
        self.made = made
        self.error = error

    def told(self) -> tuple[Any, _Said | None]:
        """What others are told of it."""
        error = self.error
        if error is None:
            return self.made, None
        where = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        if isinstance(error, PgrpoError):
            return None, _Said(type(error), str(error), where)
        return None, _Said(RuntimeError, f"{type(error).__name__}: {error}", where)


def _outcome(make: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(make(), None)
    except Exception as error:
        return _Outcome(None, error)


@contextmanager
def _lost(what: str) -> Generator[None]:
    """What torch.distributed says of processes that do not answer, as a ParallelError about `what`."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no class of their own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise ParallelError(f"{what}: {reason[:300]}") from error


@contextmanager
def connect(config: ParallelConfig) -> Generator[Ranks]:
    """The processes of this run: those that torchrun started (or whoever sets RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT as it does), those that are connected already, as Ray Train's are, or
    this one alone.

    Raises:
        ConfigError: there are not as many processes as the config's copies of the weights need, or
            nothing to offload from.
        ParallelError: they do not find each other.
    """
    size = num_processes()
    if size == 1:
        yield SINGLE
        return
    if config.offload and not torch.cuda.is_available():
        raise ConfigError(
            "parallel.offload moves weights from GPUs to the memory of the processors; there is no GPU"
        )
    if size % config.replicate:
        raise ConfigError(
            f"parallel.replicate is {config.replicate}, and there are {size} processes; expected a "
            "multiple of it"
        )
    is_connected = dist.is_initialized()
    if not is_connected:
        _initialize(config)
    # A signal is heard between two steps, by all at once: one that left in the middle of a step would
    # leave the others waiting.
    with held(), _lost("another process of the run is lost"):
        yield Sharded(config)
    if not is_connected:
        dist.destroy_process_group()


def _initialize(config: ParallelConfig) -> None:
    """Connect the processes as their environment says."""
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _lost("the processes do not find each other"):
        timeout = timedelta(seconds=config.timeout_s)
        found, rank, size = next(rendezvous("env://", timeout=timeout))
        # torchrun may keep the store when it starts processes again, and it holds the old addresses.
        store = PrefixStore(f"attempt {num_restarts()}", found)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
