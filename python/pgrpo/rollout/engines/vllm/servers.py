"""vLLM in processes of its own, spoken to over HTTP.

A server that does not answer, or that has come back without the policy's weights, is tried again for
`generation.vllm.retry_s`, while the others go on; it gets the weights of the last sync before it is
asked for more. Each sample says which weights made it, so none of a server that restarted unnoticed
is used.
"""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import queue
import shutil
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

import httpx
import torch

from pgrpo.config.checks import api_key
from pgrpo.errors import EngineError
from pgrpo.rollout.engines.vllm.engine import Completion, Request
from pgrpo.rollout.engines.vllm.launch import (
    LORA_NAME,
    engine_precision,
    folder_of,
    longest_sequence,
    save_adapter,
)

if TYPE_CHECKING:
    from pgrpo.config.sections import ModelConfig
    from pgrpo.model.language_model import LanguageModel
    from pgrpo.rollout.engines.vllm.settings import VllmConfig
    from pgrpo.rollout.settings import GenerationConfig

_log = logging.getLogger("pgrpo")

Answer = TypeVar("Answer")

_REQUESTS_PER_SERVER = 64
"""Groups of 8 fill a batch of 512."""
_GENERATE = "/inference/v1/generate"
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_CONTROL_S = 10.0
"""How long a server may take for what is no work; one that hangs is found by it."""


class _Unavailable(Exception):  # noqa: N818 - no error in the end, if the server recovers
    """A server did not answer, or not sensibly; it may do so later."""


class Server:
    """One server: its address, and what we know of it.

    Attributes:
        url: its address.
        version: of the weights it is known to use; None when it may have lost them.
        clean: version since which nothing older is in its prefix cache.
        in_flight: requests under way.
        failed_at: when it last did not answer.
        is_reported: whether that was told.
        renewal: held while it is given weights.
    """

    def __init__(self, url: str, options: VllmConfig) -> None:
        self.url = url.rstrip("/")
        self.version: str | None = None
        self.clean: str | None = None
        self.in_flight = 0
        self.failed_at = -math.inf
        self.is_reported = False
        self.renewal = threading.Lock()
        key = api_key(options.api_key_env)
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(options.timeout_s, connect=_CONTROL_S),
            limits=httpx.Limits(max_connections=None),
        )

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, is_control: bool = False
    ) -> Any:
        """Send JSON; returns what is answered, None where that is no JSON.

        Raises:
            _Unavailable: no answer, or the server's own fault.
            EngineError: the server refuses it.
        """
        return self._call("POST", path, body, is_control)

    def ask(
        self, path: str, name: str, body: Mapping[str, Any] | None = None, *, method: str = "GET"
    ) -> Any:
        """One field of an answer, which has to be there; errors as of `post`."""
        answer = self._call(method, path, body, body is None)
        if not isinstance(answer, Mapping) or name not in answer:
            raise _Unavailable(f"{self.url}{path} answered nothing about {name}")
        return cast(Mapping[str, Any], answer)[name]

    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None, is_control: bool
    ) -> Any:
        timeout: Any = _CONTROL_S if is_control else httpx.USE_CLIENT_DEFAULT
        try:
            response = self._client.request(method, path, json=body, timeout=timeout)
        except httpx.TimeoutException:
            raise _Unavailable(f"{self.url}{path} timed out") from None
        except httpx.TransportError as error:
            raise _Unavailable(f"{self.url}{path}: {error or type(error).__name__}") from None
        said = " ".join(response.text.split())[:300]
        # A server that restarted no longer knows the adapters.
        forgot = response.status_code == 404 and path == _GENERATE and LORA_NAME in said
        if response.status_code >= 500 or response.status_code in (408, 429) or forgot:
            raise _Unavailable(f"{self.url}{path} answered {response.status_code}: {said}")
        if response.is_error:
            raise EngineError(
                f"server {self.url} refuses {path} with status {response.status_code} (pgrpo serve "
                f"starts one that fits): {said}"
            )
        try:
            return response.json()
        except ValueError:
            return None

    def close(self) -> None:
        """End the connections."""
        self._client.close()


class Servers:
    """The backend protocol over `vllm serve` processes.

    Args:
        config: the section `[generation]`.
        model: the policy's model.
        source: the section `[model]`, where it came from.
    """

    def __init__(self, config: GenerationConfig, model: LanguageModel, source: ModelConfig) -> None:
        self._options = config.vllm
        self._longest = longest_sequence(config, model.num_positions)
        self._servers = [Server(url, self._options) for url in self._options.servers]
        self.capacity = _REQUESTS_PER_SERVER * len(self._servers)
        self._model = model
        self._has_adapters = source.lora is not None
        # No other run's weights pass for ours.
        self._run = uuid4().hex[:8]
        self._wanted = ""
        self._transfer: Any = self._options.transfer
        if self._transfer == "auto":
            self._transfer = "nccl" if model.device.type == "cuda" else "file"
        self._update = _Recorder()
        self._sender: Any = None
        self._adapters = tempfile.TemporaryDirectory(
            prefix="pgrpo-adapters-", dir=folder_of(self._options)
        )
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._results: queue.Queue[tuple[int, int, list[Completion] | BaseException]]
        self._results = queue.Queue()
        self._epoch = 0

    def submit(self, key: int, request: Request) -> None:
        """See `Backend.submit`."""
        # Daemons, so that a server that hangs does not keep the process from ending.
        thread = threading.Thread(
            target=self._answer, args=(self._epoch, key, request), daemon=True
        )
        self._threads = [t for t in self._threads if t.is_alive()]
        self._threads.append(thread)
        thread.start()

    def next(self) -> tuple[int, list[Completion]]:
        """See `Backend.next`."""
        mine = self._epoch
        while True:
            epoch, key, result = self._results.get()
            if self._epoch != mine:
                raise EngineError("the requests were abandoned")
            if epoch != mine:
                continue
            if isinstance(result, BaseException):
                raise result
            return key, result

    def abandon(self) -> None:
        """See `Backend.abandon`; returns when no server that answers works on them any more."""
        self._epoch += 1
        # Whoever waits is woken.
        self._results.put((-1, 0, []))
        if not any(thread.is_alive() for thread in self._threads):
            return
        for server in self._servers:
            if server.version is not None:
                with contextlib.suppress(_Unavailable, EngineError):
                    server.post("/abort_requests", {}, is_control=True)
        deadline = time.monotonic() + _CONTROL_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def interrupt(self) -> None:
        """See `Backend.interrupt`."""
        self.abandon()

    def send_weights(self, version: int) -> int:
        """See `Backend.send_weights`. A server that cannot be reached gets them later, unless there is
        no other."""
        previous, self._wanted = self._wanted, f"{self._run}-{version}"
        try:
            if self._has_adapters:
                num_bytes = save_adapter(self._model, Path(self._adapters.name) / self._wanted)
            elif self._transfer == "file":
                num_bytes = self._make_sender().send(self._wanted)
            else:
                # A send would wait for ever for a server that is not there, or has left the group.
                self._persist(lambda: self._check_group(previous), lambda: True)
                num_bytes = self._make_sender().send(self._wanted)
        except OSError as error:
            raise EngineError(f"weights cannot be written for the servers: {error}") from error
        self._persist(self._renew_all, lambda: True)
        for old in Path(self._adapters.name).iterdir():
            if old.name != self._wanted:
                shutil.rmtree(old, ignore_errors=True)
        return num_bytes

    def sleep(self) -> None:
        """See `Backend.sleep`. The memory is other machines', or other processes' to manage."""

    def close(self) -> None:
        """See `Backend.close`."""
        self.abandon()
        if self._sender is not None:
            self._sender.close()
        self._adapters.cleanup()
        for server in self._servers:
            server.close()

    def _answer(self, epoch: int, key: int, request: Request) -> None:
        """Have one request answered, by whichever server can."""
        try:
            result = self._persist(lambda: self._ask(request), lambda: epoch == self._epoch)
        except BaseException as error:  # it has to reach the waiting side
            self._results.put((epoch, key, error))
        else:
            self._results.put((epoch, key, result))

    def _ask(self, request: Request) -> list[Completion]:
        """One attempt."""
        with self._lock:
            server = min(
                self._servers,
                key=lambda s: (0, s.in_flight) if s.version == self._wanted else (1, s.failed_at),
            )
            server.in_flight += 1
        try:
            self._renew(server)
            body: dict[str, Any] = {
                "token_ids": request.token_ids,
                "sampling_params": {**request.sampling, "detokenize": False},
            }
            if self._has_adapters:
                body["model"] = LORA_NAME
            choices = server.ask(_GENERATE, "choices", body, method="POST")
            try:
                completions = [_completion(choice) for choice in choices]
            except (KeyError, TypeError, AttributeError):
                raise _Unavailable(f"{server.url} answered no completions") from None
            if any(completion.version != self._wanted for completion in completions):
                raise _Unavailable(f"{server.url} has lost the policy's weights")
        except _Unavailable as failure:
            self._note_failure(server, failure)
            raise
        finally:
            with self._lock:
                server.in_flight -= 1
        return [replace(completion, version=None) for completion in completions]

    def _note_failure(self, server: Server, failure: _Unavailable) -> None:
        """Even if it is the network's fault: only a server that says so has our weights."""
        with self._lock:
            server.version, server.failed_at = None, time.monotonic()
            news, server.is_reported = not server.is_reported, True
        if news:
            others = sum(s.version == self._wanted for s in self._servers)
            _log.warning(
                "%s; %s", failure, "going on with the other servers" if others else "trying again"
            )

    def _make_sender(self) -> Any:
        if self._sender is None:
            try:
                from pgrpo.rollout.engines.vllm.weights import WeightSender
            except ImportError as error:
                raise EngineError(
                    f"full weights are sent by vLLM's own means, which cannot be imported ({error}); "
                    "install them with pip install 'pgrpo[vllm]'"
                ) from error
            precision = engine_precision(self._options, self._model.precision)
            clients = [self._update] if self._transfer == "file" else [*map(_Client, self._servers)]
            self._sender = WeightSender(
                self._transfer,
                self._model.bare,
                clients,
                dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
                folder=folder_of(self._options),
            )
        return self._sender

    def _check_group(self, previous: str) -> None:
        """See that all servers answer, and that none has lost what was sent to it by nccl or ipc."""
        for server in self._servers:
            self._check_model(server)
            known = server.ask("/weight_info", "weight_version")
            if previous and known != previous:
                raise self._lost(server)

    def _lost(self, server: Server) -> EngineError:
        return EngineError(
            f"server {server.url} has lost the policy's weights, which {self._transfer} cannot send to "
            "it again; continue the run with --resume"
        )

    def _renew_all(self) -> None:
        """Have all servers that answer use the wanted weights; one at least."""
        with ThreadPoolExecutor(len(self._servers)) as threads:
            failures = [f for f in threads.map(self._try_renew, self._servers) if f]
        if len(failures) == len(self._servers):
            raise failures[0]

    def _try_renew(self, server: Server) -> _Unavailable | None:
        try:
            self._renew(server)
        except _Unavailable as failure:
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
                raise _Unavailable(f"{server.url} has just failed")
            if server.version is None:
                self._check_model(server)
            has_them = server.ask("/weight_info", "weight_version") == self._wanted
            if not (has_them and server.clean == self._wanted):
                if not has_them:
                    self._give_weights(server)
                if not server.ask("/reset_prefix_cache", "success", method="POST"):
                    raise _Unavailable(f"{server.url} cannot reset its prefix cache: it is in use")
            server.version = server.clean = self._wanted
            server.is_reported = False

    def _give_weights(self, server: Server) -> None:
        if self._has_adapters:
            # Under a new number, for one that is loaded in place is read again with every token.
            with contextlib.suppress(EngineError):
                server.post("/v1/unload_lora_adapter", {"lora_name": LORA_NAME})
            folder = str(Path(self._adapters.name) / self._wanted)
            server.post("/v1/load_lora_adapter", {"lora_name": LORA_NAME, "lora_path": folder})
            server.post("/update_weight_version", {"new_version": self._wanted})
        elif self._transfer == "file":
            self._update.replay(_Client(server), self._wanted)
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

    def _persist(self, attempt: Callable[[], Answer], wanted: Callable[[], bool]) -> Answer:
        """Try until it works, for at most retry_s after the first failure.

        Raises:
            EngineError: it did not.
        """
        deadline, pause_s = None, _FIRST_PAUSE_S
        while True:
            try:
                return attempt()
            except _Unavailable as error:
                now = time.monotonic()
                deadline = deadline or now + self._options.retry_s
                if now >= deadline or not wanted():
                    raise EngineError(
                        f"no vLLM server could be used for retry_s = {self._options.retry_s:g}: "
                        f"{error}"
                    ) from None
                time.sleep(min(pause_s, deadline - now))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                if not wanted():
                    raise EngineError("the requests were abandoned") from None


def _completion(choice: Mapping[str, Any]) -> Completion:
    content = (choice["logprobs"] or {}).get("content") or []
    versions = {span["version"] for span in choice["weight_versions"] or ()}
    return Completion(
        token_ids=tuple(choice["token_ids"] or ()),
        logprobs=tuple(
            {
                position["token_id"]: position["logprob"],
                **{option["token_id"]: option["logprob"] for option in position["top_logprobs"]},
            }
            for position in content
        ),
        finish_reason=choice["finish_reason"],
        version="+".join(sorted(versions)) or None,
    )


class _Client:
    """`weights.SyncClient` over one server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._server.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._server.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        handles = update_info.get("ipc_handles")
        if handles is not None:
            # Not run here: needs CUDA. They are no JSON.
            update_info = {name: v for name, v in update_info.items() if name != "ipc_handles"}
            update_info["ipc_handles_pickled"] = b64encode(pickle.dumps(handles)).decode()
        self._server.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = {} if weight_version is None else {"weight_version": weight_version}
        self._server.post("/finish_weight_update", body)

    def world_size(self) -> int:
        return int(self._server.ask("/get_world_size", "world_size"))


class _Recorder:
    """`weights.SyncClient` that keeps an update, for every server and for those that come back."""

    def __init__(self) -> None:
        self._init: dict[str, Any] = {}
        self._updates: list[dict[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._init = init_info

    def start_weight_update(self) -> None:
        self._updates = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._updates.append(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass

    def world_size(self) -> int:
        return 1

    def replay(self, client: _Client, version: str) -> None:
        """Give the update to a server."""
        client.init_weight_transfer_engine(self._init)
        try:
            client.start_weight_update()
        except _Unavailable:
            # A trainer that was killed may have left it in the midst of an update.
            client.finish_weight_update()
            client.start_weight_update()
        for update in self._updates:
            client.update_weights(update)
        client.finish_weight_update(version)
