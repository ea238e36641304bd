"""What the engine asks of a vLLM, be it in this process (`local`) or elsewhere (`servers`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence of tokens, and how samples that continue it shall be drawn."""

    token_ids: tuple[int, ...]
    """The prompt, and what of the completion is already fixed."""
    sampling: dict[str, Any]
    """Arguments of vLLM's SamplingParams, as JSON values."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample that continues a request's tokens."""

    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    """For each token, log-probabilities in nats by token id: the sampled one's, and those of further
    tokens if the request asked for them."""
    finish_reason: str | None
    """Why it ended: "stop" at an end token, "length" at the limit; anything else is a failure."""
    version: str | None
    """Version of the weights that made it. If they were replaced meanwhile, all versions with a `+`
    between them; None if vLLM does not tell or the backend has checked it."""


class Backend(Protocol):
    """A vLLM that takes requests and returns their samples in the order in which they finish.

    Attributes:
        capacity: how many groups of rollouts the engine may have under way in it.
    """

    capacity: int

    def submit(self, key: int, request: Request) -> None:
        """Queue a request under a key that no other request under way has."""
        ...

    def next(self) -> tuple[int, list[Completion]]:
        """Wait until a request is finished; returns its key and its samples.

        Raises:
            EngineError: vLLM failed, or was interrupted.
        """
        ...

    def abandon(self) -> None:
        """Forget all requests."""
        ...

    def interrupt(self) -> None:
        """Make a `next` that another thread is in, or comes to, raise an EngineError."""
        ...

    def send_weights(self, version: int) -> int:
        """Have vLLM compute with the model's weights as they are now, and forget what it cached.

        Args:
            version: number of updates that made these weights.

        Returns:
            The bytes that were moved.
        """
        ...

    def sleep(self) -> None:
        """See `Engine.sleep`."""
        ...

    def close(self) -> None:
        """See `Engine.close`."""
        ...
