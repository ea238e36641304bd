"""vLLM servers that Ray places on the machines of a cluster, and starts again when they die."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pgrpo.config.checks import api_key
from pgrpo.errors import EngineError
from pgrpo.on_ray import ray
from pgrpo.rollout.engines.vllm.launch import serve_command

if TYPE_CHECKING:
    from pgrpo.config.sections import ModelConfig
    from pgrpo.rollout.settings import GenerationConfig

_ATTEMPTS = 3
"""How often in a row a server may die before it has kept up: the one before it may hold its memory
for a while."""
_KEPT_UP_S = 60.0
"""How long a server answers until it counts as one that keeps up."""
_POLL_S = 0.5
_FREE_S = 60.0
"""How long the port of a server that was lost may be taken by what is left of it."""

_AT_ONCE = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks a server without the proxy of the environment, which is for addresses elsewhere."""

_WATCHER = """
import contextlib, os, signal, sys
if os.fork():
    os._exit(0)
sys.stdin.read()
with contextlib.suppress(ProcessLookupError):
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
"""
"""Ends a server with all its processes, which would keep port and memory, when the pipe from its actor
closes, however that was lost. By the fork it is no child of the actor, for Ray ends those."""


def serve_on_ray(
    generation: GenerationConfig,
    model: ModelConfig,
    num_servers: int,
    say: Callable[[str], None],
) -> NoReturn:
    """Keep so many servers up until an interrupt.

    A server that dies is started again, by a new actor where its own is lost, on the same machine and
    port, so that runs that use it find it; where the machine is lost, on another one.

    Args:
        generation: the section `[generation]`.
        model: the section `[model]`.
        num_servers: how many.
        say: is told of servers that die, and, when all answer, of the setting with their addresses,
            wherever it has changed.

    Raises:
        PgrpoError: a server cannot be started, or keeps dying within a minute after it answers.
    """
    servers = [_Server(generation, model, say) for _ in range(num_servers)]
    told: list[str] = []
    while True:
        awaited = {server.next: server for server in servers}
        for reference in ray().wait(list(awaited), num_returns=1)[0]:
            awaited[reference].go_on()
        urls = [server.url for server in servers if server.is_up]
        if len(urls) == num_servers and urls != told:
            say(f"generation.vllm.servers={json.dumps(urls)}")
            told = urls


class _Place(NamedTuple):
    """Where a server is."""

    node: str
    address: str
    port: int


class _Server:
    """One server, as the process sees it that keeps all of them up; it is started at once."""

    def __init__(
        self, generation: GenerationConfig, model: ModelConfig, say: Callable[[str], None]
    ) -> None:
        self._arguments = generation, model, api_key(generation.vllm.api_key_env)
        self._say = say
        options = generation.vllm
        self._num_gpus = options.tensor_parallel_size * options.data_parallel_size
        self._place: _Place | None = None
        self._attempts = 0
        self._actor: Any = None
        self._end: Any = None
        self.next: Any = None
        """Reference to what comes next of it: that it answers, then that it ends."""
        self.is_up = False
        """Whether it answers."""
        self._up_since = 0.0
        self._start()

    @property
    def url(self) -> str:
        """Where it answers."""
        assert self._place is not None
        return f"http://{self._place.address}:{self._place.port}"

    def go_on(self) -> None:
        """Take notice of what has come.

        Raises:
            PgrpoError: it cannot be started, or keeps dying within a minute after it answers.
        """
        module = ray()
        if self.is_up:
            if time.monotonic() - self._up_since >= _KEPT_UP_S:
                self._attempts = 0
        else:
            try:
                place: _Place | None = module.get(self.next)
            except module.exceptions.RayTaskError as error:
                raise error.cause from error
            except module.exceptions.RayError:
                place = None
            if place is not None:
                self._place, self._up_since = place, time.monotonic()
                self.next, self.is_up = self._end, True
                return
        if self._attempts == _ATTEMPTS:
            raise EngineError(
                f"a vLLM server {self._how_it_ended()} before it had answered for {_KEPT_UP_S:g} s, "
                f"{_ATTEMPTS} times in a row; the logs of Ray's _Process say why"
            )
        if self.is_up:
            self._say(f"{self.url} {self._how_it_ended()}; starting it again")
        self._start()

    def _start(self) -> None:
        """Start it, where it was if it was anywhere."""
        module = ray()
        if self._actor is not None:
            module.kill(self._actor)
        strategy: Any = "SPREAD"
        alive = {node["NodeID"] for node in module.nodes() if node["Alive"]}
        if self._place is not None and self._place.node in alive:
            strategies = ray("ray.util.scheduling_strategies")
            strategy = strategies.NodeAffinitySchedulingStrategy(self._place.node, soft=False)
        else:
            self._place = None
        on_gpus = module.cluster_resources().get("GPU", 0) > 0
        self._actor = module.remote(
            num_cpus=0,
            num_gpus=self._num_gpus if on_gpus else 0,
            scheduling_strategy=strategy,
        )(_Process).remote()
        self._attempts += 1
        self.next = self._actor.start.remote(*self._arguments, self._place)
        self._end = self._actor.end.remote()
        self.is_up = False

    def _how_it_ended(self) -> str:
        """In words."""
        module = ray()
        try:
            return f"ended with code {module.get(self._end)}"
        except module.exceptions.RayError:
            return "was lost"


class _Process:
    """An actor that has a server as its child."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    def start(
        self,
        generation: GenerationConfig,
        model: ModelConfig,
        key: str | None,
        place: _Place | None,
    ) -> _Place | None:
        """Start the server, and return where it is when it answers; None where it ended before."""
        if key is not None:
            os.environ[generation.vllm.api_key_env] = key
        module = ray()
        if place is None:
            address = ray("ray.util").get_node_ip_address()
            with socket.socket() as free:
                free.bind((address, 0))
                port = free.getsockname()[1]
            place = _Place(module.get_runtime_context().get_node_id(), address, port)
        _wait_until_free(place)
        command, environment = serve_command(generation, model, host=place.address, port=place.port)
        self._server = subprocess.Popen(command, env=environment, start_new_session=True)
        watcher = [sys.executable, "-c", _WATCHER, str(self._server.pid)]
        self._watcher = subprocess.Popen(watcher, stdin=subprocess.PIPE, start_new_session=True)
        while self._server.poll() is None:
            try:
                with _AT_ONCE.open(f"http://{place.address}:{place.port}/health", timeout=5):
                    return place
            except (OSError, HTTPException):
                time.sleep(_POLL_S)
        return None

    def end(self) -> int | None:
        """The server's exit code, when it ends; None where none was started."""
        if self._server is None or self._watcher is None:
            return None
        code = self._server.wait()
        self._watcher.communicate()
        return code


def _wait_until_free(place: _Place) -> None:
    until = time.monotonic() + _FREE_S
    while time.monotonic() < until:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((place.address, place.port))
            except OSError:
                time.sleep(_POLL_S)
            else:
                return
