"""One vLLM server: its HTTP routes, and what is known of it.

Whatever goes wrong is one of two things: the server may recover and is worth another attempt
(`Unavailable`), or it refuses what it was asked, and will again (`EngineError`).
"""

from __future__ import annotations

import math
import pickle
import threading
from base64 import b64encode
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import httpx

from pgrpo.config.checks import api_key
from pgrpo.errors import EngineError
from pgrpo.rollout.engines.vllm.backend import Completion, Request
from pgrpo.rollout.engines.vllm.launch import LORA_NAME

if TYPE_CHECKING:
    from pgrpo.rollout.engines.vllm.settings import VllmConfig

_GENERATE = "/inference/v1/generate"


class Unavailable(Exception):  # noqa: N818 - no error in the end, if the server recovers
    """A server did not answer, or not sensibly; it may do so later."""


class Server:
    """One server: its address, and what we know of it.

    Attributes:
        url: its address.
        version: version of the weights that it is known to use; None when it may have lost them.
        clean: version of the weights that all of its prefix cache was computed with, or later ones.
        in_flight: number of requests under way.
        failed_at: when it last did not answer, on the clock of `time.monotonic`.
        is_reported: whether the user has been told that it does not answer.
        renewal: held while it is given weights.
    """

    control_s = 10.0
    """Seconds it may take for a connection, and for calls that ask no work of it. One that hangs is
    found by this."""

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
            timeout=httpx.Timeout(options.timeout_s, connect=self.control_s),
            limits=httpx.Limits(max_connections=None),
        )

    def generate(self, request: Request, model: str | None) -> list[Completion]:
        """A request's samples, drawn with the named adapters if there are any; errors as of `post`."""
        body: dict[str, Any] = {
            "token_ids": request.token_ids,
            "sampling_params": request.sampling,
        }
        if model is not None:
            body["model"] = model
        choices = self.ask(_GENERATE, "choices", body, method="POST")
        try:
            return [_completion(choice) for choice in choices]
        except (KeyError, TypeError, AttributeError):
            raise Unavailable(f"{self.url} answered no completions") from None

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, is_control: bool = False
    ) -> Any:
        """Send JSON; returns what is answered, None where that is no JSON.

        Args:
            path: of the route.
            body: what is sent.
            is_control: it asks no work of the server, which has to answer within `control_s`.

        Raises:
            Unavailable: no answer, or an error that is the server's own.
            EngineError: the server refuses the request.
        """
        return self._call("POST", path, body, is_control)

    def ask(
        self, path: str, name: str, body: Mapping[str, Any] | None = None, *, method: str = "GET"
    ) -> Any:
        """One field of an answer, which has to be there; errors as of `post`.

        Without a body it asks no work of the server.
        """
        answer = self._call(method, path, body, body is None)
        if not isinstance(answer, Mapping) or name not in answer:
            raise Unavailable(f"{self.url}{path} answered nothing about {name}")
        return cast(Mapping[str, Any], answer)[name]

    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None, is_control: bool
    ) -> Any:
        timeout: Any = self.control_s if is_control else httpx.USE_CLIENT_DEFAULT
        try:
            response = self._client.request(method, path, json=body, timeout=timeout)
        except httpx.TimeoutException:
            raise Unavailable(f"{self.url}{path} timed out") from None
        except httpx.TransportError as error:
            raise Unavailable(f"{self.url}{path}: {error or type(error).__name__}") from None
        said = " ".join(response.text.split())[:300]
        # A server that restarted no longer knows the adapters.
        forgot = response.status_code == 404 and path == _GENERATE and LORA_NAME in said
        if response.status_code >= 500 or response.status_code in (408, 429) or forgot:
            raise Unavailable(f"{self.url}{path} answered {response.status_code}: {said}")
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


class ServerClient:
    """`SyncClient` over one server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._server.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._server.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        handles = update_info.get("ipc_handles")
        if handles is not None:
            # Not run here: needs CUDA. The handles are no JSON values.
            update_info = {name: v for name, v in update_info.items() if name != "ipc_handles"}
            update_info["ipc_handles_pickled"] = b64encode(pickle.dumps(handles)).decode()
        self._server.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = {} if weight_version is None else {"weight_version": weight_version}
        self._server.post("/finish_weight_update", body)

    def world_size(self) -> int:
        return int(self._server.ask("/get_world_size", "world_size"))


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
