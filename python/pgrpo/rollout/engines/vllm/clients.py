"""Whom weights are sent to over vLLM's weight-transfer API: one vLLM, several, or late comers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol


class SyncClient(Protocol):
    """vLLM's side of a transfer, as its `LLM` and each of its servers offer it. Any failure raises."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Prepare the workers; for nccl, this returns once they have met the trainer."""
        ...

    def start_weight_update(self) -> None:
        """Begin an update; refused while another is not finished."""
        ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Hand over weights; this returns once all workers compute with them."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update; outputs carry this version from now on."""
        ...

    def world_size(self) -> int:
        """Number of workers behind this client."""
        ...


def start_update(client: SyncClient) -> None:
    """Begin an update, also with a vLLM that was left in the midst of another.

    It is left so by a trainer that failed or was killed there, and refuses a second start until the
    first is finished.
    """
    try:
        client.start_weight_update()
    except Exception as refusal:
        try:
            client.finish_weight_update()
        except Exception:
            # It was in no update, so the refusal has another reason.
            raise refusal from None
        client.start_weight_update()


class AllClients:
    """All clients as one.

    Attributes:
        version: what the next update is finished with, for the trainer's ends do not tell it.
    """

    def __init__(self, clients: Sequence[SyncClient]) -> None:
        self._clients = clients
        self.version: str | None = None

    def _each(self, call: Callable[[SyncClient, int], Any]) -> list[Any]:
        if len(self._clients) == 1:
            # In its own process vLLM is called by the thread that made it.
            return [call(self._clients[0], 0)]
        with ThreadPoolExecutor(len(self._clients)) as threads:
            return list(threads.map(call, self._clients, range(len(self._clients))))

    def world_size(self) -> int:
        return sum(self._each(lambda client, _: client.world_size()))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [init_info] * len(self._clients)
        if "rank_offset" in init_info:
            # nccl: the workers of all servers form one group, one server's after another's.
            offset = init_info["rank_offset"]
            infos = []
            for client in self._clients:
                infos.append({**init_info, "rank_offset": offset})
                offset += client.world_size()
        self._each(lambda client, i: client.init_weight_transfer_engine(infos[i]))

    def start_weight_update(self) -> None:
        self._each(lambda client, _: start_update(client))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._each(lambda client, _: client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = self.version if weight_version is None else weight_version
        self._each(lambda client, _: client.finish_weight_update(version))


class RecordedUpdate:
    """A client that keeps an update, to be given to each server when it is there to take it."""

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

    def replay(self, client: SyncClient) -> None:
        """Give the update to another client, whose outputs carry the version that they had."""
        client.init_weight_transfer_engine(self._init)
        start_update(client)
        for update in self._updates:
            client.update_weights(update)
        client.finish_weight_update()
