"""vLLM in processes of its own, spoken to over HTTP.

A server that does not answer, or that has come back without the policy's weights, is tried again for
`generation.vllm.retry_s`, while the others go on; it gets the weights of the last sync before it is
asked for more. Each sample says which weights made it, so none of a server that restarted unnoticed
is used.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch

from pgrpo.errors import EngineError
from pgrpo.rollout.engines.vllm.backend import Completion, Request
from pgrpo.rollout.engines.vllm.clients import RecordedUpdate
from pgrpo.rollout.engines.vllm.launch import (
    LORA_NAME,
    engine_precision,
    folder_of,
    longest_sequence,
    save_adapter,
)
from pgrpo.rollout.engines.vllm.server import Server, ServerClient, Unavailable

if TYPE_CHECKING:
    from pgrpo.config.sections import ModelConfig
    from pgrpo.model.language_model import LanguageModel
    from pgrpo.rollout.engines import Peers
    from pgrpo.rollout.settings import GenerationConfig

_log = logging.getLogger("pgrpo")

Answer = TypeVar("Answer")

_REQUESTS_PER_SERVER = 64
"""With groups of 8 rollouts they fill vLLM's batch of 512."""
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0


class Servers:
    """The backend protocol over `vllm serve` processes.

    Args:
        config: the section `[generation]`.
        model: the policy's model.
        source: the section `[model]`, where it came from.
        peers: the processes of the run, which use the servers together; one of them drives the
            transfer of weights, and tells the others what came of it.
    """

    def __init__(
        self, config: GenerationConfig, model: LanguageModel, source: ModelConfig, peers: Peers
    ) -> None:
        self._options = config.vllm
        self._longest = longest_sequence(config, model.num_positions)
        self._servers = [Server(url, self._options) for url in self._options.servers]
        self.capacity = _REQUESTS_PER_SERVER * len(self._servers)
        self._model = model
        self._peers = peers
        self._has_adapters = source.lora is not None
        self._run = uuid4().hex[:8]
        """Begins every version, so that the weights of another run cannot pass for ours."""
        self._wanted = ""
        """Version of the weights that the policy was last synced with."""
        self._transfer: Any = self._options.transfer
        if self._transfer == "auto":
            self._transfer = "nccl" if model.device.type == "cuda" else "file"
        self._update = RecordedUpdate()
        self._sender: Any = None
        self._adapters = tempfile.TemporaryDirectory(
            prefix="pgrpo-adapters-", dir=folder_of(self._options)
        )
        self._adapter = ""
        """Folder of the newest adapters, which one process has written for all."""
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._results: queue.Queue[tuple[threading.Event, int, list[Completion] | BaseException]]
        self._results = queue.Queue()
        self._abandoned = threading.Event()
        """Set once the requests that were submitted with it are abandoned; later ones have another."""

    def submit(self, key: int, request: Request) -> None:
        """See `Backend.submit`."""
        # Daemons, so that a server that hangs does not keep the process from ending.
        thread = threading.Thread(
            target=self._answer, args=(self._abandoned, key, request), daemon=True
        )
        self._threads = [t for t in self._threads if t.is_alive()]
        self._threads.append(thread)
        thread.start()

    def next(self) -> tuple[int, list[Completion]]:
        """See `Backend.next`."""
        mine = self._abandoned
        while not mine.is_set():
            abandoned, key, result = self._results.get()
            if abandoned.is_set():
                continue
            if isinstance(result, BaseException):
                raise result
            return key, result
        raise EngineError("the requests were abandoned")

    def abandon(self) -> None:
        """See `Backend.abandon`; returns when no server that answers works on them any more, or soon:
        a server that is told to abort them aborts those of other processes too."""
        self.interrupt()
        self._abandoned = threading.Event()
        if not any(thread.is_alive() for thread in self._threads):
            return
        for server in self._servers if self._peers.size == 1 else ():
            if server.version is not None:
                with contextlib.suppress(Unavailable, EngineError):
                    server.post("/abort_requests", {}, is_control=True)
        deadline = time.monotonic() + Server.control_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def interrupt(self) -> None:
        """See `Backend.interrupt`."""
        # Another thread may put a new one in its place meanwhile.
        abandoned = self._abandoned
        abandoned.set()
        # Whoever waits for a result is woken.
        self._results.put((abandoned, 0, []))

    def send_weights(self, version: int) -> int:
        """See `Backend.send_weights`. A server that cannot be reached gets them later, unless there is
        no other."""
        peers = self._peers
        wanted = peers.first(lambda: f"{self._run}-{version}")
        try:
            num_bytes = self._send_adapters(wanted) if self._has_adapters else self._send(wanted)
        except OSError as error:
            raise EngineError(f"weights cannot be written for the servers: {error}") from error
        # Only now: until here there was nothing that could be given to a server under this version.
        self._wanted = wanted
        renewed = peers.first(lambda: self._persist(self._renew_all))
        for server in self._servers:
            if server.url in renewed:
                server.version = server.clean = self._wanted
        for old in Path(self._adapters.name).iterdir():
            if old.name != self._wanted:
                shutil.rmtree(old, ignore_errors=True)
        return num_bytes

    def _send_adapters(self, wanted: str) -> int:
        weights = self._model.weights(keep=self._peers.leads)
        folder = Path(self._adapters.name) / wanted
        num_bytes = self._peers.first(lambda: save_adapter(self._model, weights, folder))
        self._adapter = self._peers.first(lambda: str(folder))
        return num_bytes

    def _send(self, wanted: str) -> int:
        """Send full weights; only the process that leads knows how many bytes they were."""
        peers = self._peers
        peers.first(self._prepare)
        num_bytes = 0
        if not peers.leads:
            from pgrpo.rollout.engines.vllm.sender import take_part

            take_part(self._model.bare)
        elif self._transfer != "file":
            num_bytes = self._sender.send(wanted)
        elif peers.size > 1:
            # Before anything is written: a disk that refuses one process must not leave the others
            # waiting in the midst of the weights.
            self._sender.gather()
        if self._transfer == "file":
            num_bytes = peers.first(lambda: self._sender.send(wanted))
            self._update = peers.first(lambda: self._update)
        return num_bytes

    def _prepare(self) -> None:
        if self._transfer != "file":
            # A send would wait for ever for a server that is not there, or has left the group.
            self._persist(self._check_group)
        if self._sender is None:
            self._sender = self._make_sender()

    def sleep(self) -> None:
        """Nothing, for the memory belongs to other processes."""

    def close(self) -> None:
        """See `Backend.close`."""
        self.abandon()
        if self._sender is not None:
            self._sender.close()
        self._adapters.cleanup()
        for server in self._servers:
            server.close()

    def _answer(self, abandoned: threading.Event, key: int, request: Request) -> None:
        """Have one request answered, by whichever server can."""
        result: list[Completion] | BaseException
        try:
            result = self._persist(lambda: self._ask(request), abandoned)
        except BaseException as error:  # it has to reach the waiting side
            result = error
        self._results.put((abandoned, key, result))

    def _ask(self, request: Request) -> list[Completion]:
        """One attempt: have it answered by the least busy server that has our weights, or else by the
        one that failed longest ago, which gets them first."""
        with self._lock:
            server = min(
                self._servers,
                key=lambda s: (0, s.in_flight) if s.version == self._wanted else (1, s.failed_at),
            )
            server.in_flight += 1
        try:
            self._renew(server)
            completions = server.generate(request, LORA_NAME if self._has_adapters else None)
            if any(completion.version != self._wanted for completion in completions):
                raise Unavailable(f"{server.url} has lost the policy's weights")
        except Unavailable as failure:
            self._note_failure(server, failure)
            raise
        finally:
            with self._lock:
                server.in_flight -= 1
        return [replace(completion, version=None) for completion in completions]

    def _note_failure(self, server: Server, failure: Unavailable) -> None:
        """Note that a server is to be given our weights again before it is asked for more.

        Even where the network alone failed: it has them only if it says so.
        """
        with self._lock:
            server.version, server.failed_at = None, time.monotonic()
            news, server.is_reported = not server.is_reported, True
        if news:
            others = sum(s.version == self._wanted for s in self._servers)
            _log.warning(
                "%s; %s", failure, "going on with the other servers" if others else "trying again"
            )

    def _make_sender(self) -> Any:
        try:
            from pgrpo.rollout.engines.vllm.sender import WeightSender
        except ImportError as error:
            raise EngineError(
                f"full weights are sent by vLLM's own means, which cannot be imported ({error}); "
                "install them with pip install 'pgrpo[vllm]'"
            ) from error
        precision = engine_precision(self._options, self._model.precision)
        clients = (
            [self._update] if self._transfer == "file" else [*map(ServerClient, self._servers)]
        )
        return WeightSender(
            self._transfer,
            self._model.bare,
            clients,
            dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
            folder=folder_of(self._options),
        )

    def _check_group(self) -> None:
        """See that all servers answer, and that none has lost what was sent to it by nccl or ipc."""
        for server in self._servers:
            self._check_model(server)
            known = server.ask("/weight_info", "weight_version")
            if self._wanted and known != self._wanted:
                raise self._lost(server)

    def _lost(self, server: Server) -> EngineError:
        return EngineError(
            f"server {server.url} has lost the policy's weights, which {self._transfer} cannot send to "
            "it again; continue the run with --resume"
        )

    def _renew_all(self) -> set[str]:
        """Have all servers that answer use the wanted weights; returns their addresses.

        Raises:
            Unavailable: none answers.
        """
        with ThreadPoolExecutor(len(self._servers)) as threads:
            failures = [f for f in threads.map(self._try_renew, self._servers) if f]
        if len(failures) == len(self._servers):
            raise failures[0]
        return {server.url for server in self._servers if server.version == self._wanted}

    def _try_renew(self, server: Server) -> Unavailable | None:
        try:
            self._renew(server)
        except Unavailable as failure:
            self._note_failure(server, failure)
            return failure
        return None

    def _renew(self, server: Server) -> None:
        """Have a server use the wanted weights, and nothing cached of others."""
        began = time.monotonic()
        with server.renewal:
            if server.version == self._wanted:
                return
            if server.failed_at > began:
                raise Unavailable(f"{server.url} has just failed")
            if server.version is None:
                self._check_model(server)
            has_them = server.ask("/weight_info", "weight_version") == self._wanted
            if not (has_them and server.clean == self._wanted):
                if not has_them:
                    self._give_weights(server)
                if not server.ask("/reset_prefix_cache", "success", method="POST"):
                    raise Unavailable(f"{server.url} cannot reset its prefix cache: it is in use")
                if not has_them:
                    # Last, for from now on other processes take it for one that has the weights, and
                    # nothing cached of others.
                    server.post("/update_weight_version", {"new_version": self._wanted})
            server.version = server.clean = self._wanted
            server.is_reported = False

    def _give_weights(self, server: Server) -> None:
        if self._has_adapters:
            # Under a new number, for one that is loaded in place is read again with every token.
            with contextlib.suppress(EngineError):
                server.post("/v1/unload_lora_adapter", {"lora_name": LORA_NAME})
            loaded = {"lora_name": LORA_NAME, "lora_path": self._adapter}
            try:
                server.post("/v1/load_lora_adapter", loaded)
            except EngineError as error:
                if self._peers.size == 1:
                    raise
                # Another process may have loaded them in between.
                raise Unavailable(str(error)) from error
        elif self._transfer == "file":
            self._update.replay(ServerClient(server))
        else:
            raise self._lost(server)

    def _check_model(self, server: Server) -> None:
        models = server.ask("/v1/models", "data")
        # Other servers of OpenAI's protocol do not tell.
        found = models[0].get("max_model_len") if models else None
        if found is not None and found < self._longest:
            raise EngineError(
                f"server {server.url} takes sequences of {found} tokens; generation.max_prompt_tokens "
                f"and max_new_tokens ask for {self._longest}"
            )

    def _persist(
        self, attempt: Callable[[], Answer], abandoned: threading.Event | None = None
    ) -> Answer:
        """Try until it works, with growing pauses, for at most retry_s after the first failure.

        By hand, for tenacity counts from the beginning of the first attempt, which may have taken
        longer than retry_s before it failed.

        Raises:
            EngineError: it did not work, or was abandoned.
        """
        abandoned = abandoned or threading.Event()
        deadline, pause_s = None, _FIRST_PAUSE_S
        while not abandoned.is_set():
            try:
                return attempt()
            except Unavailable as error:
                now = time.monotonic()
                deadline = deadline or now + self._options.retry_s
                if now >= deadline:
                    raise EngineError(
                        f"no vLLM server could be used for retry_s = {self._options.retry_s:g}: "
                        f"{error}"
                    ) from None
                abandoned.wait(min(pause_s, deadline - now))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise EngineError("the requests were abandoned")
